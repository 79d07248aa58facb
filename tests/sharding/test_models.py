"""A mesh changes where numbers are, not what they are: every family on every kind of mesh.

Tolerances: sums are taken in another order, so logits agree to 2e-5 and gradients to 1e-5 of the
largest one of their array. 9 heads and 3 key heads on a tensor axis of 2 or 4 are replicated, while
the MLP and the vocabulary beside them are split.
"""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.models.gemma3_text.config import Config as Gemma3Config
from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.nn.balance import Balance
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from llmprep_jax.train.losses import training_loss
from tests.grids import cases
from tests.models import tiny
from tests.models.tiny import forward, random_model

MESHES = {
    "fsdp4-tensor2": {"fsdp": 4, "tensor": 2},
    "fsdp8": {"fsdp": 8},
    "fsdp2-tensor4": {"fsdp": 2, "tensor": 4},
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp2-expert2-tensor2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
_SIZES = dict(vocab_size=96, dim=32, mlp_dim=64, num_layers=2, head_dim=8, max_seq_len=64)
CONFIGS = {
    "llama-tied": LlamaConfig(**_SIZES, num_heads=4, num_kv_heads=2, tie_embeddings=True),
    "llama-9-3-heads": LlamaConfig(
        **_SIZES, num_heads=9, num_kv_heads=3, qkv_bias=True, out_bias=True, mlp_bias=True
    ),
    "gemma3-1-kv-head": Gemma3Config(
        **{**_SIZES, "num_layers": 3}, num_heads=4, num_kv_heads=1, window=6, global_every=3
    ),
    "deepseek-v3": dataclasses.replace(
        tiny.CONFIGS["deepseek-v3"], num_layers=2, balance=Balance(expert=0.1)
    ),
}
# each compiles for seconds: every family and every mesh, and heads that a mesh does not divide
PAIRS = cases(
    itertools.product(CONFIGS, MESHES),
    fast=[("llama-tied", "fsdp8"), ("llama-9-3-heads", "fsdp4-tensor2")],
    slow=[
        ("deepseek-v3", "fsdp2-expert2-tensor2"),  # fifteen seconds; nn/test_dispatch has its parts
        ("llama-9-3-heads", "fsdp2-tensor4"),
        ("gemma3-1-kv-head", "fsdp4-tensor2"),
    ],
)
on_pairs = pytest.mark.parametrize(("name", "mesh_name"), PAIRS)


@functools.cache
def build(name: str, mesh_name: str | None = None) -> nnx.Module:
    """The same numbers on every mesh."""
    with use_mesh(mesh_name and make_mesh(MESHES[mesh_name])):
        return random_model(CONFIGS[name])


def make_batch(rows: int = 8, length: int = 12) -> dict[str, np.ndarray]:
    """Packed rows: two documents each, and padding."""
    rng = np.random.default_rng(3)
    segments = np.repeat([[1, 2, 0]], rows, axis=0).repeat([5, 6, 1], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(5), np.arange(6), [0]]).astype(np.int32)
    return {
        "tokens": rng.integers(0, 96, (rows, length), dtype=np.int32),
        "targets": rng.integers(0, 96, (rows, length), dtype=np.int32),
        "loss_mask": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": np.repeat(positions[None], rows, axis=0),
    }


@jax.jit
def loss_and_grads(model, batch):
    def loss_of(model):
        loss = training_loss(model, batch)
        return loss.total / loss.count

    return jax.value_and_grad(loss_of)(model)


@functools.cache
def logits_alone(name: str) -> np.ndarray:
    return np.asarray(forward(build(name), make_batch()["tokens"]))


