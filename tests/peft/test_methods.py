"""The laws of every adapter method: identity at first, own leaves move, a merge says the same."""

import contextlib
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Compute, Shared
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft import HRA, IA3, OFT, AdaLoRA, DoRA, LoHa, LoKr, LoRA, VeRA
from llmprep_jax.peft.adapter import adapters
from llmprep_jax.peft.lokr import factors
from llmprep_jax.peft.method import Method
from llmprep_jax.sharding import has_mesh, make_mesh, use_mesh
from llmprep_jax.weights.receipt import probe
from tests.grids import cases
from tests.models.tiny import make_tokens
from tests.random_modules import random_module

# one has a bias and unmerged outputs, one unmerged inputs, one more outputs than inputs
SOME = ("k_proj", "o_proj", "up_proj")
METHODS = {
    "dora": DoRA(rank=4, alpha=8, targets=SOME),
    "dora-rslora": DoRA(rank=4, alpha=8, rslora=True, targets=("q_proj", "down_proj")),
    "loha": LoHa(rank=4, alpha=8, targets=SOME),
    "lokr": LoKr(rank=2, alpha=4, targets=SOME),
    "lokr-both": LoKr(1, 1, decompose_both=True, decompose_factor=4, targets=SOME),
    "ia3": IA3(),
    "vera": VeRA(rank=48, targets=("k_proj", "o_proj", "down_proj")),
    "adalora": AdaLoRA(rank=4, alpha=8, total_steps=10, targets=SOME),
    "oft": OFT(block_size=8, targets=SOME),
    "oft-exact": OFT(num_blocks=4, targets=("q_proj", "o_proj"), neumann=False),
    "oft-coft": OFT(targets=("up_proj",), coft=True, eps=0.3, share_blocks=True),
    "hra": HRA(rank=4, targets=SOME),
    "ia3-outputs": IA3(targets="all-linear", feedforward=()),
    "whole": LoRA(4, 8, targets=("q_proj",), modules_to_save=("embed", "attn_norm", "v", "head")),
    "tables": LoRA(4, 8, targets=("embed_tokens", "lm_head", "q_proj")),
    "dora-head": DoRA(4, 8, targets=("lm_head",)),
    "biases": LoRA(4, 8, targets=("q_proj", "o_proj"), bias="lora_only"),
    "dora-biases": DoRA(4, 8, targets=("k_proj", "up_proj"), modules_to_save=("v",), bias="all"),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# of a method above, each of which compiles its programs again
VARIANTS = ("dora-rslora", "lokr-both", "oft-exact", "oft-coft")
VARIANTS += ("ia3-outputs", "dora-head", "dora-biases")
each_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=pytest.mark.slow if name in VARIANTS else ())
        for name, method in METHODS.items()
    ],
)
# where variants would compile for seconds and show no more: DoRA keeps something of its base's
# weights, VeRA has arrays that all layers share
KINDS = ("dora", "vera", "loha", "lokr", "ia3", "adalora", "whole", "tables")


def on_kinds(*slow: str, fast: tuple[str, ...] = KINDS[:2]):
    """All kinds: `fast` in `make test`, those named slow tests, the others in `make test-all`."""
    return pytest.mark.parametrize("name", cases(KINDS, fast=fast, slow=slow))


def small(remat: str = "none") -> nnx.Module:
    """A model with the biases of Qwen2, heads and widths that a 4x2 mesh divides."""
    sizes = dict(vocab_size=96, dim=32, mlp_dim=64, num_layers=2, head_dim=8, max_seq_len=64)
    heads = dict(num_heads=4, num_kv_heads=2, qkv_bias=True, model_type="qwen2")
    cfg = LlamaConfig(**sizes, **heads, compute=Compute(remat=remat))
    return registry.build(cfg, rngs=nnx.Rngs(0))


@functools.cache
def base() -> nnx.Module:
    return random_module(small)


def scattered(model: nnx.Module) -> nnx.Module:
    """The adapted model with adapters that have been trained, as it were."""
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    rng = np.random.default_rng(3)

    def move(x: jax.Array) -> jax.Array:
        place = x.sharding if has_mesh() else None
        moved = np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(x.dtype)
        return jax.device_put(moved, place)

    return nnx.merge(graph, jax.tree.map(move, adapters), rest)


# the program that `save` compares by, so that each method's is compiled once
def logits_of(model: nnx.Module) -> np.ndarray:
    return probe(model)["logits"]


@functools.cache
def fresh(method: Method) -> nnx.Module:
    """The base with adapters as they begin."""
    return lp.peft.inject(base(), method)


