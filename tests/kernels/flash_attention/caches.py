"""Caches that attention reads, in pages and of 8 bits, and what the same rows mean written out."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.kernels.flash_attention.problems import alibi


@dataclasses.dataclass(frozen=True)
class Cached:
    """Queries at the ends of rows of different lengths, the last of which is empty.

    Attributes:
      S: slots a row. page: slots of one; 0: rows are not in pages. bits: 8, 16 or 32 of a number.
      U: None: values are the first `width` numbers of the keys.
    """

    B: int = 3
    T: int = 1
    S: int = 96
    N: int = 4
    K: int = 2
    H: int = 16
    U: int | None = 16
    width: int | None = None
    page: int = 32
    bits: int = 32
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    bias: bool = False

    def __str__(self) -> str:
        default, fields = Cached(), dataclasses.asdict(self)
        return (
            " ".join(f"{k}={v}" for k, v in fields.items() if v != getattr(default, k)) or "plain"
        )

    @property
    def dtype(self) -> str:
        """Of queries."""
        return "bfloat16" if self.bits == 16 else "float32"

    def problem(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(options of a call that reads the cache, those of one that reads rows of numbers).

        What no row has written is NaN: slots, whole pages, and page 0, which stands for none.
        """
        draw = np.random.default_rng(sum(map(ord, str(self))))
        lengths = np.linspace(self.S, 0, self.B).astype(int)  # the first is full
        slots = np.arange(self.S)
        is_real = slots < lengths[:, None]
        q_positions = np.maximum(lengths[:, None] - self.T + np.arange(self.T), 0)
        options: dict[str, Any] = dict(
            q=draw.standard_normal((self.B, self.T, self.N, self.H)),
            q_positions=q_positions,
            k_positions=np.tile(slots, (self.B, 1)),
            q_segments=np.repeat(lengths[:, None] > 0, self.T, 1).astype(int),
            k_segments=is_real.astype(int),
            window=self.window,
            soft_cap=self.soft_cap,
            scale=self.H**-0.5,
        )
        if self.sinks:
            options["sinks"] = draw.standard_normal(self.N)
        if self.bias:
            options["bias"] = alibi
        if self.width is not None:
            options["value_width"] = self.width
        stored, rows = {}, {}
        for name, width in (("k", self.H), ("v", self.U)):
            if width is None:
                stored[name] = rows[name] = None
                continue
            x = draw.standard_normal((self.B, self.S, self.K, width))
            if self.bits == 8:
                scales = np.abs(x).max(-1) * draw.uniform(0.5, 2, x.shape[:3]) / 127
                x = np.clip(np.round(x / scales[..., None]), -127, 127)
                stored[f"{name}_scales"] = np.where(is_real[..., None], scales, np.nan)
                stored[name] = x.astype(np.int8)
                rows[name] = x * scales[..., None]
            else:
                stored[name] = np.where(is_real[..., None, None], x, np.nan)
                rows[name] = x
        if self.page:
            stored |= self._in_pages(stored, is_real, draw)
        return [
            {key: _as_array(x, self.dtype) for key, x in {**options, **arrays}.items()}
            for arrays in (stored, rows)
        ]

    def _in_pages(self, rows: dict[str, Any], is_real: np.ndarray, draw: Any) -> dict[str, Any]:
        """Pools with the pages of all rows in no order; a table with -1 where none is needed."""
        is_used = is_real.reshape(self.B, -1, self.page).any(-1)
        pages = np.full(is_used.shape, -1)
        # page 0 is nobody's
        pages[is_used] = 1 + draw.permutation(is_used.sum())
        pools = {"pages": pages}
        for name, x in rows.items():
            if x is None:
                continue
            shape = 1 + is_used.sum(), self.page, *x.shape[2:]
            pools[name] = np.full(shape, 99 if x.dtype == np.int8 else np.nan, x.dtype)
            pools[name][pages[is_used]] = x.reshape(self.B, -1, *shape[1:])[is_used]
        return pools


def _as_array(x: Any, dtype: str) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    is_float = x.dtype.kind == "f"
    return jnp.asarray(x, dtype if is_float and x.ndim == 4 else "float32" if is_float else None)
