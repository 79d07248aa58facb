"""Resume: from any batch, in another process or the same, the stream goes on bit for bit."""

import itertools
import json
import random

import pytest

from llmprep_jax.data import DataConfig, build, evaluation_batches
from tests.data.corpora import EOS, chat, encode, encode_chat, same, write_lines, write_texts

CASES = {
    "packed": {},
    "padded": {"packing": "padded"},
    "stream": {"packing": "stream"},
    "mixed": {"weights": (3.0, 1.0)},
    "mixed stream": {"weights": (1.0, 2.0), "packing": "stream"},
    "in order": {"shuffle": False, "pack_window": 1},
    "threads": {"threads": 3, "prefetch": 3},
    "no prefetch": {"prefetch": 0},
    "dropping": {"overlong": "drop", "pack_window": 2},
    "held out": {"holdout": 0.3, "weights": (1.0, 1.0)},
}


@pytest.fixture
def paths(tmp_path):
    talk = [chat("why " * (i % 5), "so" * (i % 17)) for i in range(13)]
    return (
        write_texts(tmp_path / "a.jsonl", 17, "a"),
        write_lines(tmp_path / "b.jsonl", talk),
    )


def batches(cfg, **arguments):
    return build(cfg, encode, encode_chat, eos_id=EOS, **arguments)


@pytest.mark.parametrize("num_stops", [1, pytest.param(5, marks=pytest.mark.grid)])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_a_stream_goes_on_as_if_it_had_not_stopped(paths, fields, num_stops):
    defaults = {"seq_len": 24, "batch_size": 3, "pack_window": 4, "num_epochs": 4}
    cfg = DataConfig(paths=paths, **(defaults | fields))
    whole, states, reports = [], [], []
    stream = batches(cfg)
    states.append(json.dumps(stream.get_state()))
    for batch in stream:
        whole.append(batch)
        states.append(json.dumps(stream.get_state()))
        reports.append(stream.report())
    assert len(whole) > 12
    stops = random.Random(str(fields)).sample(range(1, len(whole)), num_stops)
    for stop in (0, *stops, len(whole)):
        resumed = batches(cfg)
        resumed.set_state(json.loads(states[stop]))
        assert json.dumps(resumed.get_state()) == states[stop]
        rest = list(resumed)
        assert len(rest) == len(whole) - stop
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))
        assert resumed.report() == stream.report()


def test_states_taken_after_a_resume_are_those_of_the_whole_run(paths):
    cfg = DataConfig(paths=paths, seq_len=24, batch_size=2, pack_window=3)
    stream, states, whole = batches(cfg), [], []
    for batch in itertools.islice(stream, 80):
        whole.append(batch)
        states.append(stream.get_state())
    at = 7
    for step in (20, 1, 31, 14):  # killed again and again, each time between two checkpoints
        resumed = batches(cfg)
        resumed.set_state(states[at])
        for batch in itertools.islice(resumed, step):
            at += 1
            assert same(batch, whole[at])
            assert resumed.get_state() == states[at]
        resumed.close()


def test_an_iterator_goes_back_and_forth(paths):
    stream = batches(DataConfig(paths=paths, seq_len=24, batch_size=2, num_epochs=1))
    start = stream.get_state()
    first = list(stream)
    end = stream.get_state()
    stream.set_state(start)
    assert all(same(a, b) for a, b in zip(stream, first, strict=True))
    stream.set_state(end)
    assert list(stream) == []


def test_an_evaluation_can_be_resumed_too(paths):
    cfg = DataConfig(paths=paths, seq_len=24, batch_size=4)
    passes = evaluation_batches(cfg, encode, encode_chat, eos_id=EOS, split="all")
    whole = list(passes)
    half = iter(passes)
    for _ in range(3):
        next(half)
    resumed = iter(passes)
    resumed.set_state(half.get_state())
    assert all(same(a, b) for a, b in zip(resumed, whole[3:], strict=True))


def test_a_folder_may_move(paths, tmp_path):
    cfg = DataConfig(paths=paths[:1], seq_len=24, batch_size=2)
    stream = batches(cfg)
    next(stream)
    state = stream.get_state()
    (tmp_path / "new").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "new" / "a.jsonl")
    moved = batches(DataConfig(paths=(f"{tmp_path}/new",), seq_len=24, batch_size=2))
    moved.set_state(state)
    again = batches(DataConfig(paths=(f"{tmp_path}/new",), seq_len=24, batch_size=2))
    next(again)
    assert same(next(moved), next(again))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seq_len": 32}, "(seq_len was 24 and is 32)"),
        ({"seed": 1, "packing": "stream"}, "(packing was packed and is stream, seed was 0 and"),
        ({"holdout": 0.5}, "holdout was 0.0 and is 0.5"),
    ],
)
def test_a_place_in_other_data_is_refused(paths, fields, words):
    defaults = {"paths": paths, "seq_len": 24, "batch_size": 2}
    state = batches(DataConfig(**defaults)).get_state()
    other = batches(DataConfig(**(defaults | fields)))
    with pytest.raises(ValueError, match=r"^the saved place is in other data \([^\n]*$") as error:
        other.set_state(state)
    assert words in str(error.value)


@pytest.mark.parametrize("state", [None, 3, {}, {"of": {}}, "{}"])
def test_what_is_no_state_is_refused(paths, state):
    stream = batches(DataConfig(paths=paths, seq_len=24, batch_size=2))
    with pytest.raises(
        ValueError, match=r"^this is no state of a data iterator; give what get_state"
    ):
        stream.set_state(state)
