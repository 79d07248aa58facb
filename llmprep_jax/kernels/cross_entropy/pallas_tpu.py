"""The loss by Pallas kernels on a TPU: no logit leaves the chip's vector memory.

Forward goes over the words for each block of tokens, with maximum and sum of the logits so far (the
online softmax of Milakov and Gimelshein 2018). Backward computes each tile of logits once again and
adds to both gradients: that of a block of words stays in vector memory while it goes over all
tokens, that of a block of tokens is fetched, added to and put back at each visit, while the tile's
logits are computed. Two halves of the words are independent, for chips of two cores; each has its
own sum of the tokens' gradients.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels import tpu
from llmprep_jax.kernels.cross_entropy.head import Head, Sums, Tokens

N_BLOCK, V_BLOCK = 512, 512
AT_A_TIME = 3 * 2**19  # numbers of a block of words, at most: 6 MiB of their gradient
WIDEST = 8192
LOW = -1e30  # the maximum of no logits

Array = jax.Array


class Blocks(NamedTuple):
    """Tokens, model width and words of one device, and a tile's tokens and words."""

    N: int
    D: int
    V: int
    tokens: int
    words: int

    @property
    def num_tokens(self) -> int:
        return pl.cdiv(self.N, self.tokens)

    @property
    def num_words(self) -> int:
        return pl.cdiv(self.V, self.words)


def refusal(x_ND: Array, w: Array, dtype: jnp.dtype) -> str | None:
    """Why the kernels cannot do it; None: they can."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it multiplies float32 and bfloat16, not {dtype}"
    if x_ND.shape[1] > WIDEST or x_ND.shape[1] % tpu.LANES:
        return f"a width of {x_ND.shape[1]}: it must be a multiple of 128, and {WIDEST} at most"
    if 0 in (*x_ND.shape, *w.shape):
        return "an array is empty"
    return None


def sums(x_ND: Array, w: Array, targets_N: Array, head: Head) -> Sums:
    """As of `chunked`, with all of a device's words."""
    blocks = _blocks(x_ND, w, head)
    row = pl.BlockSpec((1, blocks.tokens), lambda i, v: (0, i))
    column = pltpu.VMEM((blocks.tokens, tpu.LANES), jnp.float32)
    shape = jax.ShapeDtypeStruct((1, blocks.N), jnp.float32)
    lse, wanted, total = pl.pallas_call(
        functools.partial(_sums_kernel, head=head, blocks=blocks),
        grid=(blocks.num_tokens, blocks.num_words),
        in_specs=[
            pl.BlockSpec((blocks.tokens, blocks.D), lambda i, v: (i, 0)),
            _words_spec(blocks, head, lambda i, v: v),
            row,
        ],
        out_specs=[row] * 3,
        out_shape=[shape] * 3,
        scratch_shapes=[*[column] * 4, pltpu.VMEM(column.shape, jnp.int32)],
        compiler_params=tpu.params("parallel", "arbitrary"),
        cost_estimate=_cost(blocks, 1, x_ND, w),
        interpret=tpu.interprets(),
        name="cross_entropy_forward",
    )(x_ND.astype(head.dtype), w, targets_N[None])
    return Sums(lse[0], wanted[0], total[0])


