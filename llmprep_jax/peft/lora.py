"""LoRA (Hu et al. 2021, section 4.1): W + s B A with a low rank r, s = alpha / r; only A and B are
trained.

The weights are einsum weights with unmerged dimensions, so A is [inputs..., r] and B [r,
outputs...]. With `rslora` s = alpha / sqrt(r) (Kalajdzievski 2023). LoRA+ (Hayou et al. 2024) is a
setting of the optimiser. A is drawn from U(+-1/sqrt(fan in)) and B is zero, so the model is
unchanged, bit for bit, until the first step. Of an embedding it is A that is zero and B that is
drawn, as in PEFT.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum, Embed, contract, contract_logits
from llmprep_jax.peft import biases, principal
from llmprep_jax.peft.layout import Layout, axes_of, shape_of
from llmprep_jax.peft.low_rank import LowRank, bypass, draw, outer
from llmprep_jax.peft.method import Params
from llmprep_jax.peft.peft_fields import flag, rows_from_peft
from llmprep_jax.peft.targets import Number
from llmprep_jax.sharding import spec
from llmprep_jax.weights.safetensors import quoted


@dataclasses.dataclass(frozen=True)
class LoRA(LowRank):
    """Settings of LoRA: those of `LowRank`, and more.

    Attributes:
      rslora: a scale of alpha / sqrt(rank).
      bias: which biases are trained too: "none", those of the adapted layers ("lora_only"), "all".
      dropout: the share of A's inputs that is dropped in `peft.train_mode` with a key.
      trainable_token_indices: rows of the embedding that are trained too, see `tokens`.
      init_weights: how A and B begin: "default", "gaussian" (A from N(0, 1/r^2), as in PEFT), or
        from the weight, "pissa", "pissa_niter_4" and "olora" (see `principal`).
    """

    rank: int = 16
    alpha: Number = 32.0
    _: dataclasses.KW_ONLY
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    trainable_token_indices: tuple[int, ...] | list[int] = ()
    init_weights: str = "default"

    adapts_embeddings: ClassVar[bool] = True
    adds_product: ClassVar[bool] = True
    pads: ClassVar[bool] = True
    ties_tables: ClassVar[bool] = True
    scaled: ClassVar[str] = "lora_b"
    peft_type: ClassVar[str] = "LORA"
    peft_fields: ClassVar[tuple[str, ...]] = (
        *("r", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "use_dora", "bias"),
        *("init_lora_weights", "ensure_weight_tying", "lora_dropout", "target_parameters"),
        "trainable_token_indices",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.bias not in biases.KINDS:
            raise ValueError(f"bias is {self.bias!r}; it must be one of {', '.join(biases.KINDS)}")
        if self.init_weights not in ("default", "gaussian") and not self.takes_part:
            kinds = ", ".join(("default", "gaussian", *principal.KINDS))
            raise ValueError(f"init_weights is {self.init_weights!r}; it must be one of {kinds}")
        if self.init_weights.startswith("pissa") and self.alpha < 0:
            raise ValueError(f"pissa takes roots of its scale, but alpha is {self.alpha}; give > 0")

    @property
    def takes_part(self) -> bool:
        """Whether A and B begin as a part of the weight, whose rest stays."""
        return principal.is_one(self.init_weights)

    reads_weight = takes_part

    @property
    def frozen(self) -> tuple[str, ...]:
        """What the part was that was taken out of the weight."""
        return ("lora_a0", "lora_b0") if self.takes_part else ()

    @property
    def decayed(self) -> tuple[str, ...]:
        """Both factors; none where what they began as is the identity, and zero is not."""
        return () if self.takes_part else ("lora_a", "lora_b")

    def hastened(self, base: Einsum) -> tuple[str, ...]:
        return ("lora_a",) if isinstance(base, Embed) else ("lora_b",)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        a, b = "lora_A.weight", "lora_B.weight"
        if layout.is_embedding:
            a, b = "lora_embedding_A", "lora_embedding_B"
        return {
            "lora_a": (a, f"r {layout.their_ins} -> {layout.ins} r"),
            "lora_b": (b, f"{layout.their_outs} r -> r {layout.outs}"),
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return not flag(config, "use_dora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoRA":
        dropout, init = config.get("lora_dropout") or 0.0, str(config.get("init_lora_weights"))
        if not isinstance(dropout, (int, float)):
            raise ValueError(f"lora_dropout is {quoted(dropout)}; it must be a number")
        return cls(
            **cls.ranks_from_peft(config, "lora_alpha"),
            rslora=flag(config, "use_rslora"),
            bias=config.get("bias") or "none",
            dropout=float(dropout),
            trainable_token_indices=rows_from_peft(config),
            init_weights=init if principal.is_one(init) else "default",
        )

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "LoRA"]) -> dict[str, Any]:
        first = next(iter(by_name.values()))
        return cls.ranks_to_peft(by_name, "lora_alpha") | {
            "lora_dropout": first.dropout,
            "use_rslora": first.rslora,
            "use_dora": False,
            "fan_in_fan_out": False,
            "bias": first.bias,
            "init_lora_weights": True,
        }

    def check(self, base: Einsum) -> None:
        super().check(base)
        if isinstance(base, Embed) and self.init_weights != "default":
            raise ValueError(f"an embedding begins as default, not {self.init_weights}")
        if self.takes_part:
            principal.check(self.init_weights, base, self.rank)

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
        if self.takes_part:
            a, b = principal.begin(self.init_weights, base, self.rank, self.scale, rngs)
            a, b = a.astype(self.dtype), b.astype(self.dtype)
            return {"lora_a": a, "lora_b": b, "lora_a0": a, "lora_b0": b}
        a = (*ins, self.rank), (*in_axes, None)
        b = (self.rank, *outs), (None, *out_axes)
        if isinstance(base, Embed):  # the other way round: a table's gradient is in its rows
            return {"lora_a": self._zeros(*a), "lora_b": self._normal(rngs, *b)}
        if self.init_weights == "gaussian":
            return {"lora_a": self._normal(rngs, *a) / self.rank, "lora_b": self._zeros(*b)}
        drawn = draw(rngs, *a, math.prod(ins), self.dtype)
        return {"lora_a": drawn, "lora_b": self._zeros(*b)}

    def resolve(self, names: Sequence[str]) -> "LoRA":
        return dataclasses.replace(super().resolve(names), trainable_token_indices=())

    def derived(self, base: Einsum) -> Params:
        """What a folder's A and B began as, which it does not hold."""
        if not self.takes_part:
            return {}
        a, b = principal.begin(self.init_weights, base, self.rank, self.scale, nnx.Rngs(0))
        return {"lora_a0": a, "lora_b0": b}

    def _zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        return jnp.zeros(shape, self.dtype, out_sharding=spec(*axes, shape=shape))

    def _normal(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> Array:
        place = spec(*axes, shape=shape)
        return jax.random.normal(rngs.params(), shape, self.dtype, out_sharding=place)

    def forward(
        self, params: Mapping[str, Array], base: Einsum, x: Array, dropped: Array | None = None
    ) -> Array:
        inputs = x if dropped is None else dropped
        return self.rest(params, base, x) + self.added(params, base, inputs)

    def rest(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        """The base's result, without the part of it that is trained."""
        return base(x) - self.added(_taken(params), base, x) if self.takes_part else base(x)

    def added(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        """s B A x; of an embedding's tokens, x, s B of rows of A."""
        return bypass(params["lora_a"], self._scaled(params), base, x)

    def _scaled(self, params: Mapping[str, Array]) -> Array:
        """s B, in float32, as PEFT scales adapters of any dtype."""
        return params["lora_b"].astype(jnp.float32) * self.scale

    def unembed(self, params: Mapping[str, Array], base: Embed, x_BTD: Array) -> Array:
        """Logits against a tied table with the adapter in it."""
        axes = ("batch", "seq", None)
        b_RD = self._scaled(params)
        low_BTR = contract("BTD,RD->BTR", x_BTD.astype(jnp.float32), b_RD, base.dtype, axes)
        added_BTV = contract_logits("BTR,VR->BTV", low_BTR, params["lora_a"], base.dtype)
        return base.unembed(x_BTD) + added_BTV

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        delta = outer(params["lora_a"], params["lora_b"], base)
        if self.takes_part:
            delta = delta - outer(params["lora_a0"], params["lora_b0"], base)
        return base.weight().astype(jnp.float32) + self.scale * delta

    @property
    def wide(self) -> "LoRA":
        """The settings of what `widen` makes: at rank 2 r, twice alpha is the same scale."""
        alpha = self.alpha * (math.sqrt(2) if self.rslora else 2)
        return dataclasses.replace(self, rank=2 * self.rank, alpha=alpha, init_weights="default")

    def widen(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """A layer's parameters as those of an adapter on the whole weight: [A; A0] and [B, -B0]."""
        a = jnp.concatenate([params["lora_a"], params["lora_a0"]], axis=-1)
        b = jnp.concatenate([params["lora_b"], -params["lora_b0"]], axis=0)
        factors = ("lora_a", "lora_b", "lora_a0", "lora_b0")
        more = {name: x for name, x in params.items() if name not in factors}
        return {"lora_a": a, "lora_b": b, **more}


def _taken(params: Mapping[str, Array]) -> dict[str, Array]:
    return {"lora_a": params["lora_a0"], "lora_b": params["lora_b0"]}