@functools.cache
def trained(method: Method) -> nnx.Module:
    return scattered(fresh(method))


@functools.partial(jax.jit, compiler_options=QUICK)
def run(model: nnx.Module) -> tuple:
    """(logits, gradients of the adapters, merged model)."""
    graph, adapters, frozen = nnx.split(model, AdapterParam, ...)

    def loss(adapters):
        logits = nnx.merge(graph, adapters, frozen)(make_tokens(8)).logits
        return jnp.square(logits).mean(), logits

    grads, logits = jax.grad(loss, has_aux=True)(adapters)
    return logits, grads, lp.peft.merge(model)


@functools.cache
def ran(method: Method) -> tuple:
    """`run` of the trained adapters: what several laws look at."""
    return run(trained(method))


def assert_near(found, expected, tolerance: float = 1e-5) -> None:
    def near(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0)

    jax.tree.map(near, found, expected)


@each_method
def test_a_method_starts_as_identity_bit_for_bit(method):
    assert_identity(method, fresh(method))


def assert_identity(method, adapted: nnx.Module) -> None:
    """The adapted model says what its base does, to the bit where the method can."""
    is_exact = not isinstance(method, HRA)  # whose pairs of reflections cancel to rounding
    assert_near(logits_of(adapted), logits_of(base()), 0.0 if is_exact else 1e-5)


@each_method
def test_a_step_moves_every_leaf_of_the_adapters_and_no_other(method):
    graph, adapters, frozen = nnx.split(trained(method), AdapterParam, ...)
    _, grads, _ = ran(method)
    step = lambda x, grad: np.asarray(x) - np.asarray(0.1 * np.asarray(grad), x.dtype)  # noqa: E731
    moved = nnx.merge(graph, jax.tree.map(step, adapters, grads), frozen)
    trainable, _ = lp.peft.split(moved)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), trainable, adapters)
    assert all(jax.tree.leaves(changed))
    assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(grads))
    assert_near(lp.peft.strip(moved), base(), 0.0)


@each_method
def test_a_merged_model_says_the_same(method):
    merged = ran(method)[2]
    assert not lp.peft.is_adapted(merged)
    assert_near(logits_of(merged), logits_of(trained(method)))


@each_method
def test_a_folder_holds_the_adapter_and_opens_again(method, tmp_path):
    folder = lp.peft.save(trained(method), tmp_path / "adapter")
    assert_near(lp.peft.load(base(), folder), trained(method), 1e-7)


@on_kinds("whole", fast=("vera",))
def test_layers_in_a_list_say_the_same_and_save_the_same(name, tmp_path):
    model = trained(METHODS[name])
    graph, state = nnx.split(model)
    listed = nnx.merge(graph, state)
    listed.layers = unstack(model.layers)
    assert_near(logits_of(listed), logits_of(model))
    folder = lp.peft.save(listed, tmp_path / "adapter")
    assert_near(logits_of(lp.peft.load(base(), folder)), logits_of(model))


@pytest.mark.parametrize(
    ("name", "num_rows"),
    cases(
        itertools.product(KINDS, (1, 2)),
        slow=[
            *[
                ("dora", 1),
                ("vera", 1),
                ("loha", 1),
                ("lokr", 2),
                ("ia3", 1),
                ("adalora", 2),
                ("whole", 2),
            ],
            ("tables", 1),
        ],
    ),
)
def test_an_adapted_model_generates_what_its_merged_one_does(name, num_rows):
    model = trained(METHODS[name])
    tokens, settings = make_tokens(num_rows), dict(max_new_tokens=4, return_logprobs=True)
    found = lp.generate_tokens(model, tokens, **settings)
    expected = lp.generate_tokens(lp.peft.merge(model), tokens, **settings)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


@on_kinds("dora", fast=("vera",))
def test_gradients_are_the_same_rematerialised(name):
    plain, again = [
        random_module(lambda remat=remat: lp.peft.inject(small(remat), METHODS[name]))
        for remat in ("none", "full")
    ]
    assert_near(run(again)[1], run(plain)[1])


@on_kinds(*KINDS[1:], fast=KINDS[:1])
def test_a_mesh_changes_nothing(name):
    make = lambda: lp.peft.inject(small(), METHODS[name])  # noqa: E731
    logits, grads, merged = run(random_module(make))
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        model = random_module(make)
        found, found_grads, found_merged = run(model)
    assert_near(found, logits)
    assert_near(found_grads, grads, 2e-5)
    assert_near(found_merged, merged)


