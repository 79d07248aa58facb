"""The pipeline's laws: every document once an epoch, shares as weighted, parts that are disjoint,
and errors of one line."""

import collections
import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from llmprep_jax.data import DataConfig, SourceOptions, build, evaluation_batches
from llmprep_jax.data.encoding import COUNTS
from llmprep_jax.data.pipeline import Batches, _find_packs
from tests.data.corpora import (
    EOS,
    chat,
    encode,
    encode_chat,
    same,
    segments,
    texts,
    write_lines,
    write_texts,
)

ALL = ("packed", "padded", "stream")
PADDED_IN_GRID = ("packed", pytest.param("padded", marks=pytest.mark.grid), "stream")


@pytest.fixture
def path(tmp_path):
    return write_texts(tmp_path / "a.jsonl", 50, "a")


def config(*paths, **fields) -> DataConfig:
    defaults = {"seq_len": 16, "batch_size": 4, "pack_window": 3, "num_epochs": 1}
    return DataConfig(paths=paths, **(defaults | fields))


def batches(cfg, **arguments) -> Batches:
    return build(cfg, encode, encode_chat, eos_id=EOS, **arguments)


def contents(path) -> list[str]:
    return [json.loads(line)["text"] for line in open(path)]


def pairs_of_documents(found) -> list[list[tuple[int, int]]]:
    """For each document its pairs (token, target), sorted."""
    pairs = collections.defaultdict(list)
    for doc_id, tokens, targets, mask in found:
        assert mask == [1.0] * len(mask)
        assert tokens[1:] == targets[:-1]
        pairs[doc_id] += zip(tokens, targets, strict=True)
    return sorted(map(sorted, pairs.values()))


@pytest.mark.parametrize("packing", ALL)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pair_of_every_document_is_there_once_an_epoch(path, packing, shuffle):
    found = segments(batches(config(path, packing=packing, shuffle=shuffle)))
    ids = [[*text.encode(), EOS] for text in contents(path)]
    expected = sorted(sorted(itertools.pairwise(row)) for row in ids)
    assert pairs_of_documents(found) == expected


def test_whole_documents_keep_their_text(path):
    for packing in ALL[:2]:
        cfg = config(path, packing=packing, seq_len=64)
        assert sorted(texts(batches(cfg))) == sorted(contents(path))


