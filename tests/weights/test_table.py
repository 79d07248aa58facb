"""Tensors into parameters by table and back: exact, read once, one error for all that is wrong."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprep_jax.nn.param import Param
from llmprep_jax.nn.stack import unstack
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.weights import table
from llmprep_jax.weights.rows import Table
from tests.weights.samples import BF16, TABLE, D, F, H, L, Memory, N, V, abstract, random


def tensors_of(model: nnx.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in table.export(model, TABLE)}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return tensors_of(random())


def leaves(model: nnx.Module) -> dict[str, jax.Array]:
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def assert_same(one: nnx.Module, other: nnx.Module) -> None:
    chex.assert_trees_all_equal(leaves(one), leaves(other), strict=True)


def test_names_and_shapes_are_hugging_face_s(tensors):
    assert {name: array.shape for name, array in tensors.items() if "layers.1" not in name} == {
        "embed.weight": (V, D),
        "layers.0.q.weight": (N * H, D),
        "layers.0.o.weight": (D, N * H),
        "layers.0.up.weight": (F, D),
        "layers.0.norm.weight": (D,),
        "layers.2.q.weight": (N * H, D),
        "layers.2.o.weight": (D, N * H),
        "layers.2.up.weight": (F, D),
        "layers.2.norm.weight": (D,),
        "temperature": (),
        "positions": (1, 5),
        "lm_head.weight": (V, D),
    }


def test_layouts_are_what_the_patterns_say(tensors):
    model = random()
    q = np.asarray(model.layers.q)
    np.testing.assert_array_equal(
        tensors["layers.1.q.weight"], np.stack([q[1, :, n, h] for n in range(N) for h in range(H)])
    )
    np.testing.assert_array_equal(tensors["lm_head.weight"], np.asarray(model.head["w"]).T)
    assert tensors["temperature"] == np.asarray(model.temperature)


def test_a_model_survives_export_and_load(tensors):
    checkpoint = Memory(tensors)
    assert_same(table.load(abstract(), checkpoint, TABLE), random())
    assert set(checkpoint.reads.values()) == {1}


def test_layers_in_a_list_load_and_export_like_stacked_ones(tensors):
    def make():
        model = random()
        model.layers = unstack(model.layers)
        return model

    listed = table.load(jax.eval_shape(make), Memory(tensors), TABLE)
    assert_same(listed, make())
    chex.assert_trees_all_equal(tensors_of(listed), tensors)


def test_variables_of_an_adapted_model_are_not_mistaken_for_weights():
    model = random()
    model.layers.extra = Param(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"the weight table names no tensor for layers\.extra"):
        list(table.export(model, TABLE))


PATTERNS = [
    "v d -> v d",
    "f d -> d f",
    "(n h) d -> d n h",
    "d (n h) -> n h d",
    "(a b) (c d) -> d a c b",
    "1 t d -> t d",
    "o i h w -> h w i o",
    "(n h) -> n h",
    "d -> d",
    "->",
]
FLOATS = [np.dtype(name) for name in ("float32", "float16", ml_dtypes.bfloat16)]


class One(nnx.Module):
    """A single parameter."""

    def __init__(self, shape: tuple[int, ...]):
        self.w = Param(jnp.zeros(shape))


@given(
    st.sampled_from(PATTERNS),
    st.lists(st.integers(1, 3), max_size=2),
    st.sampled_from(FLOATS),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_pattern_is_undone_bit_by_bit(pattern, stacked, dtype, data):
    theirs, ours = (side.split() for side in pattern.split("->"))
    sizes = {letter: data.draw(st.integers(1, 4)) for letter in ours}
    name = ".".join(["w", *[f"{{{key}}}" for key in "le"[: len(stacked)]]])
    rows = Table({"w": (name, pattern)})
    module = jax.eval_shape(lambda: One((*stacked, *[sizes[letter] for letter in ours])))
    groups = " ".join(theirs).replace("(", "( ").replace(")", " )").split()
    shape, inside = [], None
    for token in groups:
        if token == "(":
            inside = 1
        elif token == ")":
            shape, inside = [*shape, inside], None
        elif inside is not None:
            inside *= sizes[token]
        else:
            shape.append(sizes.get(token, 1))
    seed = data.draw(st.integers(0, 2**32 - 1))
    bits = np.random.default_rng(seed).bytes  # any bits, NaNs with payloads too
    tensors = {
        ".".join(["w", *map(str, place)]): np.frombuffer(
            bits(dtype.itemsize * math.prod(shape)), dtype
        ).reshape(shape)
        for place in itertools.product(*map(range, stacked))
    }
    loaded = table.load(module, Memory(tensors), rows)
    assert loaded.w.dtype == dtype
    exported = dict(table.export(loaded, rows))
    assert exported.keys() == tensors.keys()
    for key, array in tensors.items():
        assert exported[key].shape == array.shape
        assert exported[key].tobytes() == array.tobytes()


def test_experts_are_a_second_stacked_dimension():
    rows = Table({"w": ("layers.{l}.experts.{e}.up.weight", "f d -> d f")})
    module = jax.eval_shape(lambda: One((2, 3, 4, 5)))
    tensors = {
        f"layers.{layer}.experts.{e}.up.weight": np.full((5, 4), 10 * layer + e, np.float32)
        for layer in range(2)
        for e in range(3)
    }
    loaded = table.load(module, Memory(tensors), rows)
    assert loaded.w[1, 2, 0, 0] == 12
    assert dict(table.export(loaded, rows)).keys() == tensors.keys()


def test_copies_in_bands_are_whole(monkeypatch):
    monkeypatch.setattr(table, "_BAND", 64)
    random = np.random.default_rng(0)
    for pattern, shape in (("(n h) d -> d n h", (7, 11, 2)), ("d (n h) -> n h d", (11, 2, 7))):
        theirs = (22, 7) if pattern.startswith("(") else (7, 22)
        for names in ("w", "w.{l}"):
            stack = () if names == "w" else (2,)
            tensors = {
                names.format(l=i): random.normal(size=theirs).astype(np.float32)
                for i in range(stack[0] if stack else 1)
            }
            module = jax.eval_shape(lambda: One((*stack, *shape)))  # noqa: B023
            rows = Table({"w": (names, pattern)})
            loaded = table.load(module, Memory(tensors), rows)
            for name, array in table.export(loaded, rows):
                np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_is_cast_to_as_jax_casts(tensors, stored, dtype):
    tensors = {name: array.astype(stored) for name, array in tensors.items()}
    loaded = leaves(table.load(abstract(), Memory(tensors), TABLE, dtype=dtype))
    assert {array.dtype for array in loaded.values()} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(
        loaded["embed.w"], jnp.asarray(tensors["embed.weight"]).astype(dtype)
    )
    exported = dict(table.export(random(), TABLE, dtype=dtype))
    assert {array.dtype for array in exported.values()} == {jnp.dtype(dtype)}


def test_without_a_dtype_each_parameter_is_as_stored(tensors):
    tensors = tensors | {"embed.weight": tensors["embed.weight"].astype(BF16)}
    loaded = leaves(table.load(abstract(), Memory(tensors), TABLE))
    assert loaded["embed.w"].dtype == jnp.bfloat16
    assert loaded["head.w"].dtype == jnp.float32


@pytest.mark.parametrize("layer", range(L))
def test_layers_stored_in_two_dtypes_are_stacked_in_the_wider(tensors, layer):
    name = f"layers.{layer}.q.weight"
    half = tensors[name].astype(BF16)
    loaded = table.load(abstract(), Memory(tensors | {name: half}), TABLE)
    assert loaded.layers.q.dtype == jnp.float32
    assert dict(table.export(loaded, TABLE))[name].tobytes() == half.astype(np.float32).tobytes()


# ---- meshes


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 8}], ids=["4x2", "8x1"])
def test_parameters_land_in_the_shardings_of_the_abstract_model(tensors, axes):
    with use_mesh(make_mesh(axes)):
        wanted = abstract()
        loaded = table.load(wanted, Memory(tensors), TABLE)
        for path, array in leaves(loaded).items():
            asked = leaves(wanted)[path].sharding
            assert array.sharding.spec == (jax.P() if asked is None else asked.spec), path
            assert len(array.sharding.device_set) == 8
        assert "fsdp" in str(loaded.embed["w"].sharding.spec)
        chex.assert_trees_all_equal(tensors_of(loaded), tensors)


def test_on_a_mesh_no_host_array_is_larger_than_a_shard(tensors, monkeypatch):
    sizes = []
    empty = table._empty
    monkeypatch.setattr(
        table, "_empty", lambda shape, dtype: sizes.append(math.prod(shape)) or empty(shape, dtype)
    )
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        table.load(abstract(), Memory(tensors), TABLE)
    assert max(sizes) == L * D * N * H // 8


def test_a_mesh_of_another_device_is_not_the_default_device(tensors):
    last = jax.devices()[-1]
    with use_mesh(make_mesh({"fsdp": 1}, [last])):
        loaded = table.load(abstract(), Memory(tensors), TABLE)
    assert all(array.devices() == {last} for array in leaves(loaded).values())


# ---- memory


def test_on_a_cpu_jax_takes_over_the_loaded_buffers(tensors, monkeypatch):
    made = []

    def empty(shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    original = table._empty
    monkeypatch.setattr(table, "_empty", lambda *args: made.append(original(*args)) or made[-1])
    loaded = leaves(table.load(abstract(), Memory(tensors), TABLE))
    ours = {array.ctypes.data for array in made}
    assert {array.unsafe_buffer_pointer() for array in loaded.values()} <= ours


def test_loaded_buffers_may_be_donated(tensors):
    loaded = table.load(abstract(), Memory(tensors), TABLE)
    step = jax.jit(lambda model: jax.tree.map(lambda x: x + 1, model), donate_argnums=0)
    stepped = step(step(loaded))
    np.testing.assert_allclose(stepped.embed["w"], tensors["embed.weight"] + 2, rtol=1e-6)


# ---- what does not fit


def refused(checkpoint, module=None, rows=TABLE) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers check the reason)
        table.load(module or abstract(), checkpoint, rows)
    assert len(str(caught.value).splitlines()) == 1
    assert set(checkpoint.reads.values()) <= {0, 1}
    return str(caught.value)


def test_one_error_lists_all_that_is_missing_unexpected_or_misshapen(tensors):
    tensors = dict(tensors)
    del tensors["temperature"], tensors["layers.2.q.weight"]
    tensors["layers.3.q.weight"] = tensors["q.bias"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = np.zeros((V + 1, D), np.float32)
    tensors["layers.0.o.weight"] = np.zeros((N * H, D + 2), np.float32)
    checkpoint = Memory(tensors)
    assert refused(checkpoint) == (
        "memory: the weights do not fit the model's config: 2 missing: layers.2.q.weight,"
        " temperature; 2 unexpected: layers.3.q.weight, q.bias; 2 of another shape:"
        " layers.0.o.weight is [8, 10], expected [8, 8], lm_head.weight is [17, 8], expected"
        " [16, 8]; use the config.json that came with them"
    )
    assert set(checkpoint.reads.values()) == {0}


def test_a_long_list_is_cut(tensors):
    extra = {f"extra.{i:03}": np.zeros(1, np.float32) for i in range(200)}
    message = refused(Memory(tensors | extra))
    assert "200 unexpected: extra.000, " in message
    assert "extra.011 and 188 more" in message
    assert "extra.012" not in message


def test_two_spellings_of_one_tensor_are_refused(tensors):
    tensors = tensors | {"model.embed.weight": tensors["embed.weight"]}
    renamed = dataclasses.replace(TABLE, renames=((r"^model\.", ""),))
    message = refused(Memory(tensors), rows=renamed)
    assert "holds embed.weight twice, as embed.weight and as model.embed.weight" in message


def test_renames_bring_older_spellings_to_the_table(tensors):
    spelled = {f"text.{name}".replace("layers.", "h."): a for name, a in tensors.items()}
    renames = ((r"^text\.", ""), (r"^h\.", "layers."))
    renamed = dataclasses.replace(TABLE, renames=renames)
    loaded = table.load(abstract(), Memory(spelled), renamed)
    assert_same(loaded, random())


def test_buffers_of_old_files_and_ignored_tensors_are_left_alone(tensors):
    other = {
        "layers.0.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "embeddings.position_ids": np.zeros(4, np.int64),
        "vision.tower.weight": np.zeros(4, np.float32),
    }
    checkpoint = Memory(tensors | other)
    table.load(abstract(), checkpoint, dataclasses.replace(TABLE, ignored=(r"^vision\.",)))
    assert [checkpoint.reads[name] for name in other] == [0, 0, 0]


def test_progress_is_told_of_every_parameter(tensors):
    seen = []
    table.load(abstract(), Memory(tensors), TABLE, progress=seen.append)
    assert sorted(seen) == sorted(TABLE)


# ---- tied embeddings


def test_a_tied_model_accepts_a_head_that_repeats_the_embedding(tensors):
    checkpoint = Memory(tensors | {"lm_head.weight": tensors["embed.weight"].copy()})
    loaded = table.load(abstract(tied=True), checkpoint, TABLE)
    assert loaded.head is None
    assert not table.head_is_separate(checkpoint, TABLE)


def test_a_tied_model_refuses_a_head_that_differs_in_one_bit(tensors):
    head = tensors["embed.weight"].copy()
    head.view(np.uint32)[3, 3] ^= 1
    checkpoint = Memory(tensors | {"lm_head.weight": head})
    assert refused(checkpoint, abstract(tied=True)) == (
        "memory: lm_head.weight is not the embedding, but the model ties the two; load it with"
        " tie_embeddings=False"
    )
    assert table.head_is_separate(checkpoint, TABLE)


def test_a_nan_in_both_is_no_difference(tensors):
    embed = tensors["embed.weight"].copy()
    embed[0, 0] = np.nan
    checkpoint = Memory({"embed.weight": embed, "lm_head.weight": embed.copy()})
    assert not table.head_is_separate(checkpoint, TABLE)


def test_a_head_of_another_shape_or_dtype_is_separate_and_an_absent_one_is_not(tensors):
    embed = tensors["embed.weight"]
    for head in (embed[:-1], embed.astype(np.float16)):
        checkpoint = Memory({"embed.weight": embed, "lm_head.weight": head})
        assert table.head_is_separate(checkpoint, TABLE)
    alone = Memory({"embed.weight": embed})
    assert not table.head_is_separate(alone, TABLE)


def test_an_untied_model_needs_its_head(tensors):
    del (without := dict(tensors))["lm_head.weight"]
    assert "1 missing: lm_head.weight" in refused(Memory(without))
    assert table.load(abstract(tied=True), Memory(without), TABLE).head is None
