"""LoKr (LyCORIS, Yeh et al. 2023, section 3.2): the added matrix is a Kronecker product.

Delta W = s w1 (x) w2 for the matrix (outputs, inputs); w2, the larger factor, is w2a w2b of rank r
where that is smaller, and so is w1 with `decompose_both`. The one thing a reader would get wrong:
the factors cut outputs and inputs into blocks of the merged matrix, so they know nothing of heads.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.adapter import Layout, shape_of
from llmprep_jax.peft.low_rank import Added, LowRank, check_rank, draw
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class LoKr(Added, LowRank):
    """Settings of LoKr.

    Attributes:
      decompose_both: w1 is a product of rank r too, where that is smaller.
      decompose_factor: into how many blocks each dimension is cut, at most; -1: as near to the
        square root as its divisors allow.
    """

    decompose_both: bool = False
    decompose_factor: int = -1

    scaled: ClassVar[str] = "lokr_w1"

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
        return {name: (name, "a b -> a b") for name in names}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        check_rank(self, base)
        shapes = self._shapes(base)
        params = {}
        for name, shape in shapes.items():
            zero = name in ("lokr_w1", "lokr_w1_a")
            params[name] = (
                jnp.zeros(shape, self.dtype, out_sharding=spec(None, None))
                if zero
                else draw(rngs, shape, (None, None), shape[1], self.dtype)
            )
        return params

    def _shapes(self, base: Einsum) -> dict[str, tuple[int, int]]:
        ins, outs = map(math.prod, shape_of(base))
        (out_1, out_2), (in_1, in_2) = [factors(n, self.decompose_factor) for n in (outs, ins)]
        whole = {
            "w1": not (self.decompose_both and self.rank < max(out_1, in_1) / 2),
            "w2": self.rank >= max(out_2, in_2) / 2,
        }
        shapes = {}
        for name, rows, columns in (("w1", out_1, in_1), ("w2", out_2, in_2)):
            if whole[name]:
                shapes[f"lokr_{name}"] = (rows, columns)
            else:
                shapes[f"lokr_{name}_a"] = (rows, self.rank)
                shapes[f"lokr_{name}_b"] = (self.rank, columns)
        return shapes

    def delta(self, params: Mapping[str, Array], base: Einsum) -> Array:
        w1, w2 = (_factor(params, name) for name in ("lokr_w1", "lokr_w2"))
        (out_1, in_1), (out_2, in_2) = w1.shape, w2.shape
        delta = jnp.einsum("ac,bd->cdab", w1, w2).reshape(in_1 * in_2, out_1, out_2)
        delta = delta.reshape(in_1 * in_2, -1)  # one pair at a time, where experts are sharded
        ins, outs = shape_of(base)
        return self.scale * delta.reshape(*ins, *outs)


def factors(size: int, limit: int = -1) -> tuple[int, int]:
    """The two divisors of a size that are nearest to each other, the smaller within `limit`."""
    if limit > 0 and size % limit == 0:
        return limit, size // limit
    limit = size if limit < 0 else limit
    best = (1, size)
    for small in range(1, math.isqrt(size) + 1):
        if size % small == 0 and small <= limit:
            best = (small, size // small)
    return best


def _factor(params: Mapping[str, Array], name: str) -> Array:
    if name in params:
        return params[name].astype(jnp.float32)
    a, b = params[f"{name}_a"].astype(jnp.float32), params[f"{name}_b"].astype(jnp.float32)
    return jnp.matmul(a, b, precision="highest")
