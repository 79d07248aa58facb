"""The studies run from end to end, at sizes that show nothing."""

import json

import pytest

from experiments import adapters, bench_cross_entropy, moe_balance, mtp

pytestmark = pytest.mark.slow  # each compiles several training steps


def test_the_study_of_adapters_writes_a_row_for_each_method(tmp_path):
    sizes = ["steps=2", "base_steps=2", "seeds=1", "methods=LoRA,IA3", f"out={tmp_path}"]
    outputs = adapters.main(sizes)
    rows = json.loads(outputs["numbers"].read_text())["rows"]
    assert [row["method"] for row in rows] == ["LoRA", "IA3", "LoRA"]
    assert outputs["figure"].stat().st_size > 10_000


def test_the_study_of_balance_moves_biases_alone_where_it_says_so(tmp_path):
    outputs = moe_balance.main(["steps=3", "seeds=1", f"out={tmp_path}"])
    results = json.loads(outputs["numbers"].read_text())["results"]
    assert list(results) == ["nothing", "a loss", "biases"]
    # one model and one batch at first, then three ways
    first, last = ([result["by_step"][0][i] for result in results.values()] for i in (0, -1))
    assert len(set(first)) == 1
    assert len(set(last)) == 3
    assert len(outputs["table"].read_text().splitlines()) == 5


def test_the_study_of_further_tokens_drafts_the_same_text(tmp_path):
    outputs = mtp.main(["steps=2", "seeds=1", f"out={tmp_path}"])
    results = json.loads(outputs["numbers"].read_text())["results"]
    assert results["none"]["tokens_per_pass"] == []
    assert 1 <= results["one"]["tokens_per_pass"][0] <= 2


def test_the_forms_of_the_loss_are_compiled_timed_and_written_down(tmp_path):
    sizes = ["tokens=256", "words=8192", "width=16", "dtype=float32", "rounds=1"]
    bench_cross_entropy.main([*sizes, f"out={tmp_path / 'loss.json'}"])
    numbers = json.loads((tmp_path / "loss.json").read_text())
    assert all(numbers[form]["seconds"] > 0 for form in ("in parts", "whole", "plain"))
    assert numbers["whole"]["temporaries_mib"] > 256 * 8192 * 4 / 2**20
    with pytest.raises(ValueError, match="target=v9:1x1: .*; install libtpu, and give a topology"):
        bench_cross_entropy.main([*sizes, "target=v9:1x1"])
