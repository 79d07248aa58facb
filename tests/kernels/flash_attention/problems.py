"""Attention problems that every backend is held to, and how it is compared with the reference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmprep_jax.kernels.flash_attention import attention


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and what may see what.

    Attributes:
      values: which of positions, segments and spans are given: "" or some of "p", "s", "i"; "e" are
        segments of which some rows are all padding, and "r" positions in no order.
    """

    B: int = 2
    T: int = 48
    S: int | None = None
    N: int = 4
    K: int = 2
    H: int = 16
    U: int | None = None
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    values: str = ""
    sinks: bool = False
    bias: str = ""
    dtype: Any = "float32"

    def __str__(self) -> str:
        default = Problem()
        fields = dataclasses.asdict(self)
        return (
            " ".join(f"{k}={v}" for k, v in fields.items() if v != getattr(default, k)) or "plain"
        )

    def arrays(self) -> dict[str, Any]:
        """What is differentiated: q, k, v, and sinks and factors of a bias where there are any."""
        draw = np.random.default_rng(sum(map(ord, str(self)))).standard_normal
        S, U = self.S or self.T, self.U or self.H
        shapes = dict(
            q=(self.B, self.T, self.N, self.H),
            k=(self.B, S, self.K, self.H),
            v=(self.B, S, self.K, U),
        )
        if self.sinks:
            shapes["sinks"] = (self.N,)
        if self.bias == "factors":
            shapes |= dict(a=(self.B, self.T, self.N, 3), b=(1, S, 1, 3))
        return {name: jnp.asarray(draw(shape), self.dtype) for name, shape in shapes.items()}

    def options(self) -> dict[str, Any]:
        """Values and statics."""
        draw, S = np.random.default_rng(7), self.S or self.T
        options: dict[str, Any] = dict(
            causal=self.causal, window=self.window, soft_cap=self.soft_cap
        )
        if self.bias == "function":
            options["bias"] = alibi
        if "p" in self.values or "r" in self.values:
            k_positions = np.tile(np.arange(S), (self.B, 1))
            if "r" in self.values:
                k_positions = draw.permuted(k_positions, axis=1)
            q_positions = (
                k_positions[:, S - self.T :] if S >= self.T else k_positions[:, :1] * 0 + S
            )
            options |= dict(q_positions=q_positions, k_positions=k_positions)
        if "s" in self.values or "e" in self.values:
            k_segments = 1 + (np.arange(S) * 3 // S)[None].repeat(self.B, 0)
            k_segments[:, -max(1, S // 8) :] = 0
            if "e" in self.values:
                k_segments[0] = 0
            q_segments = k_segments[:, S - self.T :] if S >= self.T else np.ones((self.B, self.T))
            options |= dict(q_segments=q_segments.astype(int), k_segments=k_segments)
        if "i" in self.values:
            spans = np.zeros((self.B, S), int)
            spans[:, S // 4 : S // 2], spans[:, S // 2 + 2 : S - 2] = 1, 2
            options |= dict(q_spans=spans[:, S - self.T :], k_spans=spans)
        return options


def alibi(head, i, j):
    """Press et al. 2022, with heads counted from 0."""
    return -jnp.exp2(-(head + 1.0)) * jnp.abs(i - j)


def run(problem: Problem, impl: str) -> dict[str, jax.Array]:
    """o, lse and the gradients of a function of both; the reference's are computed once."""
    return _reference(problem) if impl == "reference" else _run(problem, impl)


@functools.cache
def _reference(problem: Problem) -> dict[str, jax.Array]:
    return _run(problem, "reference")


def _run(problem: Problem, impl: str) -> dict[str, jax.Array]:
    options = {
        k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in problem.options().items()
    }

    def outputs(arrays):
        rest = {k: v for k, v in arrays.items() if k == "sinks"}
        if "a" in arrays:
            rest["bias"] = (arrays["a"], arrays["b"])
        q, k, v = (arrays[name] for name in "qkv")
        return attention(q, k, v, impl=impl, return_lse=True, **options, **rest)

    def loss(arrays):
        o, lse = outputs(arrays)
        weights = np.random.default_rng(3)
        o_w, lse_w = weights.standard_normal(o.shape), weights.standard_normal(lse.shape)
        seen_lse = jnp.where(lse > -1e38, lse, 0.0)
        return jnp.sum(o.astype(jnp.float32) * o_w) + 0.1 * jnp.sum(seen_lse * lse_w)

    @jax.jit
    def both(arrays):
        o, lse = outputs(arrays)
        return dict(o=o, lse=lse) | {f"d{k}": v for k, v in jax.grad(loss)(arrays).items()}

    return both(problem.arrays())


def assert_close(found: dict[str, jax.Array], wanted: dict[str, jax.Array], tolerance: float):
    """Each array to a tolerance relative to its greatest value."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        x, y = [np.asarray(a, np.float64) for a in (found[name], value)]
        x, y = [np.where(a < -1e38, 0.0, a) if name == "lse" else a for a in (x, y)]
        error = np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-3)
        assert error <= tolerance, f"{name} is {error:.1e} off"
