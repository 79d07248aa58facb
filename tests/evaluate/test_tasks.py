"""Tasks score predictions by their own metric, whole and by split."""

import pytest

from llmprep_jax.evaluate import ocrbench
from llmprep_jax.evaluate.tasks import Split, Task, get_task, score


@pytest.mark.parametrize(
    ("task", "prediction", "answers", "expected"),
    [
        ("docvqa", "abcd", ["abcx", "zz"], 0.75),
        ("infovqa", "abcd", ["abcx"], 0.75),
        ("chartqa", "104", ["100"], 1.0),
        ("textvqa", "the stop", ["stop"] * 2 + ["go"] * 8, 0.6),
        ("ocrbench", "it says stop", ["Stop"], 1.0),
        ("exact", "Stop", ["stop"], 1.0),
    ],
)
def test_each_task_has_its_metric(task, prediction, answers, expected):
    assert score(task, [prediction], [answers]).overall == pytest.approx(expected)
    assert score(task, ["something else"], [answers]).overall == 0.0


def test_space_around_a_prediction_earns_nothing():
    assert score("docvqa", ["abcd" + "\n" * 100], ["abcx"]).overall == 0.75
    assert score("docvqa", ["zzzz" + "\n" * 100], ["abcx"]).overall == 0.0


def test_questions_count_in_each_of_their_categories():
    report = score(
        "exact",
        ["a", "b", "x", "x"],
        ["a", ["c", "B"], "c", "d"],
        [["table", "form", "form"], "table", None, ["form"]],
    )
    assert report.per_example == (1.0, 1.0, 0.0, 0.0)
    assert report.overall == 0.5
    assert report.by_split == {"form": Split(0.5, 2), "table": Split(1.0, 2)}
    assert list(report.by_split) == ["form", "table"]


def test_ocrbench_reads_formulas_by_their_category():
    kinds = [ocrbench.FORMULAS, ocrbench.FORMULAS, "Doc-oriented VQA", "Doc-oriented VQA"]
    report = score("ocrbench", ["X+1", "x+1"] * 2, ["X + 1", "X+1"] * 2, kinds)
    assert report.per_example == (1.0, 0.0, 0.0, 1.0)
    assert ocrbench.points(report.per_example, kinds).total == 2


def test_a_task_of_ones_own():
    task = Task(lambda prediction, answers: float(len(prediction)), clean=lambda text: text[1:])
    assert score(task, ["abc"], ["x"]).overall == 2.0


def test_what_cannot_be_scored_is_refused_with_its_number():
    with pytest.raises(ValueError, match="no task 'docqva'; did you mean docvqa?"):
        get_task("docqva")
    with pytest.raises(ValueError, match="no task 'mmlu'; there are docvqa, infovqa, "):
        get_task("mmlu")
    with pytest.raises(ValueError, match="'predictions': 1, 'answers': 2, 'categories': 1"):
        score("exact", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="'categories': 1"):
        score("exact", ["a", "b"], ["a", "b"], ["table"])
    with pytest.raises(ValueError, match="'predictions': 0"):
        score("exact", [], [])
    with pytest.raises(ValueError, match="question 1 has no answers"):
        score("exact", ["a", "b"], ["a", []])
    with pytest.raises(ValueError, match="question 0: 1 reference answers"):
        score("textvqa", ["a"], ["a"])


def test_questions_are_asked_as_the_benchmark_does():
    short = "\nAnswer the question using a single word or phrase."
    for name in ("docvqa", "infovqa", "chartqa", "exact"):
        assert get_task(name).prompt(" What is NASA? ") == "What is NASA?" + short
    assert get_task("textvqa").prompt("what is NASA?") == "What is nasa?" + short
    assert get_task("ocrbench").prompt("what is written? ") == "what is written?"
