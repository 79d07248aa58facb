"""Generation: one prefill of the prompts, then a loop of single tokens that stays on the device.

The loop is a `jax.lax.while_loop` over the cache, the last logits and a buffer of new tokens; it
ends when every row has met a stop id. Streaming runs the same loop a few tokens at a time, and
speculative decoding (`speculative`) has a loop of its own. The one thing a reader would get wrong:
prompts of unequal length are aligned at their ends (padding left), so that all rows write the same
cache slot.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.generate import layout, speculative
from llmprep_jax.generate.prompt import read_prompt
from llmprep_jax.generate.sampler import Sampling, draw, shape_logits
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.settle import settle
from llmprep_jax.types import Array

PROMPT_STEP = 32  # prompts are padded to a multiple, so that a new length seldom compiles anew


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one decode step hands to the next.

    Attributes:
      cache: keys and values. logits_BV: of the token to draw. step: tokens drawn so far.
      done_B: rows that have met a stop id.
      seen_BV: tokens of the prompt and the text, with a repetition penalty; else None.
      tokens_BT, logprobs_BT: what was drawn, T = max_new_tokens.
      keys_B: each row's random key.
    """

    cache: Any
    logits_BV: Array
    step: Array
    done_B: Array
    seen_BV: Array | None
    tokens_BT: Array
    logprobs_BT: Array
    keys_B: Array


class Engine:
    """A model laid out for generation: on one CPU as `layout` does, elsewhere as it is."""

    def __init__(self, model: nnx.Module):
        self.model, self.cfg = settle(model), model.cfg
        self._leaves = jax.tree.leaves(model)
        devices = self._leaves[0].devices()
        self._on_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"

    @functools.cached_property
    def _listed(self) -> nnx.Module:
        return layout.listed(self.model)

    @functools.cached_property
    def _row_wise(self) -> nnx.Module:
        return layout.row_wise(self.model)

    def _model_for(self, num_tokens: int) -> nnx.Module:
        """The layout that is fastest for so many tokens at once.

        SmolLM2 in milliseconds, scanned, listed, row-wise: one token 28, 23, 19 in float32 and 50,
        42, 11 in bf16; eight 48, 67, 69 and 94, 41, 83.
        """
        if not self._on_cpu:
            return self.model
        if num_tokens == 1:
            return self._row_wise
        return self.model if self.cfg.compute.operand_dtype == jnp.float32 else self._listed

    def is_of(self, model: nnx.Module) -> bool:
        """Whether the model still holds the very arrays that this engine was made from."""
        leaves = jax.tree.leaves(model)
        return len(leaves) == len(self._leaves) and all(
            a is b for a, b in zip(leaves, self._leaves, strict=True)
        )

    def start(
        self,
        tokens: Any,
        mask: Any | None,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        pad_id: int,
        draft: str | None = None,
    ) -> State | speculative.State:
        """Reads the prompts in.

        Raises:
          ValueError: an empty or misshapen batch, a row without a token, prompt and new tokens
            together beyond the model's context, or a draft that the model has no modules for.
        """
        speculative.check_draft(self.model, draft)
        tokens_BT, mask_BT = _align_right(tokens, mask)
        total = tokens_BT.shape[1] + max_new_tokens
        if total > self.cfg.max_seq_len:
            raise ValueError(
                f"{tokens_BT.shape[1]} prompt tokens and {max_new_tokens} new exceed the model's"
                f" context of {self.cfg.max_seq_len}; shorten the prompt or max_new_tokens"
            )
        padding = -tokens_BT.shape[1] % PROMPT_STEP
        tokens_BT = np.pad(tokens_BT, ((0, 0), (padding, 0)))
        mask_BT = np.pad(mask_BT, ((0, 0), (padding, 0)))
        prefill = _prefill if draft is None else speculative.prefill
        reader, key = self._model_for(tokens_BT.size), jax.random.key(seed)
        state = prefill(reader, tokens_BT, mask_BT, key, sampling, max_new_tokens, pad_id)
        stepper = self._stepper(state)
        if layout.is_listed(stepper) and not layout.is_listed(reader):
            state = dataclasses.replace(state, cache=_unstack_cache(state.cache))
        return state

    def advance(
        self,
        state: State | speculative.State,
        until: int,
        stop_ids: Sequence[int],
        sampling: Sampling,
    ) -> State | speculative.State:
        """Draws tokens up to `until` in all or until every row is done; uses the given state up."""
        decode = _decode if isinstance(state, State) else speculative.decode
        # never an empty array: its shape would compile anew
        stops = jnp.asarray([*stop_ids, -1], jnp.int32)
        return decode(self._stepper(state), state, jnp.int32(until), stops, sampling)

    def _stepper(self, state: State | speculative.State) -> nnx.Module:
        """The layout that is fastest for a step.

        One row with a draft, 81 M of DeepSeek-V3's kind in milliseconds, scanned, listed, row-wise:
        30, 30, 18 in float32 and 39, 28, 32 in bf16; without a draft row-wise 10 and 8.
        """
        num_rows = len(state.done_B)
        drafts = 0 if isinstance(state, State) else state.drafts_BM.size
        if num_rows == 1 and self._on_cpu and self.cfg.compute.operand_dtype == jnp.float32:
            return self._row_wise
        return self._model_for(num_rows + drafts)


