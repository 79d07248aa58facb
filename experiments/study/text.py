"""Texts that are on every machine, as tokens: Python's manual and modules, a dictionary of 1911.

The last tenth of each is held out, and evaluated on the same windows whatever the seed.
"""

import json
import pathlib
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Sequence

import numpy as np

from configs.data.shipped import DATA

Batch = dict[str, np.ndarray]


def read_texts(encode: Callable[[str], Sequence[int]] | None) -> dict[str, np.ndarray]:
    """The tokens of both texts, "A" and "B"; without a tokenizer, their bytes."""
    encode = encode or (lambda text: list(text.encode()))
    entries = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    dictionary = "\n\n".join(entry["messages"][-1]["content"] for entry in entries)
    manual = "\n\n".join(pydoc_data.topics.topics.values())
    return {"A": np.array(encode(manual)), "B": np.array(encode(dictionary))}


def read_modules(least: int) -> np.ndarray:
    """The bytes of the modules of Python's standard library that have at least so many each.

    Code says its names again thousands of bytes later, which a long context can see.
    """
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for text in (file.read_bytes() for file in files) if len(text) >= least]
    return np.frombuffer(b"".join(texts), np.uint8).astype(int)


def draw_batch(tokens: np.ndarray, rows: int, length: int, rng: np.random.Generator) -> Batch:
    """Windows from the first nine tenths."""
    starts = rng.integers(0, len(tokens) * 9 // 10 - length - 1, rows)
    return _windows(tokens, starts, length)


def held_out(tokens: np.ndarray, rows: int, length: int) -> Batch:
    """Windows over the last tenth, evenly spaced."""
    starts = np.linspace(len(tokens) * 9 // 10, len(tokens) - length - 1, rows).astype(int)
    return _windows(tokens, starts, length)


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)
    ones = np.ones((len(starts), length), np.float32)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": ones}
