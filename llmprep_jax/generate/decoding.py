"""Generation from tokens to tokens: a decoding under way, and the two calls that run one.

`generate_tokens` draws all at once, `stream_tokens` some at a time; `Decoding` is what both, and
generation of text, stand on.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.generate import speculative
from llmprep_jax.generate.engine import Engine, engine_of
from llmprep_jax.generate.media import cache_keys, read_media
from llmprep_jax.generate.prompt import check_length, read_batch
from llmprep_jax.generate.prompt_cache import PromptCache
from llmprep_jax.generate.sampler import Number, read_sampling, whole
from llmprep_jax.types import Array

Report = Callable[[speculative.Acceptance], None]
# settings beside those of the sampling and `stop_ids`
OTHERS = (
    *("max_new_tokens", "seed", "pad_id", "num_samples", "draft", "report", "prompt_cache"),
    "media",
)


class Decoding:
    """Prompts, and the tokens that were drawn after them so far. Nothing is computed before the
    first `advance`.

    Args as `generate_tokens`, whose errors it raises.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokens: Any,
        mask: Any | None = None,
        *,
        max_new_tokens: Number = 64,
        stop_ids: Number | Iterable[Number] | None = (),
        seed: Number | None = 0,
        pad_id: Number = 0,
        num_samples: Number | None = None,
        draft: str | None = None,
        report: Report | None = None,
        prompt_cache: PromptCache | None = None,
        media: Mapping[str, Any] | None = None,
        **sampling: Any,
    ):
        self.sampling = read_sampling(sampling, ("stop_ids", *OTHERS))
        self.max_new_tokens = at_least_one("max_new_tokens", max_new_tokens)
        self.num_samples = 1 if num_samples is None else at_least_one("num_samples", num_samples)
        self.stop_ids, self._seed = read_ids("stop_ids", stop_ids), read_seed(seed)
        self._pad_id, self._draft, self._report = whole("pad_id", pad_id), draft, report
        decoder = model.decoder
        speculative.check_draft(decoder, draft)
        self._model, self._prompts = model, read_batch(tokens, mask, decoder.cfg.vocab_size)
        self._media = read_media(model, self._prompts[0], media) if media else None
        image_id = model.image_id if self._media else None
        check_length(self._prompts[0], self.max_new_tokens, decoder.cfg.max_seq_len, image_id)
        self.num_rows = len(self._prompts[0]) * self.num_samples
        if self.num_samples > 1 and self.sampling.switches.is_greedy:
            raise ValueError(
                f"num_samples is {self.num_samples} at temperature 0, where all of them are alike;"
                " give a temperature above 0"
            )
        if prompt_cache is not None and (self.num_rows > 1 or draft is not None):
            raise ValueError(
                "a prompt_cache is of one prompt, one sample and no draft; give"
                f" {'draft=None' if draft else 'prompts one by one'}, or leave prompt_cache out"
            )
        self._prompt_cache, self._state, self._num_shown = prompt_cache, None, 0
        self._ended_B = np.zeros(self.num_rows, bool)

    def advance(self, number: int) -> np.ndarray:
        """Draws up to `number` further tokens a row and returns those that all rows have, [B, t].

        Drafts that were accepted may put rows ahead; they come with the next tokens.
        """
        settings = (self.stop_ids, self.sampling, self._ended_B)
        until = min(self._num_shown + number, self.max_new_tokens)
        engine = engine_of(self._model)
        # what is under way uses the state up; an interrupt leaves none
        state, self._state = self._state, None
        if state is None:
            state = self._start(engine)
        # the first token was drawn with the prompt
        is_there = until == 1 and self._draft is None
        self._state = state if is_there else engine.advance(state, until, *settings)
        end = min(self._num_drawn, until)
        block_BT = np.array(self._state.tokens_BT)[:, self._num_shown : end]
        self._num_shown = end
        return block_BT

    def _start(self, engine: Engine) -> Any:
        self._weights = engine.weights
        numbers = (self.max_new_tokens, self._seed, self._pad_id, self.stop_ids)
        extent = (self._draft, self.num_samples, self._prompt_cache, self._media)
        return engine.start(*self._prompts, self.sampling, *numbers, *extent)

    @property
    def _num_drawn(self) -> int:
        """Tokens that every row has that is not done."""
        return int(self._state.step)

    @property
    def is_done(self) -> bool:
        """Whether nothing more is to come."""
        if self._state is None:
            return False
        if self._num_shown == self.max_new_tokens:
            return True
        are_done = bool(np.all(self._ended_B | np.asarray(self._state.done_B)))
        return are_done and self._num_shown == self._num_drawn

    def end(self, ended_B: Sequence[bool]) -> None:
        """Draws no more for these rows."""
        self._ended_B |= np.asarray(ended_B, bool)

    @property
    def tokens_BT(self) -> Array:
        """All new tokens, [B, max_new_tokens], a prompt's samples one after the other."""
        return jnp.asarray(np.array(self._state.tokens_BT)[:, : self.max_new_tokens])

    @property
    def logprobs_BT(self) -> Array:
        """Their log-probabilities, of the model's own distribution."""
        return jnp.asarray(np.array(self._state.logprobs_BT)[:, : self.max_new_tokens])

    def close(self) -> None:
        """Tells how drafts fared, and leaves what was read and drawn in the prompt cache."""
        if self._state is None:
            return
        if self._report is not None and isinstance(self._state, speculative.State):
            self._report(speculative.acceptance(self._state))
        if self._prompt_cache is not None:
            read = self._num_drawn - 1  # the last was drawn, and not read
            drawn = np.array(self._state.tokens_BT)[0, :read]
            ids = self._prompts[0][0]
            if self._media:
                ids = cache_keys(self._model, ids, self._media)
            ids = np.concatenate([ids, drawn])
            self._prompt_cache.put(self._weights, ids, self._state.cache)


