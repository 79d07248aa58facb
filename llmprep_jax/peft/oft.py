"""OFT (Qiu et al. 2023, section 3; by inputs, Qiu et al. 2025): inputs are rotated in blocks.

y = W R x with R block-diagonal, each block the Cayley transform of a skew-symmetric Q, of which the
part above the diagonal is trained; COFT (section 3.3) keeps |Q| below `eps`, with no gradient
through that. The one thing a reader would get wrong: the first terms of the transform's series,
PEFT's default, are those of Q's other sign.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import Layout, shape_of
from llmprep_jax.peft.method import Method, Params
from llmprep_jax.peft.peft_fields import flag, number
from llmprep_jax.peft.targets import check_number
from llmprep_jax.sharding import has_mesh, sharding_of, spec

NUMBERS = {"oft_block_size": "block_size", "r": "num_blocks"}  # our settings by PEFT's names
NUMBERS |= {"eps": "eps", "num_cayley_neumann_terms": "terms"}
FLAGS = {"coft": "coft", "block_share": "share_blocks", "use_cayley_neumann": "neumann"}


@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Settings of OFT.

    Attributes:
      block_size, num_blocks: of a layer's inputs; the second, if given, goes first. What does not
        divide a layer's inputs becomes the nearest number that does.
      coft, eps: whether |Q| stays below eps / sqrt(number of blocks).
      share_blocks: whether all blocks are one.
      neumann, terms: whether R is the transform's series, of so many terms, or exact.
    """

    block_size: int = 32
    num_blocks: int = 0
    _: dataclasses.KW_ONLY
    coft: bool = False
    eps: float = 6e-5
    share_blocks: bool = False
    neumann: bool = True
    terms: int = 5

    peft_type: ClassVar[str] = "OFT"
    peft_fields: ClassVar[tuple[str, ...]] = (*NUMBERS, *FLAGS, "bias")

    def __post_init__(self):
        super().__post_init__()
        check_number("OFT's block_size", self.num_blocks or self.block_size, whole=True)
        if self.num_blocks:
            object.__setattr__(self, "block_size", 0)
        check_number("OFT's terms", self.terms, whole=True)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "OFT":
        sizes = {ours: number(config, name, 0) for name, ours in NUMBERS.items() if name in config}
        return cls(**sizes, **{ours: flag(config, name) for name, ours in FLAGS.items()})

    @classmethod
    def to_peft(cls, by_name: Mapping[str, "OFT"]) -> dict[str, Any]:
        first = next(iter(by_name.values()))
        own = {name: getattr(first, ours) for name, ours in {**NUMBERS, **FLAGS}.items()}
        return own

    def tensors(self, layout: Layout) -> dict[str, tuple[str, str]]:
        return {"oft_r": ("oft_R.weight", "a b -> a b")}

    def init(self, base: Einsum, rngs: nnx.Rngs) -> dict[str, Array]:
        blocks, size = self._blocks(base)
        shape = (1 if self.share_blocks else blocks, size * (size - 1) // 2)
        return {"oft_r": jnp.zeros(shape, self.dtype, out_sharding=spec(None, None))}

    def forward(self, params: Params, base: Einsum, x: Array) -> Array:
        num_ins, place = len(shape_of(base)[0]), sharding_of(x)
        rows = x.shape[: x.ndim - num_ins]
        if has_mesh():  # a block's inputs may lie on several devices
            x = jax.reshard(x, jax.P(*place.spec[: len(rows)], *[None] * num_ins))
        blocks = x.astype(jnp.float32).reshape(*rows, *self._blocks(base))
        turn = params["rotation"] if "rotation" in params else self._rotation(params, base)
        y = jnp.einsum("...rk,rkc->...rc", blocks, turn)
        y = y.reshape(x.shape).astype(x.dtype)
        return base(jax.reshard(y, place.spec) if has_mesh() else y)

    def settled(self, params: Params, base: Einsum) -> Params:
        return {"rotation": self._rotation(params, base)}

    def merge(self, params: Params, base: Einsum) -> Array:
        w = base.weight().astype(jnp.float32)
        blocks = (jax.reshard(w, jax.P()) if has_mesh() else w).reshape(*self._blocks(base), -1)
        turned = jnp.einsum("rkc,rco->rko", self._rotation(params, base), blocks).reshape(w.shape)
        return jax.reshard(turned, spec(*base.axes, shape=w.shape)) if has_mesh() else turned

    def _blocks(self, base: Einsum) -> tuple[int, int]:
        """(number of blocks, inputs of one)."""
        ins, wanted = math.prod(shape_of(base)[0]), self.num_blocks or self.block_size
        divisors = [n for n in range(1, ins + 1) if ins % n == 0]
        nearest = min(divisors, key=lambda n: (abs(n - wanted), n))  # PEFT takes the lower of two
        return (nearest, ins // nearest) if self.num_blocks else (ins // nearest, nearest)

    def _rotation(self, params: Params, base: Einsum) -> Array:
        """R, [blocks, size, size], float32."""
        (blocks, size), vectors = self._blocks(base), params["oft_r"].astype(jnp.float32)
        upper, eye = np.triu_indices(size, 1), jnp.eye(size)
        q = jnp.zeros((len(vectors), size, size)).at[:, *upper].set(vectors)
        q = q - q.mT
        if self.coft:
            limit = self.eps / math.sqrt(len(q))
            length = jnp.linalg.norm(jax.lax.stop_gradient(q), axis=(1, 2), keepdims=True)
            shorter = q * (limit / jnp.maximum(length, limit))
            q = q + jax.lax.stop_gradient(shorter - q)
        if not self.neumann:  # (I - Q) (I + Q)^-1
            r = jnp.linalg.solve((eye + q).mT, (eye - q).mT).mT
            return jnp.broadcast_to(r, (blocks, size, size))
        last = 0 if self.terms == 1 else 1 if self.terms == 2 else max(self.terms - 1, 3)
        r, power = jnp.broadcast_to(eye, q.shape), eye
        for n in range(1, last + 1):
            power = jnp.matmul(power, q, precision="highest")
            r = r + power * (1.0 if n == last and n > 1 else 2.0)
        return jnp.broadcast_to(r, (blocks, size, size))
