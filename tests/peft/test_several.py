"""Several adapters on one base: a row of a batch computes what its adapter alone does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft import IA3, AdaLoRA, DoRA, LoHa, LoKr, LoRA, VeRA
from llmprep_jax.peft.adapter import adapters, methods, wrap
from llmprep_jax.quant.linear import dequantize_model, quantize_model
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.models.tiny import make_tokens
from tests.peft.test_methods import QUICK, assert_near, base, scattered, small
from tests.random_modules import random_module

LORAS = {
    "law": LoRA(rank=4, alpha=8, targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")),
    "verse": LoRA(rank=2, alpha=3, rslora=True, targets=("q_proj", "down_proj")),
}
METHODS = LORAS | {
    "dora": DoRA(rank=4, alpha=8, targets=("q_proj", "o_proj")),
    "ia3": IA3(),
    "loha": LoHa(rank=2, alpha=4, targets=("v_proj",)),
    "lokr": LoKr(rank=2, alpha=4, targets=("gate_proj",)),
    "vera": VeRA(rank=8, targets=("q_proj", "up_proj")),
    "adalora": AdaLoRA(rank=2, alpha=40, targets=("v_proj",), total_steps=4),
    "pissa": LoRA(rank=2, alpha=4, targets=("q_proj",), init_weights="pissa"),
}
ROWS = ["loha", None, "verse", "dora", "law", "ia3", "lokr", "verse"]
ROWS += ["pissa", "vera", "adalora", "law"]


@functools.cache
def adapted(name: str) -> nnx.Module:
    """The base with one adapter, trained as it were."""
    return scattered(lp.peft.inject(base(), METHODS[name], seed=list(METHODS).index(name)))


@functools.cache
def merged(name: str | None) -> nnx.Module:
    """The plain model that says what an adapter alone does; one program is enough for all."""
    return base() if name is None else lp.peft.merge(adapted(name))


@functools.cache
def combined(names: tuple[str, ...] = tuple(METHODS)) -> nnx.Module:
    return lp.peft.combine({name: adapted(name) for name in names})


@functools.partial(jax.jit, compiler_options=QUICK)
def logits_of(model: nnx.Module, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return model(tokens, mask=mask).logits


def padded(rows: int = len(ROWS)) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, the first row padded left."""
    tokens = make_tokens(rows)
    mask = np.ones(tokens.shape, bool)
    mask[0, :5] = False
    return tokens, mask


@functools.cache
def by_row() -> np.ndarray:
    return np.asarray(logits_of(lp.peft.select(combined(), ROWS), *padded()))


@pytest.mark.parametrize("name", [None, *METHODS])
def test_a_row_computes_what_its_adapter_alone_does(name):
    row = ROWS.index(name)
    real = padded()[1][row]
    alone, other = [np.asarray(logits_of(merged(x), *padded()))[row][real] for x in (name, None)]
    assert_near(by_row()[row][real], alone)
    assert (np.abs(by_row()[row][real] - other).max() > 0.05) == (name is not None)


def test_other_names_for_as_many_rows_compile_nothing_anew():
    by_row()
    before = logits_of._cache_size()
    found = logits_of(lp.peft.select(combined(), ROWS[::-1]), *padded())
    assert logits_of._cache_size() == before
    row = ROWS[::-1].index("verse")
    assert_near(found[row], logits_of(merged("verse"), *padded())[row])


def test_an_adapter_of_nan_reaches_no_row_but_its_own():
    pairs = {name: adapted(name) for name in METHODS}
    graph, state, rest = nnx.split(pairs["verse"], AdapterParam, ...)
    pairs["verse"] = nnx.merge(graph, jax.tree.map(lambda x: np.full_like(x, np.nan), state), rest)
    found = logits_of(lp.peft.select(lp.peft.combine(pairs), ROWS), *padded())
    sound = [row for row, name in enumerate(ROWS) if name != "verse"]
    np.testing.assert_array_equal(np.asarray(found)[sound], by_row()[sound])
    assert np.isnan(found[2]).all()


