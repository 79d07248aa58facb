"""From bytes to what a tower takes: (x / 255 - mean) / std in float32.

A byte has 256 values, so this is a table: as exact as computing it, in the order that transformers
computes (scaled in float64, rounded to float32, then the rest), and faster.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32, UInt8

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Normalization:
    """`scale` times a byte, minus `mean`, over `std`, a channel each."""

    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    scale: float = 1 / 255

    def __call__(self, values: UInt8[np.ndarray, "*N H W 3"]) -> Float32[np.ndarray, "*N H W 3"]:
        """The pictures as floats, channels last."""
        if len(set(zip(self.mean, self.std, strict=True))) == 1:
            return self.table[0].take(values, mode="clip")
        out = np.empty(values.shape, np.float32)
        for channel in range(3):
            out[..., channel] = self.table[channel].take(values[..., channel], mode="clip")
        return out

    @property
    def reaches_ones(self) -> bool:
        """Whether bytes become values from -1 to 1, to a thousandth."""
        return bool(np.abs(self.table[:, [0, 255]] - [-1, 1]).max() < 1e-3)

    @functools.cached_property
    def table(self) -> Float32[np.ndarray, "3 256"]:
        """What each byte of each channel becomes."""
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(x, np.float32)[:, None] for x in (self.mean, self.std))
        return (scaled - mean) / std
