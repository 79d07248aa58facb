"""Generation from text to text: a processor before and after the engine, stop strings, streaming.

The one thing a reader would get wrong: a stop string may span tokens, so text is held back while
its end could still become one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from llmprep_jax.generate.engine import generate_tokens, stream_tokens


def generate(
    model: nnx.Module,
    processor: Any,
    messages_or_texts: Any,
    images: Any = None,
    *,
    stream: bool = False,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    seed: int = 0,
    **sampling: Any,
) -> str | list[str] | Iterator[str]:
    """The model's answer to a text or a conversation, or a list of answers to a list of them.

    Args:
      processor: of the model; makes the tokens and decodes them.
      stream: return an iterator of pieces of text instead (one prompt only).
      stop: strings that end an answer, or one; they are cut off. stop_ids: ids that do; None: the
        tokenizer's.
      sampling: see `generate_tokens`.

    Raises:
      ValueError: an empty stop string, images for a text model, a stream of several prompts, or
        what `generate_tokens` raises.
    """
    stop = _stop_strings(stop)
    inputs = processor(messages_or_texts, images)
    stop_ids = processor.tokenizer.stop_ids if stop_ids is None else stop_ids
    settings = dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed, **sampling)
    if stream:
        if len(inputs["tokens"]) != 1:
            raise ValueError(f"a stream is of one prompt; got {len(inputs['tokens'])}")
        return _stream(model, processor, inputs, stop, stop_ids, settings)
    tokens_BT = np.asarray(generate_tokens(model, **inputs, **settings))
    texts = [_cut(processor.decode(_until(row, stop_ids)), stop) for row in tokens_BT]
    return texts[0] if _is_one(messages_or_texts) else texts


def _is_one(messages_or_texts: Any) -> bool:
    """A text, or a conversation; not a list of them."""
    return isinstance(messages_or_texts, str) or isinstance(messages_or_texts[0], dict)


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
    model: nnx.Module, processor: Any, inputs: dict, stop: tuple[str, ...], stop_ids, settings: dict
) -> Iterator[str]:
    decoder, held = processor.tokenizer.stream(), ""
    for block in stream_tokens(model, **inputs, **settings):
        row = _until(block[0], stop_ids)
        held += "".join(decoder.push(token) for token in row.tolist())
        cut = _cut(held, stop)
        if cut != held:
            yield cut
            return
        safe = len(held) - _overlap(held, stop)
        if safe:
            yield held[:safe]
            held = held[safe:]
    rest = _cut(held + decoder.flush(), stop)
    if rest:
        yield rest


def _overlap(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = 0
    for each in stop:
        for size in range(1, len(each)):
            if text.endswith(each[:size]):
                longest = max(longest, size)
    return longest