def listed(model: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(model)
    again = nnx.merge(graph, state)
    again.layers = unstack(model.layers)
    return again


def test_layers_in_a_list_say_the_same():
    model = lp.peft.select(combined(), ROWS)
    assert_near(logits_of(listed(model), *padded()), by_row())


def moved(model: nnx.Module, base: nnx.Module) -> nnx.Module:
    """The adapter of a model on another base."""
    layers = adapters(model)
    own = {path: one.own() for path, one in layers.items()}
    shared = {
        key: x for one in layers.values() for key, x in one.params().items() if key not in one.own()
    }
    return wrap(base, methods(model), own, shared)


def test_rows_on_a_packed_base_compute_what_they_do_on_the_same_base_dense():
    packed = quantize_model(base(), "nf4", r"layers\.attn\.[qo]")
    rows = ["law", None, "dora"]
    found, expected = [
        logits_of(
            lp.peft.select(
                lp.peft.combine({name: moved(adapted(name), each) for name in ("law", "dora")}),
                rows,
            ),
            *padded(3),
        )
        for each in (packed, dequantize_model(packed))
    ]
    assert_near(found[1:], expected[1:])
    np.testing.assert_array_equal(padded(3)[0][1], padded()[0][1])
    assert np.abs(expected[1] - by_row()[1]).max() > 0.01  # what packing rounded off


@functools.partial(jax.jit, compiler_options=QUICK)
def gradients(model: nnx.Module) -> nnx.State:
    graph, adapters, frozen = nnx.split(model, AdapterParam, ...)
    tokens, mask = padded(2)
    loss = lambda x: jnp.square(nnx.merge(graph, x, frozen)(tokens, mask=mask).logits[1]).sum()  # noqa: E731
    return jax.grad(loss)(adapters)


@pytest.mark.slow  # a backward pass of every adapter
def test_a_row_trains_its_own_adapter_alone_as_if_there_were_no_other():
    found = gradients(lp.peft.select(combined(tuple(LORAS)), ["verse", "law"]))
    alone = dict(nnx.to_flat_state(gradients(adapted("law"))))
    for path, grad in nnx.to_flat_state(found):
        if "verse" in path:
            assert not np.any(grad[...]), path
        else:
            assert_near(grad[...], alone[(*path[:-3], path[-1])][...], 1e-4)


@pytest.mark.parametrize(
    "rows", [pytest.param(["law"], marks=pytest.mark.slow), ["law", None, "verse"]], ids=len
)
def test_rows_generate_by_their_own_adapters(rows):
    model, tokens = lp.peft.select(combined(tuple(LORAS)), rows), make_tokens(len(rows))
    found = np.asarray(lp.generate_tokens(model, tokens, max_new_tokens=4))
    whole = np.concatenate([tokens, found], axis=1)
    for row, name in enumerate(rows):
        one = np.tile(whole[row], (len(rows), 1))
        logits = logits_of(merged(name), one, np.ones(one.shape, bool))
        np.testing.assert_array_equal(found[row], np.argmax(logits[0, 13:-1], axis=-1))


@pytest.mark.slow  # compiles for eight devices
def test_a_mesh_changes_nothing():
    def make():
        model = small()
        pairs = {name: lp.peft.inject(model, method) for name, method in METHODS.items()}
        return lp.peft.select(lp.peft.combine(pairs), ROWS)

    def run():
        model = lp.peft.select(random_module(make), ROWS)  # the numbers of rows are no weights
        return np.asarray(logits_of(model, *padded()))

    expected = run()
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        found = run()
    assert_near(found, expected)


@pytest.mark.parametrize("name", ["law", "dora", None], ids=str)
def test_one_name_gives_the_model_that_has_that_adapter_alone(name):
    found, expected = lp.peft.select(combined(), name), adapted(name) if name else base()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))


def test_rows_can_be_selected_again_and_one_adapter_after_rows():
    model = lp.peft.select(combined(), ["law", None])
    again = lp.peft.select(lp.peft.select(model, ROWS), "law")
    assert jax.tree.structure(again) == jax.tree.structure(adapted("law"))
    assert model.layers.attn.q.rows[...].tolist() == [1, 0]


