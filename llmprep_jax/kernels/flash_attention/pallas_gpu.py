"""Attention on NVIDIA GPUs by Pallas kernels that Triton compiles; they interpret on a CPU.

FlashAttention-2 (Dao 2023): a program of the forward kernel, and of the one for dq, has a block of
queries and walks over blocks of keys; one of the kernel for dk and dv has a block of keys and walks
over blocks of queries of all heads that share them, so that nothing is added up through memory and
every run gives the same bits. Few queries have the heads of a group as rows of one tile, and their
keys are split over programs (flash-decoding). Arrays are read as [B, T, N, H], where they lie as
layers make them: the transposes to head-major arrays and back cancel, which saves a copy of each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmprep_jax.kernels.flash_attention.gpu_blocks import (
    SHARED_BYTES,
    blocks_seen,
    cut_width,
    join_parts,
    num_splits,
    shared_bytes,
    sizes_of,
)
from llmprep_jax.kernels.flash_attention.gpu_tiles import (
    LOG2_E,
    Array,
    Pair,
    Task,
    dot,
    dots,
    hide_tail,
    load_keys,
    load_places,
    load_rows,
    load_tile,
    padded,
    round_up,
    row_specs,
    scores,
    store_tile,
    stored_spec,
    stored_specs,
    task_of,
    tile_spec,
    tokens_left,
    walk,
)
from llmprep_jax.kernels.flash_attention.masks import NEG_INF, Rule
from llmprep_jax.kernels.flash_attention.stored import NOT_STORED, Stored, num_slots
from llmprep_jax.kernels.platforms import in_32_bits, platform

FOLDED = 16  # tokens up to which the heads of a group share tiles, as where an answer is made
DTYPES = ("float32", "bfloat16", "float16")


def refusal(q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, rule: Rule, backward: bool) -> str | None:
    """Why these kernels cannot do it, forward or backward; None: they can."""
    dtype = q_BNTH.dtype
    if dtype.name not in DTYPES:
        return f"it takes {', '.join(DTYPES)}, not {dtype.name}"
    T, (S, H), U = q_BNTH.shape[2], k_BKSH.shape[2:], v_BKSU.shape[-1]
    if not all(x.size for x in (q_BNTH, k_BKSH, v_BKSU)):
        return "an array is empty"
    for which in ("dq", "dkv") if backward else ("forward",):
        sizes = sizes_of(which, H, U, dtype, T, S)
        if "pages" in rule.stored and S % sizes.k:
            return f"pages of {S} slots are no whole tiles of {sizes.k}"
        need = shared_bytes(which, sizes, H, U, dtype)
        if need > SHARED_BYTES:
            return (
                f"widths {H} and {U} in {dtype.name} take {need} bytes of shared memory in {which};"
                f" there are {SHARED_BYTES}"
            )
    return None


def forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    places: Pair,
    rule: Rule,
    stored: Stored = NOT_STORED,
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`."""
    (B, N, T, H), K = q_BNTH.shape, k_BKSH.shape[1]
    if rule.value_width is not None and stored.k_scales is not None:
        stored = stored._replace(v_scales=stored.k_scales)
    if T > FOLDED:
        o_PBNTU, lse_PBNT = _forward(q_BNTH, k_BKSH, v_BKSU, places, rule, stored)
        return o_PBNTU[0], lse_PBNT[0]
    places = _fold(places, (T, num_slots(k_BKSH, stored.pages)), N // K)
    rows = N // K * T
    q_BKRH = q_BNTH.reshape(B, K, rows, H)
    o, lse = _forward(q_BKRH, k_BKSH, v_BKSU, places, rule, stored, fold=T)
    o, lse = join_parts(o, lse)
    return o.astype(q_BNTH.dtype).reshape(B, N, T, -1), lse.reshape(B, N, T)


def _fold(places: Pair, lengths: tuple[int, int], group: int) -> Pair:
    """Places of rows that are the tokens of each head of a group."""
    q, k = places
    if q.positions is None:
        columns = [jnp.arange(length, dtype=jnp.int32)[None] for length in lengths]
        q, k = [x._replace(positions=y) for x, y in zip(places, columns, strict=True)]
    return jax.tree.map(lambda x: jnp.tile(x, (1, group)), q), k


def _forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    places: Pair,
    rule: Rule,
    stored: Stored,
    fold: int = 0,
) -> tuple[Array, Array]:
    """(o, lse) of each part of the keys, which is one but where `fold` is given."""
    task = task_of("forward", q_BNTH, k_BKSH, v_BKSU, places, rule, stored.pages)
    (B, N, T, H), S, U, I = q_BNTH.shape, task.S, task.U, task.num_q_blocks
    P = num_splits(B * N * I, task.num_k_blocks) if fold else 1
    task = task._replace(fold=fold, splits=P)
    if rule.value_width is not None:  # a slice would be a copy
        v_BKSU = k_BKSH
    keys = k_BKSH, v_BKSU
    if fold or rule.stored:  # as a cache has them
        key_specs = [stored_spec(x, task) for x in keys]
    else:
        keys = [x.swapaxes(1, 2) for x in keys]
        whole = lambda i, n, b: (b, 0, jax.lax.div(n, task.group), 0)  # noqa: E731
        key_specs = [tile_spec(round_up(S, task.sizes.k), x, whole) for x in (H, U)]

    def block(i: Array) -> Array:  # causal blocks of most keys first
        return I - 1 - jax.lax.rem(i, I)

    part = lambda i, n, b: (jax.lax.div(i, I), b, block(i), n, 0)  # noqa: E731
    bounds = blocks_seen(places, rule, (T, S), task.sizes) if task.by_value else None
    specs = [
        tile_spec(task.sizes.q, H, lambda i, n, b: (b, block(i), n, 0)),
        *key_specs,
        row_specs(places[0], round_up(T, task.sizes.q)),
        row_specs(places[1], round_up(S, task.sizes.k)),
        row_specs(bounds, I),
        stored_specs(stored, task),
    ]
    row = pl.BlockSpec(
        (None, None, None, task.sizes.q), lambda i, n, b: (jax.lax.div(i, I), b, n, block(i))
    )
    o_PBTNU, lse_PBNT = _call(
        functools.partial(_forward_kernel, task=task),
        task,
        grid=(I * P, N, B),
        in_specs=specs,
        out_specs=[pl.BlockSpec((None, None, task.sizes.q, None, padded(U)), part), row],
        out_shape=[
            jax.ShapeDtypeStruct((P, B, T, N, U), q_BNTH.dtype if P == 1 else jnp.float32),
            jax.ShapeDtypeStruct((P, B, N, T), jnp.float32),
        ],
        name="attention_forward",
    )(q_BNTH.swapaxes(1, 2), *keys, *places, bounds, stored)
    return o_PBTNU.swapaxes(2, 3), lse_PBNT


