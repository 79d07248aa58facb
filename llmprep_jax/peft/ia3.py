"""(IA)^3 (Liu et al. 2022, section 3.3): learned vectors rescale keys, values and MLP activations.

A layer's outputs are multiplied by l, bias and all; the inputs instead where the layer ends a
feed-forward block, so that it is that block's activations which are rescaled. Where it is the
outputs, merging changes the bias too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import scale_by
from llmprep_jax.peft.layout import Layout, shape_of
from llmprep_jax.peft.method import Method
from llmprep_jax.peft.peft_fields import names as names_field
from llmprep_jax.peft.peft_fields import shortest
from llmprep_jax.peft.targets import Targets, matches
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Settings of (IA)^3.

    Attributes:
      feedforward: of the targets, those whose inputs are rescaled; names or a regex, like targets.
    """

    targets: Targets = dataclasses.field(default=("k_proj", "v_proj", "down_proj"), kw_only=True)
    feedforward: Targets = dataclasses.field(default=("down_proj",), kw_only=True)

    peft_type: ClassVar[str] = "IA3"
    peft_fields: ClassVar[tuple[str, ...]] = ("feedforward_modules",)

    def resolve(self, names: Sequence[str]) -> "IA3":
        inputs = bool(self.feedforward) and matches(self.feedforward, names)
        feedforward = "all-linear" if inputs else ()
        return dataclasses.replace(super().resolve(names), feedforward=feedforward)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "IA3":
        return cls(feedforward=names_field(config, "feedforward_modules") or ())

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "IA3"]) -> dict[str, Any]:
        inputs = {name: True for name, method in by_name.items() if method.feedforward}
        return {
            "feedforward_modules": sorted(shortest(inputs, by_name)),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        of_ins = f"1 {layout.their_ins} -> {layout.ins}"
        of_outs = f"{layout.their_outs} 1 -> {layout.outs}"
        return {"ia3_l": ("ia3_l", of_ins if self.feedforward else of_outs)}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        ins, outs = shape_of(base)
        shape = ins if self.feedforward else outs
        return {"ia3_l": jnp.ones(shape, self.dtype, out_sharding=spec(*[None] * len(shape)))}

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        scale = params["ia3_l"]
        if self.feedforward:
            return base(scale_by(x, scale))
        return scale_by(base(x), scale)

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        scale, (ins, outs) = params["ia3_l"].astype(jnp.float32), shape_of(base)
        shape = (*ins, *[1] * len(outs)) if self.feedforward else (*[1] * len(ins), *outs)
        return base.weight().astype(jnp.float32) * scale.reshape(shape)

    def merge_bias(self, params: Mapping[str, Array], base: Einsum) -> Array:
        """The base's bias with the adapter in it."""
        bias = base.b[...]
        return bias if self.feedforward else (bias * params["ia3_l"]).astype(bias.dtype)
