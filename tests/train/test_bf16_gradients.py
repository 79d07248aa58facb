"""Training in bf16 has the gradients of float32: leaf by leaf, where many tokens are summed.

A sum of many terms in bf16 stops growing at 256 times one of them, so whatever meets all tokens (a
norm's scale, a bias, an adapter's vector, a row of the embedding) has to be summed in float32. The
numbers are compared for some, at 16,384 tokens; programs are read, which compiles nothing, for all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.models.deepseek.config import Config as DeepSeekConfig
from llmprep_jax.models.gemma3_text.config import Config as Gemma3Config
from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.nn.balance import Balance
from llmprep_jax.nn.linear import look_up
from llmprep_jax.nn.moe import Routing
from llmprep_jax.nn.norm import LayerNorm
from llmprep_jax.nn.param import AdapterParam, Compute, Param, add_bias, scale_by
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from llmprep_jax.train.losses import next_token_loss, training_loss
from tests.grids import cases
from tests.peft.test_methods import METHODS
from tests.programs import equations
from tests.random_modules import random_module

# a base this small turns all pairs within a row; else the gradient of a key's bias is near 0, as
# that of a softmax's shift is
_SIZES = dict(vocab_size=64, dim=32, num_layers=1, max_seq_len=64, rope_base=10.0)
_HEADS = dict(mlp_dim=64, head_dim=8, num_heads=4)
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, **_HEADS, num_kv_heads=2, tie_embeddings=True),
    "qwen2": LlamaConfig(
        **_SIZES, **_HEADS, num_kv_heads=2, qkv_bias=True, out_bias=True, mlp_bias=True
    ),
    "gemma3": Gemma3Config(**_SIZES, **_HEADS, num_kv_heads=1, window=16),
    "deepseek-v3": DeepSeekConfig(
        **_SIZES,
        mlp_dim=64,
        expert_dim=24,
        num_heads=4,
        kv_rank=16,
        q_rank=20,
        nope_dim=8,
        rope_dim=8,
        value_dim=8,
        num_dense=0,
        num_mtp=1,
        balance=Balance(expert=0.1),
        routing=Routing(8, 3, score="sigmoid", has_bias=True, normalize=True, scale=2.5),
    ),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def make_batch(rows: int = 512, length: int = 32) -> dict[str, np.ndarray]:
    """Rows of a rule that can be learned two tokens ahead, or gradients would be noise."""
    steps = np.random.default_rng(0).integers(1, 4, (rows, length + 1))
    tokens = (np.cumsum(steps, axis=1) % 64).astype(np.int32)
    ones = np.ones((rows, length), np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": ones}


def model_of(name: str, **compute) -> nnx.Module:
    """A family's random model, or the one with biases under a method's trained adapter."""
    cfg = dataclasses.replace(CONFIGS.get(name, CONFIGS["qwen2"]), compute=Compute(**compute))

    def make():
        model = registry.build(cfg, rngs=nnx.Rngs(0))
        return model if name in CONFIGS else lp.peft.inject(model, METHODS[name])

    return random_module(make)


def gradients(model: nnx.Module, kind: type, loss_fn: Any, batch: dict) -> nnx.State:
    graph, params, rest = nnx.split(model, kind, ...)

    def loss_of(params):
        loss = loss_fn(nnx.merge(graph, params, rest), batch)
        return loss.total / loss.count

    return jax.grad(loss_of)(params)


def what(name: str) -> tuple[type, Any]:
    """What is trained, and by what loss."""
    return (Param, training_loss) if name in CONFIGS else (AdapterParam, next_token_loss)


# each compiles two programs; of variants of a method, the one with more that meets all tokens
@pytest.mark.parametrize(
    "name",
    cases(
        [*CONFIGS, *METHODS],
        fast=["qwen2"],
        slow=[
            *("gemma3", "deepseek-v3", "dora", "loha", "lokr-both", "ia3-outputs", "vera"),
            *("adalora", "oft-exact", "hra", "tables", "dora-biases"),
        ],
    ),
)
def test_every_gradient_in_bf16_is_float32s_within_two_percent(name):
    run = jax.jit(gradients, static_argnums=(1, 2), compiler_options=QUICK)
    exact, found = [
        {".".join(map(str, path)): np.asarray(x[...], np.float32) for path, x in flat}
        for flat in [
            nnx.to_flat_state(run(model_of(name, dtype=dtype), *what(name), make_batch()))
            for dtype in ("float32", "bfloat16")
        ]
    ]
    errors = {
        path: np.linalg.norm(found[path] - x) / np.linalg.norm(x) for path, x in exact.items()
    }
    # rounded activations reach matrices too, and a rounded score sends tokens to other experts
    parts = {path: path.split(".")[0] for path in errors}
    allowed = {
        part: max([0.01, *[e for p, e in errors.items() if parts[p] == part and exact[p].ndim > 2]])
        for part in parts.values()
    }
    wrong = {path: e for path, e in errors.items() if not e <= 2 * allowed[parts[path]]}
    assert not wrong
    assert max(allowed.values()) < 0.03


def test_a_cpu_has_the_products_that_the_norms_of_dora_take_in_bf16():
    grads = jax.jit(gradients, static_argnums=(1, 2))(
        model_of("dora", dtype="bfloat16"), *what("dora"), make_batch(rows=1)
    )
    norms = [np.linalg.norm(np.asarray(x, np.float32)) for x in jax.tree.leaves(grads)]
    assert np.isfinite(norms).all()
    assert min(norms) > 0


# `reduce` is of a function that is not known as a sum; it may be one
REDUCED = ("reduce_sum", "reduce")
SUMS = (*REDUCED, "reduce_window", "reduce_window_sum", "cumsum", "scatter-add")
SUMS += ("dot_general", "ragged_dot_general", "psum", "psum_invariant", "reduce_scatter")


def narrow_sums(jaxpr: Any) -> set[str]:
    """Sums of more than a few terms whose result, and so whose steps, are in bf16."""
    found = set()
    for eqn in equations(jaxpr):
        if eqn.primitive.name not in SUMS:
            continue
        out, operand = eqn.outvars[0].aval, eqn.invars[0].aval
        terms = math.prod(operand.shape) / max(math.prod(out.shape), 1)
        is_few = eqn.primitive.name in REDUCED and terms <= 4
        if out.dtype == jnp.bfloat16 and not is_few:
            found.add(f"{eqn.primitive.name} {operand.shape} -> {out.shape}")
    return found


def _sum_by(reduce: Callable[..., Any], add: Callable[..., Any], *where: Any) -> Callable[..., Any]:
    return lambda x: reduce(x, np.zeros((), x.dtype), add, *where)


def _across(collective: Callable[..., Any], out: jax.P) -> Callable[..., Any]:
    def run(x):
        with jax.set_mesh(jax.make_mesh((8,), ("data",))):
            sharded = jax.shard_map(collective, in_specs=jax.P("data"), out_specs=out)
            return jax.make_jaxpr(lambda x: sharded(jax.reshard(x, jax.P("data"))))(x)

    return run


_WINDOWS = ((8, 1), (8, 1), "VALID")
WAYS = {
    "reduce_sum": _sum_by(jax.lax.reduce, jax.lax.add, (0,)),
    "reduce": _sum_by(jax.lax.reduce, lambda a, b: a + b, (0,)),
    "reduce_window_sum": _sum_by(jax.lax.reduce_window, jax.lax.add, *_WINDOWS),
    "reduce_window": _sum_by(jax.lax.reduce_window, lambda a, b: a + b, *_WINDOWS),
    "cumsum": jax.lax.cumsum,
    "scatter-add": lambda x: jnp.zeros_like(x).at[jnp.zeros(8, int)].add(x),
    "dot_general": lambda x: jnp.ones(8, x.dtype) @ x,
    "ragged_dot_general": lambda x: jax.lax.ragged_dot(
        x.T, jnp.ones((1, 8, 3), x.dtype), jnp.array([5], jnp.int32)
    ),
}
COLLECTIVES = {
    "psum_invariant": (lambda x: jax.lax.psum(x, "data"), jax.P()),
    "reduce_scatter": (
        lambda x: jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True),
        jax.P(None, "data"),
    ),
}


@pytest.mark.parametrize("name", [*WAYS, *COLLECTIVES])
def test_every_way_to_sum_in_bf16_is_seen(name):
    trace = jax.make_jaxpr(WAYS[name]) if name in WAYS else _across(*COLLECTIVES[name])
    found, exact = [
        narrow_sums(trace(jnp.ones((8, 8), dtype)).jaxpr) for dtype in ("bfloat16", "float32")
    ]
    assert [way.split()[0] for way in found] == [name]
    assert not exact


# variants that sum nothing which their sisters do not sum too
VARIANTS = ("dora-rslora", "lokr-both", "oft-coft", "ia3-outputs", "biases")
names = [
    pytest.param(name, marks=pytest.mark.grid if name in VARIANTS else ())
    for name in (*CONFIGS, *METHODS)
]


@pytest.mark.parametrize("name", names)
def test_no_gradient_is_summed_in_bf16(name):
    # a family's parameters too, which is the harder case
    param_dtype = "bfloat16" if name in CONFIGS else "float32"
    model = jax.eval_shape(lambda: model_of(name, dtype="bfloat16", param_dtype=param_dtype))
    jaxpr = jax.make_jaxpr(gradients, static_argnums=(1, 2))(
        model, *what(name), make_batch(rows=8, length=16)
    )
    assert narrow_sums(jaxpr.jaxpr) == set()


def draw(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 0.5, shape), dtype)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2, "fsdp": 2}], ids=["alone", "mesh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_over_tokens_have_exact_sums_as_gradients(mesh, dtype):
    with use_mesh(mesh and make_mesh(mesh)):
        x, w = draw(8, 8192, 4), jnp.zeros(4, dtype)
        exact = np.asarray(x, np.float64)
        x = jax.reshard(x, jax.P(("data", "fsdp"), None, "tensor")) if mesh else x
        for power, apply in (
            (1, add_bias),
            (2, scale_by),
            (2, lambda x, w: scale_by(x, w, x.dtype)),
        ):
            loss = lambda w, x, f=apply: jnp.sum(f(x, w).astype(jnp.float32) * x)  # noqa: E731
            compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
            found, expected = compiled(w, x).astype(jnp.float32), (exact**power).sum((0, 1))
            np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == "float32" else 4e-3)
            sums = [line for line in compiled.as_text().splitlines() if " all-reduce(" in line]
            assert bool(sums) == bool(mesh)
            assert not any("bf16" in line for line in sums)


@pytest.mark.parametrize("is_jitted", [False, True])
def test_the_forward_pass_rounds_where_it_did(is_jitted):
    y, b, w = draw(3, 5, 16), draw(16, dtype="float32", seed=1), draw(16, dtype="float32", seed=2)
    pairs = [
        (add_bias, lambda y: y + b.astype(y.dtype), b),
        (lambda y, w: scale_by(y, w, y.dtype), lambda y: y * w.astype(y.dtype), w),
        (scale_by, lambda y: (y * w).astype(y.dtype), w),
    ]
    for ours, plain, vector in pairs:
        ours, plain = (jax.jit(ours), jax.jit(plain)) if is_jitted else (ours, plain)
        np.testing.assert_array_equal(ours(y, vector), plain(y), strict=True)


def test_a_layer_norm_has_exact_sums_as_gradients():
    norm, x = LayerNorm(4, rngs=nnx.Rngs(0)), draw(65536, 4)
    grads = jax.jit(jax.grad(lambda norm: jnp.sum(norm(x).astype(jnp.float32) * x)))(norm)
    np.testing.assert_allclose(grads.bias[...], np.asarray(x, np.float64).sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    "mesh", [None, {"fsdp": 8}, {"data": 2, "tensor": 2, "fsdp": 2}], ids=["alone", "fsdp", "mixed"]
)
def test_the_gradient_of_a_bf16_table_is_summed_in_float32(mesh):
    tokens = np.arange(8 * 512).reshape(8, 512) % 4
    with use_mesh(mesh and make_mesh(mesh)):
        table = jnp.zeros((16, 8), jnp.bfloat16, out_sharding=spec("vocab", "embed"))
        axes = ("batch", None, None)

        def loss(table):
            return 1.25 * jnp.sum(look_up(table, tokens, "bfloat16", axes).astype(jnp.float32))

        grad = np.asarray(jax.jit(jax.grad(loss))(table), np.float32)
    np.testing.assert_array_equal(grad[:4], np.full((4, 8), 1280.0))
    assert not np.any(grad[4:])
