"""Held-out loss and perplexity of a language model, weighted by token.

nll is the mean of -log p(token | those before it) over all tokens that count, in nats, and
perplexity its exponential; in conversations those of the answers count, as in training. It is a
mean over the tokens of the whole set, not of batch means, and only models with one tokenizer
compare by it.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.progress

from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.train.batches import Pixels, place_batch
from llmprep_jax.train.losses import LossSum, next_token_loss


class Perplexity(NamedTuple):
    """Nats a token, e to that power, and the number of tokens that counted."""

    nll: float
    perplexity: float
    tokens: int


@on_own_mesh
def perplexity(
    model: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    max_batches: int | None = None,
    console: rich.console.Console | None = None,
    pixels: Pixels | None = None,
) -> Perplexity:
    """Evaluates a model.

    Args:
      batches: numpy dicts as of `data.evaluation_batches`.
      max_batches: how many of them; None: all.
      console: shows progress on it; None: none is shown.
      pixels: how bytes of images are normalised, as in training; None: there are none.

    Raises:
      ValueError: no token counts.
    """
    how = tuple(sorted((pixels or {}).items()))  # hashable, so that a program is compiled once
    total = tokens = 0.0  # Python floats: float32 sums lose tokens beyond 2^24
    for batch in _shown(itertools.islice(batches, max_batches), console, max_batches):
        arrays = {name: x[0] for name, x in place_batch(batch).items()}
        loss = jax.device_get(_loss(model, arrays, how))
        total, tokens = total + float(loss.total), tokens + float(loss.count)
    if not tokens:
        raise ValueError("nothing to evaluate: no token of the data counts for the loss")
    nll = total / tokens
    return Perplexity(nll, math.exp(nll) if nll < 700 else math.inf, round(tokens))


@functools.partial(jax.jit, static_argnames="pixels")
def _loss(model: Any, batch: Mapping[str, jax.Array], pixels: tuple[Any, ...]) -> LossSum:
    return next_token_loss(model, batch, pixels=dict(pixels))


def _shown(
    batches: Iterable[Any], console: rich.console.Console | None, total: int | None
) -> Iterable[Any]:
    if console is None:
        return batches
    return rich.progress.track(batches, "evaluating", total, console=console, transient=True)
