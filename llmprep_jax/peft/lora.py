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
from llmprep_jax.peft import biases
from llmprep_jax.peft.adapter import Layout, axes_of, dims, shape_of
from llmprep_jax.peft.low_rank import LowRank, check_rank, draw, outer
from llmprep_jax.peft.targets import Number
from llmprep_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class LoRA(LowRank):
    """Settings of LoRA: those of `LowRank`, and more.

    Attributes:
      rslora: a scale of alpha / sqrt(rank).
      bias: which biases are trained too: "none", those of the adapted layers ("lora_only"), "all".
      dropout: the share of A's inputs that is dropped in `peft.train_mode` with a key.
    """

    rank: int = 16
    alpha: Number = 32.0
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"

    scaled: ClassVar[str] = "lora_b"
    adapts_embeddings: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.bias not in biases.KINDS:
            raise ValueError(f"bias is {self.bias!r}; it must be one of {', '.join(biases.KINDS)}")

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
            b = jax.random.normal(rngs.params(), b_shape, self.dtype)
            a_axes = spec(*in_axes, None, shape=a_shape)
            return {"lora_a": jnp.zeros(a_shape, self.dtype, out_sharding=a_axes), "lora_b": b}
        a = draw(rngs, (*ins, self.rank), (*in_axes, None), math.prod(ins), self.dtype)
        b = jnp.zeros(b_shape, self.dtype, out_sharding=spec(None, *out_axes, shape=b_shape))
        return {"lora_a": a, "lora_b": b}

    def forward(
        self, params: Mapping[str, Array], base: Einsum, x: Array, dropped: Array | None = None
    ) -> Array:
        return base(x) + self.added(params, base, x if dropped is None else dropped)

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
        return base.weight().astype(jnp.float32) + self.scale * delta
