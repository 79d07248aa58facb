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
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum, contract
from llmprep_jax.peft.adapter import Targets
from llmprep_jax.sharding import spec

Number = float | int
Pattern = tuple[tuple[str, Number], ...] | Mapping[str, Number]


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
        if self.rank < 1:
            raise ValueError(f"LoRA's rank is {self.rank}; it must be at least 1")
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("rank_pattern", "alpha_pattern"):
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, tuple(getattr(self, name).items()))

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def resolve(self, names: Sequence[str]) -> "LoRA":
        rank, alpha = _first(self.rank_pattern, names), _first(self.alpha_pattern, names)
        return dataclasses.replace(
            self,
            rank=self.rank if rank is None else int(rank),
            alpha=self.alpha if alpha is None else alpha,
            rank_pattern=(),
            alpha_pattern=(),
        )

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        w_shape, inputs = base.w.shape, num_inputs(base)
        fan_in, fan_out = math.prod(w_shape[:inputs]), math.prod(w_shape[inputs:])
        if self.rank > min(fan_in, fan_out):
            raise ValueError(
                f"LoRA's rank {self.rank} exceeds the dimensions {fan_in} x {fan_out} of a layer"
            )
        a_shape, b_shape = (*w_shape[:inputs], self.rank), (self.rank, *w_shape[inputs:])
        a_spec = spec(*base.axes[:inputs], None, shape=a_shape)
        b_spec = spec(None, *base.axes[inputs:], shape=b_shape)
        bound = 1 / math.sqrt(fan_in)
        a = jax.random.uniform(
            rngs.params(), a_shape, self.dtype, -bound, bound, out_sharding=a_spec
        )
        return {"lora_a": a, "lora_b": jnp.zeros(b_shape, self.dtype, out_sharding=b_spec)}

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        x_dims, ins, outs, y_dims = dims(base)
        low = f"{y_dims[:2]}R"
        x_low = contract(f"{x_dims},{ins}R->{low}", x, params["lora_a"], base.dtype, _LOW_AXES)
        b = params["lora_b"] * self.scale
        return base(x) + contract(f"{low},R{outs}->{y_dims}", x_low, b, base.dtype, base.out_axes)

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        _, ins, outs, _ = dims(base)
        a, b = params["lora_a"].astype(jnp.float32), params["lora_b"].astype(jnp.float32)
        delta = jnp.einsum(
            f"{ins}R,R{outs}->{ins}{outs}",
            a,
            b,
            precision="highest",
            out_sharding=spec(*base.axes, shape=base.w.shape),
        )
        return base.w[...].astype(jnp.float32) + self.scale * delta


_LOW_AXES = ("batch", "seq", None)


def dims(base: Einsum) -> tuple[str, str, str, str]:
    """(activation, weight's inputs, weight's outputs, result) of a layer's einsum, as letters."""
    inputs, y_dims = base.eqn.split("->")
    x_dims, w_dims = inputs.split(",")
    ins = "".join(dim for dim in w_dims if dim not in y_dims)
    outs = "".join(dim for dim in w_dims if dim in y_dims)
    return x_dims, ins, outs, y_dims


def num_inputs(base: Einsum) -> int:
    """How many of the weight's leading dimensions are inputs."""
    return len(dims(base)[1])


def _first(pattern: Pattern, names: Sequence[str]) -> Number | None:
    """PEFT's rule: the first key that matches the end of a path, whole names only."""
    for key, value in pattern:
        if any(re.fullmatch(rf"(.*\.)?({key})", name.replace("{l}", "0")) for name in names):
            return value
    return None
