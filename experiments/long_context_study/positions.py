"""What each byte of a row costs a model, by its position and by how much it may see before it."""

import jax
import numpy as np
from flax import nnx

from llmprep_jax.train.losses import cross_entropy


def losses(
    model: nnx.Module, tokens: np.ndarray, targets: np.ndarray, window: int | None = None
) -> np.ndarray:
    """Nats of each byte of [B, T] rows.

    Args:
      window: each byte is predicted from that many before it and no more, or half of them at
        least, in rows of their own; None: from all.
    """
    length = tokens.shape[1]
    half = length if window is None else window // 2
    parts = []
    for start in range(0, max(length - half, 1), half):
        rows = np.s_[:, start : start + 2 * half]
        parts.append(_losses(model, tokens[rows], targets[rows])[:, half if start else 0 :])
    return np.concatenate(parts, axis=1)


@jax.jit
def _losses(model: nnx.Module, tokens: np.ndarray, targets: np.ndarray) -> jax.Array:
    return cross_entropy(model(tokens).logits, targets)
