"""How adapters are updated: what decays, and what LoRA+ speeds up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft import DoRA, LoRA
from llmprep_jax.peft.training import rules
from llmprep_jax.train.optim import OptimConfig, make_optimizer
from llmprep_jax.train.state import merge, split_model
from tests.peft.test_methods import (
    METHODS,
    QUICK,
    assert_identity,
    assert_near,
    base,
    fresh,
    logits_of,
)
from tests.peft.test_principal import METHODS as PRINCIPAL

DECAYING = {
    *("lora_a", "lora_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "vera_lambda_b"),
}
STEADY = dict(schedule="constant", warmup_steps=0, clip_norm=None)
PRINCIPAL_NAMES = tuple(f"principal-{name}" for name in PRINCIPAL)
EVERY = METHODS | {f"principal-{name}": method for name, method in PRINCIPAL.items()}


def updated(model: nnx.Module, cfg: OptimConfig, gradient: float, steps: int) -> nnx.Module:
    """The model after so many steps, each with the same value in all gradients."""
    parts = split_model(model, AdapterParam)
    tx = make_optimizer(cfg, parts, 100)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)

        def step(_, carry):
            params, state = carry
            change, state = tx.update(grads, state, params)
            return optax.apply_updates(params, change), state

        return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))[0]

    return merge(parts.graphdef, run(parts.params), parts.frozen)


# the rest of them compile for half a minute and differ in names; where the identity rests elsewhere
# than at zero, or in more than one place, they run always
FAST = ("dora", "ia3", "vera", "adalora", "hra", "whole", "principal-pissa")
each_name = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in EVERY]
)


@each_name
def test_weight_decay_alone_leaves_every_method_the_identity(name):
    model = fresh(EVERY[name])
    cfg = OptimConfig(lr=0.1, weight_decay=0.5, **STEADY)
    after = updated(model, cfg, 0.0, 100)
    before = dict(nnx.to_flat_state(nnx.state(model, AdapterParam)))
    for path, x in nnx.to_flat_state(nnx.state(after, AdapterParam)):
        owner = ".".join(map(str, path[:-1]))
        moves = path[-1] in DECAYING and name not in ("adalora", *PRINCIPAL_NAMES)
        moves = moves and np.any(np.asarray(before[path][...]) != 0)
        assert np.any(np.asarray(x[...]) != np.asarray(before[path][...])) == moves, (owner, path)
    if name in PRINCIPAL_NAMES:
        assert_near(logits_of(after), logits_of(base()))
    else:
        assert_identity(EVERY[name], after)


@pytest.mark.parametrize(
    ("method", "hastened", "layer"),
    [
        (LoRA(4, targets=("q_proj", "embed_tokens")), "lora_a", "embed"),
        (LoRA(4, targets=("q_proj", "embed_tokens")), "lora_b", "layers.attn.q"),
        (DoRA(4, targets=("q_proj",)), "lora_b", "layers.attn.q"),
    ],
    ids=["embedding", "linear", "dora"],
)
def test_lora_plus_speeds_up_the_factor_that_is_zero_at_first(method, hastened, layer):
    model = fresh(method)
    of_layer = functools.reduce(getattr, layer.split("."), model)
    assert not np.any(np.asarray(getattr(of_layer, hastened)))
    moved = {}
    for ratio in (1.0, 16.0):
        cfg = OptimConfig(lr=1e-3, weight_decay=0.0, lora_plus=ratio, **STEADY)
        after = functools.reduce(getattr, layer.split("."), updated(model, cfg, 1.0, 1))
        moved[ratio] = {
            name: np.abs(np.asarray(getattr(after, name)) - getattr(of_layer, name)).max()
            for name in ("lora_a", "lora_b")
        }
    for name in ("lora_a", "lora_b"):
        expected = 16.0 if name == hastened else 1.0
        assert moved[16.0][name] / moved[1.0][name] == pytest.approx(expected, rel=1e-2)


def test_methods_that_have_no_factor_of_lora_refuse_lora_plus():
    for name in ("ia3", "vera", "adalora"):
        parts = split_model(fresh(METHODS[name]), AdapterParam)
        with pytest.raises(ValueError, match=r"lora_plus=2.0, but nothing trained is a factor"):
            make_optimizer(OptimConfig(lora_plus=2.0), parts, 10)


def test_embeddings_can_be_left_out_of_decay_with_their_adapters():
    parts = split_model(fresh(METHODS["tables"]), AdapterParam)
    cfg = OptimConfig(decay_embeddings=False, weight_decay=0.5, lr=0.1, **STEADY)
    model = merge(parts.graphdef, parts.params, parts.frozen)
    after = updated(model, cfg, 0.0, 1)
    np.testing.assert_array_equal(after.embed.lora_b[...], model.embed.lora_b[...])
    moved, at_first = [np.asarray(x.layers.attn.q.lora_a) for x in (after, model)]
    assert np.any(moved != at_first)


def test_all_that_adapters_train_has_a_rule():
    for method in EVERY.values():
        model = jax.eval_shape(functools.partial(lp.peft.inject, method=method), base())
        state = nnx.to_flat_state(nnx.state(model, AdapterParam))
        assert rules(model).keys() == {".".join(map(str, path)) for path, _ in state}