def test_a_row_of_padded_holds_one_document_and_rows_of_stream_are_full(path):
    for batch in batches(config(path, packing="padded")):
        assert batch["doc_ids"].shape[1] == 1
    rows = np.concatenate([b["segment_ids"] for b in batches(config(path, packing="stream"))])
    pairs = sum(len(text) for text in contents(path))
    assert (rows[: pairs // 16] > 0).all()
    assert (rows > 0).sum() == pairs


def test_packing_leaves_little_padding(path):
    cfg = config(path, seq_len=64, pack_window=64)
    stream = batches(cfg)
    assert len(list(stream)) == 6
    report = stream.report()
    assert report["tokens"] / (64 * report["rows"]) > 0.94


def test_each_epoch_has_its_own_order_and_a_seed_always_the_same(path):
    def order(seed, shuffle=True):
        cfg = config(path, packing="padded", seq_len=64, num_epochs=2, seed=seed, shuffle=shuffle)
        ids = [doc_id for doc_id, *_ in segments(batches(cfg))]
        assert sorted(ids[:50]) == sorted(ids[50:]) == list(range(50))
        return ids

    first = order(0)
    assert first == order(0)
    assert first[:50] != first[50:]
    # Grain adds the epoch to the seed: the second epoch of 0 must not be the first of 1
    assert len({tuple(part) for s in (0, 1) for part in (order(s)[:50], order(s)[50:])}) == 4
    assert order(0, shuffle=False) == [*range(50), *range(50)]


def test_without_a_number_of_epochs_data_do_not_end(path):
    stream = batches(config(path, num_epochs=None))
    for _ in range(100):
        next(stream)
    assert stream.report()["documents"] > 100
    stream.close()
    with pytest.raises(ValueError, match=r"^these batches are closed; build them again$"):
        next(stream)


@pytest.mark.parametrize("packing", PADDED_IN_GRID)
def test_a_mixture_has_the_shares_it_was_given(tmp_path, packing):
    paths = [
        write_texts(tmp_path / f"{m}.jsonl", n, m) for m, n in (("a", 20), ("b", 90), ("c", 7))
    ]
    cfg = config(*paths, weights=(5.0, 2.0, 3.0), packing=packing, num_epochs=None)
    stream = batches(cfg)
    rows = collections.Counter()
    for batch in itertools.islice(stream, 100):
        for ids, segment in zip(batch["doc_ids"], batch["segment_ids"], strict=True):
            marks = {pathlib.Path(stream.name(i)).name[0] for i in ids[ids >= 0]}
            assert len(marks) == 1
            rows[marks.pop()] += 1
            assert segment.any()
    assert {mark: n / 400 for mark, n in rows.items()} == pytest.approx(
        {"a": 0.5, "b": 0.2, "c": 0.3}, abs=0.005
    )
    report = stream.report()
    assert [report["sources"][p]["rows"] for p in paths] == [rows["a"], rows["b"], rows["c"]]
    assert report["rows"] == 400


def test_a_mixture_ends_with_the_first_source_that_was_read_so_often(tmp_path):
    paths = [write_texts(tmp_path / f"{m}.jsonl", n, m) for m, n in (("a", 8), ("b", 100))]
    cfg = config(*paths, weights=(1.0, 1.0), packing="padded", seq_len=64, num_epochs=3)
    marks = [text[0] for text in texts(batches(cfg))]
    assert collections.Counter(marks)["a"] == 24
    assert collections.Counter(marks)["b"] in (24, 25)


def test_paths_without_weights_are_one_set(tmp_path):
    paths = [write_texts(tmp_path / f"{m}.jsonl", n, m) for m, n in (("a", 8), ("b", 30))]
    found = texts(batches(config(*paths, packing="padded", seq_len=64)))
    assert sorted(found) == sorted(contents(paths[0]) + contents(paths[1]))
    assert {text[0] for text in found[:19]} == {"a", "b"}


@pytest.mark.parametrize("packing", PADDED_IN_GRID)
def test_processes_have_their_rows_of_one_order_and_one_place(path, packing):
    cfg = config(path, packing=packing, num_epochs=2)
    alone, parts = batches(cfg), [batches(cfg, rows=rows) for rows in ([0, 2], [1, 3], [1, 3])]
    for whole in alone:
        for part, rows in zip(parts, ([0, 2], [1, 3], [1, 3]), strict=True):
            batch = next(part)
            np.testing.assert_array_equal(batch["tokens"], whole["tokens"][rows])
            np.testing.assert_array_equal(batch["loss_mask"], whole["loss_mask"][rows])
            np.testing.assert_array_equal(batch["doc_ids"], whole["doc_ids"])  # of all rows
            assert part.get_state() == alone.get_state()
    assert all(next(part, None) is None for part in parts)


def test_a_place_that_one_process_saved_before_places_were_one_is_taken_up(path):
    alone = batches(config(path))
    next(alone)
    state = alone.get_state()
    state["of"] |= {"process_index": 0, "process_count": 1}
    again = batches(config(path))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], next(alone)["tokens"])


def test_held_out_documents_are_never_trained_on_and_stay_held_out(tmp_path, path):
    cfg = config(path, packing="padded", seq_len=64, holdout=0.3)
    held = set(texts(evaluation_batches(cfg, encode, eos_id=EOS)))
    trained = set(texts(batches(cfg)))
    assert held | trained == set(contents(path))
    assert not held & trained
    assert 5 < len(held) < 25
    more = write_lines(
        tmp_path / "more.jsonl",
        [{"text": text} for text in [f"new {i}" for i in range(30)] + contents(path)[::-1]],
    )
    again = dataclasses.replace(cfg, paths=(more,), seed=5)
    held_again = set(texts(evaluation_batches(again, encode, eos_id=EOS)))
    assert {text for text in held_again if "new" not in text} == held
    everything = evaluation_batches(cfg, encode, eos_id=EOS, split="all")
    assert sorted(texts(everything)) == sorted(contents(path))


SOME = [("packed", 1), ("padded", 2), ("packed", 4), ("stream", 4)]
REST = [cell for cell in itertools.product(ALL, (1, 2, 4)) if cell not in SOME]


