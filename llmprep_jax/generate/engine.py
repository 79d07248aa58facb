"""Generation on the device: one prefill of the prompts, then a loop of single tokens.

The first token is drawn with the prompt. The loop is a `jax.lax.while_loop` over the cache and a
buffer of new tokens: it reads the last token and draws the next, and ends when every row has met a
stop id, so that no token is read after which none is drawn. `decoding` runs it some tokens at a
time, so that text can be looked at in between, and speculative decoding (`speculative`) has a loop
of its own. Few programs are compiled: there are two widths of prompts an octave, the slots of a
cache are powers of two, and sampling numbers, seeds and ids are arguments.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.generate import layout, speculative
from llmprep_jax.generate.media import Media, cache_keys, lay_out, spans_of
from llmprep_jax.generate.prompt import (
    block_size,
    bucket,
    by_row,
    check_length,
    everywhere,
    pad,
    prompt_width,
    read_batch,
    read_prompt,
)
from llmprep_jax.generate.prompt_cache import PromptCache, is_cache, room
from llmprep_jax.generate.sampler import Sampling, draw, shape_logits
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.settle import settle
from llmprep_jax.sharding import mesh_of, on_mesh_of
from llmprep_jax.types import Array

MIN_SLOTS = 256  # of a cache while it is decoded with
MIN_STOPS = 8  # stop ids that a program takes; -1 fills them up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one decode step hands to the next.

    Attributes:
      cache: keys and values, of all tokens but the last. step: tokens drawn so far, one at least.
      done_B: rows that have met a stop id.
      seen_BV: tokens of the prompt and the text, with a repetition penalty; else None.
      tokens_BT, logprobs_BT: what was drawn, with room for as many as the cache has slots.
      keys_B: each row's random key.
    """

    cache: Any
    step: Array
    done_B: Array
    seen_BV: Array | None
    tokens_BT: Array
    logprobs_BT: Array
    keys_B: Array


