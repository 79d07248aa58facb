"""Schedules by literal values, masks by name, and updates against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmprep_jax.train.optim import (
    OptimConfig,
    decay_mask,
    make_optimizer,
    make_schedule,
)

PARAMS = {
    "embed": {"w": jnp.ones((4, 2))},
    "layers": {
        "attn": {"q": {"w": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 2))}},
        "norm": {"scale": jnp.ones((3, 2))},
    },
    "head": {"w": jnp.ones((2, 4))},
}


def rates(num_steps: int, **kwargs) -> list[float]:
    schedule = make_schedule(OptimConfig(lr=1.0, final_ratio=0.1, **kwargs), num_steps)
    return [round(float(schedule(step)), 4) for step in range(num_steps)]


def test_warmup_and_cosine_have_their_literal_values():
    assert rates(8, schedule="cosine", warmup_steps=4) == [
        0.25, 0.5, 0.75, 1.0, 0.8682, 0.55, 0.2318, 0.1,
    ]  # fmt: skip


def test_linear_falls_evenly_to_its_last_step():
    assert rates(4, schedule="linear", warmup_steps=1) == [1.0, 0.7, 0.4, 0.1]


def test_wsd_stays_and_falls_in_the_last_fifth():
    assert rates(10, schedule="wsd", warmup_steps=2) == [0.5] + [1.0] * 7 + [0.55, 0.1]


def test_constant_stays():
    assert rates(3, schedule="constant") == [1.0, 1.0, 1.0]


def test_decay_spares_norms_and_biases_and_on_request_embeddings():
    assert decay_mask(PARAMS) == {
        "embed": {"w": True},
        "layers": {"attn": {"q": {"w": True, "b": False}}, "norm": {"scale": False}},
        "head": {"w": True},
    }
    spared = decay_mask(PARAMS, decay_embeddings=False)
    assert spared["embed"] == {"w": False}
    assert spared["head"] == {"w": True}


def updates(cfg: OptimConfig, grads, params, count: int = 1):
    tx = make_optimizer(cfg, params, 10)
    state = tx.init(params)

    @jax.jit
    def update(params, state):
        change, state = tx.update(grads, state, params)
        return optax.apply_updates(params, change), state

    for _ in range(count):
        params, state = update(params, state)
    return params


def test_zero_gradients_leave_only_decay():
    cfg = OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    new = updates(cfg, zeros, PARAMS)
    np.testing.assert_allclose(new["head"]["w"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(new["layers"]["norm"]["scale"], 1.0)


def test_adamw_follows_its_formula_for_three_steps():
    cfg = OptimConfig(lr=0.01, schedule="constant", weight_decay=0.1, clip_norm=None, eps=1e-6)
    params, grad = {"w": jnp.array([1.0, -2.0])}, np.array([0.3, -0.1])
    new = updates(cfg, {"w": jnp.asarray(grad)}, params, 3)
    p, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for t in range(1, 4):
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        p = p - 0.01 * (step + 0.1 * p)
    np.testing.assert_allclose(new["w"], p, rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    # clipped to 1e-6 the gradient drowns in eps = 1, so the first step is about lr * gradient
    cfg = OptimConfig(lr=1.0, schedule="constant", weight_decay=0.0, clip_norm=1e-6, eps=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    new = updates(cfg, {"a": jnp.array([3e5]), "b": jnp.array([4e5])}, params)
    np.testing.assert_allclose([new["a"][0], new["b"][0]], [-6e-7, -8e-7], rtol=1e-4)


@pytest.mark.parametrize(("clip_norm", "factor"), [(5.0, 1.0), (2.5, 0.5), (10.0, 1.0)])
def test_clipping_shortens_a_long_gradient_and_no_other(clip_norm, factor):
    # with eps = 1e6 a first step is lr * gradient / eps
    cfg = OptimConfig(lr=1e6, schedule="constant", weight_decay=0.0, clip_norm=clip_norm, eps=1e6)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    new = updates(cfg, {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}, params)
    np.testing.assert_allclose([new["a"][0], new["b"][0]], [-3 * factor, 4 * factor], rtol=1e-4)


def test_lora_plus_without_lora_is_refused():
    with pytest.raises(ValueError, match="nothing trained is a factor of LoRA; leave it at 1"):
        make_optimizer(OptimConfig(lora_plus=2.0), PARAMS, 10)


def test_moments_are_float32_for_bf16_weights_unless_asked():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)

    def moments(cfg):
        adam = next(s for s in make_optimizer(cfg, params, 10).init(params) if hasattr(s, "mu"))
        return adam.mu["head"]["w"].dtype, adam.nu["head"]["w"].dtype

    assert moments(OptimConfig()) == (jnp.float32, jnp.float32)
    assert moments(OptimConfig(moment_dtype="bfloat16")) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", -1.0),
        ("warmup_steps", -1),
        ("final_ratio", 2.0),
        ("decay_fraction", 0.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("clip_norm", 0.0),
        ("lora_plus", 0.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=11"):
        make_schedule(OptimConfig(warmup_steps=11), 10)
