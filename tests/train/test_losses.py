"""The loss: literal values, all kinds of heads, meshes, and memory that parts save."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax import peft
from llmprep_jax.nn.language_model import LanguageModel
from llmprep_jax.nn.param import AdapterParam, Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train import losses
from llmprep_jax.train.losses import cross_entropy, next_token_loss
from llmprep_jax.train.state import merge, split_model
from tests.models.tiny import ODD_CONFIGS, forward, random_model
from tests.random_modules import random_module
from tests.train.toy import VOCAB, Toy, make_batch, toy


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    losses_BT = cross_entropy(jnp.zeros((2, 3, 8)), jnp.zeros((2, 3), jnp.int32))
    np.testing.assert_allclose(losses_BT, np.full((2, 3), math.log(8)), rtol=1e-6)


def test_cross_entropy_has_its_literal_value():
    # log(e^1 + e^2 + e^3) = 3.4076060
    logits_BTV = jnp.array([[[1.0, 2.0, 3.0]]])
    assert float(cross_entropy(logits_BTV, jnp.array([[0]]))[0, 0]) == pytest.approx(2.4076060)
    with_z = cross_entropy(logits_BTV, jnp.array([[0]]), z_loss=0.1)
    assert float(with_z[0, 0]) == pytest.approx(2.4076060 + 0.1 * 3.4076060**2)


def test_bf16_logits_are_summed_in_float32():
    logits_BTV = jnp.zeros((1, 1, 4096), jnp.bfloat16)
    loss = cross_entropy(logits_BTV, jnp.zeros((1, 1), jnp.int32))
    assert loss.dtype == jnp.float32
    assert float(loss[0, 0]) == pytest.approx(math.log(4096), rel=1e-6)


def test_masked_tokens_weigh_nothing_even_with_infinite_loss():
    model, batch = toy(), make_batch(masked=False)
    del batch["doc_ids"]
    batch["loss_mask"][:, 5:] = 0.0
    first = {name: x[:, :5] for name, x in batch.items()}
    loss = jax.jit(next_token_loss)
    whole, part = loss(model, batch), loss(model, first)
    assert float(whole.count) == 40.0
    np.testing.assert_allclose(whole.total, part.total, rtol=1e-6)
    # a logit of +inf at masked positions only
    infinite = jax.jit(lambda model: next_token_loss(_Broken(model), batch))(model)
    np.testing.assert_allclose(infinite.total, part.total, rtol=1e-6)


class _Broken(Toy):
    """The model with logits from position 5 on that are infinite."""

    def __init__(self, model):
        self.embed, self.norm, self.head = model.embed, model.norm, model.head
        self.lora_a = None

    def unembed(self, x_BTD):
        late_T = jnp.arange(x_BTD.shape[1]) >= 5
        return jnp.where(late_T[None, :, None], jnp.inf, self.head(x_BTD))


def loss_and_gradients(model, kind=Param, **options):
    batch, split = make_batch(), split_model(model, kind)
    del batch["doc_ids"]

    def loss(params):
        model = merge(split.graphdef, params, split.frozen)
        return next_token_loss(model, batch, **options).total

    return jax.jit(jax.value_and_grad(loss))(split.params)


@pytest.mark.parametrize("num_positions", [5, 6])  # of 12: the last part of 5 is padded
def test_a_head_that_is_no_matrix_gives_the_same_some_positions_at_a_time(
    num_positions, monkeypatch
):
    expected = loss_and_gradients(toy(), z_loss=1e-2)
    monkeypatch.setattr(losses, "LOGITS_AT_A_TIME", 8 * VOCAB * num_positions)
    found = loss_and_gradients(toy(), z_loss=1e-2)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


# the head is the table of embeddings
CAPPED = dataclasses.replace(ODD_CONFIGS["gemma3-all-global"], logits_soft_cap=2.0)


@functools.cache
def capped():
    return random_model(CAPPED)


def test_the_loss_of_a_language_model_is_that_of_its_logits():
    batch = make_batch()
    loss = jax.jit(next_token_loss)(capped(), {k: batch[k] for k in batch if k != "doc_ids"})
    logits = forward(capped(), batch["tokens"])
    expected = np.asarray(cross_entropy(logits, batch["targets"])) * batch["loss_mask"]
    np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-5)


def test_an_adapted_head_has_the_loss_of_the_merged_one(monkeypatch):
    method = peft.LoRA(rank=2, targets=("embed",))
    adapted = random_module(lambda: peft.inject(random_model(CAPPED), method))
    merged = loss_and_gradients(peft.merge(adapted))
    monkeypatch.setattr(losses, "LOGITS_AT_A_TIME", 8 * 96 * 5)
    loss, gradients = loss_and_gradients(adapted, AdapterParam)
    np.testing.assert_allclose(loss, merged[0], rtol=1e-5)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_a_mesh_gives_the_loss_of_one_device(axes, monkeypatch):
    batch = {name: x for name, x in make_batch().items() if name != "doc_ids"}
    if "tensor" in axes:
        monkeypatch.setattr(losses, "LOGITS_AT_A_TIME", 8 * VOCAB * 5)
    loss = jax.jit(lambda model, batch: next_token_loss(model, batch))
    alone = loss(toy(), batch)
    with use_mesh(make_mesh(axes)):
        model = toy()
        rows = {name: jax.device_put(x, jax.P(("fsdp",))) for name, x in batch.items()}
        sharded = loss(model, rows)
    np.testing.assert_allclose(sharded.total, alone.total, rtol=1e-6)
    assert float(sharded.count) == float(alone.count)


@pytest.mark.parametrize("axes", [None, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_positions_are_counted_by_what_one_device_holds(axes, monkeypatch):
    # of 8 rows and 12 positions, one row's logits: enough for all where 8 devices share them
    monkeypatch.setattr(losses, "LOGITS_AT_A_TIME", 12 * VOCAB)
    batch = {name: x for name, x in make_batch().items() if name != "doc_ids"}
    with use_mesh(axes and make_mesh(axes)):
        program = str(jax.make_jaxpr(lambda model: next_token_loss(model, batch).total)(toy()))
    assert ("scan[" in program) == (axes is None)


def test_positions_keep_the_logits_of_an_adapted_head_out_of_memory(monkeypatch):
    vocab, length = 4096, 512

    class Wide(LanguageModel):
        def __init__(self):
            self.w = Param(jnp.ones((8, vocab)))

        def embed_inputs(self, tokens):
            return jnp.ones((1, length, 8)) * tokens[..., None]

        def features(self, x_BTD, in_order):
            return x_BTD, None

        def unembedding(self):
            return None

        def unembed(self, x_BTD):
            return x_BTD @ self.w[...]

    batch = {
        "tokens": jnp.ones((1, length), jnp.int32),
        "targets": jnp.ones((1, length), jnp.int32),
        "loss_mask": jnp.ones((1, length)),
    }

    def temporary_bytes():
        grad = jax.grad(lambda model: next_token_loss(model, batch).total)
        memory = jax.jit(grad).lower(Wide()).compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = vocab * length * 4
    assert temporary_bytes() >= logits
    monkeypatch.setattr(losses, "LOGITS_AT_A_TIME", vocab * 32)
    assert temporary_bytes() < logits / 4
