"""Decoding over the latents of MLA on Hopper GPUs, by a kernel of asynchronous products and copies.

DeepSeek-V2 section 2.1.2 with both up-projections absorbed: all heads of a query attend to one key
of 576 numbers, whose first 512 are its value, so each latent is read once and serves as both. 64
heads are the rows of a program; two warpgroups take half of the keys of a tile each for the scores,
and half of the value's width each for the sums, for which 64 x 512 would not fit the registers of
one. A third only copies: two tiles of 64 latents are in flight (147 of 227 KiB). Few programs for
132 cores split the keys and join what they found by its log-sum-exp (FlashMLA; flash-decoding).
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llmprep_jax.kernels.compat import accumulate, load_as
from llmprep_jax.kernels.flash_attention.gpu_blocks import (
    Sizes,
    blocks_seen,
    join_parts,
    num_splits,
)
from llmprep_jax.kernels.flash_attention.masks import NEG_INF, Places, Rule, visible
from llmprep_jax.kernels.flash_attention.stored import refusal_of_stored
from llmprep_jax.kernels.platforms import device_kind

LOG2_E = math.log2(math.e)
ROWS, TILE, STAGES = 64, 64, 2  # heads of a program, latents of a tile, tiles in flight
HALF = TILE // 2
WIDTHS = (576, 512)  # of a latent, and of its value
HOPPER = r"\bG?H(20|100|200|800)\b"  # what devices of sm_90a are called
MAX_TOKENS = 8  # queries a row; what each sees of all latents is an array beside them

Array = jax.Array
Ref = Any


class Task(NamedTuple):
    """What the kernel knows before it is compiled.

    Attributes:
      unit: from scores to exponents of 2. blocks: of 64 heads. splits: parts of the latents.
    """

    unit: float
    blocks: int
    splits: int
    dtype: Any
    interprets: bool


def refusal(q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, rule: Rule, backward: bool) -> str | None:
    """Why it cannot do what the seam asks of a backend; None: it can."""
    if backward:
        return "it has no backward pass"
    if rule.stored:
        return refusal_of_stored(rule)
    if rule.value_width is None or k_BKSH.shape[1] != 1:
        return "its values are the first numbers of the keys of one head"
    if not re.search(HOPPER, device_kind()):
        return f"it is for Hopper GPUs, not {device_kind()}"
    return latent_refusal(q_BNTH, k_BKSH[:, 0], rule.value_width, rule)


def forward(
    q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, places: tuple[Places, Places], rule: Rule
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`; values are not read but as keys."""
    return latent_decode(q_BNTH, k_BKSH[:, 0], places, rule)


def latent_refusal(q_BNTH: Array, z_BSH: Array, width: int, rule: Rule) -> str | None:
    """Why `latent_decode` cannot do it; None: it can."""
    if (q_BNTH.shape[3], width) != WIDTHS:
        return f"latents of 576 with values of 512, not {q_BNTH.shape[3]} with {width}"
    if q_BNTH.shape[2] > MAX_TOKENS:
        return f"{q_BNTH.shape[2]} queries a row, at most {MAX_TOKENS}"
    if q_BNTH.dtype.name not in ("bfloat16", "float16"):
        return f"it multiplies bfloat16 and float16, not {q_BNTH.dtype.name}"
    if rule.bias is not None or rule.soft_cap is not None or rule.scale <= 0:
        return "a bias, a soft cap or a scale of 0 or less"
    return None if q_BNTH.size and z_BSH.size else "an array is empty"


def latent_decode(
    q_BNTH: Array,
    z_BSH: Array,
    places: tuple[Places, Places],
    rule: Rule,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """(o [B, N, T, 512], lse [B, N, T]) of absorbed queries over latents, as `reference.forward`.

    Args:
      q_BNTH: [B, N, T, 576], of few tokens T. z_BSH: latents [B, S, 576].
    """
    (B, N, T, _), S, U = q_BNTH.shape, z_BSH.shape[1], WIDTHS[1]
    blocks = pl.cdiv(N, ROWS)
    q_BTNH = q_BNTH.swapaxes(1, 2)
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, 0), (0, blocks * ROWS - N), (0, 0)))
    columns = jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
    seen_BTS = visible(*places, rule, *columns)
    seen_BTS = jnp.ones((1, 1, S), bool) if seen_BTS is None else seen_BTS
    hidden_BTS = jnp.where(jnp.broadcast_to(seen_BTS, (B, T, S)), 0.0, -jnp.inf)
    rest = (0, 0), (0, 0), (0, -S % TILE)
    hidden_BTS = jnp.pad(hidden_BTS, rest, constant_values=-jnp.inf)
    low_BT, high_BT = [
        jnp.broadcast_to(x, (B, T)) for x in blocks_seen(places, rule, (T, S), Sizes(1, TILE, 0, 0))
    ]
    P = num_splits(B * T * blocks, pl.cdiv(S, TILE), a_core=1)  # shared memory holds one
    task = Task(rule.scale * LOG2_E, blocks, P, q_BNTH.dtype, interpret is not None)
    rows = (P, B, T, blocks * ROWS)
    o_PBTNU, lse_PBTN = plgpu.kernel(
        functools.partial(_kernel, task=task),
        out_type=[
            jax.ShapeDtypeStruct((*rows, U), jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ],
        scratch_types=_scratch(q_BNTH.dtype),
        grid=(blocks * P, T, B),
        grid_names=("part", "token", "row"),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **({} if interpret is None else {"interpret": interpret}),
    )(q_BTNH, z_BSH, hidden_BTS, low_BT, high_BT)
    o_BTNU, lse_BTN = join_parts(o_PBTNU[:, :, :, :N], lse_PBTN[..., :N])
    return o_BTNU.astype(q_BNTH.dtype).swapaxes(1, 2), lse_BTN.swapaxes(1, 2)


def _scratch(dtype: Any) -> dict[str, Any]:
    # half a tile of probabilities is 32 wide, and both operands of a product lie in the same way
    lines = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF))
    return dict(
        q=plgpu.SMEM((ROWS, WIDTHS[0]), dtype, transforms=lines),
        z=plgpu.SMEM((STAGES, TILE, WIDTHS[0]), dtype, transforms=lines),
        p=plgpu.SMEM((2, ROWS, HALF), dtype, transforms=lines),
        hidden=plgpu.SMEM((STAGES, TILE), jnp.float32),
        numbers=plgpu.SMEM((2, ROWS), jnp.float32),
        q_here=plgpu.Barrier(),
        z_here=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        z_read=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        numbers_here=plgpu.Barrier(num_arrivals=2),
        p_here=plgpu.Barrier(num_arrivals=2),
    )


