"""The loss: literal values, chunks equal to the whole, and memory that chunks save."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.param import Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.losses import cross_entropy, next_token_loss
from llmprep_jax.train.state import merge, split_model
from tests.train.toy import make_batch, toy


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


class _Broken:
    """A model whose logits from position 5 on are infinite."""

    def __init__(self, model):
        self.features, self._head = model.features, model.unembed

    def unembed(self, x_BTD):
        late_T = jnp.arange(x_BTD.shape[1]) >= 5
        return jnp.where(late_T[None, :, None], jnp.inf, self._head(x_BTD))


@functools.cache
def loss_and_gradients(chunk):
    batch, split = make_batch(), split_model(toy(), Param)

    def loss(params):
        model = merge(split.graphdef, params, split.frozen)
        return next_token_loss(model, batch, chunk=chunk, z_loss=1e-2).total

    return jax.jit(jax.value_and_grad(loss))(split.params)


@pytest.mark.parametrize("chunk", [5, 6, 100])
def test_chunks_give_the_loss_and_gradients_of_the_whole(chunk):
    whole, grads = loss_and_gradients(None)
    chunked, chunked_grads = loss_and_gradients(chunk)
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    chex.assert_trees_all_close(grads, chunked_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "chunk"), [({"fsdp": 8}, None), ({"fsdp": 4, "tensor": 2}, 5)], ids=str
)
def test_a_mesh_gives_the_loss_of_one_device(axes, chunk):
    batch = {name: x for name, x in make_batch().items() if name != "doc_ids"}
    loss = jax.jit(next_token_loss, static_argnames="chunk")
    alone = loss(toy(), batch, chunk=chunk)
    with use_mesh(make_mesh(axes)):
        model = toy()
        rows = {name: jax.device_put(x, jax.P(("fsdp",))) for name, x in batch.items()}
        sharded = loss(model, rows, chunk=chunk)
    np.testing.assert_allclose(sharded.total, alone.total, rtol=1e-6)
    assert float(sharded.count) == float(alone.count)


def test_chunks_keep_the_logits_out_of_memory():
    vocab, length = 4096, 512

    class Wide(nnx.Module):
        def __init__(self):
            self.w = Param(jnp.ones((8, vocab)))

        def features(self, tokens):
            return jnp.ones((1, length, 8)) * tokens[..., None], None

        def unembed(self, x_BTD):
            return x_BTD @ self.w[...]

    batch = {
        "tokens": jnp.ones((1, length), jnp.int32),
        "targets": jnp.ones((1, length), jnp.int32),
        "loss_mask": jnp.ones((1, length)),
    }

    def temporary_bytes(chunk):
        grad = jax.grad(lambda model: next_token_loss(model, batch, chunk=chunk).total)
        memory = jax.jit(grad).lower(Wide()).compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = vocab * length * 4
    assert temporary_bytes(None) >= logits
    assert temporary_bytes(32) < logits / 4
