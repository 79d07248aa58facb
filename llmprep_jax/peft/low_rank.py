"""What methods with a rank have in common: their settings, and added matrices."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum, Embed, Head, contract, look_up
from llmprep_jax.peft.layout import dims, shape_of
from llmprep_jax.peft.method import Method, Params
from llmprep_jax.peft.peft_fields import mapping, shortest, whole
from llmprep_jax.peft.targets import Number, Pattern, as_pattern, check_number, first
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class LowRank(Method):
    """Settings of a method with a rank.

    Attributes:
      rank: r, of A and B.
      alpha: the scale is alpha / rank.
      rank_pattern, alpha_pattern: (name or regex of a path's end, value) for layers that differ;
        the first that matches holds.
    """

    rank: int = 8
    alpha: Number = 8.0
    _: dataclasses.KW_ONLY
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        check_number(f"{name}'s rank", self.rank, whole=True)
        check_number(f"{name}'s alpha", self.alpha, whole=False)
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = as_pattern(name, getattr(self, name), whole=name == "rank_pattern")
            object.__setattr__(self, name, pattern)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def resolve(self, names: Sequence[str]) -> "LowRank":
        rank, alpha = first(self.rank_pattern, names), first(self.alpha_pattern, names)
        return dataclasses.replace(
            super().resolve(names),
            rank=self.rank if rank is None else int(rank),
            alpha=self.alpha if alpha is None else alpha,
            rank_pattern=(),
            alpha_pattern=(),
        )

    def check(self, base: Einsum) -> None:
        super().check(base)
        ins, outs = map(math.prod, shape_of(base))
        if self.rank > min(ins, outs):
            raise ValueError(
                f"{type(self).__name__}'s rank {self.rank} exceeds the dimensions {ins} x {outs} of"
                " the layer; lower rank, or give the layer its own in rank_pattern"
            )

    @classmethod
    def ranks_from_peft(cls, config: Mapping[str, Any], alpha: str) -> dict[str, Any]:
        """Rank, alpha and their patterns, as settings; `alpha` is PEFT's name of that."""
        check_number("r", config["r"], whole=True)
        check_number(alpha, config[alpha], whole=False)
        ranks, alphas = (mapping(config, name) for name in ("rank_pattern", "alpha_pattern"))
        return {
            "rank": int(config["r"]),
            "alpha": config[alpha],
            "rank_pattern": as_pattern("rank_pattern", ranks, whole=True),
            "alpha_pattern": as_pattern("alpha_pattern", alphas, whole=False),
        }

    @classmethod
    def ranks_to_peft(cls, by_name: Mapping[str, "LowRank"], alpha: str) -> dict[str, Any]:
        """The inverse of `ranks_from_peft`, for methods by module."""
        first = next(iter(by_name.values()))

        def pattern(field: str) -> dict[str, Any]:
            values = {name: getattr(method, field) for name, method in by_name.items()}
            default = getattr(first, field)
            short = shortest(values, by_name)
            return {name: whole(value) for name, value in short.items() if value != default}

        return {
            "r": first.rank,
            alpha: whole(first.alpha),
            "rank_pattern": pattern("rank"),
            "alpha_pattern": pattern("alpha"),
        }


class Added(abc.ABC):
    """A method that adds to the weight a matrix `delta`, which no cheaper form is known of."""

    @abc.abstractmethod
    def delta(self, params: Params, base: Einsum) -> Array:
        """What is added to the weight, in its layout, float32."""

    def forward(self, params: Params, base: Einsum, x: Array) -> Array:
        delta = self.delta(params, base)
        return base(x) + contract(base.eqn, x, delta, base.dtype, base.out_axes)

    def merge(self, params: Params, base: Einsum) -> Array:
        return base.weight().astype(jnp.float32) + self.delta(params, base)


def draw(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    fan_in: int,
    dtype: str,
) -> Array:
    """U(+-1 / sqrt(fan_in)), as torch draws linear layers (He et al. 2015 with a = sqrt(5))."""
    bound, sharding = 1 / math.sqrt(fan_in), spec(*axes, shape=shape)
    return jax.random.uniform(rngs.params(), shape, dtype, -bound, bound, out_sharding=sharding)


def bypass(a: Array, b: Array, base: Einsum, x: Array) -> Array:
    """x a b by way of the rank: no matrix of the layer's size is formed.

    Args:
      a: [inputs..., r]. b: [r, outputs...].
      x: the layer's inputs; of an embedding tokens, whose rows of a are looked up.
    """
    x_dims, ins, outs, y_dims = dims(base)
    rows = "".join(dim for dim in y_dims if dim not in outs)
    low_axes = (*base.out_axes[: len(rows)], None)
    if isinstance(base, Embed):
        x_low = look_up(a, x, base.compute.dtype, low_axes)
    else:
        # a head computes in float32 whatever its inputs are
        x = x.astype(jnp.float32) if isinstance(base, Head) else x
        x_low = contract(f"{x_dims},{ins}r->{rows}r", x, a, base.dtype, low_axes)
    return contract(f"{rows}r,r{outs}->{y_dims}", x_low, b, base.dtype, base.out_axes)


def outer(a: Array, b: Array, base: Einsum) -> Array:
    """a b as a matrix of the layer, [inputs, outputs] unmerged, float32.

    Args:
      a: [inputs..., r]. b: [r, outputs...].
    """
    _, ins, outs, _ = dims(base)
    a, b, out = (
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        spec(*base.axes, shape=base.layer_shape),
    )
    eqn = f"{ins}r,r{outs}->{ins}{outs}"
    return jnp.einsum(eqn, a, b, precision="highest", out_sharding=out)