class Engine:
    """A model laid out for generation: on one CPU as `layout` does, elsewhere as it is.

    It holds copies of layers, and of the model only weak references: with the model, or with any of
    its weights, the engine that `engine_of` keeps goes too.
    """

    def __init__(self, model: nnx.Module):
        leaves, self._structure = jax.tree.flatten(model)
        forget = functools.partial(_forget, weakref.ref(self))
        self.weights = tuple(weakref.ref(leaf, forget) for leaf in leaves)
        settled = settle(model)
        is_settled = jax.tree.structure(settled) == self._structure
        self._settled = None if is_settled else settled
        self.attach(model)
        self.cfg, self._mesh = model.decoder.cfg, mesh_of(model)
        devices = leaves[0].devices()
        is_one_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
        self.is_on_cpu = is_one_cpu and self._mesh is None

    def attach(self, model: nnx.Module) -> None:
        """Takes a model of the very weights of this engine."""
        # what was settled holds weights, so it can only go with the model
        forget = functools.partial(_forget, weakref.ref(self))
        self._model = weakref.ref(model, None if self._settled is None else forget)

    @property
    def model(self) -> nnx.Module:
        """The model; who uses the engine holds it."""
        model = self._model() if self._settled is None else self._settled
        assert model is not None, "the model is gone"
        return model

    @property
    def decoder(self) -> nnx.Module:
        """Its language model, which decodes."""
        return self.model.decoder

    def is_of(self, model: nnx.Module) -> bool:
        """Whether the model still holds the very arrays that this engine was made from."""
        leaves, structure = jax.tree.flatten(model)
        return structure == self._structure and all(
            a is b() for a, b in zip(leaves, self.weights, strict=True)
        )

    @functools.cached_property
    def _row_wise(self) -> nnx.Module:
        return layout.row_wise(self.decoder)

    @functools.cached_property
    def _is_packed(self) -> bool:
        """Whether layers have packed weights, and copies of them are dense."""
        return bool(layout.packed_layers(self.decoder))

    @functools.cached_property
    def _has_layouts(self) -> bool:
        return self.is_on_cpu and not (self._is_packed and not layout.can_unpack(self.decoder))

    def model_for(self, num_tokens: int) -> nnx.Module:
        """The layout that is fastest for so many tokens at once.

        SmolLM2 in milliseconds, as it is and row-wise: eight tokens 60 and 72 in float32, 59 and 41
        in bf16; 512 tokens 713 and 714, 571 and 457 (two cores of Zen 4).
        """
        is_float32 = self.cfg.compute.operand_dtype == jnp.float32
        as_it_is = num_tokens > 1 and is_float32 and not self._is_packed
        return self._row_wise if self._has_layouts and not as_it_is else self.decoder

    def start(
        self,
        tokens: Any,
        mask: Any | None,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        pad_id: int,
        stop_ids: Sequence[int] = (),
        draft: str | None = None,
        num_samples: int = 1,
        prompt_cache: PromptCache | None = None,
        media: Media | None = None,
    ) -> State | speculative.State:
        """Reads the prompts in; each has `num_samples` rows in what is decoded.

        Args:
          media: of whole rows, as `read_media` gives them.

        Raises:
          ValueError: an empty or misshapen batch, a row without a token, an id outside the
            vocabulary, prompt and new tokens together beyond the model's context, or a draft that
            the model has no modules for.
        """
        speculative.check_draft(self.decoder, draft)
        tokens_BT, mask_BT = read_batch(tokens, mask, self.cfg.vocab_size)
        check_length(tokens_BT, max_new_tokens, self.cfg.max_seq_len)
        width = prompt_width(tokens_BT.shape[1])
        padded = [pad(x_BT, width) for x_BT in (tokens_BT, mask_BT)]
        with on_mesh_of(self.model):
            draws = (jax.random.key(seed), np.int32(pad_id), sampling)
            stops = _padded(stop_ids)
            if draft is not None:
                rows = [np.repeat(x_BT, num_samples, axis=0) for x_BT in (tokens_BT, mask_BT)]
                media = {
                    name: np.repeat(x, num_samples, axis=0) for name, x in (media or {}).items()
                }
                return self._start_drafts(*rows, *draws, max_new_tokens, media)
            kept = prompt_cache and self._take(prompt_cache, tokens_BT, media)
            prompt = (tokens_BT, mask_BT, media)
            cache, logits_BV, num_slots = self._read(*prompt, max_new_tokens, kept)
            seen = padded if sampling.switches.penalises else None
            stepper = self.stepper(len(tokens_BT) * num_samples)
            return _begin(stepper, cache, logits_BV, seen, *draws, stops, num_slots, num_samples)

    def _take(
        self, prompt_cache: PromptCache, tokens_BT: np.ndarray, media: Media | None
    ) -> tuple[Any, int] | None:
        """What a prompt cache has of the one row."""
        if not media:
            return prompt_cache.take(self.weights, tokens_BT[0])
        spans_BT = spans_of(self.model, tokens_BT)
        keys_T = cache_keys(self.model, tokens_BT[0], media)
        return prompt_cache.take(self.weights, keys_T, None if spans_BT is None else spans_BT[0])

    def _read(
        self,
        tokens_BT: np.ndarray,
        mask_BT: np.ndarray,
        media: Media | None,
        max_new_tokens: int,
        kept: Any = None,
    ) -> tuple[Any, Array, int]:
        """(the cache, the logits after the prompts, slots to decode with).

        Args:
          kept: a cache that holds the first tokens already, and how many.
        """
        cache, num_known = kept or (None, 0)
        length = tokens_BT.shape[1] - num_known
        width, inputs = prompt_width(length), None
        if media:
            new = (tokens_BT, mask_BT, media, width, num_known)
            *new, inputs, block = lay_out(self.model, *new)
            width = new[0].shape[1]
        else:
            new = [pad(x_BT[:, num_known:], width) for x_BT in (tokens_BT, mask_BT)]
            block = block_size(width)
        needed = max(width, length + max_new_tokens)
        reader = self.model_for(len(tokens_BT) * width)
        if cache is not None:
            num_slots, num_used = room(cache)
            needed += num_used
            num_slots = max(num_slots, self.num_slots(needed))
            cache = _refit(reader, cache, num_slots)
        cache, logits_BV = _prefill(reader, *new, cache, inputs, block)
        return cache, logits_BV, num_slots if kept else self.num_slots(needed)

    def num_slots(self, needed: int) -> int:
        """A power of two, or what the model's context can need."""
        return min(bucket(needed, MIN_SLOTS), max(needed, self.cfg.max_seq_len))

    def _start_drafts(
        self,
        tokens_BT: np.ndarray,
        mask_BT: np.ndarray,
        key: Array,
        pad_id: np.int32,
        sampling: Sampling,
        max_new_tokens: int,
        media: Media,
    ) -> speculative.State:
        length, inputs = tokens_BT.shape[1], None
        width = prompt_width(length)
        if media:
            prompt = (tokens_BT, mask_BT, media, width)
            tokens_BT, mask_BT, inputs, block = lay_out(self.model, *prompt)
        else:
            tokens_BT, mask_BT = [pad(x_BT, width) for x_BT in (tokens_BT, mask_BT)]
            block = block_size(width)
        needed = speculative.num_slots(self.decoder, length, max_new_tokens)
        num_slots = bucket(max(needed, tokens_BT.shape[1]), MIN_SLOTS)
        reader, limit = self.model_for(tokens_BT.size), np.int32(max_new_tokens)
        prompt = (tokens_BT, mask_BT, key, pad_id, limit)
        return speculative.prefill(reader, *prompt, sampling, num_slots, block, inputs)

    def advance(
        self,
        state: State | speculative.State,
        until: int,
        stop_ids: Sequence[int],
        sampling: Sampling,
        ended_B: np.ndarray | None = None,
    ) -> State | speculative.State:
        """Draws tokens up to `until` in all or until every row is done; uses the given state up.

        Args:
          ended_B: rows that are done for other reasons than a stop id.
        """
        is_plain = isinstance(state, State)
        stepper = self.stepper(len(state.done_B), 0 if is_plain else state.drafts_BM.size)
        ended_B = np.zeros(len(state.done_B), bool) if ended_B is None else ended_B
        with on_mesh_of(self.model):
            decode = _compiled(_decode if is_plain else speculative.decode, self.is_on_cpu)
            return decode(stepper, state, np.int32(until), _padded(stop_ids), ended_B, sampling)

    def stepper(self, num_rows: int, num_drafts: int = 0) -> nnx.Module:
        """The layout that is fastest for a step.

        One row with a draft is row-wise too: 81 M of DeepSeek-V3's kind take 18 ms in float32, as
        they are 30.
        """
        return self.model_for(1 if num_rows == 1 else num_rows + num_drafts)


