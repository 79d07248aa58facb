"""What only DeepSeek has: further tokens, terms of the loss, and biases that follow the load."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax import pretrained
from llmprep_jax.data import DataConfig
from llmprep_jax.models import deepseek, registry
from llmprep_jax.models.deepseek.config import Config
from llmprep_jax.nn.attention import place_tokens
from llmprep_jax.nn.balance import Balance
from llmprep_jax.nn.moe import with_bounded_buffers
from llmprep_jax.nn.param import TRAINED
from llmprep_jax.runs import describe_model
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.losses import LossSum, next_token_loss, training_loss
from llmprep_jax.train.optim import OptimConfig, make_optimizer
from llmprep_jax.train.run import RunConfig
from llmprep_jax.train.state import create_state, split_model
from llmprep_jax.train.step import make_train_step
from tests.grids import cases
from tests.models.tiny import CONFIGS, make_tokens, random_model

CFG = dataclasses.replace(
    CONFIGS["deepseek-v3"], num_layers=2, num_mtp=2, balance=Balance(expert=0.1)
)


@functools.cache
def model() -> nnx.Module:
    return random_model(CFG)


def make_batch(rows: int = 4, length: int = 12) -> dict[str, np.ndarray]:
    """Two documents a row, and padding."""
    tokens = make_tokens(rows, length + 1)
    segments = np.repeat([[1, 2, 0]], rows, axis=0).repeat([5, length - 7, 2], axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": (segments > 0).astype(np.float32),
        "segment_ids": segments.astype(np.int32),
    }


@functools.cache
def loss_of() -> LossSum:
    return jax.jit(training_loss)(model(), make_batch())


@jax.jit
def further(model, batch, next_BTD, weights_BT):
    """(log-probabilities of both modules, gradient of weighted sines of the first's logits).

    The gradient is by `next_BTD`, which the first module gets as embeddings of the next tokens.
    """
    tokens = batch["tokens"]
    place, _ = place_tokens(tokens.shape, None, batch["segment_ids"], None)
    x_BTD, _, _ = model.run(model.embed_inputs(tokens), place)
    rope = model.rope(place)

    def total(next_BTD):
        hidden_BTD, _, _ = model.mtp[0](x_BTD, next_BTD, place, rope)
        logits = model.unembed(hidden_BTD)
        return jnp.sum(jnp.sin(logits) * weights_BT[..., None]), (hidden_BTD, logits)

    by_next, (hidden_BTD, logits) = jax.grad(total, has_aux=True)(next_BTD)
    after_next_BTD = model.embed(jnp.roll(batch["targets"], -1, axis=1))
    second = model.unembed(model.mtp[1](hidden_BTD, after_next_BTD, place, rope)[0])
    return jax.nn.log_softmax(logits), jax.nn.log_softmax(second), by_next


def further_of(weights: np.ndarray | None = None) -> tuple[jax.Array, ...]:
    batch = make_batch()
    next_BTD = jax.jit(lambda model, targets: model.embed(targets))(model(), batch["targets"])
    weights = np.ones(batch["targets"].shape, np.float32) if weights is None else weights
    return further(model(), batch, next_BTD, weights)


@pytest.mark.slow  # compiles for three seconds
def test_a_further_token_depends_on_the_token_before_it_and_on_none_later():
    # of the first row's first document
    weights = np.zeros((5, 4, 12), np.float32)
    weights[range(5), 0, range(5)] = 1
    found = np.array([np.linalg.norm(further_of(one)[-1], axis=-1) for one in weights])
    later = np.triu(np.ones((5, 5), bool), 1)
    assert np.all(found[:, 0, :5][~later] > 0)
    found[:, 0, :5][~later] = 0
    assert np.all(found == 0)


def test_the_loss_is_its_parts():
    loss, plain = loss_of(), jax.jit(next_token_loss)(model(), make_batch())
    parts = loss.stats["parts"]
    assert loss.count == plain.count == 40
    np.testing.assert_allclose(parts["next_token_loss"], plain.total, rtol=1e-5)
    expected = sum(parts[name] * w for name, w in zip(sorted(parts), (1.0, 0.3, 1.0), strict=True))
    assert sorted(parts) == ["balance_loss", "mtp_loss", "next_token_loss"]
    np.testing.assert_allclose(loss.total, expected, rtol=1e-6)
    assert parts["balance_loss"] > 0


def test_the_further_loss_is_of_the_tokens_after_the_next_in_the_same_document():
    targets = make_batch()["targets"]
    first, second, _ = map(np.asarray, further_of())
    # documents are columns 0 to 4 and 5 to 9: their last columns have no such tokens
    expected = -sum(
        logp[row, t, targets[row, t + ahead]]
        for row in range(4)
        for logp, ahead, columns in (
            (first, 1, (0, 1, 2, 3, 5, 6, 7, 8)),
            (second, 2, (0, 1, 2, 5, 6, 7)),
        )
        for t in columns
    )
    found = loss_of().stats["parts"]["mtp_loss"]
    np.testing.assert_allclose(found, expected / 2, rtol=1e-5)


@functools.cache
def make_step(rate: float):
    # of what is trained, the routers alone
    parts = split_model(model(), nnx.All(TRAINED, nnx.PathContains("router")))
    # decay and momentum, neither of which is for a bias
    tx = make_optimizer(OptimConfig(lr=0.1, weight_decay=0.5, schedule="constant"), parts.params, 9)
    loss, rates = lambda m, b, _: training_loss(m, b), (lambda _: 0.1, lambda _: rate)
    return parts, tx, make_train_step(parts.graphdef, tx, loss, *rates)


def biases(params) -> dict[str, np.ndarray]:
    found = {
        "moe": params["moe_layers"]["mlp"]["router"]["bias"],
        "mtp": params["mtp"][0]["block"]["mlp"]["router"]["bias"],
    }
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.mark.parametrize("accumulate", cases([1, 2], slow=[2]))
def test_a_step_moves_each_bias_by_the_rate_towards_experts_with_little_load(accumulate):
    parts, tx, step = make_step(0.01)
    batch = make_batch()
    before = jax.tree.map(np.asarray, parts.params)
    state = create_state(jax.tree.map(jnp.copy, parts.params), tx, seed=0)
    loads = loss_of().stats["loads"]
    state, metrics = step(state, parts.frozen, place_batch(batch, accumulate))
    for name, path in (("moe", "moe_layers.mlp.router"), ("mtp", "mtp.0.block.mlp.router")):
        counts = np.asarray(loads[path])
        moved = 0.01 * np.sign(counts.mean(-1, keepdims=True) - counts)
        np.testing.assert_allclose(
            biases(state.params)[name] - biases(before)[name], moved, atol=1e-6
        )
        assert np.any(moved)
    assert metrics["dropped"] == 0
    assert metrics["max_vio"] > 0
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.params)
    assert moved["moe_layers"]["mlp"]["router"]["w"]


def test_a_checkpoint_without_the_module_is_read_without_it():
    names = ["model.layers.0.self_attn.o_proj.weight", "lm_head.weight"]
    hf = registry.to_hf(CFG)
    assert deepseek.from_hf(hf, names).num_mtp == 0
    assert deepseek.from_hf(hf, [*names, "model.layers.2.eh_proj.weight"]).num_mtp == CFG.num_mtp


def test_a_runs_checkpoints_keep_what_training_goes_by_and_loading_them_drops_no_token(
    monkeypatch, tmp_path
):
    own = dict(mtp_weight=0.1, balance=Balance(expert=0.02, device=0.05), buffer_factor=1.5)
    cfg = dataclasses.replace(CFG, transport="ring", **own)
    run = RunConfig(
        architecture=cfg, tokenizer="t", data=DataConfig(paths=("a",)), out=tmp_path / "run"
    )
    abstract = jax.eval_shape(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
    meta = json.loads(json.dumps(describe_model(run, abstract, None)))
    monkeypatch.setattr(pretrained, "all_steps", lambda path: [1])
    monkeypatch.setattr(pretrained, "read_meta", lambda path, step: meta)
    monkeypatch.setattr(pretrained, "read_params", lambda path, params, step, item: params)
    loaded = pretrained.load_model(tmp_path)
    assert {name: getattr(loaded.cfg, name) for name in own} == own
    assert loaded.cfg.transport is None  # which is chosen by the machine
    experts = loaded.moe_layers.mlp
    assert (experts.buffer_factor, experts.is_bounded) == (1.5, False)
    assert with_bounded_buffers(loaded).moe_layers.mlp.is_bounded
    del meta["training"]  # as of an older version
    assert pretrained.load_model(tmp_path).cfg.buffer_factor == Config.buffer_factor == 2.0
