"""DoRA (Liu et al. 2024, section 4.1): LoRA changes a weight's direction, a vector its magnitude.

W' = m V / ||V|| with V = W + s B A, norms over the inputs of each output, and m trained beside A
and B. ||V||^2 = ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2, of which the first is kept, so that no
matrix of the layer's size is formed. No gradient goes through the norm (section 4.3), the bias is
not scaled, and m is float32 whatever `dtype` is, since rounding it would change the model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import add_bias, scale_by
from llmprep_jax.peft.layout import Layout, dims, shape_of
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.peft.method import Params
from llmprep_jax.peft.peft_fields import flag
from llmprep_jax.sharding import has_mesh, spec

_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Settings of DoRA; those of LoRA."""

    adapts_embeddings: ClassVar[bool] = False  # a table's columns, a head's rows: other lengths
    adds_product: ClassVar[bool] = False
    pads: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LORA"

    @property
    def frozen(self) -> tuple[str, ...]:
        return (*super().frozen, "base_squares")

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return flag(config, "use_dora")

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "DoRA"]) -> dict[str, Any]:
        return super().to_peft(by_name) | {"use_dora": True}

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        pattern = f"{layout.their_outs} -> {layout.outs}"
        return super().tensors(layout) | {"magnitude": ("lora_magnitude_vector", pattern)}

    def derived(self, base: Einsum) -> Params:
        return {**super().derived(base), **self._squares(base)}

    def _squares(self, base: Einsum) -> Params:
        """||W||^2 of each output."""
        squares = jnp.square(base.weight().astype(jnp.float32))
        squares = jnp.sum(squares, axis=tuple(range(len(shape_of(base)[0]))))
        return {"base_squares": _whole(squares)}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        params = {**super().init(base, rngs), **self._squares(base)}
        return params | {"magnitude": self._norm(params, base)}

    def forward(
        self, params: Params, base: Einsum, x: Array, dropped: Array | None = None
    ) -> Array:
        y = super().forward(params, base, x, dropped)
        ratio = params["ratio"] if "ratio" in params else self._ratio(params, base)
        # what is scaled sees the dropped inputs, the base's weight too
        whole = y if dropped is None else super().forward(params, base, dropped)
        whole = whole if base.b is None else add_bias(whole, -base.b[...])
        return y + scale_by(whole, ratio - 1.0)

    def merge(self, params: Params, base: Einsum) -> Array:
        return super().merge(params, base) * self._ratio(params, base)

    def settled(self, params: Params, base: Einsum) -> Params:
        return {"ratio": self._ratio(params, base)}

    def _ratio(self, params: Params, base: Einsum) -> Array:
        """m / ||V||, [outputs...]; 1 where they differ by rounding, whatever order norms sum in."""
        ratio = params["magnitude"].astype(jnp.float32) / self._norm(params, base)
        rounding = jnp.where(jnp.abs(ratio - 1.0) < _ROUNDING, 1.0 - ratio, 0.0)
        return ratio + jax.lax.stop_gradient(rounding)

    def _norm(self, params: Params, base: Einsum) -> Array:
        """||W + s B A|| over the inputs of each output, [outputs...], without a gradient."""
        params = jax.lax.stop_gradient(dict(params))
        factors = self.widen(params) if self.takes_part else params
        a, b = (factors[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
        x_dims, ins, *_ = dims(base)
        # A^T W by the layer itself, whose weight may be packed: the rows of A^T as tokens
        rows = jnp.moveaxis(a, -1, 0).reshape(*[1] * (len(x_dims) - len(ins) - 1), *_turned(a))
        # held: XLA's CPU compiler takes the turning into the product, of which it has none in bf16
        rows = jax.lax.optimization_barrier(rows)
        along = base(rows).astype(jnp.float32)
        along = along if base.b is None else along - base.b[...].astype(jnp.float32)
        along = jax.lax.stop_gradient(_whole(along.reshape(b.shape)))  # of a trained bias too
        b, gram = _whole(b), jnp.tensordot(_whole(a), _whole(a), [list(range(len(ins)))] * 2)
        inner = jnp.sum(b * along, axis=0)
        own = jnp.sum(b * jnp.tensordot(gram, b, 1), axis=0)
        squares = params["base_squares"] + 2 * self.scale * inner + self.scale**2 * own
        return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def _turned(a: Array) -> tuple[int, ...]:
    """The shape of A^T."""
    return (a.shape[-1], *a.shape[:-1])


def _whole(x: Array) -> Array:
    """The array on every device."""
    return jax.reshard(x, spec(*[None] * x.ndim)) if has_mesh() else x
