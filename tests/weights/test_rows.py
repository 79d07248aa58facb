"""Tables that compose, parts of tensors, numbered lists of lists: read once and written whole."""

import collections
import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprep_jax.nn.param import Param, param
from llmprep_jax.nn.stack import stack, unstack
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.weights import table
from llmprep_jax.weights.rows import Row, Table, Whole
from tests.random_modules import random_module
from tests.weights import samples
from tests.weights.samples import BF16, TABLE, Memory
from tests.weights.test_table import assert_same, leaves

DEPTH, D, N, H = 2, 8, 4, 2
PARTS = {"q": (0, 3), "k": (1, 3), "v": (2, 3)}


class Attention(nnx.Module):
    """Three matrices that are stored as one, and of biases that of k in two."""

    def __init__(self, *, rngs: nnx.Rngs):
        for name in PARTS:
            setattr(self, name, param(rngs, (D, N, H), ("embed", "heads", None), normal))
            setattr(self, f"{name}_bias", param(rngs, (N, H), ("heads", None), normal))


normal = nnx.initializers.normal(1.0)


class Tower(nnx.Module):
    """Stacked layers and a table of positions."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = stack(Attention, DEPTH, rngs=rngs)
        self.positions = Param(jnp.zeros((5, D)))


TOWER = Table(
    {
        **{
            f"blocks.{name}": ("blocks.{l}.attn.qkv.weight", "(n h) d -> d n h", part)
            for name, part in PARTS.items()
        },
        **{
            f"blocks.{name}_bias": ("blocks.{l}.attn.qkv.bias", "(n h) -> n h", part)
            for name, part in PARTS.items()
        },
        "positions": ("pos_embed", "1 p d -> p d"),
    }
)


class Composed(nnx.Module):
    """A tower, a projector and a language model."""

    def __init__(self, *, tied: bool = False, rngs: nnx.Rngs):
        self.vision, self.projector = Tower(rngs=rngs), Param(jnp.zeros((D, D)))
        self.language = samples.Model(tied=tied, rngs=rngs)


PROJECTOR = Table({"projector": ("projector.weight", "o i -> i o")})
COMPOSED = (
    TOWER.below("vision", "vision_tower.")
    | PROJECTOR
    | TABLE.below("language", "language_model.", also={"lm_head.": "lm_head."})
)


def make(kind: type = Composed) -> nnx.Module:
    return random_module(lambda: kind(rngs=nnx.Rngs(0)))


def shapes(kind: type = Composed, **more) -> nnx.Module:
    return jax.eval_shape(lambda: kind(**more, rngs=nnx.Rngs(0)))


def exported(model: nnx.Module, rows: Table = COMPOSED) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in table.export(model, rows)}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return exported(make())


# ---- composition


def test_names_of_a_composed_model_are_its_parts_below_their_prefixes(tensors):
    assert sorted(name for name in tensors if ".1." not in name and ".2." not in name) == [
        "language_model.embed.weight",
        "language_model.layers.0.norm.weight",
        "language_model.layers.0.o.weight",
        "language_model.layers.0.q.weight",
        "language_model.layers.0.up.weight",
        "language_model.positions",
        "language_model.temperature",
        "lm_head.weight",
        "projector.weight",
        "vision_tower.blocks.0.attn.qkv.bias",
        "vision_tower.blocks.0.attn.qkv.weight",
        "vision_tower.pos_embed",
    ]


def test_a_composed_model_survives_export_and_load(tensors):
    assert_same(table.load(shapes(), Memory(tensors), COMPOSED), make())


def test_beginnings_of_names_are_replaced_longest_first():
    rows = Table(
        {
            "embed.w": ("model.embed.weight", "v d -> v d"),
            "norm.scale": ("model.norm.weight", "d -> d"),
            "head.w": ("lm_head.weight", "v d -> d v"),
            "scale": ("scale", "->"),
        },
        copies={"model.copy": "lm_head.weight"},
    )
    also = {"model.": "model.language_model.", "model.norm.": "norm.", "lm_head.": "lm_head."}
    below = rows.below("language", "x.", also=also)
    assert {path: row.name for path, row in below.items()} == {
        "language.embed.w": "model.language_model.embed.weight",
        "language.norm.scale": "norm.weight",
        "language.head.w": "lm_head.weight",
        "language.scale": "x.scale",
    }
    assert below.copies == {"model.language_model.copy": "lm_head.weight"}
    assert (below.embed, below.head) == ("language.embed.w", "language.head.w")


def test_the_embedding_and_head_of_a_whole_are_those_of_its_language_model(tensors):
    assert (COMPOSED.embed, COMPOSED.head) == ("language.embed.w", "language.head.w")
    assert (TOWER.embed, TOWER.head) == (None, None)
    embedding = tensors["language_model.embed.weight"]
    checkpoint = Memory(tensors | {"lm_head.weight": embedding.copy()})
    tied = table.load(shapes(tied=True), checkpoint, COMPOSED)
    assert tied.language.head is None
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        table.load(shapes(tied=True), Memory(tensors), COMPOSED)


def test_spellings_of_a_part_are_not_those_of_the_whole():
    part = dataclasses.replace(
        TABLE,
        renames=(("^a", "b"),),
        ignored=("c",),
        modules=(("d", "e"),),
        within=(Whole("f", "g."),),
        finds_prefix=True,
    )
    below = part.below("language")
    assert (below.renames, below.ignored, below.modules, below.within) == ((), (), (), ())
    assert not below.finds_prefix
    both = part | PROJECTOR
    assert (both.renames, both.ignored, both.modules) == ((("^a", "b"),), ("c",), (("d", "e"),))
    assert both.finds_prefix
    assert both.within == (Whole("f", "g."),)


def test_tables_that_overlap_are_refused():
    with pytest.raises(ValueError, match="both tables have projector;"):
        PROJECTOR | Table({"projector": ("other.weight", "o i -> i o")})
    with pytest.raises(ValueError, match="projector and more are both projector.weight"):
        PROJECTOR | Table({"more": ("projector.weight", "o i -> i o")})
    with pytest.raises(ValueError, match="both tables have embed;"):
        TABLE | Table({"text.w": ("text.weight", "v d -> v d")}, embed="text.w")


def test_numbers_that_two_rows_list_both_are_refused(tensors):
    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = Param(jnp.zeros((3, 2))), Param(jnp.zeros((2, 2)))

    rows = Table({"a": ("w.{l}", "d -> d"), "b": ("w.{l:2,3}", "d -> d")})
    with pytest.raises(ValueError, match=r"w\.2 has 1 parts in the weight table, and is for a, b"):
        table.load(jax.eval_shape(Two), Memory({}), rows)


def test_a_part_of_a_model_loads_alone_and_knows_what_the_others_hold(tensors):
    checkpoint = Memory(tensors)
    loaded = table.load(shapes().language, checkpoint, COMPOSED.only("language"))
    assert_same(loaded, make().language)
    assert checkpoint.reads["vision_tower.pos_embed"] == 0
    tower = table.load(shapes().vision, Memory(tensors), COMPOSED.only("vision"))
    assert_same(tower, make().vision)
    strange = tensors | {"vision_tower.blocks.x.attn.qkv.weight": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match=r"1 unexpected: vision_tower\.blocks\.x\.attn"):
        table.load(shapes().language, Memory(strange), COMPOSED.only("language"))
    with pytest.raises(ValueError, match="no part 'audio'; it has vision, projector, language"):
        COMPOSED.only("audio")


def test_names_in_memory_are_those_of_files_but_for_their_beginnings():
    module = Row("experts.gate_up_proj", "e f d -> e d f", (0, 2))
    rows = Table(
        {
            "gate.w": Row("experts.{e}.gate.weight", "f d -> d f", module=module),
            "up.w": Row("experts.{e}.up.weight", "f d -> d f", module=module._replace(part=(1, 2))),
            "norm.scale": ("norm.weight", "d -> d"),
        }
    )
    rows = dataclasses.replace(
        rows.below("language", "language_model."),
        modules=(("language_model.experts.", "model.experts."), ("language_model.", "m.")),
    )
    gate = "language.gate.w"
    assert rows[gate].name == "language_model.experts.{e}.gate.weight"
    assert rows.in_memory()[gate].name == "model.experts.{e}.gate.weight"
    assert rows.modules_in_memory()[gate] == ("model.experts.gate_up_proj", *module[1:])
    assert rows.modules_in_memory()["language.norm.scale"].name == "m.norm.weight"


# ---- parts of one tensor


def test_parts_are_thirds_of_a_tensors_rows_in_order(tensors):
    blocks = make().vision.blocks
    for layer in range(DEPTH):
        rows = [np.asarray(getattr(blocks, name))[layer] for name in PARTS]
        theirs = np.concatenate([np.moveaxis(w, 0, -1).reshape(N * H, D) for w in rows])
        np.testing.assert_array_equal(
            tensors[f"vision_tower.blocks.{layer}.attn.qkv.weight"], theirs
        )
    bias = tensors["vision_tower.blocks.1.attn.qkv.bias"]
    np.testing.assert_array_equal(bias[8:16], np.asarray(blocks.k_bias)[1].reshape(-1))


def test_swapped_parts_are_another_model(tensors):
    swapped = {
        path: row._replace(part=(2 - row.part[0], 3)) if row.part[1] == 3 else row
        for path, row in TOWER.items()
    }
    one = {name.removeprefix("vision_tower."): x for name, x in tensors.items() if "vision" in name}
    loaded = table.load(shapes(Tower), Memory(one), Table(swapped))
    np.testing.assert_array_equal(loaded.blocks.q, make().vision.blocks.v)


def test_parts_of_layers_in_a_list_are_as_those_of_a_stack(tensors):
    def listed():
        model = make()
        model.vision.blocks = unstack(model.vision.blocks)
        return model

    loaded = table.load(jax.eval_shape(listed), Memory(tensors), COMPOSED)
    assert_same(loaded, listed())
    chex.assert_trees_all_equal(exported(loaded), tensors)


def test_a_table_must_have_every_part_of_a_tensor_once():
    rows = dict(TOWER)
    del rows["blocks.v"]
    with pytest.raises(ValueError, match=r"has not each part of blocks\.\{l\}\.attn\.qkv\.weight"):
        Table(rows)
    with pytest.raises(ValueError, match=r"0 of 2 \(a\), 0 of 3 \(b\)"):
        Table({"a": ("w", "d -> d", (0, 2)), "b": ("w", "d -> d", (0, 3))})
    with pytest.raises(ValueError, match="a and b are both w"):
        Table({"a": ("w", "d -> d", (0, 2)), "b": ("w", "d -> d", (0, 2))})


def test_a_part_that_no_parameter_is_there_for_is_told(tensors):
    model = make()
    del model.vision.blocks.k
    with pytest.raises(ValueError, match=r"of its parts only vision\.blocks\.q, vision\.blocks\.v"):
        exported(model)
    without = jax.eval_shape(lambda: model)
    with pytest.raises(ValueError, match=r"qkv\.weight has 3 parts in the weight table, and is"):
        table.load(without, Memory(tensors), COMPOSED)


def test_a_tensor_of_parts_must_have_the_rows_of_all(tensors):
    name = "vision_tower.blocks.0.attn.qkv.weight"
    with pytest.raises(
        ValueError, match=r"1 of another shape: .* is \[23, 8\], expected \[24, 8\]"
    ):
        table.load(shapes(), Memory(tensors | {name: tensors[name][:-1]}), COMPOSED)


@pytest.mark.parametrize("axes", [None, {"fsdp": 4, "tensor": 2}], ids=["one", "4x2"])
@pytest.mark.parametrize("dtype", [np.dtype("float32"), BF16], ids=str)
def test_parts_survive_bit_by_bit_on_meshes(tensors, axes, dtype):
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    with use_mesh(axes and make_mesh(axes)):
        loaded = table.load(shapes(), Memory(tensors), COMPOSED)
        if axes:
            assert "tensor" in str(loaded.vision.blocks.k.sharding.spec)
        again = exported(loaded)
    assert {array.dtype for array in again.values()} == {dtype}
    chex.assert_trees_all_equal(again, tensors)


# ---- numbers


class Leaf(nnx.Module):
    """One vector, or a stack of them."""

    def __init__(self, *stacked: int):
        self.w = Param(jnp.arange(math.prod((*stacked, 2)), dtype=jnp.float32).reshape(*stacked, 2))


def lists(*sizes: int, of: tuple[int, ...] = ()) -> nnx.Module:
    """Lists of lists of leaves."""
    if not sizes:
        return Leaf(*of)
    return nnx.List([lists(*sizes[1:], of=of) for _ in range(sizes[0])])


NUMBERED = {
    "stack in stack, one listed": ((), (2, 3), "a.{l:2,5}.b.{e}.w", "a.5.b.2.w"),
    "three, two listed": ((), (2, 3, 2), "a.{l:2,5}.b.{e}.c.{j:0,2}.w", "a.5.b.2.c.2.w"),
    "lists of lists": ((2, 2), (), "down.{i}.block.{j}.w", "down.1.block.1.w"),
    "lists of lists, both listed": ((2, 2), (), "down.{i:1,3}.block.{j:0,4}.w", "down.3.block.4.w"),
    "a list of stacks": ((2,), (3,), "down.{i:0,3}.block.{j}.w", "down.3.block.2.w"),
}


@pytest.mark.parametrize(("sizes", "stacked", "name", "last"), NUMBERED.values(), ids=NUMBERED)
def test_numbers_of_lists_and_stacks_are_in_names_in_their_order(sizes, stacked, name, last):
    class Whole(nnx.Module):
        def __init__(self):
            self.part = lists(*sizes, of=stacked)

    rows = Table({"part.w": (name, "d -> d")})
    arrays, tree = jax.tree.flatten(Whole())
    model = jax.tree.unflatten(tree, [x + 100 * number for number, x in enumerate(arrays)])
    tensors = exported(model, rows)
    assert len(tensors) == math.prod((*sizes, *stacked))
    assert list(tensors)[-1] == last
    largest = max(tensors.values(), key=lambda array: array[0])
    assert tensors[last] is largest
    assert_same(table.load(jax.eval_shape(Whole), Memory(tensors), rows), model)


@st.composite
def models(draw) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple]]:
    """Shapes of parameters by path, and their rows, of tensors with one part or more."""
    sizes, rows = {}, {}
    for number in range(draw(st.integers(1, 4))):
        stacked = draw(st.lists(st.integers(1, 3), max_size=2))
        name, rest = f"t{number}", draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        for key, size in zip("le", stacked, strict=False):
            odd = ":" + ",".join(str(2 * i + 1) for i in range(size))
            name += f".{{{key}{odd if draw(st.booleans()) else ''}}}"
        count = draw(st.integers(1, 4))
        for part in range(count)[:: draw(st.sampled_from((1, -1)))]:
            sizes[f"p{number}{part}"] = (*stacked, *rest)
            rows[f"p{number}{part}"] = (name, "a b -> b a", (part, count))
    return sizes, rows


@given(models())
@settings(max_examples=60, deadline=None)
def test_every_part_of_every_tensor_is_read_once_and_written_once(model):
    sizes, rows = model[0], Table(model[1])

    class Flat(nnx.Module):
        def __init__(self):
            for path, shape in sizes.items():
                setattr(self, path, Param(jnp.zeros(shape)))

    abstract = jax.eval_shape(Flat)
    entries = table.entries(abstract, rows)
    reads = collections.Counter(
        (name, entry.row.part) for entry in entries.values() for name in entry.names().values()
    )
    assert set(reads.values()) == {1}
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=entry.their_shape()).astype(np.float32)
        for entry in entries.values()
        for name in entry.names().values()
    }
    checkpoint = Memory(tensors)
    loaded = table.load(abstract, checkpoint, rows)
    assert sum(checkpoint.reads.values()) == len(reads)
    written = list(table.export(loaded, rows))
    assert len(written) == len(tensors)
    chex.assert_trees_all_equal(dict(written), tensors)
    assert sum(x.size for x in leaves(loaded).values()) == sum(x.size for x in tensors.values())
