"""Generation from text to text: a processor before and after the engine, stop strings, streaming,
thoughts apart from answers.

The one thing a reader would get wrong: a stop string may span tokens, so text is held back while
its end could still become one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from llmprep_jax.generate.engine import generate_tokens, stream_tokens
from llmprep_jax.text.stream import StreamDecoder, overlap
from llmprep_jax.text.thinking import TAGS, Reply, opens_thought, split_stream, split_thoughts

_TAIL = 32  # tokens at the end of a prompt that surely hold an opening tag, one byte a token


def generate(
    model: nnx.Module,
    processor: Any,
    messages_or_texts: Any,
    images: Any = None,
    *,
    stream: bool = False,
    reasoning: bool = False,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    seed: int = 0,
    **sampling: Any,
) -> str | Reply | list[str] | list[Reply] | Iterator[str] | Iterator[Reply]:
    """The model's answer to a text or a conversation, or a list of answers to a list of them.

    Args:
      processor: of the model; makes the tokens and decodes them.
      stream: return an iterator of pieces of text instead (one prompt only).
      reasoning: return a `Reply` (reasoning_content, content) where there were a string, and a
        stream of them: the thoughts between <think> and </think>, and the answer after them. A
        piece of a stream is of one or the other. False: the text as the model says it.
      stop: strings that end an answer, or one, in thoughts too; they are cut off. stop_ids: ids
        that do; None: the tokenizer's.
      sampling: see `generate_tokens`; `draft` and `report` too.

    Raises:
      ValueError: an empty stop string, images for a text model, a stream of several prompts, or
        what `generate_tokens` raises.
    """
    stop = _stop_strings(stop)
    inputs = processor(messages_or_texts, images)
    stop_ids = processor.tokenizer.stop_ids if stop_ids is None else stop_ids
    settings = dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed, **sampling)
    keep = TAGS if reasoning else ()
    opened = _opened(processor, inputs) if reasoning else []
    if stream:
        if len(inputs["tokens"]) != 1:
            raise ValueError(f"a stream is of one prompt; got {len(inputs['tokens'])}")
        pieces = _stream(model, inputs, processor.tokenizer.stream(keep=keep), stop, settings)
        return split_stream(pieces, *opened) if reasoning else pieces
    tokens_BT = np.asarray(generate_tokens(model, **inputs, **settings))
    rows = [_until(row, stop_ids) for row in tokens_BT]
    texts = [_cut(processor.tokenizer.decode(row, keep=keep), stop) for row in rows]
    if reasoning:
        texts = list(map(split_thoughts, texts, opened))
    return texts[0] if _is_one(messages_or_texts) else texts


def _is_one(messages_or_texts: Any) -> bool:
    """A text, or a conversation; not a list of them."""
    return isinstance(messages_or_texts, str) or isinstance(messages_or_texts[0], dict)


def _opened(processor: Any, inputs: dict) -> list[bool]:
    """Which prompts end with an opening tag."""
    rows = [row[real][-_TAIL:] for row, real in zip(inputs["tokens"], inputs["mask"], strict=True)]
    return [opens_thought(processor.tokenizer.decode(row, skip_special=False)) for row in rows]


def _until(row: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(row, list(stop_ids)))
    return row[: ends[0]] if len(ends) else row


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise ValueError("stop holds an empty string, which would end every answer; leave it out")
    return strings


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first, as if read token by token."""
    places = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    return text[: min(places)[1]] if places else text


def _stream(
    model: nnx.Module, inputs: dict, decoder: StreamDecoder, stop: tuple[str, ...], settings: dict
) -> Iterator[str]:
    held = ""
    for block in stream_tokens(model, **inputs, **settings):
        row = _until(block[0], settings["stop_ids"])
        held += "".join(decoder.push(token) for token in row.tolist())
        cut = _cut(held, stop)
        if cut != held:
            yield cut
            return
        safe = len(held) - overlap(held, stop)
        if safe:
            yield held[:safe]
            held = held[safe:]
    rest = _cut(held + decoder.flush(), stop)
    if rest:
        yield rest
