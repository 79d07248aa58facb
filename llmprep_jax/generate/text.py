"""Generation from text to text: a processor before and after the engine, stop strings, streaming,
thoughts apart from answers.

A stop string may span tokens, so text is held back while its end could still become one; and it may
hold special tokens, which no text shows.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from llmprep_jax.generate.decoding import OTHERS, Decoding, read_ids
from llmprep_jax.generate.sampler import OTHER_NAMES, SETTINGS, Number, unknown
from llmprep_jax.text.stream import overlap
from llmprep_jax.text.thinking import (
    TAGS,
    Reply,
    ThoughtSplitter,
    opens_thought,
    parts_of,
    split_thoughts,
)

_TAIL = 32  # tokens at the end of a prompt that surely hold an opening tag, one byte a token
_CHUNK = 8  # tokens that are drawn before text is looked at
# settings of the tokens, and all that `generate` takes
_PASSED_ON = (*OTHERS, *SETTINGS)
_KNOWN = ("stream", "reasoning", "return_logprobs", "stop", "stop_ids", *_PASSED_ON)


class Scored(NamedTuple):
    """An answer and the tokens that it was drawn in.

    Attributes:
      text: the answer; a `Reply` where thoughts are told apart.
      tokens: ids, through the one that ended it. logprobs: of each, in nats, float32, by the
        model's own distribution before penalties and temperature.
    """

    text: str | Reply
    tokens: np.ndarray
    logprobs: np.ndarray


def generate(
    model: nnx.Module,
    processor: Any,
    messages_or_texts: Any,
    images: Any = None,
    *,
    stream: bool = False,
    reasoning: bool = False,
    return_logprobs: bool = False,
    stop: str | Iterable | None = (),
    stop_ids: Number | Iterable[Number] | None = None,
    **settings: Any,
) -> Any:
    """The model's answer to a text or a conversation, or a list of answers to a list of them.

    A conversation whose last message is the assistant's is gone on with: the answer is what follows
    that message.

    Args:
      processor: of the model; makes the tokens and decodes them.
      stream: return an iterator of pieces of text instead; of a list of prompts, or of several
        samples, an iterator of (index, piece), where a prompt's samples are counted one after the
        other.
      reasoning: return a `Reply` (reasoning_content, content) where there were a string, and a
        stream of them: the thoughts between <think> and </think>, and the answer after them. A
        piece of a stream is of one or the other. False: the text as the model says it.
      return_logprobs: return a `Scored` where there were a string or a Reply. Not for streams.
      stop: strings that end an answer, or one, in thoughts too; they are cut off, and a row that
        has met one draws a few tokens more at most. stop_ids: ids that do; None: the tokenizer's.
      settings: max_new_tokens (256 unless given), temperature, top_k, top_p, min_p,
        repetition_penalty, seed, num_samples (answers to each prompt; a list of them where there
        was one), prompt_cache (for chats), draft and report: see `generate_tokens`. All others
        (tools, enable_thinking, special_tokens, ...) go to the processor, most of them as fields of
        the chat template.

    Raises:
      ValueError: an empty stop string, images for a text model, a setting or field that nobody
        reads, or what `generate_tokens` raises.
    """
    if stream and return_logprobs:
        raise ValueError("a stream has no log-probabilities; leave out stream or return_logprobs")
    fields = {name: value for name, value in settings.items() if name not in _PASSED_ON}
    _check_fields(processor, messages_or_texts, fields)
    goes_on = {} if "add_generation_prompt" in fields else {"continue_final_message": True}
    inputs = processor(messages_or_texts, images, **(goes_on | fields))
    settings = {name: settings[name] for name in settings if name in _PASSED_ON}
    answers = Answers(model, processor, inputs, reasoning, stop, stop_ids, settings)
    is_one, are_several = _is_one(messages_or_texts), settings.get("num_samples") is not None
    if stream:
        pieces = answers.stream()
        return (piece for _, piece in pieces) if is_one and not are_several else pieces
    texts = answers.whole(return_logprobs)
    if are_several:
        n = answers.num_samples
        texts = [texts[start : start + n] for start in range(0, len(texts), n)]
    return texts[0] if is_one else texts


class Answers:
    """The texts that a model says after some prompts.

    Args:
      inputs: of the model, that the processor made. The others are those of `generate`.
    """

    def __init__(
        self,
        model: nnx.Module,
        processor: Any,
        inputs: Mapping[str, Any],
        reasoning: bool,
        stop: str | Iterable | None,
        stop_ids: Number | Iterable[Number] | None,
        settings: Mapping[str, Any],
    ):
        tokenizer, self._stop = processor.tokenizer, _stop_strings(stop)
        ids = tokenizer.stop_ids if stop_ids is None else read_ids("stop_ids", stop_ids)
        settings = {"max_new_tokens": 256, **settings}
        ids = (*ids, *tokenizer.stop_ids_of(self._stop))  # no text shows these
        media = {name: x for name, x in inputs.items() if name not in ("tokens", "mask")}
        prompts = dict(tokens=inputs["tokens"], mask=inputs["mask"], media=media or None)
        self._decoding = decoding = Decoding(model, **prompts, stop_ids=ids, **settings)
        self.num_samples = decoding.num_samples
        keep, opened = (TAGS, _opened(processor, inputs)) if reasoning else ((), [])
        self._opened = [opens for opens in opened for _ in range(decoding.num_samples)]
        rows = range(decoding.num_rows)
        self._rows = [Row(tokenizer, decoding.stop_ids, self._stop, keep) for _ in rows]

    def whole(self, return_logprobs: bool) -> list[Any]:
        """One text for each row, whole, in the forms that `generate` gives."""
        decoding, rows = self._decoding, self._rows
        texts = [""] * len(rows)
        while not decoding.is_done:
            block_BT = decoding.advance(_CHUNK if self._stop else decoding.max_new_tokens).tolist()
            texts = [t + row.push(ids) for t, row, ids in zip(texts, rows, block_BT, strict=True)]
            decoding.end([row.is_done for row in rows])
        decoding.close()
        answers: list[Any] = [text + row.close() for text, row in zip(texts, rows, strict=True)]
        if self._opened:
            answers = list(map(split_thoughts, answers, self._opened))
        if return_logprobs:
            answers = list(map(_scored, answers, rows, decoding.tokens_BT, decoding.logprobs_BT))
        return answers

    def stream(self) -> Iterator[tuple[int, str | Reply]]:
        """Pieces of the texts with the numbers of their rows, none of them empty."""
        decoding, rows, is_done = self._decoding, self._rows, False
        splitters = list(map(ThoughtSplitter, self._opened)) or [None] * len(rows)
        try:
            while not is_done:
                block_BT = decoding.advance(_CHUNK).tolist()
                is_done, parts = decoding.is_done, zip(rows, splitters, block_BT, strict=True)
                for number, (row, splitter, ids) in enumerate(parts):
                    if row.is_done:
                        continue
                    text = row.push(ids) + (row.close() if is_done else "")
                    yield from ((number, piece) for piece in _pieces(text, row.is_done, splitter))
                decoding.end([row.is_done for row in rows])
                is_done |= decoding.is_done
        finally:
            decoding.close()


class Row:
    """The text of one row as its tokens arrive, up to what ends it.

    Args:
      stop_ids, stop: ids and strings that end it. keep: special tokens that the text shows.

    Attributes:
      num_tokens: that were taken, with the one that ended it. is_done: whether it has ended.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Iterable[int], stop: tuple[str, ...], keep: tuple[str, ...]
    ):
        # text that stop strings are looked for in, with those special tokens that are part of one
        self._hidden = [x for x in tokenizer.special_texts if x not in keep and _is_in(x, stop)]
        self._decoder = tokenizer.stream(keep=(*keep, *self._hidden))
        self._stop_ids, self._stop = frozenset(stop_ids), stop
        self._held, self.num_tokens, self.is_done = "", 0, False

    def push(self, ids: Iterable[int]) -> str:
        """Takes tokens and returns the text that they make certain."""
        text = ""
        for token in ids:
            if self.is_done:
                break
            self.num_tokens += 1
            text += self.close() if token in self._stop_ids else self._take(token)
        return text

    def close(self) -> str:
        """Ends the text, if it has not ended, and returns what was held back."""
        if self.is_done:
            return ""
        self.is_done = True
        return self._shown(_cut(self._held + self._decoder.flush(), self._stop))

    def _take(self, token: int) -> str:
        text = self._held + self._decoder.push(token)
        cut = _cut(text, self._stop)
        if cut != text:
            self.is_done = True
            return self._shown(cut)
        safe = len(text) - overlap(text, self._stop)
        self._held = text[safe:]
        return self._shown(text[:safe])

    def _shown(self, text: str) -> str:
        for special in self._hidden:
            text = text.replace(special, "")
        return text


