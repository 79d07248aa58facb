"""What the tests of data share: files of documents, a tokenizer of bytes, and how to read batches
back."""

import json
import pathlib
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

EOS = 0


def encode(text: str) -> list[int]:
    """Ids are bytes."""
    return list(text.encode())


def encode_chat(
    messages: Sequence[dict], fields: Mapping | None = None
) -> tuple[list[int], list[bool]]:
    """A byte for the role, the content, a newline; the assistant says its content and newline."""
    ids: list[int] = []
    marks: list[bool] = []
    for message in messages:
        said = [*message["content"].encode(), 10]
        ids += [1 + ("system", "user", "assistant").index(message["role"]), *said]
        marks += [False] + [message["role"] == "assistant"] * len(said)
    return ids, marks


def chat(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write_lines(path: pathlib.Path, records: Iterable[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_texts(path: pathlib.Path, count: int, mark: str, seed: int = 0, longest: int = 40) -> str:
    """`count` documents that all differ and begin with `mark`."""
    rng = random.Random(f"{seed}{mark}")
    return write_lines(
        path,
        [{"text": f"{mark}{i}:" + "x" * rng.randrange(longest)} for i in range(count)],
    )


def segments(batches: Iterable[dict]) -> list[tuple[int, list[int], list[int], list[float]]]:
    """(document, tokens, targets, loss mask) of every segment, row by row."""
    found = []
    for batch in batches:
        for b, ids in enumerate(batch["segment_ids"]):
            for segment in range(1, ids.max(initial=0) + 1):
                (at,) = np.nonzero(ids == segment)
                assert (np.diff(at) == 1).all()
                np.testing.assert_array_equal(batch["positions"][b, at], np.arange(len(at)))
                parts = (batch[key][b, at].tolist() for key in ("tokens", "targets", "loss_mask"))
                found.append((int(batch["doc_ids"][b, segment - 1]), *parts))
    return found


def texts(batches: Iterable[dict]) -> list[str]:
    """The text of each segment: its first token and its targets, without the end."""
    found = []
    for _, tokens, targets, _ in segments(batches):
        assert tokens[1:] == targets[:-1]
        ids = [tokens[0], *targets]
        found.append(bytes(i for i in ids if i != EOS).decode())
    return found


def same(left: dict, right: dict) -> bool:
    """Whether two batches are equal bit by bit."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and np.array_equal(left[key], right[key])
        for key in left
    )
