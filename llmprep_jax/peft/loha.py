"""LoHa (FedPara, Hyeon-Woo et al. 2022, section 2.1): the added matrix is a Hadamard product.

Delta W = s (w1a w1b) * (w2a w2b), each factor of rank r, so that their product may have rank r^2
with twice LoRA's parameters. The one thing a reader would get wrong: all but w2b are drawn, from
U(+-1/sqrt(columns)), and w2b is zero, so the model is unchanged until the first step.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.adapter import Layout, axes_of, shape_of
from llmprep_jax.peft.low_rank import Added, LowRank, check_rank, draw, outer
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class LoHa(Added, LowRank):
    """Settings of LoHa."""

    scaled: ClassVar[str] = "hada_w1_a"

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        to_a = f"{layout.their_outs} r -> r {layout.outs}"
        to_b = f"r {layout.their_ins} -> {layout.ins} r"
        patterns = {"hada_w1_a": to_a, "hada_w1_b": to_b, "hada_w2_a": to_a, "hada_w2_b": to_b}
        return {name: (name, pattern) for name, pattern in patterns.items()}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        check_rank(self, base)
        (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
        a = (self.rank, *outs), (None, *out_axes), self.rank, self.dtype
        b = (*ins, self.rank), (*in_axes, None), math.prod(ins), self.dtype
        return {
            "hada_w1_a": draw(rngs, *a),
            "hada_w1_b": draw(rngs, *b),
            "hada_w2_a": draw(rngs, *a),
            "hada_w2_b": jnp.zeros(b[0], self.dtype, out_sharding=spec(*b[1], shape=b[0])),
        }

    def delta(self, params: Mapping[str, Array], base: Einsum) -> Array:
        factors = [outer(params[f"hada_{w}_b"], params[f"hada_{w}_a"], base) for w in ("w1", "w2")]
        return self.scale * factors[0] * factors[1]
