"""LoRA (Hu et al. 2021, section 4.1): W + s B A with a low rank r, s = alpha / r; only A and B are
trained.

The weights are einsum weights with unmerged dimensions, so A is [inputs..., r] and B [r,
outputs...]. With `rslora` s = alpha / sqrt(r) (Kalajdzievski 2023). LoRA+ (Hayou et al. 2024) is a
setting of the optimiser, which finds B by its name, `lora_b`. The one thing a reader would get
wrong: A is drawn from U(+-1/sqrt(fan in)) and B is zero, so the model is unchanged, bit for bit,
until the first step.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum, contract
from llmprep_jax.peft.adapter import axes_of, dims, shape_of
from llmprep_jax.peft.targets import Number, Pattern, Targets, as_pattern, check_number, first
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of LoRA.

    Attributes:
      rank: r. alpha: the scale is alpha / rank, or alpha / sqrt(rank) with `rslora`.
      targets: which layers, see `adapter.inject`.
      rank_pattern, alpha_pattern: (name or regex of a path's end, value) for layers that differ;
        the first that matches holds.
      dtype: of the adapter's parameters.
    """

    rank: int = 16
    alpha: Number = 32.0
    targets: Targets = "all-linear"
    rslora: bool = False
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    dtype: str = "float32"

    def __post_init__(self):
        check_number("LoRA's rank", self.rank, whole=True)
        check_number("LoRA's alpha", self.alpha, whole=False)
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = as_pattern(name, getattr(self, name), whole=name == "rank_pattern")
            object.__setattr__(self, name, pattern)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def resolve(self, names: Sequence[str]) -> "LoRA":
        rank, alpha = first(self.rank_pattern, names), first(self.alpha_pattern, names)
        return dataclasses.replace(
            self,
            rank=self.rank if rank is None else int(rank),
            alpha=self.alpha if alpha is None else alpha,
            targets=(),
            rank_pattern=(),
            alpha_pattern=(),
        )

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
        fan_in, fan_out = math.prod(ins), math.prod(outs)
        if self.rank > min(fan_in, fan_out):
            raise ValueError(
                f"LoRA's rank {self.rank} exceeds the dimensions {fan_in} x {fan_out} of the layer;"
                " lower rank, or give the layer its own in rank_pattern"
            )
        a_shape, b_shape = (*ins, self.rank), (self.rank, *outs)
        a_spec = spec(*in_axes, None, shape=a_shape)
        b_spec = spec(None, *out_axes, shape=b_shape)
        bound = 1 / math.sqrt(fan_in)
        a = jax.random.uniform(
            rngs.params(), a_shape, self.dtype, -bound, bound, out_sharding=a_spec
        )
        return {"lora_a": a, "lora_b": jnp.zeros(b_shape, self.dtype, out_sharding=b_spec)}

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        x_dims, ins, outs, y_dims = dims(base)
        rows = "".join(dim for dim in y_dims if dim not in outs)
        low_axes = (*base.out_axes[: len(rows)], None)
        eqn = f"{x_dims},{ins}r->{rows}r"
        x_low = contract(eqn, x, params["lora_a"], base.dtype, low_axes)
        # scaled in float32, as PEFT does for adapters of any dtype
        b = params["lora_b"].astype(jnp.float32) * self.scale
        return base(x) + contract(f"{rows}r,r{outs}->{y_dims}", x_low, b, base.dtype, base.out_axes)

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        _, ins, outs, _ = dims(base)
        a, b = params["lora_a"].astype(jnp.float32), params["lora_b"].astype(jnp.float32)
        out = spec(*base.axes, shape=base.layer_shape)
        eqn = f"{ins}r,r{outs}->{ins}{outs}"
        delta = jnp.einsum(eqn, a, b, precision="highest", out_sharding=out)
        return base.weight().astype(jnp.float32) + self.scale * delta
