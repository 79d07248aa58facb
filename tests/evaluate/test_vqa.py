"""Exact match, ChartQA's and TextVQA's accuracy, by hand."""

import pytest

from llmprep_jax.evaluate.vqa import exact_match, normalise_answer, relaxed_accuracy, vqa_accuracy


def test_exact_match_looks_past_case_and_outer_space():
    assert exact_match(" Paris\n", ["London", "paris "]) == 1.0
    assert exact_match("Paris, France", ["Paris"]) == 0.0
    assert exact_match("new  york", ["new york"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "is_right"),
    [
        ("105", "100", True),
        ("105.01", "100", False),
        ("95", "100", True),
        ("94.9", "100", False),
        ("-103", "-100", True),
        ("103", "-100", False),
        ("12%", "0.12", True),
        ("12.5 %", "12%", True),
        ("12", "12%", False),
        ("0", "0", True),
        ("0.0", "0", False),  # an answer of 0 has no magnitude: texts are compared
        ("1200", "1,200", False),
        ("yes", "Yes", True),
        (" Yes ", "yes", True),
        ("4", "four", False),
        ("nan", "100", False),
        ("NaN", "nan", True),
        ("100", "inf", False),
    ],
)
def test_numbers_may_be_five_per_cent_off(prediction, answer, is_right):
    assert relaxed_accuracy(prediction, [answer]) == is_right


def test_relaxed_accuracy_takes_any_of_the_answers():
    assert relaxed_accuracy("52", ["10", "50"]) == 1.0
    assert relaxed_accuracy("56", ["10", "50"]) == 0.0
    assert relaxed_accuracy("56", ["50"], tolerance=0.2) == 1.0


@pytest.mark.parametrize(
    ("agree", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_three_of_ten_people_nearly_make_an_answer_right(agree, score):
    answers = ["Stop"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_accuracy("the stop", answers) == pytest.approx(score, abs=1e-12)


def test_few_people_cannot_make_an_answer_right():
    assert vqa_accuracy("stop", ["stop"] * 4) == 1.0
    with pytest.raises(ValueError, match="3 reference answers"):
        vqa_accuracy("stop", ["stop"] * 3)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat\nsat", "cat sat"),
        ("Two dogs, none!", "2 dogs 0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("What's up?", "what 's up"),
        ("1,200", "1200"),
        ("3.5 km. away.", "3.5 km away"),
        ("well-known", "well known"),
        ("well-known - yes", "wellknown yes"),
        ("x-y- z", "xy z"),
        ("x-y -z", "xy z"),
        ("a/b", "b"),  # the slash becomes a space, then the article goes
        ("(yes)", "yes"),
        ("." * 40, "." * 8),
    ],
    ids=str,
)
def test_answers_are_normalised_as_the_server_does(text, normal):
    assert normalise_answer(text) == normal
