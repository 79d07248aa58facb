"""OCRBench by hand: an answer within the prediction, and points by group."""

import pytest

from llmprep_jax.evaluate.ocrbench import FORMULAS, GROUPS, contains_answer, points


def test_an_answer_within_a_sentence_counts():
    assert contains_answer("It says CENTRE.", ["hotel", "Centre"]) == 1.0
    assert contains_answer("It says CENTER.", ["hotel", "Centre"]) == 0.0
    assert contains_answer("Grand\nHotel", [" grand hotel "]) == 1.0
    assert contains_answer("GrandHotel", ["grand hotel"]) == 0.0


def test_formulas_are_compared_without_spaces_and_with_case():
    assert contains_answer("x = \\frac{1}{ 2 }\n", ["\\frac {1} {2}"], FORMULAS) == 1.0
    assert contains_answer("A + b", ["a + b"], FORMULAS) == 0.0
    assert contains_answer("A + b", ["a + b"]) == 1.0


def test_an_empty_answer_is_refused():
    with pytest.raises(ValueError, match="empty reference answer"):
        contains_answer("anything", ["cat", " "])


def test_points_add_up_by_the_groups_of_the_paper():
    kinds = ["Digit String Recognition", "Doc-oriented VQA", "Artistic Text Recognition", FORMULAS]
    total, groups = points([1, 1, 1, 0], kinds)
    assert total == 3
    assert groups == {
        "Text Recognition": 2,
        "Scene Text-centric VQA": 0,
        "Doc-oriented VQA": 1,
        "Key Information Extraction": 0,
        FORMULAS: 0,
    }
    assert sum(map(len, GROUPS.values())) == 10
    with pytest.raises(ValueError, match="'Poems' is no kind"):
        points([1], ["Poems"])
