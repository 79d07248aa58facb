"""LoHa (FedPara, Hyeon-Woo et al. 2022, section 2.1): the added matrix is a Hadamard product.

Delta W = s (w1a w1b) * (w2a w2b), each factor of rank r, so that their product may have rank r^2
with twice LoRA's parameters. All but w2b are drawn, from U(+-1/sqrt(columns)), and w2b is zero, so
the model is unchanged until the first step.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import Layout, axes_of, dims, shape_of
from llmprep_jax.peft.low_rank import Added, LowRank, draw, outer
from llmprep_jax.sharding import has_mesh, spec

_FACTORS = ("1_a", "1_b", "2_a", "2_b")


@dataclasses.dataclass(frozen=True)
class LoHa(Added, LowRank):
    """Settings of LoHa."""

    scaled: ClassVar[str] = "hada_w1_a"
    pads: ClassVar[bool] = True
    decayed: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    peft_type: ClassVar[str] = "LOHA"
    peft_fields: ClassVar[tuple[str, ...]] = ("r", "alpha", "rank_pattern", "alpha_pattern")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoHa":
        return cls(**cls.ranks_from_peft(config, "alpha"))

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "LoHa"]) -> dict[str, Any]:
        return cls.ranks_to_peft(by_name, "alpha")

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        to_a = f"{layout.their_outs} r -> r {layout.outs}"
        to_b = f"r {layout.their_ins} -> {layout.ins} r"
        patterns = {"hada_w1_a": to_a, "hada_w1_b": to_b, "hada_w2_a": to_a, "hada_w2_b": to_b}
        return {name: (name, pattern) for name, pattern in patterns.items()}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
        a = (self.rank, *outs), (None, *out_axes), self.rank, self.dtype
        b = (*ins, self.rank), (*in_axes, None), math.prod(ins), self.dtype
        return {
            "hada_w1_a": draw(rngs, *a),
            "hada_w1_b": draw(rngs, *b),
            "hada_w2_a": draw(rngs, *a),
            "hada_w2_b": jnp.zeros(b[0], self.dtype, out_sharding=spec(*b[1], shape=b[0])),
        }

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        """For few tokens by way of rank r^2, sum of (w1a w2a) over pairs of (w1b w2b) x."""
        x_dims, ins, outs, y_dims = dims(base)
        rows = y_dims.removesuffix(outs)
        tokens = math.prod(x.shape[: len(rows)])
        num_ins, num_outs = map(math.prod, shape_of(base))
        of_pairs = tokens * self.rank**2 * (num_ins + num_outs)
        if has_mesh() or of_pairs > (2 * self.rank + tokens) * num_ins * num_outs:
            return super().forward(params, base, x)
        # float32, as XLA's CPU compiler has no bf16 product for some of these inside a loop
        w1a, w1b, w2a, w2b = (params[f"hada_w{n}"].astype(jnp.float32) for n in _FACTORS)
        x_wide = x.astype(base.dtype).astype(jnp.float32)
        pairs = jnp.einsum(f"{x_dims},{ins}r,{ins}s->{rows}rs", x_wide, w1b, w2b)
        y = jnp.einsum(f"{rows}rs,r{outs},s{outs}->{y_dims}", pairs, w1a, w2a)
        return base(x) + (self.scale * y).astype(x.dtype)

    def delta(self, params: Mapping[str, Array], base: Einsum) -> Array:
        factors = [outer(params[f"hada_{w}_b"], params[f"hada_{w}_a"], base) for w in ("w1", "w2")]
        return self.scale * factors[0] * factors[1]
