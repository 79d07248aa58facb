"""What methods with a rank have in common: their settings, and added matrices.

The one thing a reader would get wrong: settings are resolved for each layer by its names, so a
method in a model has neither targets nor patterns left.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum, Embed, Head, contract, look_up
from llmprep_jax.peft.adapter import dims, shape_of
from llmprep_jax.peft.targets import Number, Pattern, Targets, as_pattern, check_number, first
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Settings of a method with a rank.

    Attributes:
      rank: r. alpha: the scale is alpha / rank.
      targets: which layers, see `adapter.inject`.
      rank_pattern, alpha_pattern: (name or regex of a path's end, value) for layers that differ;
        the first that matches holds.
      dtype: of the adapter's parameters.
      modules_to_save: modules that are trained whole beside the adapters (embeddings, norms, the
        head), matched as targets are; see `tuned`.
    """

    rank: int = 8
    alpha: Number = 8.0
    targets: Targets = "all-linear"
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    dtype: str = "float32"
    modules_to_save: Targets = ()

    def __post_init__(self):
        name = type(self).__name__
        check_number(f"{name}'s rank", self.rank, whole=True)
        check_number(f"{name}'s alpha", self.alpha, whole=False)
        for name in ("targets", "modules_to_save"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
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
            self,
            rank=self.rank if rank is None else int(rank),
            alpha=self.alpha if alpha is None else alpha,
            targets=(),
            rank_pattern=(),
            alpha_pattern=(),
            modules_to_save=(),
        )


class Added(abc.ABC):
    """A method that adds a matrix to the weight, which it forms whole."""

    @abc.abstractmethod
    def delta(self, params: Mapping[str, Array], base: Einsum) -> Array:
        """What is added to the weight, in its layout, float32."""

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        delta = self.delta(params, base)
        return base(x) + contract(base.eqn, x, delta, base.dtype, base.out_axes)

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        return base.weight().astype(jnp.float32) + self.delta(params, base)


def check_rank(method: LowRank, base: Einsum) -> None:
    """Refuses a rank above a layer's dimensions."""
    ins, outs = map(math.prod, shape_of(base))
    if method.rank > min(ins, outs):
        raise ValueError(
            f"{type(method).__name__}'s rank {method.rank} exceeds the dimensions {ins} x {outs} of"
            " the layer; lower rank, or give the layer its own in rank_pattern"
        )


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
        x_low = look_up(a, x, low_axes).astype(base.compute.dtype)
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
