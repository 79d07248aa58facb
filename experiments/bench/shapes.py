"""Attention in the shapes of released models, and what each of its works costs.

FLOPs are those of the pairs of tokens that see each other, so causal attention counts once, not
twice: 2 (H + U) a pair and head forward (two products), 2 (3 H + 2 U) backward (five, the scores
computed again). Bytes are those of q, k, v and o once; of latents whose values are a part of the
keys, the keys alone.
"""

import dataclasses
from typing import Literal

import numpy as np

Work = Literal["forward", "backward", "decode"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one layer's attention.

    Attributes:
      B, T, N, K, H, U: rows, tokens, heads of queries and of keys, widths of keys and of values.
      works: what of it is timed; "decode" is one query a row after T keys.
      latent: whether values are the first U of the keys.
    """

    B: int
    T: int
    N: int
    K: int
    H: int
    U: int
    causal: bool = True
    window: int | None = None
    latent: bool = False
    works: tuple[Work, ...] = ("forward", "backward")

    def shrunk(self, factor: int) -> "Shape":
        """With fewer rows, tokens and heads, for a machine that is no accelerator."""
        K = max(1, self.K // 4)
        return dataclasses.replace(
            self,
            B=min(self.B, 2),
            T=max(64, self.T // factor),
            N=K * min(self.N // self.K, 4),
            K=K,
            window=None if self.window is None else max(16, self.window // factor),
        )

    @property
    def sizes(self) -> str:
        """B, T, N and K, for a table."""
        return f"{self.B} {self.T} {self.N} {self.K}"

    def pairs(self) -> int:
        """Queries and keys of a row that see each other."""
        if not self.causal:
            return self.T**2
        seen = np.arange(1, self.T + 1)
        return int((seen if self.window is None else np.minimum(seen, self.window)).sum())

    def flops(self, work: Work) -> int:
        """As this file counts them."""
        H, U, heads = self.H, self.U, self.B * self.N
        if work == "decode":
            return 2 * (H + U) * heads * self.T
        width = H + U if work == "forward" else 3 * H + 2 * U
        return 2 * width * heads * self.pairs()

    def bytes(self, work: Work, itemsize: int = 2) -> int:
        """Read and written, each array once: q, k, v, o, and backward do, dq, dk and dv too."""
        queries = 1 if work == "decode" else self.T
        q_and_o = self.B * queries * self.N * (self.H + self.U)
        keys = self.B * self.T * self.K * (self.H + (0 if self.latent else self.U))
        return itemsize * (q_and_o + keys) * (2 if work == "backward" else 1)


SHAPES = {
    "d128": Shape(2, 8192, 16, 16, 128, 128),  # the one of published charts
    "llama-3-8b": Shape(1, 8192, 32, 8, 128, 128),
    "gemma-3-4b-local": Shape(1, 8192, 8, 4, 256, 256, window=1024),
    "gemma-3-4b-global": Shape(1, 8192, 8, 4, 256, 256),
    "deepseek-v3": Shape(1, 4096, 128, 128, 192, 128),
    "siglip-so400m": Shape(16, 729, 16, 16, 72, 72, causal=False),
    "smollm2-135m": Shape(8, 2048, 9, 3, 64, 64),
    "llama-3-8b-decode": Shape(32, 8192, 32, 8, 128, 128, works=("decode",)),
    "gemma-3-4b-decode": Shape(32, 8192, 8, 4, 256, 256, works=("decode",)),
    "deepseek-v3-decode": Shape(64, 4096, 128, 1, 576, 512, latent=True, works=("decode",)),
    # of an eighth of the heads, so that memory decides
    "deepseek-v3-decode-tp8": Shape(64, 4096, 16, 1, 576, 512, latent=True, works=("decode",)),
}