def assert_close(found, expected, name, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= tolerance * scale, name


def test_parameters_are_born_sharded_with_the_values_of_one_device():
    make = jax.jit(lambda: registry.build(CONFIGS["llama-tied"], rngs=nnx.Rngs(0)))
    single = make()
    with use_mesh(make_mesh(MESHES["fsdp4-tensor2"])):
        model = make()
    specs = {
        ".".join(path): jax.typeof(x[...]).sharding.spec
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
    assert specs == {
        "embed.w": jax.P("tensor", "fsdp"),
        "layers.attn.q.w": jax.P(None, "fsdp", "tensor", None),
        "layers.attn.k.w": jax.P(None, "fsdp", "tensor", None),
        "layers.attn.v.w": jax.P(None, "fsdp", "tensor", None),
        "layers.attn.o.w": jax.P(None, "tensor", None, "fsdp"),
        "layers.attn_norm.scale": jax.P(None, None),
        "layers.mlp.down.w": jax.P(None, "tensor", "fsdp"),
        "layers.mlp.gate.w": jax.P(None, "fsdp", "tensor"),
        "layers.mlp.up.w": jax.P(None, "fsdp", "tensor"),
        "layers.mlp_norm.scale": jax.P(None, None),
        "norm.scale": jax.P(None),
    }
    chex.assert_trees_all_equal(*[jax.tree.leaves(x) for x in (model, single)])


@on_pairs
def test_heads_that_a_mesh_does_not_divide_are_replicated(name, mesh_name):
    model, tensor = build(name, mesh_name), MESHES[mesh_name].get("tensor", 0)
    divided = lambda heads: "tensor" if tensor and heads % tensor == 0 else None  # noqa: E731
    if name == "deepseek-v3":
        layers, heads = model.dense_layers, [(4, "q_b"), (4, "kv_b")]
    else:
        layers, heads = model.layers, [(model.cfg.num_heads, "q"), (model.cfg.num_kv_heads, "k")]
    for number, part in heads:
        w = getattr(layers.attn, part).w
        assert jax.typeof(w[...]).sharding.spec[2] == divided(number)
    assert jax.typeof(layers.mlp.up.w[...]).sharding.spec[2] == divided(64)


@pytest.mark.parametrize("name", cases(CONFIGS, fast=["llama-9-3-heads"]))
def test_a_batch_that_the_mesh_does_not_divide_is_replicated(name):
    model = build(name, "fsdp4-tensor2")
    with use_mesh(make_mesh(MESHES["fsdp4-tensor2"])):
        found = forward(model, make_batch()["tokens"][:3])
    np.testing.assert_allclose(found, logits_alone(name)[:3], atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "axes"), [(16, ("fsdp", "expert")), (4, "fsdp"), (6, None)], ids=str
)
def test_rows_are_laid_over_the_first_axes_that_divide_them(rows, axes):
    with use_mesh(make_mesh({"fsdp": 4, "expert": 2})):
        assert spec("batch", "seq", shape=(rows, 3)) == jax.P(axes, None)


@on_pairs
def test_losses_and_gradients_equal_those_of_one_device(name, mesh_name):
    loss, grads = loss_and_grads(build(name), make_batch())
    model = build(name, mesh_name)
    with use_mesh(make_mesh(MESHES[mesh_name])):
        found_loss, found = loss_and_grads(model, make_batch())
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-6)
    for (path, ours), (_, expected), (_, weight) in zip(
        *[nnx.to_flat_state(nnx.state(x)) for x in (found, grads, model)], strict=True
    ):
        assert_close(ours[...], expected[...], path)
        assert jax.typeof(ours[...]).sharding == jax.typeof(weight[...]).sharding, path


@on_pairs
def test_cached_decoding_equals_one_device(name, mesh_name):
    tokens = make_batch()["tokens"]

    @jax.jit
    def decode(model, tokens):
        first = model(tokens[:, :11], cache=model.init_cache(8, 16))
        last = model(tokens[:, 11:], cache=first.cache)
        return jnp.concatenate([first.logits, last.logits], axis=1)

    with use_mesh(make_mesh(MESHES[mesh_name])):
        found = decode(build(name, mesh_name), tokens)
    np.testing.assert_allclose(found, logits_alone(name), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "mesh_name", "dtypes"),
    [
        ("llama-tied", "fsdp8", ("float32", "int8")),
        pytest.param("llama-tied", "fsdp8", ("float32", "bfloat16"), marks=pytest.mark.grid),
        pytest.param(
            *("gemma3-1-kv-head", "fsdp4-tensor2"),
            ("float32", "bfloat16", "int8"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_caches_in_pages_and_of_few_bits_decode_on_a_mesh_as_on_one_device(name, mesh_name, dtypes):
    tokens, expected = make_batch()["tokens"], logits_alone(name)

    @functools.partial(jax.jit, static_argnames="dtype")
    def decode(model, tokens, dtype):
        cache = model.init_cache(8, 16, dtype=dtype, page_size=4)
        first = model(tokens[:, :10], cache=cache)
        last = [first]
        for column in (10, 11):
            last.append(model(tokens[:, column : column + 1], cache=last[-1].cache))
        return jnp.concatenate([out.logits for out in last], axis=1)

    with use_mesh(make_mesh(MESHES[mesh_name])):
        model = build(name, mesh_name)
        found, *rounded = [decode(model, tokens, x) for x in dtypes]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for small in rounded:
        assert 0 < np.abs(small - expected).max() < 0.03 * np.abs(expected).max()