def _sums_kernel(x_ref, w_ref, targets_ref, *refs, head: Head, blocks: Blocks):
    *outs, max_ref, sum_ref, wanted_ref, total_ref, target_ref = refs
    v = pl.program_id(1)

    @pl.when(v == 0)
    def begin():
        max_ref[...] = jnp.full_like(max_ref, LOW)
        for ref in (sum_ref, wanted_ref, total_ref):
            ref[...] = jnp.zeros_like(ref)
        target_ref[...] = tpu.to_column(targets_ref[...])

    logits = _logits(x_ref[...], w_ref[...].astype(head.dtype), head)
    ids = v * blocks.words + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if head.label_smoothing:
        there = tpu.within(logits, v * blocks.words, blocks.V, 1, blocks.words)
        total_ref[...] += jnp.sum(there, axis=1, keepdims=True)
    is_wanted = tpu.lanes(target_ref[...], blocks.words) == ids
    if blocks.V % blocks.words:
        is_wanted &= ids < blocks.V  # a target may be another device's word
        logits = jnp.where(ids < blocks.V, logits, LOW)
    old_max = max_ref[...]
    new_max = jnp.maximum(old_max, jnp.max(logits, axis=1, keepdims=True))
    e = jnp.exp(logits - tpu.lanes(new_max, blocks.words))
    sum_ref[...] *= jnp.exp(old_max - new_max)
    sum_ref[...] += jnp.sum(e, axis=1, keepdims=True)
    max_ref[...] = new_max
    wanted_ref[...] += jnp.sum(jnp.where(is_wanted, logits, 0.0), axis=1, keepdims=True)

    @pl.when(v == blocks.num_words - 1)
    def finish():
        columns = max_ref[...] + jnp.log(sum_ref[...]), wanted_ref[...], total_ref[...]
        for ref, column in zip(outs, columns, strict=True):
            ref[...] = tpu.to_row(column)


def gradients(x_ND: Array, w: Array, tokens: Tokens, head: Head) -> tuple[Array, Array]:
    """As of `chunked`."""
    blocks = _blocks(x_ND, w, head)
    halves = min(2, blocks.num_words)
    of_half = pl.cdiv(blocks.num_words, halves)

    def word(half, v, i):  # an odd last one is visited twice, and only computed once
        return jnp.minimum(half * of_half + v, blocks.num_words - 1)

    row = pl.BlockSpec((1, blocks.tokens), lambda half, v, i: (0, i))
    words = _words_spec(blocks, head, word)
    dx_shape = (halves, blocks.num_tokens * blocks.tokens, blocks.D)
    tile = (blocks.tokens, blocks.D)
    dx, dw = pl.pallas_call(
        functools.partial(_gradients_kernel, head=head, blocks=blocks, of_half=of_half),
        grid=(halves, of_half, blocks.num_tokens),
        in_specs=[pl.BlockSpec(tile, lambda half, v, i: (i, 0)), words, row, row, row],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), words],
        out_shape=[
            jax.ShapeDtypeStruct(dx_shape, jnp.float32),
            jax.ShapeDtypeStruct(w.shape, w.dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, *tile), jnp.float32),
            pltpu.VMEM((blocks.words, blocks.D), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=tpu.params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=_cost(blocks, 3, x_ND, w, w, dx_shape=dx_shape),
        interpret=tpu.interprets(),
        name="cross_entropy_backward",
    )(x_ND.astype(head.dtype), w, *[x[None] for x in tokens])
    return jnp.sum(dx, axis=0)[: blocks.N], dw