def test_the_projections_of_vera_are_one_pair_of_arrays_in_all_layers(tmp_path):
    method = METHODS["vera"]
    model = fresh(method)
    listed = nnx.merge(*nnx.split(model))
    listed.layers = unstack(model.layers)
    loaded = lp.peft.load(base(), lp.peft.save(trained(method), tmp_path / "adapter"))
    for each in (model, loaded, trained(method), listed):
        found = adapters(each).values()
        assert len({id(layer.vera_a[...]) for layer in found}) == 1
        assert len({id(layer.vera_b[...]) for layer in found}) == 1
        # 2 layers: 16 + 32 + 32 outputs and 48 d each; A is 48 x 64, B 32 x 48
        counts = lp.peft.count(each)
        assert counts.trainable == 2 * (16 + 32 + 32 + 3 * 48)
        assert counts.frozen == lp.peft.count(base()).frozen + 48 * 64 + 32 * 48
        assert not nnx.state(lp.peft.split(each)[0], Shared)
        assert not nnx.state(lp.peft.strip(each), Shared)
        assert not nnx.state(lp.peft.merge(each), Shared)


def test_the_projections_of_vera_are_torchs_random_numbers():
    class Layer(nnx.Module):
        def __init__(self):
            axes = ("embed", "mlp"), ("batch", "seq", "mlp")
            compute, rngs = Compute(), nnx.Rngs(0)
            self.q = Einsum("BTD,DF->BTF", (6, 2), *axes, compute=compute, rngs=rngs)

    # 2 torch.rand(n) - 1 from manual_seed(0), A's 6 columns and B's 1 each under its own bound
    q = lp.peft.inject(Layer(), VeRA(rank=1)).q
    expected = np.float32([[-0.0074868, 0.5364436, -0.8230451, -0.735939, -0.3851544, 0.2681574]])
    np.testing.assert_allclose(q.vera_a[...], expected, atol=1e-6)
    expected = np.sqrt(6) * np.float32([[-0.0198132], [0.7928895]])
    np.testing.assert_allclose(q.vera_b[...], expected, atol=1e-6)


def test_adalora_writes_what_pruning_left_as_peft_does(tmp_path):
    method = AdaLoRA(4, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 2}, total_steps=10)
    model = scattered(lp.peft.inject(base(), method))
    folder = lp.peft.save(model, tmp_path / "adapter")
    assert_near(lp.peft.load(base(), folder), model, 1e-7)
    config = json.loads((folder / "adapter_config.json").read_text())
    module = "model.layers.{}.self_attn.{}_proj.lora_E"
    assert config["rank_pattern"] == {
        module.format(layer, name): left
        for layer in (0, 1)
        for name, left in (("q", [True] * 4), ("v", [True, True, False, False]))
    }
    assert (config["init_r"], config["target_r"], config["total_step"]) == (4, 8, 10)
    assert model.layers.attn.v.method.scale == model.layers.attn.q.method.scale == 8 / 4.00001


def test_adalora_draws_both_factors_from_the_same_normal_distribution():
    q = lp.peft.inject(base(), AdaLoRA(32, targets=("q_proj",), total_steps=10)).layers.attn.q
    for drawn in map(np.asarray, (q.lora_a[...], q.lora_b[...])):
        assert np.std(drawn) == pytest.approx(0.02, rel=0.05)
        assert not np.any(drawn[0] == drawn[1])
    assert not np.any(q.lora_e[...])


ADALORA = {
    "total_steps": ({"warmup_steps": 5, "final_steps": 5}, "total_steps must exceed warmup_steps"),
    "beta": ({"beta1": 1.0}, r"beta1 must be in \(0, 1\), not 1.0"),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern must be empty, not"),
    "ranks": ({"rank_pattern": {"q_proj": 13}}, "rank_pattern must not exceed rank"),
    "target": ({"target_rank": 0}, "target_rank is 0; it must be a whole number"),
}


@pytest.mark.parametrize(("settings", "message"), ADALORA.values(), ids=ADALORA)
def test_settings_of_adalora_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"AdaLoRA's {message}"):
        AdaLoRA(total_steps=10, **settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank_pattern", {"q_proj": 2}, "rank_pattern of 'q_proj' is 2; it must hold true or"),
        ("rank_pattern", {"q_proj": [True]}, "for each of init_r triplets"),
        ("total_step", None, "total_step is None; it must be a whole number"),
        ("tinit", "1", "tinit is '1'; it must be a number"),
        ("trainable_token_indices", [1], "sets trainable_token_indices=.*not supported"),
    ],
)
def test_a_folder_of_adalora_that_makes_no_sense_is_refused(tmp_path, field, value, message):
    folder = lp.peft.save(trained(METHODS["adalora"]), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message) as caught:
        lp.peft.load(base(), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"initial": 0}, {"seed": -1}], ids=str)