@pytest.mark.parametrize(
    ("packing", "count"),
    [*SOME, *[pytest.param(*cell, marks=pytest.mark.grid) for cell in REST]],
)
def test_evaluation_counts_every_document_once_on_any_number_of_processes(path, packing, count):
    cfg = config(path, packing=packing, num_epochs=None)
    alone = list(evaluation_batches(cfg, encode, eos_id=EOS, split="all"))
    parts = [
        evaluation_batches(cfg, encode, eos_id=EOS, split="all", rows=rows)
        for rows in np.arange(4).reshape(count, -1).tolist()
    ]
    for _ in range(2):  # again and again the same
        for batch, *own in zip(alone, *parts, strict=True):
            together = {key: [b[key] for b in own] for key in batch if key != "doc_ids"}
            for key, arrays in together.items():
                np.testing.assert_array_equal(np.concatenate(arrays), batch[key])
    assert sum(batch["loss_mask"].sum() for batch in alone) == sum(map(len, contents(path)))
    assert parts[0].num_documents == 50
    assert parts[0].report()["documents"] == 50
    assert [i for i, *_ in segments(alone)] != []
    if packing == "stream":
        order = [i for i, *_ in segments(alone)]
        assert order == sorted(order)


def test_the_report_tells_what_was_done_to_documents(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            chat("why", "so"),
            chat("a question beyond the context", "never seen"),
            chat("what is it", "a long answer"),
            {"text": "text of some length, to be split"},
            {"text": ""},
        ],
    )
    found = batches(config(path, shuffle=False, prefetch=0))
    assert [len(list(found))] == [1]
    assert found.report() == {
        "documents": 5,
        "tokens": 8 + 16 + 32,
        "targets": 3 + 4 + 32,
        "split": 1,
        "truncated": 2,
        "lost": 11 + 10,
        "dropped": 0,
        "empty": 2,
        "images_lost": 0,
        "rows": 4,
        "yielded": {"documents": 3, "tokens": 8 + 16 + 32, "targets": 3 + 4 + 32},
    }
    for prefetch in (0, 2):  # documents dropped after the last row count too
        cfg = config(path, overlong="drop", shuffle=False, prefetch=prefetch, batch_size=1)
        dropping = batches(cfg)
        assert len(list(dropping)) == 1
        report = dropping.report()
        assert (report["documents"], report["dropped"], report["empty"]) == (5, 3, 1)


def test_documents_are_named_by_file_and_line(tmp_path):
    paths = [write_texts(tmp_path / f"{m}.jsonl", 3, m) for m in "ab"]
    for weights in (None, (1.0, 1.0)):
        stream = batches(config(*paths, weights=weights))
        names = [f"{path}:{line}" for path in paths for line in (1, 2, 3)]
        assert [stream.name(i) for i in range(6)] == names
        for unknown in (6, -1):
            with pytest.raises(ValueError, match=f"^there is no document {unknown} in these data$"):
                stream.name(unknown)


