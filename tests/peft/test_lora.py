"""LoRA's laws: the identity at first, only adapters move, a merge says the same."""

import dataclasses
import functools
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import nnx
from safetensors.numpy import load_file

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.nn.param import AdapterParam, Compute
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft import LoRA
from llmprep_jax.peft.adapter import methods
from llmprep_jax.peft.peft_format import adapter_table
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.weights.table import export
from tests.grids import cases
from tests.models.tiny import CONFIGS, forward, make_model, make_tokens
from tests.random_modules import random_module

LLAMA = "llama-tied-9-3-heads"
METHOD = LoRA(rank=4, alpha=8)
ATTENTION = LoRA(rank=4, alpha=8, targets=("q_proj", "o_proj"))
# latent attention and experts have tests of their own, and what Qwen2 adds has test_methods
families = pytest.mark.parametrize("name", cases(CONFIGS, fast=(LLAMA, "gemma3")))


@functools.cache
def adapted(name: str, *, b: float = 1.0, method: LoRA = METHOD) -> nnx.Module:
    """A model with adapters that are random, B too, times `b`; nothing is drawn by a program."""
    return scaled(random_adapted(CONFIGS[name], method), b)


def random_adapted(cfg, method: LoRA = METHOD) -> nnx.Module:
    return random_module(lambda: lp.peft.inject(registry.build(cfg, rngs=nnx.Rngs(0)), method))


# heads and widths that a 4x2 mesh divides
SMALL = LlamaConfig(
    vocab_size=96,
    dim=32,
    mlp_dim=64,
    num_layers=2,
    head_dim=8,
    max_seq_len=64,
    num_heads=4,
    num_kv_heads=2,
)


@functools.cache
def small(*, num_layers: int = 2, remat: str = "none") -> nnx.Module:
    cfg = dataclasses.replace(SMALL, num_layers=num_layers, compute=Compute(remat=remat))
    targets = ("q_proj", "k_proj", "o_proj", "down_proj")  # v is as k is, gate and up as down
    return random_adapted(cfg, dataclasses.replace(METHOD, targets=targets))


@functools.cache
def fresh() -> tuple[nnx.Module, nnx.Module]:
    """A model, and the same with adapters as they begin."""
    model = make_model("qwen2-window")
    return model, lp.peft.inject(model, ATTENTION)


def scaled(model: nnx.Module, b: float) -> nnx.Module:
    """The model with B times `b`."""
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    flat = nnx.to_flat_state(adapters)
    flat = [
        (p, x.replace(np.asarray(x) * np.float32(b)) if p[-1] == "lora_b" else x) for p, x in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


# compiled in a third of the time
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def loss_of(adapters, frozen, graph):
    logits = nnx.merge(graph, adapters, frozen)(make_tokens(8)).logits
    return jnp.square(logits).mean(), logits


@functools.partial(jax.jit, compiler_options=QUICK)
def run(model: nnx.Module) -> tuple:
    """(logits, gradients of the adapters, merged model)."""
    graph, adapters, frozen = nnx.split(model, AdapterParam, ...)
    grads, logits = jax.grad(loss_of, has_aux=True)(adapters, frozen, graph)
    return logits, grads, lp.peft.merge(model)


@functools.cache
def ran() -> tuple:
    """`run` of the small model, which several laws look at."""
    return run(small())


@pytest.mark.parametrize("name", [LLAMA, "gemma3"])
def test_a_zero_b_changes_no_bit(name):
    model, tokens = adapted(name, b=0.0), make_tokens()
    np.testing.assert_array_equal(
        forward(model, tokens), forward(lp.peft.strip(model), tokens), strict=True
    )


def test_lora_starts_as_identity_bit_for_bit():
    (model, found), tokens = fresh(), make_tokens()
    np.testing.assert_array_equal(forward(found, tokens), forward(model, tokens), strict=True)


def test_injecting_shares_the_base_and_leaves_the_given_model_alone():
    model, found = fresh()
    assert lp.peft.is_adapted(found)
    assert not lp.peft.is_adapted(model)
    assert found.layers.attn.q.base.w[...] is model.layers.attn.q.w[...]
    assert lp.peft.strip(found).layers.attn.q.w[...] is model.layers.attn.q.w[...]


def test_a_is_uniform_within_one_over_root_fan_in_and_differs_from_layer_to_layer():
    attn = fresh()[1].layers.attn
    for layer, fan_in in ((attn.q, 48), (attn.o, 32)):
        a, bound = np.asarray(layer.lora_a[...]), fan_in**-0.5
        assert 0.97 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not np.any(a[0] == a[1])
        assert not np.any(layer.lora_b[...])


def test_another_target_changes_no_layers_initial_values():
    (model, both), method = fresh(), LoRA(rank=4, targets=("q_proj",))
    few, other = [lp.peft.inject(model, method, seed=seed) for seed in (0, 6)]
    expected = both.layers.attn.q.lora_a[...]
    np.testing.assert_array_equal(few.layers.attn.q.lora_a[...], expected)
    assert not np.any(other.layers.attn.q.lora_a[...] == expected)


def test_only_b_has_a_gradient_at_first_and_then_every_adapter_has():
    for (_, grads, _), at_first in ((run(scaled(small(), 0.0)), True), (ran(), False)):
        for path, grad in nnx.to_flat_state(grads):
            assert np.any(np.asarray(grad[...]) != 0) == (path[-1] == "lora_b" or not at_first)


def test_one_step_moves_the_adapters_alone():
    from llmprep_jax.train.batches import place_batch
    from llmprep_jax.train.losses import next_token_loss
    from llmprep_jax.train.optim import OptimConfig, make_optimizer, make_schedule
    from llmprep_jax.train.state import create_state, split_model
    from llmprep_jax.train.step import make_train_step

    method = LoRA(rank=4, targets=("q_proj",))
    model, tokens = random_adapted(SMALL, method), make_tokens()
    before = {path: np.array(x[...]) for path, x in nnx.to_flat_state(nnx.state(model))}
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}
    cfg = OptimConfig(lr=1e-2, warmup_steps=0)
    parts = split_model(model, AdapterParam)
    tx = make_optimizer(cfg, parts, 10)
    step = make_train_step(
        parts.graphdef,
        tx,
        lambda model, batch, key: next_token_loss(model, batch),
        make_schedule(cfg, 10),
    )
    params = jax.tree.map(jnp.copy, parts.params)  # the step may take its arrays over
    state, _ = step(create_state(params, tx, seed=0), parts.frozen, place_batch(batch, 1))
    after = nnx.merge(parts.graphdef, state.params, parts.frozen)
    for path, x in nnx.to_flat_state(nnx.state(after)):
        moved = np.any(np.asarray(x[...]) != before[path])
        assert moved == (path[-1] in ("lora_a", "lora_b")), path