def _gradients_kernel(
    x_ref, w_ref, targets_ref, lse_ref, dlosses_ref, dx_ref, dw_ref, *refs, head, blocks, of_half
):
    sums_ref, dw_sums_ref, fetched, put = refs
    half, v, i = [pl.program_id(axis) for axis in range(3)]
    word, step = half * of_half + v, v * blocks.num_tokens + i
    last = jnp.minimum(of_half, blocks.num_words - half * of_half) * blocks.num_tokens - 1

    def ends(step: Array) -> tuple[Any, Any]:
        """A step's tokens in memory, and the buffer that they have; there are two."""
        start = jax.lax.rem(step, blocks.num_tokens) * blocks.tokens
        return dx_ref.at[half, pl.ds(start, blocks.tokens)], sums_ref.at[jax.lax.rem(step, 2)]

    def fetch() -> Any:
        there, here = ends(step)
        return pltpu.make_async_copy(there, here, fetched.at[jax.lax.rem(step, 2)])

    def put_back(step: Array) -> Any:
        there, here = ends(step)
        return pltpu.make_async_copy(here, there, put.at[jax.lax.rem(step, 2)])

    @pl.when(step <= last)
    def add():
        slot = jax.lax.rem(step, 2)
        # a single block of tokens is fetched as the step before puts it back
        free = 1 if blocks.num_tokens == 1 else 2
        pl.when(step >= free)(lambda: put_back(step - free).wait())
        pl.when(v > 0)(lambda: fetch().start())
        x = tpu.within(x_ref[...], i * blocks.tokens, blocks.N, 0, blocks.tokens)
        w = w_ref[...].astype(head.dtype)
        w = tpu.within(w, word * blocks.words, blocks.V, 1 - head.w_axis, blocks.words)
        columns = [tpu.to_column(ref[...]) for ref in (targets_ref, lse_ref, dlosses_ref)]
        d = _logit_gradients(_logits(x, w, head), columns, (word, i), head, blocks)

        @pl.when(i == 0)
        def begin_words():
            dw_sums_ref[...] = jnp.zeros_like(dw_sums_ref)

        dw_sums_ref[...] += tpu.multiply(d, x, (0, 0))

        @pl.when(v == 0)
        def begin_tokens():
            sums_ref[slot] = jnp.zeros(sums_ref.shape[1:], jnp.float32)

        pl.when(v > 0)(lambda: fetch().wait())
        sums_ref[slot] += tpu.multiply(d, w, (1, 1 - head.w_axis))
        put_back(step).start()

        @pl.when(i == blocks.num_tokens - 1)
        def finish_words():
            sums = dw_sums_ref[...]
            dw_ref[...] = (sums.T if head.w_axis == 0 else sums).astype(dw_ref.dtype)

    @pl.when(step == last)
    def finish():
        if blocks.num_tokens > 1:
            put_back(step - 1).wait()
        put_back(step).wait()


def _logits(x: Array, w: Array, head: Head) -> Array:
    logits = tpu.multiply(x, w, (1, head.w_axis))
    return logits if head.soft_cap is None else head.soft_cap * jnp.tanh(logits / head.soft_cap)


def _logit_gradients(logits: Array, columns: list, place: tuple, head: Head, blocks: Blocks):
    """`head.logit_gradients` of a tile."""
    (word, i), smooth = place, head.label_smoothing
    targets, lse, dlosses = [tpu.lanes(x, blocks.words) for x in columns]
    ids = word * blocks.words + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    d = dlosses * (1 + 2 * head.z_loss * lse) * jnp.exp(logits - lse)
    d -= jnp.where(targets == ids, dlosses * (1 - smooth), 0.0)
    if smooth:
        d -= dlosses * (smooth / head.vocab_size)
    if head.soft_cap is not None:
        d *= 1 - jnp.square(logits / head.soft_cap)
    counts = dlosses != 0
    if blocks.N % blocks.tokens:
        rows = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        counts &= i * blocks.tokens + rows < blocks.N
    return jnp.where(counts, d, 0.0).astype(head.dtype)


def _blocks(x_ND: Array, w: Array, head: Head) -> Blocks:
    (N, D), V = x_ND.shape, w.shape[1 - head.w_axis]
    limit = max(tpu.LANES, min(V_BLOCK, AT_A_TIME // D // tpu.LANES * tpu.LANES))
    return Blocks(N, D, V, tpu.block(N, min(N_BLOCK, limit)), tpu.block(V, limit))


def _words_spec(blocks: Blocks, head: Head, word: Any) -> pl.BlockSpec:
    """Of weights and their gradient, by the block of words at a step."""
    if head.w_axis == 0:
        return pl.BlockSpec((blocks.D, blocks.words), lambda *step: (0, word(*step)))
    return pl.BlockSpec((blocks.words, blocks.D), lambda *step: (word(*step), 0))


def _cost(blocks: Blocks, products: int, *arrays: Array, dx_shape=(0,)) -> pl.CostEstimate:
    pairs = blocks.N * blocks.V
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    size += 8 * functools.reduce(lambda a, b: a * b, dx_shape) * blocks.num_words // 2
    return pl.CostEstimate(
        flops=2 * products * pairs * blocks.D, transcendentals=pairs, bytes_accessed=size
    )
