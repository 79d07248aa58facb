"""LoRA's laws: the identity at first, only adapters move, a merge says the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.param import AdapterParam, Param
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft import LoRA
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.models.tiny import CONFIGS, forward, make_model, make_tokens

families = pytest.mark.parametrize("name", CONFIGS)


def shake(model: nnx.Module, seed: int = 3) -> nnx.Module:
    """The model with adapters that are all random, B too."""
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    rng = np.random.default_rng(seed)
    values = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), adapters)
    return nnx.merge(graph, values, rest)


@functools.cache
def adapted(name: str, **compute) -> nnx.Module:
    return shake(lp.peft.inject(make_model(name, **compute), LoRA(rank=4, alpha=8)))


def loss_of(adapters, frozen, graph, tokens):
    return jnp.square(nnx.merge(graph, adapters, frozen)(tokens).logits).mean()


def adapter_grads(model: nnx.Module) -> nnx.State:
    graph, adapters, frozen = nnx.split(model, AdapterParam, ...)
    grad = jax.jit(jax.grad(loss_of), static_argnums=2)
    return grad(adapters, frozen, graph, make_tokens())


@families
def test_lora_starts_as_identity_bit_for_bit(name):
    model, tokens = make_model(name), make_tokens()
    found = forward(lp.peft.inject(model, LoRA(rank=4)), tokens)
    np.testing.assert_array_equal(found, forward(model, tokens))


def test_injecting_shares_the_base_and_leaves_the_given_model_alone():
    model = make_model("gemma3")
    found = lp.peft.inject(model, LoRA(rank=4))
    assert lp.peft.is_adapted(found)
    assert not lp.peft.is_adapted(model)
    assert found.layers.attn.q.base.w[...] is model.layers.attn.q.w[...]
    assert lp.peft.strip(found).layers.attn.q.w[...] is model.layers.attn.q.w[...]


def test_a_is_uniform_within_one_over_root_fan_in_and_differs_from_layer_to_layer():
    model = lp.peft.inject(make_model("gemma3"), LoRA(rank=16))
    for layer, fan_in in ((model.layers.attn.q, 48), (model.layers.attn.o, 32)):
        a, bound = np.asarray(layer.lora_a[...]), fan_in**-0.5
        assert 0.97 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not np.any(a[0] == a[1])
        assert not np.any(layer.lora_b[...])


def test_another_target_changes_no_layers_initial_values():
    few = lp.peft.inject(make_model("gemma3"), LoRA(rank=4, targets=("q_proj",)), seed=5)
    more = lp.peft.inject(make_model("gemma3"), LoRA(rank=4), seed=5)
    other = lp.peft.inject(make_model("gemma3"), LoRA(rank=4), seed=6)
    np.testing.assert_array_equal(few.layers.attn.q.lora_a[...], more.layers.attn.q.lora_a[...])
    assert np.any(other.layers.attn.q.lora_a[...] != more.layers.attn.q.lora_a[...])


@families
def test_only_b_has_a_gradient_at_first_and_then_every_adapter_has(name):
    for model, at_first in ((lp.peft.inject(make_model(name), LoRA(4)), True), (adapted(name), 0)):
        for path, grad in nnx.to_flat_state(adapter_grads(model)):
            assert np.any(np.asarray(grad[...]) != 0) == (path[-1] == "lora_b" or not at_first)


def test_one_step_moves_the_adapters_alone():
    from llmprep_jax.train.losses import next_token_loss
    from llmprep_jax.train.optim import OptimConfig, make_optimizer, make_schedule
    from llmprep_jax.train.state import create_state, split_model
    from llmprep_jax.train.step import make_train_step, place_batch

    model, tokens = adapted("llama-tied-9-3-heads"), make_tokens()
    before = {path: np.array(x[...]) for path, x in nnx.to_flat_state(nnx.state(model))}
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}
    cfg = OptimConfig(lr=1e-2, warmup_steps=0)
    parts = split_model(model, AdapterParam)
    tx = make_optimizer(cfg, parts.params, 10)
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
    model, tokens = adapted("llama-tied-9-3-heads", unroll=0), make_tokens()

    def flops(kind) -> float:
        graph, trained, frozen = nnx.split(model, kind, ...)
        grad = jax.jit(jax.grad(loss_of), static_argnums=2)
        return grad.lower(trained, frozen, graph, tokens).compile().cost_analysis()["flops"]

    weights = sum(x.size for x in jax.tree.leaves(nnx.state(model, Param)))
    saved = flops(Param) - flops(AdapterParam)
    # 2 flops a weight and token; the adapters' own gradients come on top
    assert saved > 0.5 * 2 * weights * tokens.size


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
    base = make_model("gemma3")
    graph, state = nnx.split(base)
    base = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    model = shake(lp.peft.inject(base, LoRA(rank=4, alpha=8)))
    q, found = model.layers.attn.q, lp.peft.merge(model).layers.attn.q.w[...]
    delta = np.einsum("ldr,lrnh->ldnh", q.lora_a[...], q.lora_b[...]) * 2.0
    expected = jnp.asarray(np.asarray(base.layers.attn.q.w[...], np.float32) + delta)
    assert found.dtype == jnp.bfloat16
    off = np.abs(np.asarray(found, np.float32) - np.asarray(expected))
    assert np.all(off <= 2.0**-8 * np.abs(expected))  # one rounding


@pytest.mark.parametrize("compute", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 0}], ids=str)
def test_gradients_are_the_same_rematerialised_and_unrolled(compute):
    expected, found = adapter_grads(adapted("gemma3")), adapter_grads(adapted("gemma3", **compute))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_adapted_layers_in_a_list_say_the_same_and_save_the_same(tmp_path):
    model, tokens = adapted("llama-tied-9-3-heads"), make_tokens()
    listed = lp.peft.merge(model)
    graph, state = nnx.split(model)
    listed = nnx.merge(graph, state)
    listed.layers = unstack(model.layers)
    expected = forward(model, tokens)
    np.testing.assert_allclose(forward(listed, tokens), expected, atol=1e-5)
    np.testing.assert_allclose(forward(lp.peft.merge(listed), tokens), expected, atol=1e-4)
    lp.peft.save(listed, tmp_path / "listed")
    lp.peft.save(model, tmp_path / "stacked")
    one, two = [tmp_path / kind / "adapter_model.safetensors" for kind in ("listed", "stacked")]
    assert one.read_bytes() == two.read_bytes()


def test_layers_in_a_list_are_found_by_hugging_faces_names():
    base = make_model("llama-tied-9-3-heads")
    base.layers = unstack(base.layers)
    model = lp.peft.inject(base, LoRA(rank=4, targets=("q_proj",)))
    assert lp.peft.count(model).trainable == 3 * 4 * (48 + 72)


def test_a_mesh_changes_nothing():
    sizes = dict(vocab_size=96, dim=32, mlp_dim=64, num_layers=2, head_dim=8, max_seq_len=64)
    cfg = type(CONFIGS["llama-tied-9-3-heads"])(**sizes, num_heads=4, num_kv_heads=2)
    tokens = make_tokens(8)

    @jax.jit
    def run(tokens):
        model = lp.peft.inject(registry.build(cfg, rngs=nnx.Rngs(0)), LoRA(rank=4))
        graph, adapters, frozen = nnx.split(model, AdapterParam, ...)
        # of the same values on each mesh, and B not zero
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        logits = nnx.merge(graph, adapters, frozen)(tokens).logits
        grads = jax.grad(loss_of)(adapters, frozen, graph, tokens)
        return logits, grads, lp.peft.merge(nnx.merge(graph, adapters, frozen)), adapters

    logits, grads, merged, _ = run(tokens)
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        found, found_grads, found_merged, adapters = run(tokens)
    np.testing.assert_allclose(found, logits, atol=2e-5)
    pairs = [(found_grads, grads), (found_merged, merged)]
    for a, b in [two for pair in pairs for two in zip(*map(jax.tree.leaves, pair), strict=True)]:
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    specs = {
        ".".join(path): jax.typeof(x[...]).sharding.spec
        for path, x in nnx.to_flat_state(adapters)
        if path[-2] in ("q", "o")
    }
    assert specs == {
        "layers.attn.q.lora_a": jax.P(None, "fsdp", None),
        "layers.attn.q.lora_b": jax.P(None, None, "tensor", None),
        "layers.attn.o.lora_a": jax.P(None, "tensor", None, None),
        "layers.attn.o.lora_b": jax.P(None, None, "fsdp"),
    }


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
COUNTS = [
    ("llama-3.1-8b", QKVO, 8, 6_815_744),
    ("llama-3.1-8b", "all-linear", 8, 20_971_520),
    ("llama-3.1-8b", "all-linear", 16, 41_943_040),
    ("llama-3.1-8b", "all-linear", 64, 167_772_160),
    # 26 layers: q 1152 + 1024, k and v 1152 + 256, o 1024 + 1152, and three of 1152 + 6912
    ("gemma-3-1b", "all-linear", 8, 26 * 8 * (2176 + 2 * 1408 + 2176 + 3 * 8064)),
]


@pytest.mark.parametrize(("preset", "targets", "rank", "expected"), COUNTS)
def test_trainable_parameters_of_abstract_models_are_the_published_numbers(
    preset, targets, rank, expected
):
    from llmprep_jax.models.gemma3.config import PRESETS as GEMMA3
    from llmprep_jax.models.llama.presets import PRESETS as LLAMA

    cfg = {**GEMMA3, **LLAMA}[preset]

    def make():
        base = registry.build(cfg, rngs=nnx.Rngs(0))
        return lp.peft.inject(base, LoRA(rank=rank, targets=targets))

    abstract = jax.eval_shape(make)
    found = lp.peft.count(abstract)
    assert found.trainable == expected
    assert found.trainable_bytes == 4 * expected
    base = jax.eval_shape(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
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
    model = lp.peft.inject(make_model("gemma3"), LoRA(rank=4, targets=targets))
    trainable, _ = lp.peft.split(model)
    assert {path[:-1] for path, _ in nnx.to_flat_state(trainable)} == {
        ("layers", "attn", "q"),
        ("layers", "mlp", "down"),
    }


def test_all_linear_leaves_the_output_head_alone():
    trainable, _ = lp.peft.split(lp.peft.inject(make_model("qwen2-window"), LoRA(rank=4)))
    kinds = {path[-2] for path, _ in nnx.to_flat_state(trainable)}
    assert kinds == {"q", "k", "v", "o", "gate", "up", "down"}


def test_patterns_give_layers_ranks_and_scales_of_their_own():
    method = LoRA(
        rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"attn.k": 1.0, "mlp.up": 2}
    )
    layers = lp.peft.inject(make_model("gemma3"), method).layers
    assert (layers.attn.q.method.rank, layers.attn.q.method.scale) == (2, 4.0)
    assert layers.attn.q.lora_a.shape == (7, 48, 2)
    assert (layers.attn.k.method.rank, layers.attn.k.method.scale) == (4, 0.25)
    assert (layers.mlp.up.method.scale, layers.mlp.down.method.scale) == (0.5, 2.0)


def test_rslora_divides_by_the_root_of_the_rank():
    assert LoRA(rank=16, alpha=32, rslora=True).scale == 8.0
    assert LoRA(rank=16, alpha=32).scale == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_prj",)}, "target 'q_prj' matches no linear layer; near names: .*q_proj"),
        ({"targets": r".*\.wq"}, "matches no linear layer"),
        ({"targets": ("q_proj", "lm_head")}, "target 'lm_head' matches no"),
        ({"targets": ()}, "no targets given"),
        ({"targets": "layers.(q"}, "layers.(q.*is no regex"),
        ({"rank": 33, "targets": ("o_proj",)}, "rank 33 exceeds the dimensions 32 x 48"),
        ({"rank": 0}, "must be at least 1"),
        ({"rank_pattern": {"q_proj": 49}}, "rank 49 exceeds the dimensions 48 x 32"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_fit_no_layer_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message.replace("(q", r"\(q")) as caught:
        lp.peft.inject(make_model("gemma3"), LoRA(**{"rank": 4, **settings}))
    assert "\n" not in str(caught.value)