def test_no_gradient_of_a_frozen_weight_is_computed():
    graph, adapters, frozen = nnx.split(small(num_layers=1), AdapterParam, ...)
    weights = sum(x.size for x in jax.tree.leaves(frozen))
    grad = jax.jit(jax.grad(loss_of, has_aux=True), static_argnums=2, compiler_options=QUICK)
    found = grad.lower(adapters, frozen, graph).compile().cost_analysis()["flops"]
    # a weight and token: 2 flops forward, 2 back to the input; 2 more were the weight's gradient
    assert found / make_tokens(8).size / weights == pytest.approx(4, abs=0.5)


@families
def test_a_merged_model_says_the_same_and_is_plain(name):
    model, tokens = adapted(name), make_tokens()
    expected, merged = np.asarray(forward(model, tokens)), lp.peft.merge(model)
    assert np.abs(expected - forward(lp.peft.strip(model), tokens)).max() > 0.1
    np.testing.assert_allclose(
        forward(merged, tokens), expected, atol=1e-5 * np.abs(expected).max()
    )
    assert jax.tree.structure(merged) == jax.tree.structure(make_model(name))
    assert lp.peft.is_adapted(model)


def test_a_merge_adds_in_float32_and_keeps_the_weights_dtype():
    model = adapted("gemma3", method=LoRA(rank=4, alpha=8, targets=("attn.q",)))
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    rest = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), rest)
    model = nnx.merge(graph, adapters, rest)
    q, found = model.layers.attn.q, lp.peft.merge(model).layers.attn.q.w[...]
    delta = np.einsum("ldr,lrnh->ldnh", q.lora_a[...], q.lora_b[...]) * 2.0
    expected = np.asarray(q.base.w[...], np.float32) + delta
    assert found.dtype == jnp.bfloat16
    off = np.abs(np.asarray(found, np.float32) - expected)
    assert np.all(off <= 2.0**-8 * np.abs(expected))  # one rounding


# "full" around VeRA is in test_methods
@pytest.mark.parametrize("remat", cases(("full", "dots"), fast=("dots",)))
def test_gradients_are_the_same_rematerialised(remat):
    assert_near(run(small(remat=remat))[1], ran()[1], 1e-5)


