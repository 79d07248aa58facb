"""VeRA (Kopiczko et al. 2024, section 3.1): one random pair of matrices for all layers, and two
trained vectors a layer that scale it.

Delta W = diag(b) B diag(d) A, with A and B of the largest width among the layers, of which each
takes the first columns and rows. A and B are no parameters; every layer refers to the same two
arrays, which are drawn as PEFT draws them, bit for bit, from `seed`. b is zero at first, so the
model is unchanged until the first step.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import Layout, axes_of, shape_of
from llmprep_jax.peft.low_rank import bypass, outer
from llmprep_jax.peft.method import Method
from llmprep_jax.peft.targets import Number, check_number
from llmprep_jax.sharding import has_mesh, spec


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Settings of VeRA.

    Attributes:
      rank: r, which may exceed a layer's dimensions: a rank costs one number a layer.
      initial: of every value of d at first.
      seed: that A and B are drawn from; PEFT's projection_prng_key.
    """

    rank: int = 256
    initial: Number = 0.1
    seed: int = 0

    decayed: ClassVar[tuple[str, ...]] = ("vera_lambda_b",)
    shared: ClassVar[Mapping[str, str]] = {
        "vera_a": "base_model.vera_A",
        "vera_b": "base_model.vera_B",
    }
    peft_type: ClassVar[str] = "VERA"
    peft_fields: ClassVar[tuple[str, ...]] = (
        *("r", "d_initial", "projection_prng_key", "save_projection", "bias"),
    )

    def __post_init__(self):
        super().__post_init__()
        check_number("VeRA's rank", self.rank, whole=True)
        check_number("VeRA's initial", self.initial, whole=False)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"VeRA's seed is {self.seed!r}; it must be a whole number from 0 on")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "VeRA":
        check_number("r", config["r"], whole=True)
        initial, seed = config.get("d_initial", 0.1), config.get("projection_prng_key", 0)
        return cls(int(config["r"]), initial, seed)

    @classmethod
    def draws_shared(cls, config: Mapping[str, Any]) -> bool:
        return config.get("save_projection") is False

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "VeRA"]) -> dict[str, Any]:
        first = next(iter(by_name.values()))
        return {
            "r": first.rank,
            "d_initial": first.initial,
            "projection_prng_key": first.seed,
            "save_projection": True,
        }

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        return {
            "vera_lambda_b": ("vera_lambda_b", f"{layout.their_outs} -> {layout.outs}"),
            "vera_lambda_d": ("vera_lambda_d", "r -> r"),
        }

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        outs, axes = shape_of(base)[1], axes_of(base)[1]
        return {
            "vera_lambda_b": jnp.zeros(outs, self.dtype, out_sharding=spec(*axes, shape=outs)),
            "vera_lambda_d": jnp.full(self.rank, self.initial, self.dtype, out_sharding=spec(None)),
        }

    def shared_shapes(self, bases: Iterable[Einsum]) -> dict[str, tuple[int, int]]:
        """Of A, (r, largest input), and B, (largest output, r), for these layers."""
        sizes = [tuple(map(math.prod, shape_of(base))) for base in bases]
        ins, outs = (max(column) for column in zip(*sizes, strict=True))
        return {"vera_a": (self.rank, ins), "vera_b": (outs, self.rank)}

    def draw_shared(self, bases: Iterable[Einsum]) -> dict[str, np.ndarray]:
        """A, then B, from U(+-sqrt(6 / columns)) (He et al. 2015), float32."""
        # torch's generator is MT19937 too, and takes 24 bits of each 32 for a float32
        stream = np.random.RandomState(self.seed % 2**32)
        drawn = {}
        for name, shape in self.shared_shapes(bases).items():
            bits = stream.randint(0, 2**32, size=shape, dtype=np.uint32) & 0xFFFFFF
            low, high = np.float32([-1, 1]) * np.float32(math.sqrt(6 / shape[1]))
            drawn[name] = (bits * 2.0**-24 * np.float64(high - low) + low).astype(np.float32)
        return drawn

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        return base(x) + bypass(*self._factors(params, base), base, x)

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        delta = outer(*self._factors(params, base), base)
        return base.weight().astype(jnp.float32) + delta

    def _factors(self, params: Mapping[str, Array], base: Einsum) -> tuple[Array, Array]:
        """A as [inputs..., r], and B as [r, outputs...] with both vectors in it, float32."""
        (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
        a, b = params["vera_a"][:, : math.prod(ins)], params["vera_b"][: math.prod(outs)]
        a = _placed(a.T.reshape(*ins, self.rank), *in_axes, None)
        b = _placed(b.T.reshape(self.rank, *outs), None, *out_axes)
        d = params["vera_lambda_d"].astype(jnp.float32).reshape(self.rank, *[1] * len(outs))
        return a, b * d * params["vera_lambda_b"].astype(jnp.float32)


def _placed(x: Array, *axes: str | None) -> Array:
    return jax.reshard(x, spec(*axes, shape=x.shape)) if has_mesh() else x
