"""What is trained on and what is held out: the documents of a run on either side.

Of a text whose end is held out, the first part does not end (there is no EOS after it) and the last
does not begin (there is no BOS before it).
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from llmprep_jax.data.config import DataConfig
from llmprep_jax.data.documents import Document, Source, digest
from llmprep_jax.data.sources import open_source

Split = Literal["train", "heldout", "all"]

# how long a run that holds nothing out looks for broken documents before it starts
CHECK_SECONDS = 2.0


class Documents:
    """The documents of one or several paths on one side of the split: pairs (id, Document).

    Args:
      sources: in order; ids count through them.
      title: for messages.
      first_id: the id of the first document of the first source.
      keep: which documents, counted from 0, in order; None: all.
      parts: by number of a document, the characters of it that are in.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        title: str,
        first_id: int,
        keep: np.ndarray | None = None,
        parts: Mapping[int, slice] | None = None,
    ):
        self._sources, self.title, self._keep, self._parts = sources, title, keep, parts or {}
        self._starts = np.cumsum([first_id, *map(len, sources)])
        self.ids = range(int(self._starts[0]), int(self._starts[-1]))  # of both sides

    def __len__(self) -> int:
        return len(self.ids) if self._keep is None else len(self._keep)

    def __getitem__(self, index: int) -> tuple[int, Document]:
        number = index if self._keep is None else int(self._keep[index])
        source, at = self._locate(self.ids[number])
        document = source[at]
        if number in self._parts:
            document = _part_of(document, self._parts[number])
        return self.ids[number], document

    def __iter__(self) -> Iterator[tuple[int, Document]]:
        return (self[i] for i in range(len(self)))

    def _locate(self, doc_id: int) -> tuple[Source, int]:
        source = int(np.searchsorted(self._starts, doc_id, side="right")) - 1
        return self._sources[source], int(doc_id - self._starts[source])

    def name(self, doc_id: int) -> str:
        """Where a document of `ids` is: file and line."""
        source, at = self._locate(doc_id)
        return source.name(at)

    def side(self, holdout: float, split: Split) -> "Documents":
        """Those that are in a split; reads as many as it can, so that broken ones are told of now.

        A share that falls on no document holds out the one whose hash is next, and a share that
        falls on all leaves the one whose hash is last. Where a whole text would be more than the
        share, and where there is but one, its end is held out.

        Raises:
          ValueError: there is one conversation, or one text too short to be cut.
        """
        if not holdout or split == "all":
            end = time.monotonic() + CHECK_SECONDS
            for i in range(len(self)):
                self[i]
                if time.monotonic() > end:
                    break
            return self
        digests = np.array([digest(self[i][1]) for i in range(len(self))], np.uint64)
        is_held = digests < np.uint64(int(holdout * 2.0**64))
        distinct = np.unique(digests)
        cut: dict[int, int] = {}
        if not is_held.any():
            is_held = digests == distinct[0]
            cut = self._cuts(is_held, min(1.0, holdout * len(distinct)))
        elif is_held.all():
            is_held = digests != distinct[-1]
        if len(distinct) == 1:
            is_held, cut = np.ones(len(self), bool), self._cuts(digests == distinct[0], holdout)
            if not cut:
                raise ValueError(
                    f"{self.title}: there is one document, and it cannot be parted into what is"
                    " trained on and what is held out; set data.holdout=0, or give more data"
                )
        wanted = is_held if split == "heldout" else ~is_held
        wanted = [i for i in range(len(self)) if wanted[i] or i in cut]
        at = {i: slice(c, None) if split == "heldout" else slice(c) for i, c in cut.items()}
        return Documents(self._sources, self.title, self.ids[0], np.array(wanted, np.int64), at)

    def _cuts(self, chosen: np.ndarray, share: float) -> dict[int, int]:
        """Where the last `share` of each chosen text begins; {} where one is not to be cut."""
        cuts = {}
        for i in np.flatnonzero(chosen).tolist():
            document = self[i][1]
            if document.text is None or document.answer is not None or share >= 1:
                return {}
            cuts[i] = _cut_near(document.text, int(len(document.text) * (1 - share)))
            if not 0 < cuts[i] < len(document.text):
                return {}
        return cuts


def _cut_near(text: str, at: int) -> int:
    """A place at or shortly before `at`, after a line or word if there is one."""
    for mark in ("\n", " "):
        end = text.rfind(mark, max(at - 200, at // 2), at)
        if end >= 0:
            return end + 1
    return at


def _part_of(document: Document, part: slice) -> Document:
    start, end, _ = part.indices(len(document.text))
    return dataclasses.replace(
        document,
        text=document.text[part],
        is_start=document.is_start and start == 0,
        is_end=document.is_end and end == len(document.text),
    )


def open_documents(cfg: DataConfig, split: Split) -> list[Documents]:
    """What is mixed: one entry, or one a path where there are weights."""
    if split == "heldout" and not cfg.holdout:
        raise ValueError(
            "data.holdout is 0, so nothing is held out; set data.holdout=0.05, or split=all"
        )
    sources = [open_source(path, cfg.source, cfg.format) for path in cfg.paths]
    if not cfg.weights:
        return [Documents(sources, ", ".join(cfg.paths), 0).side(cfg.holdout, split)]
    first = np.cumsum([0, *map(len, sources)])
    return [
        Documents([source], path, int(at)).side(cfg.holdout, split)
        for source, path, at in zip(sources, cfg.paths, first, strict=False)
    ]
