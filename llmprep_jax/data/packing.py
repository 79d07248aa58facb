"""Packing: pieces of documents into rows, and rows into batches; exactly resumable.

"packed" fits whole pieces together (best fit, longest first, over a window of rows), "padded" puts
one piece in a row, "stream" lays documents end to end and cuts every T pairs, so that no row but
the last has padding. In all of them documents do not see each other: segment ids and positions
start anew, and no pair crosses a border. An iterator's state holds no tokens: it is the place where
the window (or the document) began and how far it was used, and `set_state` reads that window again.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from llmprep_jax.data.encoding import COUNTS, MARKS, Encoded, Piece
from llmprep_jax.data.images import ImageReader, Run

# what `Batches.report` tells of the batches given out, in this order
YIELDED = ("documents", "tokens", "targets")
Row = list[Piece]
Check = Callable[[Sequence[int]], None]  # of an epoch's marks, by MARKS


def fit_together(pieces: Sequence[Piece], seq_len: int, max_images: int | None = None) -> list[Row]:
    """Packs pieces into few rows of at most seq_len pairs: longest first, each where it fits best.

    Pieces in a row, and rows by their first piece, are in the order given.

    Args:
      max_images: pictures of a row, where pieces have any.
    """
    pictures: list[int] = []  # of each row
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for i in sorted(range(len(pieces)), key=lambda i: (-len(pieces[i]), i)):
        size = len(pieces[i])
        at, seen = bisect.bisect_left(spaces, (size, -1)), pieces[i].pictures
        while seen and at < len(spaces) and pictures[spaces[at][1]] + seen > max_images:
            at += 1
        space, row = spaces.pop(at) if at < len(spaces) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
            pictures.append(0)
        rows[row].append(i)
        pictures[row] += seen
        if space > size:
            bisect.insort(spaces, (space - size, row))
    return [[pieces[i] for i in sorted(row)] for row in sorted(rows, key=min)]


class Packed(grain.IterDataset):
    """Rows of packed or padded documents.

    Args:
      parent: of `Encoded` documents.
      seq_len: T.
      epoch: documents of an epoch, of which one at least must have a target.
      check: of the marks of its first epoch.
      window: rows that are packed together; 0: every piece has its own row.
      seed: of the order of rows within a window; None: in order of their documents.
      max_images: pictures of a row; None: there are none.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        seq_len: int,
        epoch: int,
        check: Check,
        *,
        window: int,
        seed: int | None = None,
        max_images: int | None = None,
    ):
        super().__init__(parent)
        self._of_rows, self._of_windows = (seq_len, epoch, check), (window, seed, max_images)
        self.iterator: _PackedIterator | None = None

    def __iter__(self) -> grain.DatasetIterator:
        parent = self._parent.__iter__()
        self.iterator = _PackedIterator(parent, *self._of_rows, *self._of_windows)
        return self.iterator


class Stream(grain.IterDataset):
    """Rows cut from documents laid end to end.

    Args:
      parent: of `Encoded` documents.
      seq_len: T.
      epoch: documents of an epoch, of which one at least must have a target.
      check: of the marks of its first epoch.
    """

    def __init__(self, parent: grain.IterDataset, seq_len: int, epoch: int, check: Check):
        super().__init__(parent)
        self._of_rows = seq_len, epoch, check
        self.iterator: _StreamIterator | None = None

    def __iter__(self) -> grain.DatasetIterator:
        self.iterator = _StreamIterator(self._parent.__iter__(), *self._of_rows)
        return self.iterator


