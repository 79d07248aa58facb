"""Attention against a float64 loop, `chunked` against the reference; meshes; memory."""

import dataclasses
import itertools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.flash_attention import api, attention, chunked
from llmprep_jax.kernels.platforms import tell_once
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from tests.grids import cases
from tests.kernels.flash_attention.problems import Problem, alibi, assert_close, run

P = Problem


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(num_heads=4, num_kv_heads=2, T=5, S=7, B=2, H=8):
    q = draw(B, T, num_heads, H)
    return q, draw(B, S, num_kv_heads, H, seed=1), draw(B, S, num_kv_heads, H, seed=2)


def slow_attention(q_BTNH, k_BSKH, v_BSKH, seen_BTS, scale, soft_cap=None, bias=None, sinks=None):
    """One query, head and row at a time, in float64; query head n reads key head n // G."""
    q, k, v = [np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH)]
    out, group = np.zeros((*q.shape[:3], v.shape[3])), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, :, n // group] @ q[b, t, n] * scale
        if bias is not None:
            scores += bias[n, t]
        if soft_cap is not None:
            scores = np.tanh(scores / soft_cap) * soft_cap
        weights = np.where(seen_BTS[b, t], np.exp(scores), 0)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
        out[b, t, n] = weights @ v[b, :, n // group] / total if total else 0
    return out


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_attention_is_a_softmax_over_the_visible_keys(impl):
    (q, k, v), sinks = qkv(6, 2), draw(6, seed=5)
    seen = np.tril(np.ones((5, 7), bool))[None].repeat(2, 0)
    bias = np.stack(
        [-(2.0 ** -(n + 1)) * np.abs(np.arange(5)[:, None] - np.arange(7)) for n in range(6)]
    )
    options = dict(scale=0.3, soft_cap=0.7, bias=alibi, sinks=sinks, impl=impl)
    found = jax.jit(lambda *x: attention(*x, **options))(q, k, v)
    np.testing.assert_allclose(
        found, slow_attention(q, k, v, seen, 0.3, 0.7, bias, sinks), atol=1e-5
    )


def test_scores_are_scaled_by_the_head_width_unless_told():
    q, k, v = qkv()
    np.testing.assert_allclose(attention(q, k, v), attention(q, k, v, scale=8**-0.5), atol=0)


def test_a_query_that_sees_nothing_gives_zero_and_owes_nothing():
    q, k, v = qkv()
    segments = dict(q_segments=np.zeros((2, 5), int), k_segments=np.ones((2, 7), int))
    found, lse = attention(q, k, v, **segments, return_lse=True)
    assert not np.asarray(found).any()
    assert (np.asarray(lse) < -2e38).all()

    def total(*x):
        o, lse = attention(*x, **segments, return_lse=True)
        return o.sum() + lse.sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["rows", "queries", "keys"]
)
def test_nothing_attends_to_something_and_something_to_nothing(sizes):
    B, T, S = sizes
    arrays = qkv(T=T, S=S, B=B)

    def total(*arrays):
        o, lse = attention(*arrays, return_lse=True)
        return o.sum(), (o, lse)

    (_, (o, lse)), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
    chex.assert_trees_all_equal((o, *grads), tuple(map(np.zeros_like, (arrays[0], *arrays))))
    assert lse.shape == (B, T, 4)
    assert (np.asarray(lse) < -2e38).all()


def test_softmax_is_float32_for_bf16_operands():
    q, k, v = [x.astype(jnp.bfloat16) for x in qkv(T=1, S=512, B=1)]
    found = attention(q, k, v, causal=False, scale=0.1)
    exact = slow_attention(
        *(np.asarray(x, np.float32) for x in (q, k, v)), np.ones((1, 1, 512)), 0.1
    )
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float32) - exact).max() < 2e-3


def test_a_bias_of_two_factors_is_their_product():
    (q, k, v), (a, b) = qkv(), (draw(2, 5, 4, 3), draw(1, 7, 4, 3))  # keys by query head
    bias = np.einsum("btnr,snr->bnts", a, b[0])
    dense = [
        slow_attention(*[x[i : i + 1] for x in (q, k, v)], np.ones((1, 5, 7)), 0.3, None, bias[i])
        for i in (0, 1)
    ]
    found = attention(q, k, v, causal=False, scale=0.3, bias=(a, b))
    np.testing.assert_allclose(found, np.concatenate(dense), atol=1e-5)


def test_lse_takes_sinks_in_and_has_a_gradient():
    q, k, v = qkv(2, 1)
    sinks = np.array([0.3, -0.2], np.float32)

    def lse(q, sinks):
        return attention(q, k, v, causal=False, sinks=sinks, return_lse=True)[1].sum()

    def plain(q, sinks):
        s = jnp.einsum("btnh,bsh->btns", q, k[:, :, 0]) * 8**-0.5
        return jnp.logaddexp(jax.nn.logsumexp(s, axis=-1), sinks).sum()

    found, wanted = [jax.jit(jax.value_and_grad(f, (0, 1)))(q, sinks) for f in (lse, plain)]
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