def test_threads_do_not_change_what_comes_out(path):
    cfg = config(path, num_epochs=2)
    plain = list(batches(dataclasses.replace(cfg, prefetch=0)))
    for threads, prefetch in ((0, 3), (3, 0), (2, 1)):
        threaded = list(batches(dataclasses.replace(cfg, threads=threads, prefetch=prefetch)))
        assert all(same(a, b) for a, b in zip(plain, threaded, strict=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"paths": ()}, "paths must be a list of at least one path, not ()"),
        ({"seq_len": 0}, "seq_len must be at least 1, not 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, not 0"),
        ({"prefetch": -1}, "prefetch must be at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"holdout": 1.0}, "holdout must be in [0, 1), not 1.0"),
        ({"weights": (1.0, 2.0)}, "there are 2 weights for 1 paths; give one each"),
        ({"weights": (0.0,)}, "weights must be positive, not 0.0; leave the path out"),
    ],
)
def test_a_setting_out_of_range_is_refused(fields, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        DataConfig(**({"paths": ("a.jsonl",)} | fields))
    assert str(error.value) == words


def test_one_path_without_a_list_around_it_is_refused():
    cfg = DataConfig(paths=("a.jsonl",))
    object.__setattr__(cfg, "paths", "a.jsonl")  # the constructor's types are checked in tests
    with pytest.raises(ValueError, match=r"paths: wanted a list of a text, not 'a.jsonl'$"):
        cfg.__post_init__()


def test_a_chunk_must_have_a_size():
    with pytest.raises(ValueError, match=r"^chunk_bytes must be at least 16, not 3$"):
        SourceOptions(chunk_bytes=3)


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        (
            {},
            {"split": "heldout"},
            "data.holdout is 0, so nothing is held out; set data.holdout=0.05",
        ),
        (
            {"seq_len": 1, "overlong": "drop"},
            {},
            "not one of 50 documents has a token to learn (50",
        ),
        (
            {"seq_len": 3, "overlong": "error"},
            {},
            "tokens and the context holds 4; raise data.seq_len",
        ),
    ],
)
def test_data_that_cannot_be_had_are_refused_on_one_line(path, fields, arguments, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        next(batches(config(path, num_epochs=None, **fields), **arguments))
    assert words in str(error.value)


def marks_everything(messages, fields):
    ids, _ = encode_chat(messages)
    return ids, [False] + [True] * (len(ids) - 1)  # a BOS is outside of the template's blocks


def marks_nothing(messages, fields):
    ids, _ = encode_chat(messages)
    return ids, [False] * len(ids)


MARKING = {"every token is to be learnt": marks_everything, "there is no token": marks_nothing}
ENDS = {
    "one epoch": lambda cfg, **settings: build(cfg, **settings),
    "without end": lambda cfg, **settings: build(
        dataclasses.replace(cfg, num_epochs=None), **settings
    ),
    "evaluation": lambda cfg, **settings: evaluation_batches(cfg, **settings, split="all"),
}


def unchecked_talks(monkeypatch, tmp_path, more=()) -> str:
    """Conversations of several batches, which there was no time to look at before the run."""
    monkeypatch.setattr("llmprep_jax.data.pipeline.CHECK_SECONDS", -1.0)
    talks = [chat(f"how is {i}", "so " * (i % 4 + 1)) for i in range(40)]
    return write_lines(tmp_path / "talks.jsonl", [*talks, *more])


@pytest.mark.parametrize("make", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("packing", ALL)
@pytest.mark.parametrize("words", MARKING)
def test_masks_empty_or_full_over_all_of_the_data_are_an_error_at_an_epochs_end(
    monkeypatch, tmp_path, words, packing, make
):
    cfg = config(unchecked_talks(monkeypatch, tmp_path), packing=packing)
    settings = {"encode": encode, "encode_chat": MARKING[words], "eos_id": EOS, "template": "a/b"}
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        collections.deque(itertools.islice(make(cfg, **settings), 100), 0)
    assert f"in 40 of 40 conversations, by the chat template of a/b, {words}" in str(error.value)


@pytest.mark.parametrize("packing", ALL)
def test_an_epochs_marks_are_counted_through_a_resume(monkeypatch, tmp_path, packing):
    cfg = config(unchecked_talks(monkeypatch, tmp_path), packing=packing)

    def open_batches():
        return build(cfg, encode, marks_everything, eos_id=EOS, template="a/b")

    first = open_batches()
    next(first)
    state = json.loads(json.dumps(first.get_state()))
    resumed = open_batches()
    resumed.set_state(state)
    with pytest.raises(ValueError, match="in 40 of 40 conversations"):
        list(resumed)

    old = open_batches()  # of a version that counted none
    for pack in _find_packs(state):
        pack |= {name: pack[name][: len(COUNTS)] for name in ("seen", "before")}
    old.set_state(state)
    assert list(old)
    assert old.report()["documents"] == 40


def test_full_masks_among_others_and_where_all_is_asked_for_are_no_error(monkeypatch, tmp_path):
    path = unchecked_talks(monkeypatch, tmp_path)
    assert list(build(config(path, mask="all"), encode, marks_everything, eos_id=EOS))
    assert list(build(config(path), encode, encode_chat, eos_id=EOS))
    mixed = unchecked_talks(monkeypatch, tmp_path, [{"text": "plain"}] * 3)
    with pytest.raises(ValueError, match="in 40 of 40 conversations"):  # of those there are
        list(build(config(mixed), encode, marks_everything, eos_id=EOS))


def test_a_broken_line_is_told_of_before_the_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 30 + "{}\n")
    for holdout in (0.0, 0.1):
        with pytest.raises(ValueError, match=r"a.jsonl:31: a record has 'text' or 'messages'"):
            batches(config(str(path), holdout=holdout))
