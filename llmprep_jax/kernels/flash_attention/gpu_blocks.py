"""Blocks of the GPU kernels: their sizes on an H100, and which of them a block may see.

A size is chosen by what a program must hold: sums in registers (a warpgroup of 128 threads has
65,536 of them for two such programs at most), operands in shared memory (227 KiB). Nothing here is
measured on a card yet; that no kernel of a released width spills
registers in bfloat16 is tested, by compiling for the card.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.masks import NEG_INF, Places, Rule, may_see, ranges

SHARED_BYTES = 232_448  # that one block of threads may have on compute capability 9.0
MIN_BLOCK = 16  # of a matrix instruction


class Sizes(NamedTuple):
    """Queries and keys of a tile, warps of a program, tiles in flight."""

    q: int
    k: int
    warps: int
    stages: int


# by pass, then by the sum of both widths up to which a row holds: 16-bit operands, then float32
TABLE = {
    "forward": (
        (128, Sizes(128, 64, 4, 3), Sizes(64, 32, 8, 2)),
        (320, Sizes(128, 64, 8, 3), Sizes(64, 32, 8, 2)),
        (512, Sizes(128, 64, 8, 2), Sizes(32, 32, 8, 2)),
        (1088, Sizes(32, 32, 8, 2), Sizes(16, 16, 8, 1)),
    ),
    "dq": (
        (128, Sizes(128, 64, 8, 2), Sizes(64, 32, 8, 2)),
        (320, Sizes(128, 64, 8, 2), Sizes(32, 32, 8, 2)),
        (512, Sizes(64, 32, 8, 2), Sizes(32, 16, 8, 1)),
        (1088, Sizes(32, 16, 8, 1), Sizes(16, 16, 8, 1)),
    ),
    "dkv": (
        (128, Sizes(64, 128, 8, 2), Sizes(32, 32, 8, 2)),
        (192, Sizes(32, 64, 8, 2), Sizes(32, 32, 8, 2)),
        (256, Sizes(32, 128, 8, 2), Sizes(32, 32, 8, 2)),
        (320, Sizes(64, 32, 8, 2), Sizes(32, 32, 8, 2)),
        (512, Sizes(64, 32, 8, 2), Sizes(16, 32, 8, 1)),
        (1088, Sizes(32, 16, 8, 1), Sizes(16, 16, 8, 1)),
    ),
}
NUM_CORES = 132  # streaming multiprocessors


def sizes_of(which: str, H: int, U: int, dtype: Any, T: int, S: int) -> Sizes:
    """For a pass over widths H and U; no larger than a short row needs."""
    table = TABLE[which]
    row = next((row for row in table if row[0] >= H + U), table[-1])
    sizes = row[1] if jnp.dtype(dtype).itemsize == 2 else row[2]
    q, k = [min(size, max(MIN_BLOCK, power_of_two(n))) for size, n in ((sizes.q, T), (sizes.k, S))]
    return sizes._replace(q=q, k=k)


def num_splits(num_programs: int, num_blocks: int, a_core: int = 2) -> int:
    """Parts into which few queries' keys are split, so that there are so many programs a core."""
    return max(1, min(a_core * NUM_CORES // num_programs, num_blocks // 2))


def power_of_two(n: int) -> int:
    """The least that is no smaller."""
    return 1 << (n - 1).bit_length()


def cut_width(width: int) -> tuple[tuple[int, int], ...]:
    """(first column, columns) of one or two parts that are powers of two and hold the width."""
    whole = max(MIN_BLOCK, power_of_two(width))
    first = whole // 2
    rest = max(MIN_BLOCK, power_of_two(max(1, width - first)))
    return ((0, whole),) if first + rest >= whole else ((0, first), (first, rest))


def shared_bytes(which: str, sizes: Sizes, H: int, U: int, dtype: Any) -> int:
    """What operands take of shared memory: those that stay, and tiles in flight."""
    H, U = [sum(size for _, size in cut_width(width)) for width in (H, U)]
    stay, stream = (sizes.k, sizes.q) if which == "dkv" else (sizes.q, sizes.k)
    stays = stay * (H if which == "forward" else H + U)
    return (stays + sizes.stages * stream * (H + U)) * jnp.dtype(dtype).itemsize


def seen_by_column(
    start: Any, size: int, block: int, length: int, back: int | None, ahead: int | None
) -> tuple[Any, Any, Any, Any]:
    """Ends of what `size` tokens from `start` see of blocks of another side's `length` tokens.

    Args:
      back, ahead: how many columns each sees, beside its own; None: all.

    Returns:
      (low, inner low, inner high, high) in blocks: all from low on to high are seen in part, those
      between the inner two whole.
    """
    last, num_blocks = start + size - 1, -(-length // block)
    low, inner_low, inner_high, high = 0, 0, length // block, num_blocks
    if back is not None:
        low = jax.lax.div(jnp.maximum(start - back, 0), block)
        inner_low = jax.lax.div(jnp.maximum(last - back, 0) + block - 1, block)
    if ahead is not None:
        inner_high = jnp.minimum(inner_high, jax.lax.div(start + ahead + 1, block))
        high = jnp.minimum(high, jax.lax.div(last + ahead, block) + 1)
    low = jnp.minimum(low, high)
    inner_low = jnp.clip(inner_low, low, high)
    return low, inner_low, jnp.clip(inner_high, inner_low, high), high


def blocks_seen(
    places: tuple[Places, Places],
    rule: Rule,
    lengths: tuple[int, int],
    sizes: Sizes,
    by_key: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """First block of keys that each block of queries may see, and one after the last.

    Both are [B or 1, I], int32, and the same where nothing is seen. With `by_key`: of queries that
    may see each block of keys, [B or 1, J].
    """
    q, k = [ranges(*x) for x in zip(places, lengths, sizes[:2], strict=True)]
    seen_BIJ = may_see(q, k, rule)
    seen_BIJ = seen_BIJ.swapaxes(1, 2) if by_key else seen_BIJ
    any_BI = jnp.any(seen_BIJ, axis=2)
    last_BI = seen_BIJ.shape[2] - jnp.argmax(seen_BIJ[:, :, ::-1], axis=2)
    low_BI = jnp.where(any_BI, jnp.argmax(seen_BIJ, axis=2), 0)
    return low_BI.astype(jnp.int32), jnp.where(any_BI, last_BI, 0).astype(jnp.int32)


def join_parts(o_PBNTU: jax.Array, lse_PBNT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs and lse over parts of the keys as those over all."""
    if len(o_PBNTU) == 1:
        return o_PBNTU[0], lse_PBNT[0]
    top_BNT = jnp.max(lse_PBNT, axis=0)
    e_PBNT = jnp.where(lse_PBNT > NEG_INF, jnp.exp(lse_PBNT - top_BNT), 0.0)
    total_BNT = jnp.sum(e_PBNT, axis=0)
    sees_BNT = total_BNT > 0
    total_BNT = jnp.where(sees_BNT, total_BNT, 1.0)
    o_BNTU = jnp.sum(o_PBNTU * (e_PBNT / total_BNT)[..., None], axis=0)
    return o_BNTU, jnp.where(sees_BNT, top_BNT + jnp.log(total_BNT), NEG_INF)