# each feature once, written out; and all of them as a loop whose blocks divide nothing
PROBLEMS = [
    P(T=300),
    P(T=300, window=70, N=8, K=1),
    P(T=300, causal=False, window=70),
    P(T=300, S=200, window=20),
    P(T=150, values="s", sinks=True),
    P(values="e", U=8),
    P(values="i", bias="function"),
    P(values="rsi", window=9, soft_cap=2.0),
    P(T=5, S=33, values="ps", bias="factors"),
    P(B=1, T=1, S=33, values="ps"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_blocks_are_the_reference(problem):
    assert_close(run(problem, "chunked"), run(problem, "reference"), 1e-5)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_blocks_in_a_loop_are_the_reference(problem, monkeypatch):
    for name, value in dict(WHOLE=0, Q_BLOCK=32, K_BLOCK=40).items():
        monkeypatch.setattr(chunked, name, value)
    if problem.T > 1:
        assert_close(run(problem, "chunked"), run(problem, "reference"), 1e-5)


def test_rows_that_fill_the_last_block_of_a_loop_owe_nothing_whatever_the_bias(monkeypatch):
    for name, value in dict(WHOLE=0, Q_BLOCK=16, K_BLOCK=10).items():
        monkeypatch.setattr(chunked, name, value)
    arrays = qkv(T=20, S=20)

    def gradients(**options):
        run = lambda *x: attention(*x, causal=False, **options).sum()  # noqa: E731
        return jax.jit(jax.grad(run, argnums=(0, 1, 2)))(*arrays)

    biased = gradients(bias=lambda head, i, j: 100.0 + 0 * (head + i + j))
    chex.assert_trees_all_close(biased, gradients(), atol=1e-4)


@pytest.mark.parametrize("loops", [False, True])
def test_blocks_in_bf16_are_the_reference(loops, monkeypatch):
    if loops:
        for name, value in dict(WHOLE=0, Q_BLOCK=32, K_BLOCK=40).items():
            monkeypatch.setattr(chunked, name, value)
    problem = P(T=150, values="s", window=50, dtype="bfloat16")
    assert_close(run(problem, "chunked"), run(problem, "reference"), 2e-2)


def temporaries(T: int, **options) -> int:
    q = jax.ShapeDtypeStruct((1, T, 8, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.bfloat16)
    loss = lambda *x: attention(*x, **options).astype(jnp.float32).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_forward_and_backward_is_linear_in_length():
    short, long = temporaries(2048), temporaries(32768)
    assert long < 17 * short
    assert long < 400 * 2**20  # of float32 scores alone there are 32 GiB


def test_few_blocks_are_written_out_each_with_the_keys_up_to_its_end():
    q, k, v = qkv(1, 1, 2048, 2048, 1, 64)
    assert str(jax.make_jaxpr(attention)(q, k, v)).count("dot_general[") == 16

    def cost(**options):
        run = jax.jit(lambda *x: attention(*x, **options))
        return run.lower(q, k, v).cost_analysis()["flops"]

    whole = cost(causal=False)
    assert cost() < 0.6 * whole
    assert cost(window=256) < 0.3 * whole


MESHES = {"heads": dict(fsdp=2, tensor=4), "rows": dict(fsdp=2, data=4), "all": dict(tensor=8)}


# each mesh, and key heads that it divides, has fewer of, or cannot divide
ON_MESHES = cases(
    itertools.product(MESHES, [(8, 4), (8, 2), (24, 3), (8, 1)]),
    fast=[
        *[("heads", (8, 2)), ("heads", (24, 3)), ("rows", (8, 4))],
        *[("all", (8, 4)), ("all", (8, 1))],
    ],
)


@pytest.mark.parametrize(("mesh", "heads"), ON_MESHES, ids=str)
def test_a_mesh_changes_nothing(mesh, heads):
    N, K = heads
    arrays = qkv(N, K, 12, 12, 8, 4)
    segments = np.repeat([[1, 2, 0]], 4, axis=1) * np.ones((8, 1), int)
    weights = draw(8, 12, N, 4, seed=9)

    def loss(q, k, v):
        o, lse = attention(
            q, k, v, q_segments=segments, k_segments=segments, window=3, return_lse=True
        )
        return jnp.sum(o * weights) + jnp.sum(jnp.where(lse > -1e38, lse, 0.0)), o

    both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    wanted = jax.jit(both)(*arrays)
    with use_mesh(make_mesh(MESHES[mesh])):
        placed = [
            jax.device_put(x, spec("batch", None, name, None, shape=x.shape))
            for x, name in zip(arrays, ("heads", "kv_heads", "kv_heads"), strict=True)
        ]
        compiled = jax.jit(both).lower(*placed).compile()
        found = compiled(*placed)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
    if mesh == "rows":  # rows that lie on one device need no other
        assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_rows_that_a_shard_map_has_split_leave_heads_to_the_other_axes(num_kv_heads):
    arrays = qkv(8, num_kv_heads, 12, 12, 8, 4)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, window=5)), axis=(1, 2, 3))

    def gradients(rows):
        return jax.jit(jax.value_and_grad(lambda *x: rows(*x).sum(), argnums=(0, 1, 2)))

    wanted = gradients(loss)(*arrays)
    with use_mesh(make_mesh(dict(data=2, tensor=4))):
        placed = [
            jax.device_put(x, spec("batch", None, name, None, shape=x.shape))
            for x, name in zip(arrays, ("heads", "kv_heads", "kv_heads"), strict=True)
        ]
        split = jax.shard_map(
            loss, in_specs=jax.P("data"), out_specs=jax.P("data"), axis_names={"data"}
        )
        found = gradients(split)(*placed)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_factors_of_a_bias_need_not_lie_as_queries_and_keys_do(num_kv_heads):
    arrays = (*qkv(8, num_kv_heads, 6, 6, 2, 4), draw(2, 6, 8, 3, seed=4), draw(1, 6, 8, 3, seed=5))

    def total(q, k, v, a, b):
        return attention(q, k, v, bias=(a, b)).sum()

    both = jax.value_and_grad(total, argnums=tuple(range(5)))
    wanted = jax.jit(both)(*arrays)
    with use_mesh(make_mesh(dict(fsdp=2, tensor=4))):
        placed = [
            jax.device_put(x, spec("batch", None, name, None, shape=x.shape))
            for x, name in zip(arrays[:3], ("heads", "kv_heads", "kv_heads"), strict=True)
        ]
        found = jax.jit(both)(*placed, *arrays[3:])
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_mesh_changes_nothing_in_bf16_but_rounding():
    arrays = [jnp.asarray(x, "bfloat16") for x in qkv(8, 2, 12, 12, 8, 4)]

    def loss(q, k, v):
        return jnp.sum(jnp.square(attention(q, k, v).astype(jnp.float32)))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    wanted = gradients(*arrays)
    with use_mesh(make_mesh(MESHES["heads"])):
        q = jax.device_put(arrays[0], spec("batch", None, "heads", None, shape=arrays[0].shape))
        found = gradients(q, *arrays[1:])
    for x, y in zip(found, wanted, strict=True):
        x, y = [np.asarray(a, np.float32) for a in (x, y)]
        np.testing.assert_allclose(x, y, atol=2e-2 * np.abs(y).max())