def test_one_of_them_is_saved_as_the_folder_of_it_alone_and_folders_combine(tmp_path):
    for name in LORAS:
        folder = lp.peft.save(lp.peft.select(combined(), name), tmp_path / name)
        expected = lp.peft.save(adapted(name), tmp_path / "alone")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (folder / file).read_bytes() == (expected / file).read_bytes()
    again = lp.peft.combine({name: tmp_path / name for name in LORAS}, base())
    found = lp.peft.select(again, "verse")
    assert_near(found, adapted("verse"), 1e-7)
    mixed = lp.peft.combine({"law": adapted("law"), "verse": str(tmp_path / "verse")})
    assert_near(mixed, again, 1e-7)


def test_a_combined_model_counts_all_adapters_and_strips_to_the_base():
    model = lp.peft.select(combined(), ROWS)
    assert lp.peft.is_adapted(model)
    each = [lp.peft.count(adapted(name)) for name in METHODS]
    assert lp.peft.count(model).trainable == sum(one.trainable for one in each)
    vera = each[list(METHODS).index("vera")]  # whose random matrices are frozen too
    assert lp.peft.count(model).frozen == vera.frozen > each[0].frozen
    trainable, _ = lp.peft.split(model)
    assert len(jax.tree.leaves(trainable)) == sum(
        len(jax.tree.leaves(lp.peft.split(adapted(name))[0])) for name in METHODS
    )
    stripped = lp.peft.strip(model)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (stripped, base())), strict=True))


WEIGHTS = {"law": 0.7, "verse": -0.3}
MIXED = {"law": 0.5, "dora": 0.25, "ia3": 2, "loha": 0}


@pytest.mark.parametrize("weights", [WEIGHTS, MIXED], ids=["loras", "mixed"])
def test_a_weighted_merge_adds_weighted_differences(weights):
    found = lp.peft.merge(combined(), weights)

    def expected(*leaves):
        plain, *others = map(np.asarray, leaves)
        return plain + sum(w * (x - plain) for w, x in zip(weights.values(), others, strict=True))

    assert_near(found, jax.tree.map(expected, base(), *map(merged, weights)), 1e-6)
    biases = [np.asarray(model.layers.attn.k.b[...]) for model in (found, base())]
    assert np.abs(biases[0] - biases[1]).max() > 0.05 or "ia3" not in weights


def test_a_blend_is_one_lora_that_merges_to_the_weighted_sum(tmp_path):
    model = lp.peft.blend(combined(tuple(LORAS)), WEIGHTS)
    assert_near(lp.peft.merge(model), lp.peft.merge(combined(), WEIGHTS), 1e-6)
    folder = lp.peft.save(model, tmp_path / "blend")
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_A.weight" for x in "qk"]
    assert [tensors[name].shape for name in names] == [(6, 32), (4, 32)]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dora"])
def test_an_adapter_comes_out_of_merged_weights(name):
    assert_near(lp.peft.unmerge(merged(name), adapted(name)), base(), 1e-6)
    on_merged = moved(adapted(name), merged(name))
    assert_near(lp.peft.unmerge(merged(name), on_merged), base(), 1e-6)  # the base does not count


def test_merged_bf16_weights_come_back_to_within_their_rounding():
    model = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), adapted("verse"))
    whole = lp.peft.merge(model)
    weights = [
        x.layers.attn.q.w[...] for x in (lp.peft.unmerge(whole, model), lp.peft.strip(model), whole)
    ]
    assert weights[0].dtype == jnp.bfloat16
    found, expected, largest = [np.asarray(w, np.float32) for w in weights]
    assert np.abs(found - expected).max() < np.abs(largest).max() / 128


def zeroed() -> nnx.Module:
    graph, adapters, rest = nnx.split(adapted("ia3"), AdapterParam, ...)
    return nnx.merge(
        graph, jax.tree.map(lambda x: np.arange(x.shape[-1]) * np.asarray(x), adapters), rest
    )