@functools.partial(jax.jit, static_argnames="block", donate_argnames="cache")
def _prefill(model, tokens_BT, mask_BT, cache, inputs, block) -> tuple[Any, Array]:
    """(the cache, the logits after the last token); without a cache, one as long as the prompt."""
    kind = dict(block=block, last_only=True, inputs=inputs, is_new=cache is None)
    cache = model.init_cache(*tokens_BT.shape) if cache is None else cache
    x_B1D, cache = read_prompt(model, tokens_BT, mask_BT, cache, **kind)
    return cache, everywhere(model.unembed(by_row(x_B1D))[:, 0])


def fit(cache: Any, empty: Any) -> Any:
    """A cache's tokens in an empty one's slots and rows, see `nn.cache.KVCache.fit`."""
    return jax.tree.map(KVCache.fit, cache, empty, is_leaf=is_cache)


@functools.partial(jax.jit, static_argnames="num_slots")
def _refit(model, cache, num_slots) -> Any:
    """One row's cache with so many slots."""
    return fit(cache, model.init_cache(1, num_slots))


@functools.partial(jax.jit, static_argnames=("num_slots", "num_samples"))
def _begin(
    model, cache, logits_BV, seen, key, pad_id, sampling, stop_ids, num_slots, num_samples
) -> State:
    """The state after the first draw, each prompt `num_samples` times.

    Args:
      seen: tokens and mask of the prompts, if they count for a penalty.
    """
    logits_BV = jnp.repeat(logits_BV, num_samples, axis=0)
    B, V = logits_BV.shape
    seen_BV = None
    if seen is not None:
        # padding is sent beyond the vocabulary, where a scatter drops it
        ids_BT = jnp.repeat(jnp.where(seen[1], seen[0], V), num_samples, axis=0)
        seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], ids_BT].set(True, mode="drop")
    state = State(
        fit(cache, model.init_cache(B, num_slots)),
        jnp.int32(0),
        jnp.zeros(B, bool),
        seen_BV,
        jnp.full((B, num_slots), pad_id, jnp.int32),
        jnp.zeros((B, num_slots)),
        jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(B)),
    )
    return _draw(state, logits_BV, stop_ids, sampling)