class _RowIterator(grain.DatasetIterator):
    """What both have: reading documents and adding up their counts."""

    def __init__(self, parent: grain.DatasetIterator, seq_len: int, epoch: int, check: Check):
        super().__init__(parent)
        self._seq_len, self._epoch, self._check, self._barren = seq_len, epoch, check, 0
        self._start = parent.get_state()  # where what is in use was begun to be read
        # counts, marks and lost images at _start, and now
        self._before = self._seen = read_seen(())
        self._num_rows = 0
        self._yielded = (0,) * len(YIELDED)

    def _yield(self, row: Row) -> Row:
        """A row that is given out, counted."""
        self._num_rows += 1
        documents, tokens, targets = self._yielded
        self._yielded = (
            documents + sum(piece.is_first for piece in row),
            tokens + sum(map(len, row)),
            targets + sum(piece.num_targets for piece in row),
        )
        return row

    def _read(self) -> Encoded:
        encoded = next(self._parent)
        more = (*encoded.counts, *encoded.marks, encoded.images_lost)
        self._seen = tuple(map(sum, zip(self._seen, more, strict=True)))
        if self._seen[0] == self._epoch:
            self._check(self._seen[len(COUNTS) : -1])
        self._barren = 0 if encoded.pieces else self._barren + 1
        if self._barren == self._epoch:  # an infinite repeat would look for ever
            counts = dict(zip(COUNTS, self._seen, strict=False))
            raise ValueError(
                f"not one of {self._epoch} documents has a token to learn ({counts['dropped']} "
                f"dropped as too long, {counts['empty']} without a target); "
                "check the data, data.mask, data.overlong and data.seq_len"
            )
        return encoded

    def get_state(self) -> dict[str, Any]:
        return {
            "documents": self._start,
            "before": list(self._before),
            "seen": list(self._seen),
            "rows": self._num_rows,
            "yielded": list(self._yielded),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._start = state["documents"]
        self._parent.set_state(self._start)
        self._before, self._seen = (read_seen(state[name]) for name in ("before", "seen"))
        self._num_rows = state["rows"]
        self._yielded = tuple(state.get("yielded", (0,) * len(YIELDED)))


def read_seen(counts: Sequence[int]) -> tuple[int, ...]:
    """Counts, marks and lost images of a state; an older run's lacks the last, or marks too, which
    are then such as are not refused."""
    unknown = [int(mark == "some") for mark in MARKS] if len(counts) == len(COUNTS) else []
    counts = (*counts, *unknown)
    return (*counts, *[0] * (len(COUNTS) + len(MARKS) + 1 - len(counts)))


class _PackedIterator(_RowIterator):
    def __init__(
        self,
        parent: grain.DatasetIterator,
        seq_len: int,
        epoch: int,
        check: Check,
        window: int,
        seed: int | None,
        max_images: int | None,
    ):
        super().__init__(parent, seq_len, epoch, check)
        self._window, self._seed, self._max_images = window, seed, max_images
        self._rows: list[Row] | None = None  # of the window; None: not read yet
        self._number = self._row = 0  # of the window, and of the next row in it

    def __next__(self) -> Row:
        if self._rows is None:
            self._seen = self._before  # after set_state they tell of the window that is read again
            self._rows = self._read_window()
        while self._row >= len(self._rows):
            self._start, self._before = self._parent.get_state(), self._seen
            self._number, self._row, self._rows = self._number + 1, 0, None
            self._rows = self._read_window()
        self._row += 1
        return self._yield(self._rows[self._row - 1])

    def _read_window(self) -> list[Row]:
        pieces: list[Piece] = []
        room = max(1, self._window * self._seq_len)
        while room > 0:
            try:
                encoded = self._read()
            except StopIteration:
                if not pieces:
                    raise
                break
            pieces += encoded.pieces
            room -= sum(map(len, encoded.pieces))
        if not self._window:
            return [[piece] for piece in pieces]
        rows = fit_together(pieces, self._seq_len, self._max_images)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self._number]).permutation(len(rows))
            rows = [rows[i] for i in order]
        return rows

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"window": self._number, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._number, self._row, self._rows = state["window"], state["row"], None


class _StreamIterator(_RowIterator):
    def __init__(self, parent: grain.DatasetIterator, seq_len: int, epoch: int, check: Check):
        super().__init__(parent, seq_len, epoch, check)
        self._rest: Piece | None = None  # what is left of the document in use
        self._used = 0  # pairs of that document in earlier rows

    def __next__(self) -> Row:
        row, space = [], self._seq_len
        while space:
            if self._rest is None and not self._open_document():
                break
            row.append(self._rest[:space])
            self._rest = self._rest[space:]
            self._used += len(row[-1])
            space -= len(row[-1])
            if not len(self._rest):
                self._rest, self._used = None, 0
                self._start, self._before = self._parent.get_state(), self._seen
        if not row:
            raise StopIteration
        return self._yield(row)

    def _open_document(self) -> bool:
        """Takes up the next document that has pairs; False at the end of the data."""
        while True:
            self._start, self._before = self._parent.get_state(), self._seen
            try:
                encoded = self._read()
            except StopIteration:
                return False
            if encoded.pieces:
                (self._rest,) = encoded.pieces
                return True

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._rest, self._used = None, 0
        if state["used"]:
            self._seen = self._before
            self._open_document()
            self._rest, self._used = self._rest[state["used"] :], state["used"]


def make_batch(
    rows: Sequence[Row],
    num_rows: int,
    seq_len: int,
    pad_id: int = 0,
    own: Sequence[int] | None = None,
    images: ImageReader | None = None,
) -> dict[str, np.ndarray]:
    """Rows as arrays; rows that lack are padding.

    Args:
      num_rows: of the whole batch.
      own: numbers of those that become arrays, on this process; None: all.
      images: decodes those of these rows; None: there are none.

    Returns:
      tokens, targets, positions, segment_ids int32 and loss_mask float32, [B, T] of `own`; doc_ids
      int64 [B, M] of all rows, so that any process can name them; -1 where a row has fewer than M
      segments. Of images what `ImageReader.decode` gives.
    """
    own = range(num_rows) if own is None else own
    shape = (len(own), seq_len)
    tokens_BT, targets_BT = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    positions_BT, segments_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask_BT = np.zeros(shape, np.float32)
    ids_BM = np.full((num_rows, max([1, *map(len, rows)])), -1, np.int64)
    for number, row in enumerate(rows):
        ids_BM[number, : len(row)] = [piece.doc_id for piece in row]
    for b, number in enumerate(own):
        at = 0
        for m, piece in enumerate(rows[number] if number < len(rows) else ()):
            part = (b, slice(at, at + len(piece)))
            tokens_BT[part], targets_BT[part] = piece.tokens, piece.targets
            positions_BT[part], segments_BT[part] = np.arange(len(piece)), m + 1
            mask_BT[part] = piece.counts
            at += len(piece)
    seen = [rows[number] if number < len(rows) else () for number in own]
    pictures = {} if images is None else images.decode([_runs_of(row) for row in seen])
    return {
        "tokens": tokens_BT,
        "targets": targets_BT,
        "loss_mask": mask_BT,
        "positions": positions_BT,
        "segment_ids": segments_BT,
        "doc_ids": ids_BM,
        **pictures,
    }


def _runs_of(row: Sequence[Piece]) -> list[Run]:
    return [run for piece in row for run in piece.runs]