def backward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    lse_BNT: Array,
    do_BNTU: Array,
    delta_BNT: Array,
    places: Pair,
    rule: Rule,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), as `reference.backward`."""
    arrays = [x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSU, do_BNTU.astype(q_BNTH.dtype))]
    # a row that sees nothing has no probabilities; in base 2 its lse would be -inf
    lse_BNT = jnp.where(lse_BNT > NEG_INF / 2, lse_BNT * LOG2_E, jnp.inf)
    by_query = (lse_BNT, delta_BNT)
    dq_task = task_of("dq", q_BNTH, k_BKSH, v_BKSU, places, rule)
    dq_BTNH = _backward_queries(arrays, by_query, places, dq_task)
    dkv_task = task_of("dkv", q_BNTH, k_BKSH, v_BKSU, places, rule)
    dk_BSKH, dv_BSKU = _backward_keys(arrays, by_query, places, dkv_task)
    return dq_BTNH.swapaxes(1, 2), dk_BSKH.swapaxes(1, 2), dv_BSKU.swapaxes(1, 2)


def _backward_queries(
    arrays: Sequence[Array], by_query: Sequence[Array], places: Pair, task: Task
) -> Array:
    (B, T, N, H), S, U, I = arrays[0].shape, task.S, task.U, task.num_q_blocks
    block = lambda i, n, b: (b, I - 1 - i, n, 0)  # noqa: E731
    whole = lambda i, n, b: (b, 0, jax.lax.div(n, task.group), 0)  # noqa: E731
    bounds = blocks_seen(places, task.rule, (T, S), task.sizes) if task.by_value else None
    row = pl.BlockSpec((None, None, task.sizes.q), lambda i, n, b: (b, n, I - 1 - i))
    specs = [
        tile_spec(task.sizes.q, H, block),
        tile_spec(round_up(S, task.sizes.k), H, whole),
        tile_spec(round_up(S, task.sizes.k), U, whole),
        tile_spec(task.sizes.q, U, block),
        row,
        row,
        row_specs(places[0], round_up(T, task.sizes.q)),
        row_specs(places[1], round_up(S, task.sizes.k)),
        row_specs(bounds, I),
    ]
    return _call(
        functools.partial(_queries_kernel, task=task),
        task,
        grid=(I, N, B),
        in_specs=specs,
        out_specs=tile_spec(task.sizes.q, H, block),
        out_shape=jax.ShapeDtypeStruct((B, T, N, H), arrays[0].dtype),
        name="attention_backward_queries",
    )(*arrays, *by_query, *places, bounds)


def _backward_keys(
    arrays: Sequence[Array], by_query: Sequence[Array], places: Pair, task: Task
) -> tuple[Array, Array]:
    (B, T, _, H), (_, S, K, U), J = arrays[0].shape, arrays[2].shape, task.num_k_blocks
    block = lambda j, n, b: (b, j, n, 0)  # noqa: E731
    heads = lambda j, n, b: (b, 0, n, 0)  # noqa: E731
    bounds = None
    if task.by_value:
        bounds = blocks_seen(places, task.rule, (T, S), task.sizes, by_key=True)
    rows = round_up(T, task.sizes.q)
    row = pl.BlockSpec((None, task.group, rows), lambda j, n, b: (b, n, 0))
    specs = [
        pl.BlockSpec((None, rows, task.group, padded(H)), heads),
        tile_spec(task.sizes.k, H, block),
        tile_spec(task.sizes.k, U, block),
        pl.BlockSpec((None, rows, task.group, padded(U)), heads),
        row,
        row,
        row_specs(places[0], rows),
        row_specs(places[1], round_up(S, task.sizes.k)),
        row_specs(bounds, J),
    ]
    return _call(
        functools.partial(_keys_kernel, task=task),
        task,
        grid=(J, K, B),
        in_specs=specs,
        out_specs=[tile_spec(task.sizes.k, H, block), tile_spec(task.sizes.k, U, block)],
        out_shape=[jax.ShapeDtypeStruct((B, S, K, width), jnp.float32) for width in (H, U)],
        name="attention_backward_keys",
    )(*arrays, *by_query, *places, bounds)


def _call(kernel: Callable[..., None], task: Task, **options: Any) -> Callable[..., Any]:
    params = plgpu.CompilerParams(num_warps=task.sizes.warps, num_stages=task.sizes.stages)
    interpret = platform() == "cpu"
    call = pl.pallas_call(kernel, compiler_params=params, interpret=interpret, **options)
    return in_32_bits(call)


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    q_places,
    k_places,
    bounds,
    stored,
    o_ref,
    lse_ref,
    *,
    task: Task,
):
    I, size, head = task.num_q_blocks, task.sizes.q, pl.program_id(1)
    i = I - 1 - jax.lax.rem(pl.program_id(0), I)
    part = jax.lax.div(pl.program_id(0), I)
    left = tokens_left(task.T, size, i * size)
    q = load_tile(q_ref, 0, size, left, task.H)
    q_at = load_places(q_places, i * size, size, left, axis=0)
    if task.fold:
        rows = i * size + jnp.arange(size)[:, None]
        head = head * (task.T // task.fold) + jax.lax.div(rows, task.fold)

    def body(masked, j, carry):
        top, total, sums = carry
        keys = load_keys(task, k_ref, v_ref, k_places, j, masked, stored)
        k, v = [[x.astype(q[0].dtype) for x in parts] for parts in (keys.k, keys.v)]
        s, _ = scores(task, q, k, (q_at, keys.places), head, masked, keys.k_scale)
        s = hide_tail(task, s, j, masked)
        new_top = jnp.maximum(top, jnp.max(s, axis=1) * task.unit)
        e = jnp.exp2(s * task.unit - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(e, axis=1)
        if keys.v_scale is not None:
            e *= keys.v_scale[None]
        e = e.astype(v[0].dtype)
        sums = [x * shrink[:, None] + dot(e, y, (1, 0)) for x, y in zip(sums, v, strict=True)]
        return new_top, total, sums

    zeros = [jnp.zeros((size, wide), jnp.float32) for _, wide in cut_width(task.U)]
    # finite, so that a row that has seen nothing yet takes exp2(-inf - top) = 0 of what is hidden
    first = jnp.full((size,), NEG_INF, jnp.float32), jnp.zeros((size,), jnp.float32), zeros
    top, total, sums = walk(task, bounds, i, body, first, part=part)
    sees_any = total > 0
    total = jnp.where(sees_any, total, 1.0)
    store_tile(o_ref, [x / total[:, None] for x in sums], left, task.U)
    lse = jnp.where(sees_any, top / LOG2_E + jnp.log(total), NEG_INF)
    mask = None if left is None else jnp.arange(size) < left
    plgpu.store(lse_ref, lse, mask=mask)


def _queries_kernel(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    q_places,
    k_places,
    bounds,
    dq_ref,
    *,
    task: Task,
):
    i, head, size = task.num_q_blocks - 1 - pl.program_id(0), pl.program_id(1), task.sizes.q
    left = tokens_left(task.T, size, i * size)
    q = load_tile(q_ref, 0, size, left, task.H)
    do = load_tile(do_ref, 0, size, left, task.U)
    lse = load_rows(lse_ref, 0, size, left, jnp.inf)
    delta = load_rows(delta_ref, 0, size, left, 0.0)
    q_at = load_places(q_places, i * size, size, left, axis=0)

    def body(masked, j, sums):
        k, v, k_at, *_ = load_keys(task, k_ref, v_ref, k_places, j, masked, NOT_STORED)
        s, slope = scores(task, q, k, (q_at, k_at), head, masked)
        s = hide_tail(task, s, j, masked)
        p = jnp.exp2(s * task.unit - lse[:, None])
        ds = (p * (dots(do, v) - delta[:, None]) * slope).astype(k[0].dtype)
        return [x + dot(ds, y, (1, 0)) for x, y in zip(sums, k, strict=True)]

    zeros = [jnp.zeros((size, wide), jnp.float32) for _, wide in cut_width(task.H)]
    sums = walk(task, bounds, i, body, zeros)
    store_tile(dq_ref, [x * task.rule.scale for x in sums], left, task.H)


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    q_places,
    k_places,
    bounds,
    dk_ref,
    dv_ref,
    *,
    task: Task,
):
    """Tiles of scores are transposed: keys by queries."""
    j, kv_head, size, rows = pl.program_id(0), pl.program_id(1), task.sizes.k, task.sizes.q
    left = tokens_left(task.S, size, j * size)
    k = load_tile(k_ref, 0, size, left, task.H)
    v = load_tile(v_ref, 0, size, left, task.U)
    k_at = load_places(k_places, j * size, size, left, axis=0)

    def body(g, masked, i, carry):
        dk, dv = carry
        start = i * rows
        q_left = tokens_left(task.T, rows, start) if masked else None
        q = load_tile(q_ref, start, rows, q_left, task.H, (g,))
        do = load_tile(do_ref, start, rows, q_left, task.U, (g,))
        lse = load_rows(lse_ref, start, rows, q_left, jnp.inf, (g,))
        delta = load_rows(delta_ref, start, rows, q_left, 0.0, (g,))
        q_at = load_places(q_places, start, rows, q_left, axis=1)
        head = kv_head * task.group + g
        s, slope = scores(task, k, q, (q_at, k_at), head, masked)
        p = jnp.exp2(s * task.unit - lse[None])
        ds = (p * (dots(v, do) - delta[None]) * slope).astype(q[0].dtype)
        p = p.astype(do[0].dtype)
        dv = [x + dot(p, y, (1, 0)) for x, y in zip(dv, do, strict=True)]
        dk = [x + dot(ds, y, (1, 0)) for x, y in zip(dk, q, strict=True)]
        return dk, dv

    def of_head(g, carry):
        return walk(task, bounds, j, functools.partial(body, g), carry, by_key=True)

    zeros = [
        [jnp.zeros((size, wide), jnp.float32) for _, wide in cut_width(width)]
        for width in (task.H, task.U)
    ]
    dk, dv = jax.lax.fori_loop(0, task.group, of_head, tuple(zeros))
    store_tile(dk_ref, [x * task.rule.scale for x in dk], left, task.H)
    store_tile(dv_ref, dv, left, task.U)
