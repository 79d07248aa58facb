"""HRA (Yuan et al. 2024, section 3): inputs are reflected at r trained hyperplanes.

y = W H x with H = H_1 ... H_r and H_i = I - 2 u_i u_i^T / |u_i|^2; the product of reflections is I
- U T U^T with T^-1 = striu(U^T U) + diag(U^T U) / 2, two low-rank products. With `apply_gs`, PEFT's
Gram-Schmidt, H = I - 2 U (U^T U)^-1 U^T, at the hyperplanes' intersection. Reflections begin in
equal pairs, the identity to rounding; under `apply_gs`, where a pair would be one, H begins as a
true reflection, which changes the model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import Layout, axes_of, dims, shape_of
from llmprep_jax.peft.low_rank import draw
from llmprep_jax.peft.method import Method, Params
from llmprep_jax.peft.peft_fields import flag
from llmprep_jax.peft.targets import check_number
from llmprep_jax.sharding import has_mesh, sharding_of, spec


@dataclasses.dataclass(frozen=True)
class HRA(Method):
    """Settings of HRA.

    Attributes:
      rank: r; even, so that reflections can begin in pairs.
      apply_gs: whether the hyperplanes are made orthogonal.
    """

    rank: int = 8
    apply_gs: bool = dataclasses.field(default=False, kw_only=True)

    peft_type: ClassVar[str] = "HRA"
    peft_fields: ClassVar[tuple[str, ...]] = ("r", "apply_GS", "bias")

    def __post_init__(self):
        super().__post_init__()
        check_number("HRA's rank", self.rank, whole=True)

    def prepare(self, model: nnx.Module) -> nnx.Module:
        if self.rank % 2 and not self.apply_gs:
            raise ValueError(
                f"HRA's rank is {self.rank}, but reflections begin in pairs; give an even rank"
            )
        return model

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "HRA":
        check_number("r", config["r"], whole=True)
        return cls(int(config["r"]), apply_gs=flag(config, "apply_GS"))

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "HRA"]) -> dict[str, Any]:
        first = next(iter(by_name.values()))
        return {"r": first.rank, "apply_GS": first.apply_gs}

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        return {"hra_u": ("hra_u", f"{layout.their_ins} r -> {layout.ins} r")}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        (ins, _), (axes, _) = shape_of(base), axes_of(base)
        copies = 1 if self.apply_gs or self.rank % 2 else 2
        count = self.rank // copies
        u = draw(rngs, (*ins, count), (*axes, None), count, self.dtype)
        return {"hra_u": jnp.repeat(u, copies, axis=-1)}

    def forward(self, params: Params, base: Einsum, x: Array) -> Array:
        x_dims, ins, _, _ = dims(base)
        u, rows = params["hra_u"].astype(jnp.float32), x_dims.removesuffix(ins)
        place = jax.P(*sharding_of(x).spec[: len(rows)], None) if has_mesh() else None
        along = _sum(f"{x_dims},{ins}r->{rows}r", x.astype(jnp.float32), u, place)
        along = _sum(f"{rows}r,sr->{rows}s", along, self._core(u), place)
        back = _sum(f"{rows}s,{ins}s->{x_dims}", along, u, sharding_of(x))
        return base((x.astype(jnp.float32) - back).astype(x.dtype))

    def merge(self, params: Params, base: Einsum) -> Array:
        _, ins, outs, _ = dims(base)
        w, u, out_axes = base.weight().astype(jnp.float32), params["hra_u"], axes_of(base)[1]
        u = u.astype(jnp.float32)
        along = _sum(f"{ins}{outs},{ins}r->r{outs}", w, u, spec(None, *out_axes))
        along = _sum(f"r{outs},rs->s{outs}", along, self._core(u), spec(None, *out_axes))
        return w - _sum(f"s{outs},{ins}s->{ins}{outs}", along, u, sharding_of(w))

    def _core(self, u: Array) -> Array:
        """T of H = I - U T U^T, [r, r]."""
        ins = "abcdefgh"[: u.ndim - 1]
        gram = _sum(f"{ins}r,{ins}s->rs", u, u, spec(None, None))
        upper = jnp.triu(gram, 1) + jnp.diag(jnp.diag(gram)) / 2
        return jnp.linalg.inv(gram / 2 if self.apply_gs else upper)


def _sum(eqn: str, x: Array, y: Array, place: Any) -> Array:
    return jnp.einsum(eqn, x, y, precision="highest", out_sharding=place)