def test_adapted_layers_in_a_list_say_the_same_and_save_the_same(tmp_path):
    model, (logits, _, merged) = small(), ran()
    graph, state = nnx.split(model)
    listed = nnx.merge(graph, state)
    listed.layers = unstack(model.layers)
    merged = nnx.merge(*nnx.split(merged))
    merged.layers = unstack(merged.layers)
    found = jax.jit(lambda model: model(make_tokens(8)).logits, compiler_options=QUICK)(listed)
    assert_near(found, logits, 1e-5)
    assert_near(lp.peft.merge(listed), merged, 1e-6)
    folder = lp.peft.save(listed, tmp_path / "listed")
    tensors = export(nnx.state(model, AdapterParam), adapter_table(model, methods(model)))
    saved = load_file(folder / "adapter_model.safetensors")
    chex.assert_trees_all_equal(saved, dict(tensors))


def test_a_mesh_changes_nothing():
    logits, grads, merged = ran()
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        found, found_grads, found_merged = run(small.__wrapped__())
    assert_near(found, logits, 1e-5)
    assert_near(found_grads, grads, 1e-4)  # sums over 112 tokens, in another order
    assert_near(found_merged, merged, 1e-6)


def test_adapters_are_born_sharded_with_the_same_values():
    expected = nnx.state(fresh()[1], AdapterParam)
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        model = lp.peft.inject(make_model("qwen2-window"), ATTENTION)
        found = nnx.state(model, AdapterParam)
    assert_near(found, expected, 0)
    specs = {".".join(p): jax.typeof(x[...]).sharding.spec for p, x in nnx.to_flat_state(found)}
    assert specs == {
        "layers.attn.q.lora_a": jax.P(None, "fsdp", None),
        "layers.attn.q.lora_b": jax.P(None, None, "tensor", None),
        "layers.attn.o.lora_a": jax.P(None, "tensor", None, None),
        "layers.attn.o.lora_b": jax.P(None, None, "fsdp"),
    }


