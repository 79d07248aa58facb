"""Beginnings of LoRA in the weight itself: PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024).

Both train A and B from a part of W, s B0 A0, and keep the rest, W - s B0 A0, frozen: PiSSA takes
the r largest singular values (section 3, eq. 2 to 4), OLoRA the first r columns of a QR
factorisation (section 3). The one thing a reader would get wrong: the base's arrays stay W; the
layer subtracts s B0 A0 as it computes, so the base is shared, removed and merged exactly, and only
the start is the identity to within rounding.
"""

import math

import jax
import jax.numpy as jnp

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.adapter import axes_of, shape_of
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array


def begin(kind: str, base: Einsum, rank: int, scale: float) -> tuple[Array, Array]:
    """A0 [inputs..., r] and B0 [r, outputs...] of a layer, float32.

    Args:
      kind: "pissa" or "olora".
    """
    (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
    w = base.weight().astype(jnp.float32)
    w = jax.reshard(w, spec(*[None] * w.ndim)) if has_mesh() else w  # factorised on every device
    matrix = w.reshape(math.prod(ins), math.prod(outs))
    if kind == "pissa":
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        root = jnp.sqrt(values[:rank] / scale)
        a, b = left[:, :rank] * root, root[:, None] * right[:rank]
    else:  # of the matrix outputs by inputs, as it is released
        q, r = jnp.linalg.qr(matrix.T)
        a, b = r[:rank].T, q[:, :rank].T
    a, b = a.reshape(*ins, rank), b.reshape(rank, *outs)
    if has_mesh():
        a = jax.reshard(a, spec(*in_axes, None, shape=a.shape))
        b = jax.reshard(b, spec(None, *out_axes, shape=b.shape))
    return a, b