def stream_tokens(
    model: nnx.Module, tokens: Any, mask: Any | None = None, *, chunk: Number = 8, **settings: Any
) -> Iterator[np.ndarray]:
    """As `generate_tokens`, in blocks [B, t] of up to `chunk` tokens as they are drawn.

    With `num_samples`, B counts each prompt so often. A stream that is left early reports too.
    """
    chunk = at_least_one("chunk", chunk)
    return _blocks(Decoding(model, tokens, mask, **settings), chunk)


def _blocks(decoding: Decoding, chunk: int) -> Iterator[np.ndarray]:
    try:
        while not decoding.is_done:
            yield decoding.advance(chunk)
    finally:
        decoding.close()


def generate_tokens(
    model: nnx.Module,
    tokens: Any,
    mask: Any | None = None,
    *,
    return_logprobs: bool = False,
    **settings: Any,
) -> Any:
    """New tokens after each prompt, [B, max_new_tokens]; after a stop id (kept) comes `pad_id`.

    Args:
      tokens: prompts, ints [B, T], or rows of unequal length. mask: True on real tokens; padding
        may be left or right.
      return_logprobs: also returns the model's own log-probabilities of the new tokens, float32 [B,
        max_new_tokens], before penalties and temperature.
      max_new_tokens: 64 unless given.
      stop_ids: ids that end a row, or one. seed: of the draws; None draws anew at each call.
      num_samples: draws so many texts of each prompt, which is read once; what is returned is
        [B, num_samples, max_new_tokens]. None: one, without that axis.
      draft: "mtp" lets the model's multi-token prediction modules draft tokens that the model
        verifies several at once. The text is that of plain decoding, or, where it is sampled,
        another draw from the same distribution.
      report: called with the `Acceptance` of the drafts at the end.
      media: what a processor gave beside tokens and mask: images by name, as the model is called
        with them.
      prompt_cache: a `PromptCache`, for one prompt; of a prompt that begins as the last one and
        what was said after it, only the rest is read.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.

    Raises:
      ValueError: an unknown setting or one out of its range, prompt and new tokens beyond the
        model's context, ids outside its vocabulary, or a draft that the model has no modules for.
    """
    decoding = Decoding(model, tokens, mask, **settings)
    decoding.advance(decoding.max_new_tokens)
    decoding.close()
    results = (decoding.tokens_BT, decoding.logprobs_BT)
    if settings.get("num_samples") is not None:
        shape = (-1, decoding.num_samples, decoding.max_new_tokens)
        results = tuple(result.reshape(shape) for result in results)
    return results if return_logprobs else results[0]


def at_least_one(name: str, value: Any) -> int:
    """A count."""
    count = whole(name, value)
    if count < 1:
        raise ValueError(f"{name} is {count}; it must be at least 1")
    return count


def read_ids(name: str, value: Any) -> tuple[int, ...]:
    """Ids, of one or of several, or of none."""
    if value is None:
        return ()
    several = np.ndim(value) == 1 or isinstance(value, set | frozenset)
    return tuple(whole(name, one) for one in (value if several else [value]))


def read_seed(value: Any) -> int:
    """A seed; None is another one at each call."""
    seed = secrets.randbits(63) if value is None else whole("seed", value)
    if abs(seed) >= 2**63:
        raise ValueError(f"seed is {seed}; it must fit in 64 bits")
    return seed