def test_each_device_takes_the_keys_of_its_own_query_heads():
    arrays = [jnp.zeros((1, 64, heads, 16)) for heads in (8, 2, 2)]
    with use_mesh(make_mesh(dict(tensor=8))):
        q = jax.device_put(arrays[0], spec(None, None, "heads", None))
        text = jax.jit(attention).lower(q, *arrays[1:]).compile().as_text()
    assert "f32[1,64,1,16]" in text  # one key head
    assert not {"f32[1,64,8,16]", "f32[1,8,64,16]"} & set(re.findall(r"f32\[[\d,]+\]", text))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 2, 4)), {}, r"N a multiple of K"),
        (((1, 2, 2, 4), (1, 2, 2, 5), (1, 2, 2, 4)), {}, r"they must be \[B, T, N, H\]"),
        (((1, 2, 2, 4),) * 3, dict(window=0), r"window=0; it counts the query itself"),
        (((2, 3, 2, 4),) * 3, dict(k_spans=jnp.ones(3)), r"of k are \(3,\); they must be \(2, 3\)"),
        (((1, 2, 2, 4),) * 3, dict(value_width=2), r"give v, or value_width where"),
        (((1, 2, 2, 4),) * 3, dict(impl="flash"), r"unknown impl 'flash'; there are reference, "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*map(jnp.zeros, shapes), **options)


def test_what_a_backend_refuses_falls_to_the_next_and_is_said_once(monkeypatch):
    monkeypatch.setattr(api, "BACKENDS", dict(cpu=("reference",)))
    monkeypatch.setattr(chunked, "refusal", lambda *_: "it is Sunday")
    tell_once.cache_clear()
    q = jnp.ones((1, 2, 1, 4))
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(2):
            attention(q, q, q, impl="chunked")
    (one,) = caught
    assert "impl='chunked' cannot do this (it is Sunday)" in str(one.message)


def test_problems_differ_in_each_field():
    changed = dict(B=3, T=5, S=6, N=8, K=1, H=4, U=2, causal=False, window=3, soft_cap=1.0)
    changed |= dict(values="p", sinks=True, bias="function", dtype="bfloat16")
    assert changed.keys() == {field.name for field in dataclasses.fields(Problem)}
    names = {str(Problem(**{name: value})) for name, value in changed.items()}
    assert len(names) == len(changed)
