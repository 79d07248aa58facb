"""The studies run from end to end, at sizes that show nothing."""

import json

import pytest

from experiments import adapters, moe_balance, mtp

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
