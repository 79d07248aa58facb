"""Beginnings of LoRA in the weight itself: PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024).

Both train A and B from a part of W, s B0 A0, and keep the rest, W - s B0 A0, frozen: PiSSA takes
the r largest singular values (section 3, eq. 2 to 4), OLoRA the first r columns of a QR
factorisation (section 3). "pissa_niter_4" finds the singular values by 4 power iterations on random
vectors (Halko et al. 2011, algorithm 4.4), in a fraction of the time. The base's arrays stay W; the
layer subtracts s B0 A0 as it computes, so the base is shared, removed and merged exactly, and only
the start is the identity to within rounding.
"""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import axes_of, shape_of
from llmprep_jax.quant.linear import QuantEinsum
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Float

KINDS = ("pissa", "pissa_niter_N", "olora")
_OVERSAMPLED = 8  # random vectors beyond the rank (section 1.3)


def is_one(kind: str) -> bool:
    """Whether a beginning is one of these."""
    return re.fullmatch(r"pissa|pissa_niter_\d+|olora", kind) is not None


def check(kind: str, base: Einsum, rank: int) -> None:
    """Refuses a layer that cannot begin so.

    Raises:
      ValueError: it is packed, or smaller than twice the rank.
    """
    if isinstance(base, QuantEinsum):
        raise ValueError(
            f"init_weights={kind} trains a part of the weight, and a packed layer would keep a rest"
            " that is not the base's; leave it at default, or take a dense base"
        )
    ins, outs = map(math.prod, shape_of(base))
    if 2 * rank > min(ins, outs):
        raise ValueError(
            f"rank {rank} and its frozen half exceed the dimensions {ins} x {outs} of the layer;"
            " lower rank, or give the layer its own in rank_pattern"
        )


def begin(kind: str, base: Einsum, rank: int, scale: float, rngs: nnx.Rngs) -> tuple[Array, Array]:
    """A0 [inputs..., r] and B0 [r, outputs...] of a layer, float32.

    Args:
      kind: one of `KINDS`.
      rngs: of the random vectors.
    """
    (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
    w = base.weight().astype(jnp.float32)
    w = jax.reshard(w, spec(*[None] * w.ndim)) if has_mesh() else w  # factorised on every device
    matrix = w.reshape(math.prod(ins), math.prod(outs))
    if kind == "olora":  # of the matrix outputs by inputs, as it is released
        q, r = jnp.linalg.qr(matrix.T)
        a, b = r[:rank].T, q[:, :rank].T
    else:
        iterations = kind.removeprefix("pissa").removeprefix("_niter_")
        left, values, right = _svd(matrix, rank, int(iterations or -1), rngs.params())
        root = jnp.sqrt(values[:rank] / scale)
        a, b = left[:, :rank] * root, root[:, None] * right[:rank]
    a, b = a.reshape(*ins, rank), b.reshape(rank, *outs)
    if has_mesh():
        a = jax.reshard(a, spec(*in_axes, None, shape=a.shape))
        b = jax.reshard(b, spec(None, *out_axes, shape=b.shape))
    return a, b


def _svd(
    matrix: Float[Array, "I O"], rank: int, iterations: int, key: jax.Array
) -> tuple[Array, Array, Array]:
    """The singular value decomposition; by so many iterations its largest values, -1: exactly."""
    if iterations < 0:
        return jnp.linalg.svd(matrix, full_matrices=False)
    count = min(rank + _OVERSAMPLED, *matrix.shape)
    drawn = jax.random.normal(key, (matrix.shape[1], count))
    basis = jnp.linalg.qr(matrix @ drawn)[0]
    for _ in range(iterations):
        basis = jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