@jax.jit
def _unstack_cache(cache: Any) -> Any:
    is_cache = lambda x: isinstance(x, KVCache)  # noqa: E731
    return jax.tree.map(KVCache.unstacked, cache, is_leaf=is_cache)


def _align_right(tokens: Any, mask: Any | None) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.asarray(tokens)
    if tokens_BT.ndim != 2 or not tokens_BT.size or tokens_BT.dtype.kind not in "iu":
        raise ValueError(f"tokens are {tokens_BT.dtype} {tokens_BT.shape}; give integers [B, T]")
    mask_BT = np.ones(tokens_BT.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask_BT.shape != tokens_BT.shape or not mask_BT.any(axis=1).all():
        raise ValueError(f"mask is {mask_BT.shape} for tokens {tokens_BT.shape}, or hides a row")
    # a stable sort by the mask moves the padding to the left and keeps the order of the rest
    order_BT = np.argsort(mask_BT, axis=1, kind="stable")
    tokens_BT = np.take_along_axis(tokens_BT, order_BT, axis=1).astype(np.int32)
    mask_BT = np.take_along_axis(mask_BT, order_BT, axis=1)
    first = int(mask_BT.argmax(axis=1).min())
    return tokens_BT[:, first:], mask_BT[:, first:]


@functools.partial(jax.jit, static_argnames=("sampling", "max_new_tokens", "pad_id"))
def _prefill(model, tokens_BT, mask_BT, key, sampling, max_new_tokens, pad_id) -> State:
    B, T = tokens_BT.shape
    V = model.cfg.vocab_size
    cache = model.init_cache(B, T + max_new_tokens)
    x_B1D, cache = read_prompt(model, tokens_BT, mask_BT, cache, last_only=True)
    seen_BV = None
    if sampling.repetition_penalty != 1.0:
        # padding is sent beyond the vocabulary, where a scatter drops it
        ids_BT = jnp.where(mask_BT, tokens_BT, V)
        seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], ids_BT].set(True, mode="drop")
    return State(
        cache,
        model.unembed(x_B1D)[:, 0],
        jnp.int32(0),
        jnp.zeros(B, bool),
        seen_BV,
        jnp.full((B, max_new_tokens), pad_id, jnp.int32),
        jnp.zeros((B, max_new_tokens)),
        jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B)),
    )


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def _decode(model, state, until, stop_ids, sampling) -> State:
    def going(state):
        return (state.step < until) & ~jnp.all(state.done_B)

    def step(state):
        # tied to the step, or XLA's CPU compiler turns bf16 weights into float32 ahead of the loop
        here, step = jax.lax.optimization_barrier((model, state.step))
        return _step(here, stop_ids, sampling, dataclasses.replace(state, step=step))

    return jax.lax.while_loop(going, step, state)