def assert_near(found, expected, tolerance: float) -> None:
    """Leaf by leaf, as a share of the leaf's largest value."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
# r (in + out) of each matrix, by hand. Gemma 3 1B: width 1152, 4 query heads and 1 key head of 256,
# mlp 6912, 26 layers. q 1152 + 1024 = 2176; k and v 1152 + 256 = 1408 each; o 1024 + 1152 = 2176;
# gate, up and down 1152 + 6912 = 8064 each. 2176 + 2 * 1408 + 2176 + 3 * 8064 = 31,360 a layer;
# 26 * 8 * 31,360 = 6,522,880
COUNTS = [
    ("llama-3.1-8b", QKVO, 8, 6_815_744),
    ("llama-3.1-8b", "all-linear", 8, 20_971_520),
    ("llama-3.1-8b", "all-linear", 16, 41_943_040),
    ("llama-3.1-8b", "all-linear", 64, 167_772_160),
    ("gemma3-1b", "all-linear", 8, 6_522_880),
]


@functools.cache
def abstract_base(preset: str) -> nnx.Module:
    return jax.eval_shape(lambda: registry.build(registry.preset(preset), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("preset", "targets", "rank", "expected"), COUNTS)
def test_trainable_parameters_of_abstract_models_are_the_published_numbers(
    preset, targets, rank, expected
):
    base = abstract_base(preset)
    method = LoRA(rank=rank, targets=targets)
    abstract = jax.eval_shape(lambda base: lp.peft.inject(base, method), base)
    found = lp.peft.count(abstract)
    assert found.trainable == expected
    assert found.trainable_bytes == 4 * expected
    assert found.frozen == sum(x.size for x in jax.tree.leaves(base))
    trainable, frozen = lp.peft.split(abstract)
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(base))
    assert len(jax.tree.leaves(trainable)) == (8 if targets == QKVO else 14)


@pytest.mark.parametrize(
    "targets",
    [("q_proj", "down_proj"), ["attn.q", "mlp.down"], ("q", "down"), r".*\.(q|down)_proj"],
    ids=str,
)
def test_targets_go_by_our_names_by_hugging_faces_and_by_regex(targets):
    assert targeted("gemma3", targets) == {"layers.attn.q", "layers.mlp.down"}


def targeted(name: str, targets, *, listed: bool = False) -> set[str]:
    """The paths that get adapters."""
    model = jax.eval_shape(lambda: build(name, LoRA(rank=4, targets=targets), listed=listed))
    return {".".join(map(str, p[:-1])) for p, _ in nnx.to_flat_state(lp.peft.split(model)[0])}


def build(name: str, method: LoRA, *, listed: bool = False) -> nnx.Module:
    model = registry.build(CONFIGS[name], rngs=nnx.Rngs(0))
    if listed:
        model.layers = unstack(model.layers)
    return lp.peft.inject(model, method)


def test_all_linear_leaves_the_output_head_alone():
    kinds = {path.rsplit(".", 1)[-1] for path in targeted("qwen2-window", "all-linear")}
    assert kinds == {"q", "k", "v", "o", "gate", "up", "down"}


def test_layers_in_a_list_are_picked_one_by_one():
    found = targeted(LLAMA, r".*layers\.[02]\..*v_proj", listed=True)
    assert found == {"layers.0.attn.v", "layers.2.attn.v"}
    assert targeted(LLAMA, ("layers.1.mlp.up",), listed=True) == {"layers.1.mlp.up"}
    assert len(targeted(LLAMA, ("layers.mlp.up",), listed=True)) == 3


def test_patterns_give_layers_ranks_and_scales_of_their_own():
    method = LoRA(
        rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"attn.k": 1.0, "mlp.up": 2}
    )
    layers = jax.eval_shape(lambda: build("gemma3", method)).layers
    assert (layers.attn.q.method.rank, layers.attn.q.method.scale) == (2, 4.0)
    assert layers.attn.q.lora_a.shape == (5, 48, 2)
    assert (layers.attn.k.method.rank, layers.attn.k.method.scale) == (4, 0.25)
    assert (layers.mlp.up.method.scale, layers.mlp.down.method.scale) == (0.5, 2.0)


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoRA(rank=16, alpha=32, rslora=True).scale == 8.0
    assert LoRA(rank=16, alpha=32).scale == 2.0
    plain = adapted(LLAMA, method=LoRA(rank=4, alpha=8))
    wider = adapted(LLAMA, method=LoRA(rank=4, alpha=4, rslora=True))  # the same scale, 2
    found, expected = [nnx.state(lp.peft.merge(model)) for model in (wider, plain)]
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_prj",)}, "target 'q_prj' matches no linear layer; near names: .*q_proj"),
        ({"targets": r".*\.v_prj"}, r"matches no linear layer; near names: v_proj"),
        ({"targets": ("q_proj", "lm_head")}, "head is its embedding, so 'lm_head' cannot be"),
        ({"targets": ()}, "no targets given"),
        ({"targets": "layers.(q"}, r"layers.\(q.*is no regex"),
        ({"targets": r".*layers\.[01]\..*"}, "some layers of the stack layers.attn.k and leave"),
        ({"rank": 33, "targets": ("o_proj",)}, "attn.o: LoRA's rank 33 exceeds .* 32 x 48 of"),
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a finite number other than 0"),
        ({"rank_pattern": {"q_proj": 49}}, "rank 49 exceeds the dimensions 48 x 32"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' is 0"),
        ({"rank_pattern": {"(q_proj": 2}}, r"rank_pattern key '\(q_proj' is no regex"),
        ({"rank_pattern": {"w_proj": 2}}, "rank_pattern key 'w_proj' matches no linear layer"),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 2}}, "sets layers of the stack .*mlp.up apart"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_fit_no_layer_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        lp.peft.inject(make_model("gemma3"), LoRA(**{"rank": 4, **settings}))
    assert "\n" not in str(caught.value)


def test_a_second_adapter_on_a_model_is_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        lp.peft.inject(adapted(LLAMA), METHOD)


def test_the_table_of_counts_has_a_row_a_target_and_one_of_the_whole():
    console = rich.console.Console(file=io.StringIO(), width=120, color_system=None)
    model = jax.eval_shape(lambda: build(LLAMA, LoRA(4, targets=("q_proj", "down")), listed=True))
    lp.peft.print_counts(model, console, optimizer_bytes=2**30)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert "(of activations a run tells once compiled)" in console.file.getvalue()
    cells = [[cell for cell in row if cell.strip("│┃|")] for row in rows]
    # q 3 * 4 * (48 + 72), down 3 * 4 * (64 + 48); 3 * 48 * 72 and 3 * 64 * 48 weights; MiB
    memory = lambda trained, frozen: [  # noqa: E731
        f"{n / 2**20:.1f}" for n in (4 * (trained + frozen), 4 * trained, 2**30 * trained / 2784)
    ]
    assert ["layers.attn.q", "1,440", "10,368", "12.1951", *memory(1440, 10368)] in cells
    assert ["layers.mlp.down", "1,344", "9,216", "12.7273", *memory(1344, 9216)] in cells
    assert ["the", "whole", "model", "2,784", "60,240", "4.4174", "0.2", "0.0", "1,024.0"] in cells
