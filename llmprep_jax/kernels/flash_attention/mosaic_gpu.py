"""Attention's forward pass on Hopper GPUs, by asynchronous products and copies.

After FlashAttention-3 (Shah et al. 2024): a program has 128 queries of a head, 64 a warpgroup; a
third warpgroup copies tiles of 128 keys and values, two of which are in flight. The two that
multiply take turns, so that one has the tensor cores while the other is at its softmax. Masks are
by columns; backward is another backend's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llmprep_jax.kernels.compat import accumulate_product, mosaic_interpreter
from llmprep_jax.kernels.flash_attention.gpu_blocks import seen_by_column
from llmprep_jax.kernels.flash_attention.gpu_tiles import LOG2_E
from llmprep_jax.kernels.flash_attention.masks import NEG_INF, Places, Rule, sees
from llmprep_jax.kernels.flash_attention.stored import refusal_of_stored
from llmprep_jax.kernels.platforms import platform

ROWS, TILE, STAGES = 64, 128, 2  # queries of a warpgroup, keys of a tile, tiles in flight
WIDTHS = (64, 128)

Array = jax.Array
Ref = Any


class Task(NamedTuple):
    """What the kernel knows before it is compiled.

    Attributes:
      S: keys. group: query heads of a key head. width: of keys and values.
    """

    rule: Rule
    S: int
    group: int
    width: int
    dtype: Any
    interprets: bool

    @property
    def unit(self) -> float:
        """From scores to exponents of 2."""
        return self.rule.scale * LOG2_E


def refusal(q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, rule: Rule, backward: bool) -> str | None:
    """Why it cannot do it; None: it can."""
    if backward:
        return "it has no backward pass"
    if rule.stored:
        return refusal_of_stored(rule)
    if rule.given:
        return f"it masks by columns, not by {' and '.join(rule.given)}"
    if rule.bias is not None or rule.soft_cap is not None or rule.scale <= 0:
        return "a bias, a soft cap or a scale of 0 or less"
    H, U = q_BNTH.shape[3], v_BKSU.shape[3]
    if H != U or H not in WIDTHS:
        return f"heads of width 64 or 128, not {H} with values of {U}"
    if q_BNTH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, not {q_BNTH.dtype.name}"
    if not q_BNTH.size or not k_BKSH.size:
        return "an array is empty"
    if platform() == "cpu" and mosaic_interpreter() is None:
        return "this JAX does not interpret it"
    return None


def forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    places: tuple[Places, Places],
    rule: Rule,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`."""
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    if interpret is None and platform() == "cpu":
        interpret = mosaic_interpreter()
    task = Task(rule, S, N // K, H, q_BNTH.dtype, interpret is not None)
    blocks = pl.cdiv(T, 2 * ROWS)
    o_BTNU, lse_BNT = plgpu.kernel(
        functools.partial(_kernel, task=task),
        out_type=[
            jax.ShapeDtypeStruct((B, T, N, H), q_BNTH.dtype),
            # whole blocks: copies take strides of 16 bytes
            jax.ShapeDtypeStruct((B, N, blocks * 2 * ROWS), jnp.float32),
        ],
        scratch_types=_scratch(task),
        grid=(N, blocks, B),
        grid_names=("head", "block", "row"),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(*[x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSU)])
    return o_BTNU.swapaxes(1, 2), lse_BNT[..., :T]


def _scratch(task: Task) -> dict[str, Any]:
    lines = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiles = (STAGES, TILE, task.width)
    barrier = functools.partial(plgpu.Barrier, num_barriers=STAGES)
    return dict(
        q=plgpu.SMEM((2, ROWS, task.width), task.dtype, transforms=lines),  # then the outputs
        k=plgpu.SMEM(tiles, task.dtype, transforms=lines),
        v=plgpu.SMEM(tiles, task.dtype, transforms=lines),
        lse=plgpu.SMEM((2, ROWS), jnp.float32),
        q_here=plgpu.Barrier(num_barriers=2),
        k_here=barrier(),
        v_here=barrier(),
        k_read=barrier(num_arrivals=2),
        v_read=barrier(num_arrivals=2),
        turn=plgpu.Barrier(num_arrivals=2),
    )


def _kernel(q_ref, k_ref, v_ref, o_ref, lse_ref, *, task: Task, **memory):
    group, row, head = [jax.lax.axis_index(name) for name in ("group", "row", "head")]
    # causal blocks of most keys first
    block = jax.lax.axis_size("block") - 1 - jax.lax.axis_index("block")
    back = None if task.rule.window is None else task.rule.window - 1
    ahead = 0 if task.rule.causal else back
    ends = seen_by_column(block * 2 * ROWS, 2 * ROWS, TILE, task.S, back, ahead)

    @pl.when(group == 2)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = jax.lax.div(head, task.group)

        @pl.loop(0, ends[3] - ends[0])
        def _tile(step):
            slot = jax.lax.rem(step, STAGES)
            at = (row, pl.ds((ends[0] + step) * TILE, TILE), kv_head)
            for name, ref in (("k", k_ref), ("v", v_ref)):

                @pl.when(step >= STAGES)
                def _wait(name=name):
                    plgpu.barrier_wait(memory[f"{name}_read"].at[slot])

                here = memory[f"{name}_here"].at[slot]
                plgpu.copy_gmem_to_smem(ref.at[at], memory[name].at[slot], here)

    @pl.when(group < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        first = block * 2 * ROWS + group * ROWS
        rows, o_and_q = pl.ds(first, ROWS), memory["q"].at[group]
        here = memory["q_here"].at[group]
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], o_and_q, here)
        plgpu.barrier_wait(here)
        o, lse = _attend(ends, first, group, task, **memory)
        o_and_q[...] = o.astype(task.dtype)
        memory["lse"][group] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_and_q, o_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(memory["lse"].at[group], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _attend(
    ends: tuple[Any, ...], first: Array, group: Array, task: Task, *, q, k, v, turn, **barriers
) -> tuple[Array, Array]:
    """(outputs, lse) of a warpgroup's queries, from column `first` on."""
    layout, by_row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def give_turn() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def hide(s: Array, j: Array) -> Array:
        shape = (ROWS, TILE)
        i, c = [plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout) for axis in (0, 1)]
        i, c = i + first, c + j * TILE
        seen = sees(Places(i), Places(c), task.rule)
        s = s if seen is None else jnp.where(seen, s, -jnp.inf)
        return jnp.where(c < task.S, s, -jnp.inf) if task.S % TILE else s

    def tile(masked: bool, j: Array, carry: tuple[Array, Array, Array]):
        top, total, sums = carry
        slot = jax.lax.rem(j - ends[0], STAGES)
        plgpu.barrier_wait(barriers["k_here"].at[slot])

        def multiply(acc):
            plgpu.wgmma(acc, q.at[group], plgpu.transpose_ref(k.at[slot], (1, 0)))
            give_turn()
            return acc[...]

        s = pl.run_scoped(multiply, plgpu.ACC((ROWS, TILE), jnp.float32))
        plgpu.barrier_arrive(barriers["k_read"].at[slot])
        s = hide(s, j) if masked else s
        new_top = jnp.maximum(top, s.max(axis=1) * task.unit)
        e = jnp.exp2(s * task.unit - jax.lax.broadcast_in_dim(new_top, s.shape, [0]))
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + e.sum(axis=1)
        sums *= jax.lax.broadcast_in_dim(shrink, sums.shape, [0])
        p = e.astype(task.dtype)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(barriers["v_here"].at[slot])
        plgpu.barrier_wait(turn)
        sums = accumulate_product(p, v.at[slot], sums, task.interprets)
        plgpu.barrier_arrive(barriers["v_read"].at[slot])
        return new_top, total, sums

    def loop(masked: bool, low: Any, high: Any, carry: Any) -> Any:
        return jax.lax.fori_loop(low, high, functools.partial(tile, masked), carry)

    # finite, so that exp2(-inf - top) is 0 for what is hidden
    carry = full((ROWS,), NEG_INF, by_row), full((ROWS,), 0.0, by_row)
    carry = *carry, full((ROWS, task.width), 0.0, layout)
    pl.when(group == 1)(give_turn)  # half a tile behind the other
    if task.rule.window is not None:
        carry = loop(True, ends[0], ends[1], carry)
    carry = loop(False, ends[1], ends[2], carry)
    if task.rule.causal or task.rule.window is not None or task.S % TILE:
        carry = loop(True, ends[2], ends[3], carry)
    pl.when(group == 0)(give_turn)
    top, total, sums = carry
    sees_any = total > 0
    total = jnp.where(sees_any, total, 1.0)
    lse = jnp.where(sees_any, top / LOG2_E + jnp.log(total), NEG_INF)
    return sums / jax.lax.broadcast_in_dim(total, sums.shape, [0]), lse
