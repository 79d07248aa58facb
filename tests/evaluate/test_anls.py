"""ANLS by hand, and the edit distance against its definition."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprep_jax.evaluate.anls import anls, levenshtein


@functools.cache
def slow_distance(left: str, right: str) -> int:
    """The definition: the first characters are equal, or one of them is edited."""
    if not left or not right:
        return len(left) + len(right)
    return min(
        slow_distance(left[1:], right) + 1,
        slow_distance(left, right[1:]) + 1,
        slow_distance(left[1:], right[1:]) + (left[0] != right[0]),
    )


@settings(max_examples=60)
@given(st.text("ab c", max_size=7), st.text("ab c", max_size=7))
def test_edit_distance_is_its_definition(left, right):
    assert levenshtein(left, right) == slow_distance(left, right)


def test_edit_distance_of_words():
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "abc") == levenshtein("abc", "") == 3


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Coca Cola", ["coca cola", "Coca Cola Company"], 1.0),
        ("CocaCola", ["Coca Cola", "Coca Cola Company"], 1 - 1 / 9),
        ("The Coca", ["Coca Cola", "Coca Cola Company"], 0.0),
        ("abcd", ["abxy"], 0.5),  # the paper gives 0 here, its script 0.5
        ("abcd", ["axyz"], 0.0),
        ("", ["abc"], 0.0),
        ("", [""], 1.0),
        ("東京都", ["東京市"], 1 - 1 / 3),
        ("straß", ["stra"], 1 - 1 / 6),  # six letters in capitals
    ],
    ids=["case", "space", "other", "half", "below", "empty", "both-empty", "chinese", "sharp-s"],
)
def test_anls_by_hand(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score, abs=1e-12)


def test_surplus_space_is_no_edit_but_counts_as_length():
    assert anls("a  b\n", ["a b"]) == 1.0
    assert anls("abd", ["abc"]) == pytest.approx(1 - 1 / 3)
    assert anls(" abd ", ["abc"]) == pytest.approx(1 - 1 / 5)


def test_the_threshold_can_be_set_and_answers_must_be_given():
    assert anls("abcd", ["abxy"], threshold=0.51) == 0.0
    assert anls("abcd", ["axyz"], threshold=0.0) == 0.25
    with pytest.raises(ValueError, match="no answers"):
        anls("abc", [])