def _pieces(
    text: str, is_last: bool, splitter: ThoughtSplitter | None
) -> Iterator[str] | Iterator[Reply]:
    """A piece of text as it is, or in those of its thoughts and of its answer."""
    if splitter is None:
        yield from filter(None, [text])
        return
    for reply in (splitter.push(text), *([splitter.flush()] if is_last else [])):
        yield from parts_of(reply)


def _scored(text: str | Reply, row: Row, tokens_T: Any, logprobs_T: Any) -> Scored:
    return Scored(text, *(np.asarray(x)[: row.num_tokens] for x in (tokens_T, logprobs_T)))


def _is_in(text: str, stop: tuple[str, ...]) -> bool:
    """Whether a stop string is longer than this text and holds it."""
    return any(text in string and text != string for string in stop)


def _check_fields(processor: Any, messages_or_texts: Any, fields: Iterable[str]) -> None:
    """Refuses what is no field of the template, but a setting by another name or misspelt."""
    for name in fields:
        if name in OTHER_NAMES or difflib.get_close_matches(name, _KNOWN, cutoff=0.8):
            is_text = isinstance(messages_or_texts, str) or isinstance(messages_or_texts[0], str)
            if is_text or name not in processor.chat.fields:
                raise ValueError(unknown(name, _KNOWN))


def _is_one(messages_or_texts: Any) -> bool:
    """A text, or a conversation; not a list of them."""
    return isinstance(messages_or_texts, str) or isinstance(messages_or_texts[0], Mapping)


def _opened(processor: Any, inputs: Mapping[str, Any]) -> list[bool]:
    """Which prompts end with an opening tag."""
    rows = [row[real][-_TAIL:] for row, real in zip(inputs["tokens"], inputs["mask"], strict=True)]
    return [opens_thought(processor.tokenizer.decode(row, skip_special=False)) for row in rows]


def _stop_strings(stop: str | Iterable | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for string in strings:
        if not isinstance(string, str):
            raise ValueError(f"stop holds {string!r}, which is no string; give ids as stop_ids")
    if "" in strings:
        raise ValueError("stop holds an empty string, which would end every answer; leave it out")
    return strings


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first, as if read token by token."""
    places = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
    return text[: min(places)[1]] if places else text
