"""The studies run from end to end, at sizes that show nothing."""

import json

import numpy as np
import pytest

import llmprep_jax as lp
from experiments import (
    adapters,
    bench_attention,
    bench_cross_entropy,
    long_context,
    moe_balance,
    mtp,
)
from experiments.long_context_study import positions

pytestmark = pytest.mark.slow  # each compiles several training steps


def test_the_study_of_adapters_writes_a_row_for_each_method(tmp_path):
    sizes = ["steps=2", "base_steps=2", "seeds=1", "methods=LoRA,IA3", f"out={tmp_path}"]
    outputs = adapters.main(sizes)
    rows = json.loads(outputs["numbers"].read_text())["rows"]
    assert [row["method"] for row in rows] == ["LoRA", "IA3", "LoRA"]
    assert outputs["figure"].stat().st_size > 10_000


@pytest.mark.grid  # half a minute
def test_the_study_of_balance_moves_biases_alone_where_it_says_so(tmp_path):
    outputs = moe_balance.main(["steps=3", "seeds=1", f"out={tmp_path}"])
    results = json.loads(outputs["numbers"].read_text())["results"]
    assert list(results) == ["nothing", "a loss", "biases"]
    # one model and one batch at first, then three ways
    first, last = ([result["by_step"][0][i] for result in results.values()] for i in (0, -1))
    assert len(set(first)) == 1
    assert len(set(last)) == 3
    assert len(outputs["table"].read_text().splitlines()) == 5


@pytest.mark.grid  # half a minute
def test_the_study_of_further_tokens_drafts_the_same_text(tmp_path):
    outputs = mtp.main(["steps=2", "seeds=1", f"out={tmp_path}"])
    results = json.loads(outputs["numbers"].read_text())["results"]
    assert results["none"]["tokens_per_pass"] == []
    assert 1 <= results["one"]["tokens_per_pass"][0] <= 2


def test_the_study_of_long_context_evaluates_by_position_and_counts_memory(tmp_path):
    sizes = ["short=64", "long=512", "dim=64", "layers=1", "base_steps=20", "steps=10"]
    outputs = long_context.main([*sizes, "test_rows=2", f"out={tmp_path}"])
    results = json.loads(outputs["numbers"].read_text())["results"]
    assert results["positions"] == [[0, 32], [32, 64], [64, 128], [128, 256], [256, 512]]
    costs = results["perplexity"]
    alone, windowed = costs["trained at short"], costs["the same, a window of short"]
    assert alone[:2] == pytest.approx(windowed[:2], rel=1e-5)  # up to there they are one
    assert alone[2:] != pytest.approx(windowed[2:], rel=1e-5)
    assert costs["interpolated"][0] != pytest.approx(alone[0], rel=1e-5)
    assert costs["LongLoRA"][0] < costs["interpolated"][0]
    shifted, full = (results["ways"][name] for name in ("LongLoRA", "full attention"))
    assert shifted["trainable"] == full["trainable"] == 20_160
    assert costs["LongLoRA"] != pytest.approx(costs["full attention"], rel=1e-5)
    first, _, last = shifted["temporaries"].values()
    assert first < last < 4.5 * first  # rows of 128 and 512; scores would be 16 times as many
    assert len(results["gains"]["LongLoRA"]) == 2
    assert lp.load_model(tmp_path / "base").cfg.max_seq_len == 64
    assert outputs["figure"].stat().st_size > 10_000


def test_a_byte_is_predicted_from_a_window_in_rows_of_their_own(monkeypatch):
    seen = lambda model, tokens, targets: np.arange(tokens.shape[1])[None] + 0 * tokens  # noqa: E731
    monkeypatch.setattr(positions, "_losses", seen)
    tokens = np.zeros((2, 16), int)
    whole = positions.losses(None, tokens, tokens)
    assert whole.tolist() == [list(range(16))] * 2
    windowed = positions.losses(None, tokens, tokens, window=8)
    # bytes before each, in its row: 4 to 7 but at the start
    assert windowed.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7]] * 2


def rows_of(outputs):
    return [json.loads(line) for line in outputs["numbers"].read_text().splitlines()]


def test_the_forms_of_the_loss_are_compiled_timed_and_written_down(tmp_path):
    sizes = ["tokens=256", "words=8192", "width=16", "dtype=float32", "rounds=1"]
    rows = rows_of(bench_cross_entropy.main([*sizes, f"out={tmp_path}"]))
    forms = {row["form"]: row for row in rows}
    assert all(forms[form]["ms"] > 0 for form in ("chunked", "whole", "reference"))
    assert forms["whole"]["temporaries, MiB"] > 256 * 8192 * 4 / 2**20
    with pytest.raises(ValueError, match="target=v9:1x1: .*; install libtpu, and give a topology"):
        bench_cross_entropy.main([*sizes, "target=v9:1x1"])


def test_attention_is_timed_by_backend_and_what_cannot_be_done_is_said(tmp_path):
    sizes = ["shapes=gemma-3-4b-local,llama-3-8b-decode", "size=tiny", "rounds=1"]
    rows = rows_of(bench_attention.main([*sizes, f"out={tmp_path}"]))
    works = [("forward", "gemma-3-4b-local"), ("backward", "gemma-3-4b-local")]
    works += [("decode", "llama-3-8b-decode")]
    for work, shape in works:
        own = [row for row in rows if (row["section"], row.get("shape")) == (work, shape)]
        times = {row["contender"]: row.get("ms") for row in own}
        assert times["chunked"] > 0
        assert times["reference"] > 0
    tables = (tmp_path / "attention.md").read_text()
    assert "| llama-3-8b-decode | 2 256 8 2 | chunked |" in tables
    with pytest.raises(ValueError, match="unknown shapes .*; there are d128, llama-3-8b"):
        bench_attention.main(["shapes=llama"])