def _step(model: nnx.Module, stop_ids: Array, sampling: Sampling, state: State) -> State:
    """Draws one token a row, keeps it unless the row is done, and computes the logits after it."""
    rows_B = jnp.arange(state.done_B.shape[0])
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.step)
    logits_BV = shape_logits(state.logits_BV, state.seen_BV, sampling)
    token_B = draw(logits_BV, sampling, keys_B)
    logprob_B = jax.nn.log_softmax(state.logits_BV)[rows_B, token_B]
    keep = lambda new, old: jnp.where(state.done_B, old, new)  # noqa: E731
    token_B = keep(token_B, state.tokens_BT[:, state.step])
    seen_BV = None if state.seen_BV is None else state.seen_BV.at[rows_B, token_B].set(True)
    x_B1D, cache = model.features(token_B[:, None], cache=state.cache)
    return State(
        cache,
        model.unembed(x_B1D)[:, 0],
        state.step + 1,
        state.done_B | jnp.isin(token_B, stop_ids),
        seen_BV,
        state.tokens_BT.at[:, state.step].set(token_B),
        state.logprobs_BT.at[:, state.step].set(keep(logprob_B, 0.0)),
        state.keys_B,
    )


_engines: list[Engine] = []  # the last one only: an engine holds a copy of the layers


def engine_of(model: nnx.Module) -> Engine:
    """The engine of a model, kept from the last call if the model has not changed since."""
    if not _engines or not _engines[0].is_of(model):
        _engines[:] = [Engine(model)]
    return _engines[0]


Report = Callable[[speculative.Acceptance], None]


def _report(state: State | speculative.State, report: Report | None) -> None:
    if report is not None and isinstance(state, speculative.State):
        report(speculative.acceptance(state))


def stream_tokens(
    model: nnx.Module,
    tokens: Any,
    mask: Any | None = None,
    *,
    max_new_tokens: int = 64,
    chunk: int = 8,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    pad_id: int = 0,
    draft: str | None = None,
    report: Report | None = None,
    **sampling: Any,
) -> Iterator[np.ndarray]:
    """As `generate_tokens`, in blocks [B, t] of up to `chunk` tokens as they are drawn.

    A stream that is left early reports too.
    """
    settings = Sampling(**sampling)
    engine = engine_of(model)
    state = engine.start(tokens, mask, settings, max_new_tokens, seed, pad_id, draft)
    shown, is_done = 0, False
    try:
        while not is_done:
            until = min(shown + chunk, max_new_tokens)
            state = engine.advance(state, until, stop_ids, settings)
            # rows of accepted drafts may be ahead
            drawn = int(state.step)
            end = min(drawn, until)
            yield np.asarray(state.tokens_BT[:, shown:end])
            shown = end
            is_done = shown == max_new_tokens or (shown == drawn and bool(state.done_B.all()))
    finally:
        _report(state, report)


def generate_tokens(
    model: nnx.Module,
    tokens: Any,
    mask: Any | None = None,
    *,
    max_new_tokens: int = 64,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    pad_id: int = 0,
    return_logprobs: bool = False,
    draft: str | None = None,
    report: Report | None = None,
    **sampling: Any,
) -> Any:
    """New tokens after each prompt, [B, max_new_tokens]; after a stop id (kept) comes `pad_id`.

    Args:
      tokens: prompts, ints [B, T]. mask: True on real tokens; padding may be left or right.
      stop_ids: ids that end a row. seed: of the draws.
      return_logprobs: also returns the model's own log-probabilities of the new tokens, float32 [B,
        max_new_tokens], before penalties and temperature.
      draft: "mtp" lets the model's multi-token prediction modules draft tokens that the model
        verifies several at once. The text is that of plain decoding, or, where it is sampled,
        another draw from the same distribution.
      report: called with the `Acceptance` of the drafts at the end.
      sampling: the fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty.

    Raises:
      ValueError: a setting out of its range, prompt and new tokens beyond the model's context, or a
        draft that the model has no modules for.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    settings = Sampling(**sampling)
    engine = engine_of(model)
    state = engine.start(tokens, mask, settings, max_new_tokens, seed, pad_id, draft)
    state = engine.advance(state, max_new_tokens, stop_ids, settings)
    _report(state, report)
    return (state.tokens_BT, state.logprobs_BT) if return_logprobs else state.tokens_BT
