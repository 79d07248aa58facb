"""DoRA (Liu et al. 2024, section 4.1): LoRA changes a weight's direction, a vector its magnitude.

W' = m V / ||V|| with V = W + s B A, norms over the inputs of each output, and m trained beside A
and B. The one thing a reader would get wrong: no gradient goes through the norm (section 4.3), and
the bias is not scaled.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import add_bias, scale_by
from llmprep_jax.peft.adapter import Layout, shape_of
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.sharding import has_mesh, spec

_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Settings of DoRA; those of LoRA."""

    adapts_embeddings: ClassVar[bool] = False  # a table's columns, a head's rows: other lengths

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        pattern = f"{layout.their_outs} -> {layout.outs}"
        return super().tensors(layout) | {"magnitude": ("lora_magnitude_vector", pattern)}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        params = super().init(base, rngs)
        return params | {"magnitude": self._norm(params, base).astype(self.dtype)}

    def forward(
        self, params: Mapping[str, Array], base: Einsum, x: Array, dropped: Array | None = None
    ) -> Array:
        y, ratio = super().forward(params, base, x, dropped), self._ratio(params, base)
        # what is scaled sees the dropped inputs, the base's weight too
        whole = y if dropped is None else super().forward(params, base, dropped)
        whole = whole if base.b is None else add_bias(whole, -base.b[...])
        return y + scale_by(whole, ratio - 1.0)

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        return super().merge(params, base) * self._ratio(params, base)

    def _ratio(self, params: Mapping[str, Array], base: Einsum) -> Array:
        """m / ||V||, [outputs...]; 1 where they differ by rounding, whatever order norms sum in."""
        ratio = params["magnitude"].astype(jnp.float32) / self._norm(params, base)
        rounding = jnp.where(jnp.abs(ratio - 1.0) < _ROUNDING, 1.0 - ratio, 0.0)
        return ratio + jax.lax.stop_gradient(rounding)

    def _norm(self, params: Mapping[str, Array], base: Einsum) -> Array:
        """||W + s B A|| over the inputs of each output, [outputs...], without a gradient."""
        weight = jax.lax.stop_gradient(super().merge(params, base))
        num_ins = len(shape_of(base)[0])
        norm = jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(num_ins))))
        return jax.reshard(norm, spec(*[None] * norm.ndim)) if has_mesh() else norm
