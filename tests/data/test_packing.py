"""Packing: few rows, no document torn or lost, and batches as literal arrays."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from llmprep_jax.data.encoding import Piece
from llmprep_jax.data.packing import fit_together, make_batch


def piece(doc_id, size, start=10):
    ids = np.arange(start, start + size + 1, dtype=np.int32)
    return Piece(doc_id, ids[:-1], ids[1:], np.arange(size) > 0)


def sizes(rows):
    return [[len(p) for p in row] for row in rows]


def test_long_pieces_come_first_and_short_ones_fill_what_is_left():
    pieces = [piece(i, size) for i, size in enumerate([3, 5, 8, 2, 5, 3, 6])]
    assert sizes(fit_together(pieces, 8)) == [[3, 5], [8], [2, 6], [5, 3]]
    assert [[p.doc_id for p in row] for row in fit_together(pieces, 8)] == [
        [0, 1],
        [2],
        [3, 6],
        [4, 5],
    ]


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.integers(1, 20).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t))))
)
def test_every_piece_is_in_one_row_and_no_two_rows_would_fit_in_one(case):
    seq_len, lengths = case
    rows = fit_together([piece(i, size) for i, size in enumerate(lengths)], seq_len)
    assert sorted(p.doc_id for row in rows for p in row) == list(range(len(lengths)))
    filled = sorted(sum(map(len, row)) for row in rows)
    assert all(size <= seq_len for size in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > seq_len
    assert [row[0].doc_id for row in rows] == sorted(row[0].doc_id for row in rows)


def test_a_batch_is_what_the_model_reads():
    rows = [[piece(4, 2), piece(9, 3, start=50)], [piece(1, 6)]]
    batch = make_batch(rows, num_rows=3, seq_len=6, pad_id=99)
    expected = {
        "tokens": [[10, 11, 50, 51, 52, 99], [10, 11, 12, 13, 14, 15], [99] * 6],
        "targets": [[11, 12, 51, 52, 53, 99], [11, 12, 13, 14, 15, 16], [99] * 6],
        "loss_mask": [[0, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0] * 6],
        "positions": [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0] * 6],
        "segment_ids": [[1, 1, 2, 2, 2, 0], [1] * 6, [0] * 6],
        "doc_ids": [[4, 9], [1, -1], [-1, -1]],
    }
    assert {key: array.tolist() for key, array in batch.items()} == expected
    kinds = {key: str(array.dtype) for key, array in batch.items()}
    assert kinds == dict.fromkeys(expected, "int32") | {"loss_mask": "float32", "doc_ids": "int64"}


def test_a_batch_without_rows_is_padding():
    batch = make_batch([], num_rows=2, seq_len=3)
    assert batch["doc_ids"].tolist() == [[-1], [-1]]
    assert not any(batch[key].any() for key in ("tokens", "targets", "loss_mask", "segment_ids"))
