"""AdaLoRA (Zhang et al. 2023, section 3.1): LoRA as P diag(E) Q, whose least triplets are pruned.

Delta W = s B diag(E) A with s = alpha / r. A triplet is a row of A, a column of B and its number in
E; `rank_budget` sets to zero the E of those that matter least among all layers. E is zero at first.
The rank in s stays the one that training began with (to which PEFT adds 1e-5), so what pruning
leaves says the same.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import Layout, axes_of, shape_of
from llmprep_jax.peft.low_rank import LowRank, bypass, outer
from llmprep_jax.peft.method import float32
from llmprep_jax.peft.peft_fields import number, whole
from llmprep_jax.peft.rank_budget import (
    FIELDS,
    Budget,
    allocate_ranks,
    orthogonality,
    read_budget,
    read_ranks,
    write_budget,
)
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class AdaLoRA(LowRank, Budget):
    """Settings of AdaLoRA: those of `LowRank`, whose rank is that before pruning, and of `Budget`.

    Attributes:
      initial_rank: r in s; None: rank.
    """

    rank: int = 12
    initial_rank: int | None = dataclasses.field(default=None, kw_only=True)

    scaled: ClassVar[str] = "lora_b"
    pads: ClassVar[bool] = True
    leaves_layers: ClassVar[bool] = False  # layers without a triplet would count in the budget
    peft_type: ClassVar[str] = "ADALORA"
    # of LoRA's fields AdaLoRA ignores r, alpha_pattern and use_rslora, and PEFT refuses use_dora
    peft_fields: ClassVar[tuple[str, ...]] = (
        *(*FIELDS, "r", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "use_dora"),
        *("init_lora_weights", "bias", "ensure_weight_tying", "lora_dropout"),
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_budget(self.rank, self.rank_pattern, self.alpha_pattern)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / ((self.initial_rank or self.rank) + 1e-5)

    def of_run(self, num_steps: int) -> "AdaLoRA":
        return dataclasses.replace(self, total_steps=self.total_steps or num_steps)

    def resolve(self, names: Sequence[str]) -> "AdaLoRA":
        initial = self.initial_rank or self.rank
        return dataclasses.replace(super().resolve(names), initial_rank=initial)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "AdaLoRA":
        settings, alpha = read_budget(config), number(config, "lora_alpha", 8)
        alpha = alpha if alpha > 0 else settings["rank"]  # as PEFT has it
        ranks = {re.escape(module): rank for module, rank in read_ranks(config).items() if rank}
        return cls(**settings, alpha=alpha, rank_pattern=ranks)

    @classmethod
    def emptied(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(module for module, rank in read_ranks(config).items() if not rank)

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "AdaLoRA"]) -> dict[str, Any]:
        first = next(iter(by_name.values()))
        return write_budget(by_name) | {"lora_alpha": whole(first.alpha)}

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        return {
            "lora_a": ("lora_A", f"r {layout.their_ins} -> {layout.ins} r"),
            "lora_b": ("lora_B", f"{layout.their_outs} r -> r {layout.outs}"),
            "lora_e": ("lora_E", "r 1 -> r"),
        }

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
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

    def wrap_optimizer(
        self, tx: optax.GradientTransformation, params: Any, num_steps: int
    ) -> optax.GradientTransformation:
        return allocate_ranks(tx, self, params, num_steps)

    def extra_loss(self, layers: Sequence[Any]) -> Array:
        return self.orthogonality * orthogonality(layers)

    def _factors(self, params: Mapping[str, Array]) -> tuple[Array, Array]:
        """A E and s B, float32."""
        a, b, e = float32(params, "lora_a", "lora_b", "lora_e")
        return a * e, b * self.scale