def test_settings_of_vera_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=f"VeRA's {next(iter(settings))} is .*; it must be"):
        VeRA(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("base_model.vera_B"), r"vera_B is missing, expected \[32, 4"),
        (
            lambda tensors: tensors.update({"base_model.vera_A": np.zeros((4, 40), np.float32)}),
            r"vera_A is \[4, 40\], expected \[4, 32\]; load it on the base that",
        ),
    ],
    ids=["missing", "misshapen"],
)
def test_a_folder_of_vera_without_fitting_projections_is_refused(tmp_path, change, message):
    folder = lp.peft.save(lp.peft.inject(base(), VeRA(4, targets=("q_proj",))), tmp_path / "vera")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as caught:
        lp.peft.load(base(), folder)
    assert "\n" not in str(caught.value)


# each compiles for eight devices
@pytest.mark.parametrize(
    "name", cases(["vera", "adalora", "dora", "ia3-outputs"], slow=["vera", "dora"])
)
def test_a_folder_opens_on_a_mesh(name, tmp_path):
    model = scattered(lp.peft.inject(base(), METHODS[name]))
    folder = lp.peft.save(model, tmp_path / "adapter")
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        found = logits_of(lp.peft.load(random_module(small), folder))
    assert_near(found, logits_of(model))


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [(576, -1, (24, 24)), (1536, -1, (32, 48)), (192, -1, (12, 16)), (127, -1, (1, 127)),
     (128, 4, (4, 32)), (126, 4, (3, 42))],
)  # fmt: skip
def test_dimensions_are_cut_as_near_to_the_square_root_as_allowed(size, limit, expected):
    assert factors(size, limit) == expected


@pytest.mark.parametrize("method", [DoRA, LoHa, LoKr, IA3])
def test_embeddings_are_adapted_by_lora_alone(method):
    with pytest.raises(ValueError, match=r"(DoRA|LoHa|LoKr|IA3) does not adapt embed, .*use LoRA"):
        lp.peft.inject(base(), method(targets=("embed_tokens",)))


def test_an_embedding_of_another_base_is_refused(tmp_path):
    model = scattered(lp.peft.inject(base(), METHODS["tables"]))
    folder = lp.peft.save(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    for times, message in ((1, None), (2, "not the base's")):
        table = times * np.asarray(base().embed.w[...])
        save_file(tensors | {name: table}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            lp.peft.load(base(), folder)


def test_biases_are_refused_where_there_are_none_to_train():
    for which, targets in (("lora_only", ("o_proj",)), ("some", ("q_proj",))):
        with pytest.raises(ValueError, match=r"^bias is '(lora_only|some)'") as caught:
            lp.peft.inject(base(), LoRA(4, targets=targets, bias=which))
        assert "\n" not in str(caught.value)


def test_dora_merges_its_magnitude_exactly():
    model = fresh(METHODS["dora"])
    doubled = jax.tree.map_with_path(
        lambda path, x: 2 * np.asarray(x) if "magnitude" in jax.tree_util.keystr(path) else x, model
    )
    k = base().layers.attn.k.w[...]
    np.testing.assert_array_equal(lp.peft.merge(model).layers.attn.k.w[...], k)
    found = lp.peft.merge(doubled).layers.attn.k.w[...]
    np.testing.assert_allclose(found, 2 * k, rtol=2**-22)  # the norm's rounding


@pytest.mark.parametrize("method", [LoHa(rank=33), LoKr(rank=33)], ids=["loha", "lokr"])
def test_a_rank_above_the_dimensions_is_refused(method):
    with pytest.raises(ValueError, match=r"rank 33 exceeds the dimensions 32 x .* of the layer"):
        lp.peft.inject(base(), method)


@pytest.mark.parametrize("rank", [4, 16])
def test_loha_in_bf16_reads_a_token_or_a_few(rank):
    cfg = dataclasses.replace(small().cfg, dim=96, num_heads=6, num_kv_heads=3, head_dim=16)
    cfg = cfg.with_compute(Compute(dtype="bfloat16", param_dtype="bfloat16"))
    model = random_module(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
    adapted = scattered(lp.peft.inject(model, LoHa(rank=rank, alpha=8, targets="all-linear")))
    merged = lp.peft.merge(adapted)
    for tokens in ([[5]], [[5, 6, 7, 8, 9]]):
        found, expected = (x(np.array(tokens)).logits for x in (adapted, merged))
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=0.05 * scale)