def _kernel(q_ref, z_ref, hidden_ref, low_ref, high_ref, o_ref, lse_ref, *, task: Task, **memory):
    group, row, token = [jax.lax.axis_index(name) for name in ("group", "row", "token")]
    program = jax.lax.axis_index("part")
    part, block = jax.lax.div(program, task.blocks), jax.lax.rem(program, task.blocks)
    low, high = low_ref[row, token], high_ref[row, token]
    size = jax.lax.div(high - low + task.splits - 1, task.splits)
    low = low + part * size
    steps = jnp.maximum(jnp.minimum(high - low, size), 0)
    heads = pl.ds(block * ROWS, ROWS)

    @pl.when(group == 2)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(q_ref.at[row, token, heads], memory["q"], memory["q_here"])

        @pl.loop(0, steps)
        def _tile(step):
            slot = jax.lax.rem(step, STAGES)

            @pl.when(step >= STAGES)
            def _wait():
                plgpu.barrier_wait(memory["z_read"].at[slot])

            latents = pl.ds((low + step) * TILE, TILE)
            here = memory["z_here"].at[slot]
            plgpu.copy_gmem_to_smem(z_ref.at[row, latents], memory["z"].at[slot], here)
            hidden = memory["hidden"].at[slot]
            plgpu.copy_gmem_to_smem(hidden_ref.at[row, token, latents], hidden, here)

    for side in range(2):  # slices of tiles are static

        @pl.when(group == side)
        def _compute(side=side):
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(memory["q_here"])
            o, lse = _attend(steps, side, task, **memory)
            width = pl.ds(side * WIDTHS[1] // 2, WIDTHS[1] // 2)
            o_ref[part, row, token, heads, width] = o
            if side == 0:
                lse_ref[part, row, token, heads] = lse


def _attend(
    steps: Array, side: int, task: Task, *, q, z, p, hidden, numbers, z_here, z_read, **barriers
) -> tuple[Array, Array]:
    """(half the width of the outputs, lse), by one of two warpgroups."""
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def exchange(values: Array, barrier: Ref) -> Array:
        """The other warpgroup's values by row."""
        numbers[side] = values
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return load_as(numbers.at[1 - side], by_row)

    def tile(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, sums = carry
        slot = jax.lax.rem(step, STAGES)
        plgpu.barrier_wait(z_here.at[slot])
        own = pl.ds(side * HALF, HALF)

        def multiply(acc):
            plgpu.wgmma(acc, q, plgpu.transpose_ref(z.at[slot, own], (1, 0)))
            return acc[...]

        s = pl.run_scoped(multiply, plgpu.ACC((ROWS, HALF), jnp.float32))
        mask = load_as(hidden.at[slot, own], plgpu.Layout.WGMMA.reduce(0))
        s += jax.lax.broadcast_in_dim(mask, s.shape, [1])
        tops = s.max(axis=1) * task.unit
        new_top = jnp.maximum(top, jnp.maximum(tops, exchange(tops, barriers["numbers_here"])))
        e = jnp.exp2(s * task.unit - jax.lax.broadcast_in_dim(new_top, s.shape, [0]))
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + e.sum(axis=1)
        p[side] = e.astype(task.dtype)
        plgpu.commit_smem()
        sums *= jax.lax.broadcast_in_dim(shrink, sums.shape, [0])
        plgpu.barrier_arrive(barriers["p_here"])
        plgpu.barrier_wait(barriers["p_here"])
        width = pl.ds(side * WIDTHS[1] // 2, WIDTHS[1] // 2)

        def add(acc):
            for half in range(2):
                plgpu.wgmma(acc, p.at[half], z.at[slot, pl.ds(half * HALF, HALF), width])

        sums = accumulate(add, sums, task.interprets)
        plgpu.barrier_arrive(z_read.at[slot])
        return new_top, total, sums

    # finite, so that exp2(-inf - top) is 0 for what is hidden
    first = full((ROWS,), NEG_INF, by_row), full((ROWS,), 0.0, by_row)
    zeros = full((ROWS, WIDTHS[1] // 2), 0.0, plgpu.Layout.WGMMA)
    top, total, sums = jax.lax.fori_loop(0, steps, tile, (*first, zeros))
    total = total + exchange(total, barriers["numbers_here"])
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    o = sums / jax.lax.broadcast_in_dim(total, sums.shape, [0])
    return o, jnp.where(sees, top / LOG2_E + jnp.log(total), NEG_INF)
