"""LoKr (LyCORIS, Yeh et al. 2023, section 3.2): the added matrix is a Kronecker product.

Delta W = s w1 (x) w2 for the matrix (outputs, inputs); w2, the larger factor, is w2a w2b of rank r
where that is smaller, and so is w1 with `decompose_both`. The factors cut outputs and inputs into
blocks of the merged matrix, so they know nothing of heads.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import Layout, shape_of
from llmprep_jax.peft.low_rank import Added, LowRank, draw
from llmprep_jax.peft.peft_fields import flag
from llmprep_jax.sharding import has_mesh, sharding_of, spec
from llmprep_jax.weights.safetensors import quoted

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclasses.dataclass(frozen=True)
class LoKr(Added, LowRank):
    """Settings of LoKr.

    Attributes:
      decompose_both: w1 is a product of rank r too, where that is smaller.
      decompose_factor: into how many blocks each dimension is cut, at most; -1: as near to the
        square root as its divisors allow.
    """

    _: dataclasses.KW_ONLY
    decompose_both: bool = False
    decompose_factor: int = -1

    scaled: ClassVar[str] = "lokr_w1"
    decayed: ClassVar[tuple[str, ...]] = NAMES
    peft_type: ClassVar[str] = "LOKR"
    peft_fields: ClassVar[tuple[str, ...]] = (
        *("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"),
    )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoKr":
        factor = config.get("decompose_factor", -1)
        is_whole = isinstance(factor, int) and not isinstance(factor, bool)
        if not is_whole or not (factor == -1 or factor > 0):
            raise ValueError(f"decompose_factor is {quoted(factor)}; it must be -1 or at least 1")
        blocks = {"decompose_both": flag(config, "decompose_both"), "decompose_factor": factor}
        return cls(**cls.ranks_from_peft(config, "alpha"), **blocks)

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "LoKr"]) -> dict[str, Any]:
        first = next(iter(by_name.values()))
        return cls.ranks_to_peft(by_name, "alpha") | {
            "decompose_both": first.decompose_both,
            "decompose_factor": first.decompose_factor,
        }

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        return {name: (name, "a b -> a b") for name in NAMES}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
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

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        """As (w1 (x) w2) x = w1 X w2^T, of the inputs X cut into blocks."""
        (ins, outs), place = shape_of(base), sharding_of(x)
        rows = x.shape[: x.ndim - len(ins)]
        if has_mesh():  # a block's inputs may lie on several devices
            x_cut = jax.reshard(x, jax.P(*place.spec[: len(rows)], *[None] * len(ins)))
        else:
            x_cut = x
        w1, w2 = (_factors(params, name) for name in ("lokr_w1", "lokr_w2"))
        y = x_cut.astype(base.dtype).reshape(*rows, -1)
        y = y.reshape(*rows, w1[-1].shape[1], w2[-1].shape[1])
        for w in reversed(w2):
            y = _multiply("...ab,cb->...ac", y, w, base.dtype)
        for w in reversed(w1):
            y = _multiply("...ba,cb->...ca", y, w, base.dtype)
        y = (self.scale * y).astype(x.dtype).reshape(*rows, -1).reshape(*rows, *outs)
        return base(x) + (jax.reshard(y, spec(*base.out_axes, shape=y.shape)) if has_mesh() else y)

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


def _factors(params: Mapping[str, Array], name: str) -> list[Array]:
    """What a factor is the product of."""
    parts = [name] if name in params else [f"{name}_a", f"{name}_b"]
    return [params[part].astype(jnp.float32) for part in parts]


def _factor(params: Mapping[str, Array], name: str) -> Array:
    first, *rest = _factors(params, name)
    return jnp.matmul(first, *rest, precision="highest") if rest else first


def _multiply(eqn: str, x: Array, w: Array, dtype: jnp.dtype) -> Array:
    return jnp.einsum(eqn, x, w.astype(dtype), preferred_element_type=jnp.float32).astype(dtype)
