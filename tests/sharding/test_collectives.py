"""What crosses the network: activations, in the compute dtype, and no table of embeddings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config
from llmprep_jax.nn.linear import Embed, contract, look_up
from llmprep_jax.nn.param import Compute
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from llmprep_jax.train.losses import next_token_loss
from tests.sharding.collectives import collectives

MIB = 2**20
BF16 = Compute(dtype="bfloat16", param_dtype="float32")


def placed(shape, dtype="int32"):
    """An abstract batch, laid over the mesh in force by its rows."""
    mesh = jax.sharding.get_mesh()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec("batch")))


@jax.jit
def embedding_and_gradient(embed, tokens):
    def loss_of(embed):
        return jnp.square(embed(tokens).astype(jnp.float32)).sum()

    return jax.value_and_grad(loss_of)(embed)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_no_device_sees_more_of_gemma_27_b_s_table_than_its_part(axes):
    cfg = registry.preset("gemma3-27b")
    rows, length = 8, 1024
    with use_mesh(make_mesh(axes)):
        make = functools.partial(Embed, cfg.vocab_size, cfg.dim, compute=BF16)
        embed = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        lowered = embedding_and_gradient.lower(embed, placed((rows, length)))
        sent = [x for x in collectives(lowered) if x.shape]
    part = cfg.vocab_size * cfg.dim // 8
    assert (
        embed.w.get_value().sharding.shard_shape((cfg.vocab_size, cfg.dim))[1]
        == 5376 // (axes["fsdp"])
    )
    memory = lowered.compile().memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(part * 4, rel=1e-3)  # 672 MiB
    assert memory.temp_size_in_bytes < 128 * MIB  # 42 and 105
    assert {x.dtype for x in sent} == {"bf16", "s32"}
    # the activations of a device's rows, or of its share of the columns
    share = rows * length * cfg.dim // 8 * axes.get("tensor", 1) * 2
    assert max(x.num_bytes for x in sent) == share  # 10.5 and 21 MiB


def draw_table(num_rows=24, dim=16):
    return np.random.default_rng(0).normal(size=(num_rows, dim)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(2,))
def rows_and_gradient(table, tokens, dtype):
    axes = ("batch", "seq", "act_embed")
    y, pullback = jax.vjp(lambda table: look_up(table, tokens, dtype, axes), table)
    return y, pullback(jnp.cos(y))[0]


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [({"fsdp": 4, "tensor": 2}, 8), ({"data": 2, "tensor": 4}, 3), ({"fsdp": 2, "expert": 4}, 2)],
    ids=str,
)
def test_rows_of_a_table_and_its_gradient_are_those_of_one_device(mesh, rows):
    table = draw_table()
    tokens = np.random.default_rng(1).integers(0, 24, (rows, 5)).astype(np.int32)
    tokens[0, :3] = 23, 0, -1
    odd = np.full((rows, 5), 30, np.int32)  # outside: the nearest row, as on one device
    expected, nearest = [rows_and_gradient(table, x, "float32") for x in (tokens, odd)]
    with use_mesh(make_mesh(mesh)):
        laid = jax.reshard(table, spec("vocab", "embed", shape=table.shape))
        y, grad = rows_and_gradient(laid, tokens, "float32")
        assert jax.typeof(grad).sharding == jax.typeof(laid).sharding
        np.testing.assert_array_equal(rows_and_gradient(laid, odd, "float32")[0], nearest[0])
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_allclose(grad, expected[1], atol=1e-6)


def test_gradients_of_a_table_are_summed_in_float32_where_activations_are_bf16():
    tokens = np.zeros((8, 512), np.int32)
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        table = jax.reshard(jnp.zeros((24, 16)), spec("vocab", "embed", shape=(24, 16)))
        y, grad = rows_and_gradient(table, tokens, "bfloat16")
    assert (y.dtype, grad.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(np.asarray(grad)[0], np.full(16, 4096.0))  # bf16 stays at 256


@jax.jit
def loss_and_grads(model, batch):
    return jax.value_and_grad(lambda model: next_token_loss(model, batch).total)(model)


def test_what_activations_need_of_other_devices_crosses_the_network_in_bf16():
    cfg = Config(96, 32, 64, 1, 4, 2, 8, max_seq_len=64, tie_embeddings=False)
    cfg = dataclasses.replace(cfg, compute=BF16)
    length = 20  # no other size
    with use_mesh(make_mesh({"fsdp": 2, "tensor": 4})):
        model = jax.eval_shape(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
        batch = {name: placed((8, length)) for name in ("tokens", "targets")}
        batch["loss_mask"] = placed((8, length), "float32")
        sent = collectives(loss_and_grads.lower(model, batch))
    activations = [x for x in sent if length in x.shape and len(x.shape) > 2]
    assert {x.dtype for x in activations} == {"bf16"}
    sums = [x for x in activations if x.op == "all-reduce"]
    # forward of o, down and the table; backward of q, k, v, gate and up
    assert len(sums) >= 6
    # backward of the head, of a device's 80 tokens; no logits, but numbers by token in float32
    of_tokens = [x for x in sent if x.shape and x.shape[0] == 4 * length]
    assert {(x.op, x.dtype, x.shape) for x in of_tokens} == {
        ("all-reduce", "bf16", (80, 32)),
        ("all-reduce", "f32", (80,)),
    }
    gathered = [x for x in sent if x.op == "all-gather" and len(x.shape) > 1]
    assert "f32" not in {x.dtype for x in gathered}  # weights are cast before they are sent


@pytest.mark.parametrize("kind", [{}, {"dtype": "int8"}, {"page_size": 44}], ids=str)
def test_a_decode_step_sends_nothing_of_what_is_cached(kind):
    cfg = Config(96, 32, 64, 2, 4, 2, 8, max_seq_len=64, tie_embeddings=False)
    num_slots = 44  # no other size
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        model = jax.eval_shape(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
        cache = registry.build(cfg, rngs=nnx.Rngs(0)).init_cache(8, num_slots, **kind)
        leaves, structure = jax.tree.flatten(cache)

        def step(model, leaves, tokens):
            return jax.tree.leaves(model(tokens, cache=structure.unflatten(leaves)))

        sent = collectives(jax.jit(step).lower(model, leaves, placed((8, 1))))
    assert sent
    assert not [x for x in sent if num_slots in x.shape]


def test_a_device_s_own_sum_is_float32_and_rounded_once():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 2, 2048)), rng.normal(size=(2048, 16))
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    axes = ("batch", "seq", "mlp")
    run = jax.jit(lambda x, w: contract("BTD,DF->BTF", x, w, jnp.dtype("bfloat16"), axes))
    expected = run(x, w)
    with use_mesh(make_mesh({"fsdp": 8})):
        found = run(x, jax.reshard(w, spec("embed", "mlp")))
    exact = np.einsum("btd,df->btf", np.float64(x), np.float64(w))
    error = lambda y: np.abs(np.float64(y) - exact).max() / np.abs(exact).max()  # noqa: E731
    assert error(found) == pytest.approx(error(expected), rel=0.05)
    assert error(found) < 2**-8
