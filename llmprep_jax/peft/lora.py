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

from llmprep_jax.nn.linear import Einsum, Embed, Head, contract, contract_logits, look_up
from llmprep_jax.peft import biases, principal
from llmprep_jax.peft.adapter import Layout, axes_of, dims, shape_of
from llmprep_jax.peft.low_rank import LowRank, check_rank, draw, outer
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
        a_shape, b_shape = (*ins, self.rank), (self.rank, *outs)
        if isinstance(base, Embed):  # the other way round: a table's gradient is in its rows
            if self.init_weights != "default":
                raise ValueError(f"an embedding begins as default, not {self.init_weights}")
            b_axes = spec(None, *out_axes, shape=b_shape)
            b = jax.random.normal(rngs.params(), b_shape, self.dtype, out_sharding=b_axes)
            a_axes = spec(*in_axes, None, shape=a_shape)
            return {"lora_a": jnp.zeros(a_shape, self.dtype, out_sharding=a_axes), "lora_b": b}
        if self.frozen:
            if 2 * self.rank > min(math.prod(ins), math.prod(outs)):
                sizes = f"{math.prod(ins)} x {math.prod(outs)}"
                raise ValueError(
                    f"rank {self.rank} and its frozen half exceed the dimensions {sizes} of the"
                    " layer; lower rank, or give the layer its own in rank_pattern"
                )
            a, b = principal.begin(self.init_weights, base, self.rank, self.scale)
            a, b = a.astype(self.dtype), b.astype(self.dtype)
            return {"lora_a": a, "lora_b": b, "lora_a0": a, "lora_b0": b}
        a = draw(rngs, (*ins, self.rank), (*in_axes, None), math.prod(ins), self.dtype)
        if self.init_weights == "gaussian":
            a_axes = spec(*in_axes, None, shape=a_shape)
            a = jax.random.normal(rngs.params(), a_shape, self.dtype, out_sharding=a_axes)
            a /= self.rank
        b = jnp.zeros(b_shape, self.dtype, out_sharding=spec(None, *out_axes, shape=b_shape))
        return {"lora_a": a, "lora_b": b}

    def forward(
        self, params: Mapping[str, Array], base: Einsum, x: Array, dropped: Array | None = None
    ) -> Array:
        return self.rest(params, base, x) + self.added(
            params, base, x if dropped is None else dropped
        )

    def rest(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        """The base's result, without the part of it that is trained."""
        return base(x) - self.added(_frozen(params), base, x) if self.frozen else base(x)

    def added(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array:
        """s B A x; of an embedding's tokens, x, s B of rows of A."""
        x_dims, ins, outs, y_dims = dims(base)
        rows = "".join(dim for dim in y_dims if dim not in outs)
        low_axes = (*base.out_axes[: len(rows)], None)
        eqn = f"{x_dims},{ins}r->{rows}r"
        if isinstance(base, Embed):
            x_low = look_up(params["lora_a"], x, low_axes).astype(base.compute.dtype)
        else:
            # a head computes in float32 whatever its inputs are
            x = x.astype(jnp.float32) if isinstance(base, Head) else x
            x_low = contract(eqn, x, params["lora_a"], base.dtype, low_axes)
        # scaled in float32, as PEFT does for adapters of any dtype
        b = params["lora_b"].astype(jnp.float32) * self.scale
        return contract(f"{rows}r,r{outs}->{y_dims}", x_low, b, base.dtype, base.out_axes)

    def unembed(self, params: Mapping[str, Array], base: Embed, x_BTD: Array) -> Array:
        """Logits against a tied table with the adapter in it."""
        axes = ("batch", "seq", None)
        b = params["lora_b"].astype(jnp.float32) * self.scale
        low_BTR = contract("BTD,RD->BTR", x_BTD.astype(jnp.float32), b, base.dtype, axes)
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
