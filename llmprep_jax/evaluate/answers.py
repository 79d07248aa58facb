"""What a model answers to questions about pictures, a batch at a time, by greedy decoding."""

from collections.abc import Iterator, Sequence
from typing import Any

import rich.console
import rich.progress
from flax import nnx

from llmprep_jax.evaluate.questions import Question
from llmprep_jax.generate.text import generate


def answer(
    model: nnx.Module,
    processor: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    blind: bool = False,
    console: rich.console.Console | None = None,
) -> list[str]:
    """One text a question, in order.

    Args:
      batch_size: questions at a time; the last batch is filled up, so that one program serves all.
      blind: without the pictures.
      console: where progress is shown; None: nowhere.

    Raises:
      ValueError: what `generate` refuses, with the names of the first and last question.
    """
    texts: list[str] = []
    for batch in shown(batches(questions, batch_size), len(questions), "asking", console):
        messages = [q.blind() if blind else q.messages for q in batch]
        images = [[ref.content() for ref in q.images] or None for q in batch]
        images = None if blind or not any(images) else images
        try:
            said = generate(model, processor, messages, images, max_new_tokens=max_new_tokens)
        except ValueError as error:
            raise ValueError(f"{batch[0].name} to {batch[-1].name}: {error}") from error
        texts += said
    return texts[: len(questions)]


def batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, or of all where they are fewer, the last filled up with its last."""
    size = min(size, len(items))
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + [batch[-1]] * (size - len(batch))


def shown(
    batches: Iterator[list[Any]], total: int, word: str, console: rich.console.Console | None
) -> Iterator[list[Any]]:
    """Batches, with a bar of how many items are done on the console."""
    if console is None:
        yield from batches
        return
    columns = [*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()]
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(word, total=total)
        for batch in batches:
            yield batch
            progress.advance(bar, len(batch))
