"""AdaLoRA (Zhang et al. 2023, section 3.1): LoRA as P diag(E) Q, whose least triplets are pruned.

Delta W = s B diag(E) A with s = alpha / r. A triplet is a row of A, a column of B and its number in
E; `train.rank_budget` sets to zero the E of those that matter least among all layers. E is zero at
first. The one thing a reader would get wrong: s keeps the rank that training began with (and PEFT
adds 1e-5 to it), so what pruning leaves says the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.adapter import Layout, axes_of, shape_of
from llmprep_jax.peft.low_rank import LowRank, bypass, check_rank, outer
from llmprep_jax.peft.targets import Number, check_number
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class AdaLoRA(LowRank):
    """Settings of AdaLoRA: those of `LowRank`, whose rank is the one before pruning.

    Attributes:
      total_steps: T of the schedule (section 3.3, eq. 12).
      target_rank: mean over the layers at its end.
      warmup_steps, final_steps: first and last of the T steps, which prune nothing.
      every: steps between prunings.
      beta1, beta2: of the averages of sensitivity and uncertainty (eq. 9 and 10).
      orthogonality: weight of the regulariser in the loss (eq. 7).
      initial_rank: r in s; None: rank.
    """

    rank: int = 12
    target_rank: int = 8
    warmup_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: Number = 0.85
    beta2: Number = 0.85
    orthogonality: Number = 0.5
    initial_rank: int | None = None
    total_steps: int = dataclasses.field(kw_only=True)

    scaled: ClassVar[str] = "lora_b"

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_rank", "every", "total_steps"):
            check_number(f"AdaLoRA's {name}", getattr(self, name), whole=True)
        wrong = {
            "alpha_pattern must be empty": self.alpha_pattern,
            "warmup_steps must be >= 0": self.warmup_steps < 0,
            "final_steps must be >= 0": self.final_steps < 0,
            "total_steps must exceed warmup_steps + final_steps": self.total_steps
            <= self.warmup_steps + self.final_steps,
            "beta1 must be in (0, 1)": not 0 < self.beta1 < 1,
            "beta2 must be in (0, 1)": not 0 < self.beta2 < 1,
            "orthogonality must be >= 0": not self.orthogonality >= 0,
            "rank_pattern must not exceed rank": any(r > self.rank for _, r in self.rank_pattern),
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"AdaLoRA's {message}, not {getattr(self, message.split()[0])}")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / ((self.initial_rank or self.rank) + 1e-5)

    def resolve(self, names: Sequence[str]) -> "AdaLoRA":
        initial = self.initial_rank or self.rank
        return dataclasses.replace(super().resolve(names), initial_rank=initial)

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        return {
            "lora_a": ("lora_A", f"r {layout.their_ins} -> {layout.ins} r"),
            "lora_b": ("lora_B", f"{layout.their_outs} r -> r {layout.outs}"),
            "lora_e": ("lora_E", "r 1 -> r"),
        }

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        check_rank(self, base)
        (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)

        def draw(shape: tuple[int, ...], *axes: str | None) -> Array:
            place = spec(*axes, shape=shape)
            return 0.02 * jax.random.normal(rngs.params(), shape, self.dtype, out_sharding=place)

        return {
            "lora_a": draw((*ins, self.rank), *in_axes, None),
            "lora_b": draw((self.rank, *outs), None, *out_axes),
            "lora_e": jnp.zeros(self.rank, self.dtype, out_sharding=spec(None)),
        }

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        return base(x) + bypass(*self._factors(params), base, x)

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        return base.weight().astype(jnp.float32) + outer(*self._factors(params), base)

    def _factors(self, params: Mapping[str, Array]) -> tuple[Array, Array]:
        """A E and s B, float32."""
        a, b, e = (params[name].astype(jnp.float32) for name in ("lora_a", "lora_b", "lora_e"))
        return a * e, b * self.scale