@functools.cache
def _compiled(decode: Callable[..., Any], on_cpu: bool) -> Callable[..., Any]:
    options = layout.cpu_options() if on_cpu else None
    return jax.jit(decode, donate_argnames="state", compiler_options=options)


def _decode(model, state, until, stop_ids, ended_B, sampling) -> State:
    def going(state):
        return (state.step < until) & ~jnp.all(state.done_B)

    def step(state):
        # tied to the step, or XLA's CPU compiler turns bf16 weights into float32 ahead of the loop
        model_here, step = jax.lax.optimization_barrier((model, state.step))
        return _step(model_here, stop_ids, sampling, dataclasses.replace(state, step=step))

    state = dataclasses.replace(state, done_B=state.done_B | ended_B)
    return jax.lax.while_loop(going, step, state)


def _step(model: nnx.Module, stop_ids: Array, sampling: Sampling, state: State) -> State:
    """Reads the last token of each row, and draws the next."""
    token_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BT, state.step - 1, 1, axis=1)
    x_B1D = model.embed_inputs(by_row(token_B1))
    x_B1D, cache = model.features(x_B1D, cache=state.cache)
    logits_BV = everywhere(model.unembed(x_B1D)[:, 0])
    return _draw(dataclasses.replace(state, cache=cache), logits_BV, stop_ids, sampling)


def _draw(state: State, logits_BV: Array, stop_ids: Array, sampling: Sampling) -> State:
    """Draws one token a row, and keeps it unless the row is done."""
    rows_B = jnp.arange(state.done_B.shape[0])
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.step)
    token_B = draw(shape_logits(logits_BV, state.seen_BV, sampling), sampling, keys_B)
    logprob_B = jax.nn.log_softmax(logits_BV)[rows_B, token_B]
    keep = lambda new, old: jnp.where(state.done_B, old, new)  # noqa: E731
    token_B = keep(token_B, state.tokens_BT[:, state.step])
    seen_BV = None if state.seen_BV is None else state.seen_BV.at[rows_B, token_B].set(True)
    return State(
        state.cache,
        state.step + 1,
        state.done_B | jnp.isin(token_B, stop_ids),
        seen_BV,
        state.tokens_BT.at[:, state.step].set(token_B),
        state.logprobs_BT.at[:, state.step].set(keep(logprob_B, 0.0)),
        state.keys_B,
    )


def _padded(stop_ids: Sequence[int]) -> np.ndarray:
    """Stop ids in one of few shapes, and never an empty one: each compiles anew."""
    stops = np.full(bucket(len(stop_ids), MIN_STOPS), -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    return stops


_engines: list[Engine] = []  # the last one only: an engine holds a copy of the layers


def engine_of(model: nnx.Module) -> Engine:
    """The engine of a model, kept from the last call if the model has not changed since."""
    if not _engines or not _engines[0].is_of(model):
        _engines[:] = [Engine(model)]
    _engines[0].attach(model)
    return _engines[0]


def _forget(engine: weakref.ref, _: weakref.ref) -> None:
    """Drops an engine of whose weights one is gone."""
    if _engines and _engines[0] is engine():
        _engines.clear()