def with_rows(*rows: str | None) -> nnx.Module:
    return lp.peft.select(combined(tuple(LORAS)), rows)


REFUSED = {
    "no adapters": (lambda: lp.peft.combine({"x": base()}), "'x' has no adapter; give it one by"),
    "no models": (lambda: lp.peft.combine({"x": "folder"}), "no model to combine; give base=model"),
    "biases": (
        lambda: lp.peft.combine(
            {"x": lp.peft.inject(base(), LoRA(2, targets=("q_proj",), bias="lora_only"))}
        ),
        "'x' trains more than adapters of linear layers",
    ),
    "rows of an embedding": (
        lambda: lp.peft.select(
            lp.peft.combine({"x": lp.peft.inject(base(), LoRA(2, targets=("embed_tokens",)))}),
            ["x"],
        ),
        "embed is adapted, and an embedding or a head takes no adapter by row; select one",
    ),
    "of several": (
        lambda: lp.peft.combine({"x": combined()}),
        "several adapters: law, verse, dora",
    ),
    "another base": (
        lambda: lp.peft.combine({"law": adapted("law")}, jax.tree.map(np.negative, base())),
        "'law' is around another base; save it by lp.peft.save",
    ),
    "another shape": (
        lambda: lp.peft.combine({"law": adapted("law")}, listed(base())),
        "'law' is around another base",
    ),
    "unknown": (lambda: with_rows("law", "vers"), "no adapter is named 'vers'; near names: verse"),
    "unknown one": (lambda: lp.peft.select(combined(), "x"), "named 'x'; near names: law, verse"),
    "no rows": (lambda: with_rows(), "no rows are given; give a name, or None, for each row"),
    "one adapter": (
        lambda: lp.peft.select(adapted("law"), "law"),
        "no adapters by name; put them on it by lp.peft.combine",
    ),
    "wrong rows": (
        lambda: logits_of(with_rows("law", None, "law"), *padded(2)),
        "selected for 3 rows and the batch has 2; give lp.peft.select",
    ),
    "none chosen": (lambda: logits_of(combined(), *padded()), "several adapters: law, .*; choose"),
    "save": (lambda: lp.peft.save(combined(), "never"), "choose one by lp.peft.select"),
    "merge": (lambda: lp.peft.merge(combined()), "merge by lp.peft.merge.model, {name: weight}"),
    "weights of one": (lambda: lp.peft.merge(adapted("law"), WEIGHTS), "one adapter, without a"),
    "weights of none": (lambda: lp.peft.merge(base(), WEIGHTS), "no adapters that weights could"),
    "unknown weight": (lambda: lp.peft.merge(combined(), {"lw": 1}), "'lw'; near names: law"),
    "no weights": (lambda: lp.peft.merge(combined(), {}), "no weights are given; give some of law"),
    "nan": (lambda: lp.peft.merge(combined(), {"law": float("nan")}), "'law' is nan; it must be"),
    "blend": (lambda: lp.peft.blend(combined(), {"dora": 1}), "'dora' is DoRA around .* take"),
    "unmerge": (
        lambda: lp.peft.unmerge(merged("dora"), adapted("dora")),
        "DoRA around layers.attn.* cannot be taken out .* lp.peft.strip",
    ),
    "unmerge a zero": (
        lambda: lp.peft.unmerge(lp.peft.merge(zeroed()), zeroed()),
        "IA3 around layers.attn.k cannot be taken out",
    ),
    "unmerge adapted": (
        lambda: lp.peft.unmerge(adapted("law"), adapted("law")),
        "has adapters; give what lp.peft.merge gave",
    ),
    "unmerge several": (lambda: lp.peft.unmerge(base(), combined()), "choose one by"),
    "unmerge another": (
        lambda: lp.peft.unmerge(listed(base()), adapted("law")),
        "layers.attn.k is adapted, and the merged model has no such layer",
    ),
}


@pytest.mark.parametrize(("use", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(use, message):
    with pytest.raises(ValueError, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)
