"""LoRA (Hu et al. 2021, section 4.1): W + s B A with a low rank r, s = alpha / r; only A and B are
trained.

The weights are einsum weights with unmerged dimensions, so A is [inputs..., r] and B [r,
outputs...]. With `rslora` s = alpha / sqrt(r) (Kalajdzievski 2023). LoRA+ (Hayou et al. 2024) is a
setting of the optimiser, which finds B by its name, `lora_b`. The one thing a reader would get
wrong: A is drawn from U(+-1/sqrt(fan in)) and B is zero, so the model is unchanged, bit for bit,
until the first step.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum, Embed, contract, contract_logits
from llmprep_jax.peft import biases, principal
from llmprep_jax.peft.adapter import Layout, axes_of, shape_of
from llmprep_jax.peft.low_rank import LowRank, bypass, check_rank, draw, outer
from llmprep_jax.peft.targets import Number
from llmprep_jax.sharding import spec

PRINCIPAL = ("pissa", "olora")


@dataclasses.dataclass(frozen=True)
class LoRA(LowRank):
    """Settings of LoRA: those of `LowRank`, and more.

    Attributes:
      rslora: a scale of alpha / sqrt(rank).
      bias: which biases are trained too: "none", those of the adapted layers ("lora_only"), "all".
      dropout: the share of A's inputs that is dropped in `peft.train_mode` with a key.
      init_weights: how A and B begin: "default", "gaussian" (A from N(0, 1/r^2), as in PEFT), or
        from the weight, "pissa" and "olora" (see `principal`).
    """

    rank: int = 16
    alpha: Number = 32.0
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    init_weights: str = "default"

    scaled: ClassVar[str] = "lora_b"
    adapts_embeddings: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.bias not in biases.KINDS:
            raise ValueError(f"bias is {self.bias!r}; it must be one of {', '.join(biases.KINDS)}")
        if self.init_weights not in ("default", "gaussian", *PRINCIPAL):
            kinds = ", ".join(("default", "gaussian", *PRINCIPAL))
            raise ValueError(f"init_weights is {self.init_weights!r}; it must be one of {kinds}")
        if self.init_weights == "pissa" and self.alpha < 0:
            raise ValueError(f"pissa takes roots of its scale, but alpha is {self.alpha}; give > 0")

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters that are not trained: of what is taken out of the weight."""
        return ("lora_a0", "lora_b0") if self.init_weights in PRINCIPAL else ()

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

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        (ins, outs), (in_axes, out_axes) = shape_of(base), axes_of(base)
        check_rank(self, base)
        if self.frozen:
            return self._begin_in_the_weight(base)
        a = (*ins, self.rank), (*in_axes, None)
        b = (self.rank, *outs), (None, *out_axes)
        if isinstance(base, Embed):  # the other way round: a table's gradient is in its rows
            if self.init_weights != "default":
                raise ValueError(f"an embedding begins as default, not {self.init_weights}")
            return {"lora_a": self._zeros(*a), "lora_b": self._normal(rngs, *b)}
        if self.init_weights == "gaussian":
            return {"lora_a": self._normal(rngs, *a) / self.rank, "lora_b": self._zeros(*b)}
        drawn = draw(rngs, *a, math.prod(ins), self.dtype)
        return {"lora_a": drawn, "lora_b": self._zeros(*b)}

    def _zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        return jnp.zeros(shape, self.dtype, out_sharding=spec(*axes, shape=shape))

    def _normal(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> Array:
        place = spec(*axes, shape=shape)
        return jax.random.normal(rngs.params(), shape, self.dtype, out_sharding=place)

    def _begin_in_the_weight(self, base: Einsum) -> dict[str, Array]:
        if isinstance(base, Embed):
            raise ValueError(f"an embedding begins as default, not {self.init_weights}")
        ins, outs = map(math.prod, shape_of(base))
        if 2 * self.rank > min(ins, outs):
            raise ValueError(
                f"rank {self.rank} and its frozen half exceed the dimensions {ins} x {outs} of the"
                " layer; lower rank, or give the layer its own in rank_pattern"
            )
        begun = principal.begin(self.init_weights, base, self.rank, self.scale)
        a, b = (x.astype(self.dtype) for x in begun)
        return {"lora_a": a, "lora_b": b, "lora_a0": a, "lora_b0": b}

    def forward(
        self, params: Mapping[str, Array], base: Einsum, x: Array, dropped: Array | None = None
    ) -> Array:
        inputs = x if dropped is None else dropped
        return self.rest(params, base, x) + self.added(params, base, inputs)

    def rest(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        """The base's result, without the part of it that is trained."""
        return base(x) - self.added(_frozen(params), base, x) if self.frozen else base(x)

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
        if self.frozen:
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
        more = {name: x for name, x in params.items() if name not in ("lora_a", "lora_b")}
        more = {name: x for name, x in more.items() if name not in self.frozen}
        return {"lora_a": a, "lora_b": b, **more}


def _frozen(params: Mapping[str, Array]) -> dict[str, Array]:
    return {"lora_a": params["lora_a0"], "lora_b": params["lora_b0"]}
