"""OCRBench: whether a reference answer stands in what the model said (arXiv 2305.07895).

1,000 questions of ten kinds, a point each, so that the score is of 1,000. A long reply is not held
against a model, and "12" is found in "2012" too: the paper asks no question whose answer is shorter
than four characters.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

FORMULAS = "Handwritten Mathematical Expression Recognition"
# what the paper reports: group -> the kinds of question in it
GROUPS = {
    "Text Recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    ),
    "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",),
    "Key Information Extraction": ("Key Information Extraction",),
    FORMULAS: (FORMULAS,),
}


class Points(NamedTuple):
    """The sum of all points, of 1,000 on the whole benchmark, and those of each group."""

    total: float
    groups: dict[str, float]


def contains_answer(prediction: str, answers: Sequence[str], category: str | None = None) -> float:
    """1 where the prediction contains one of the answers, else 0.

    Case and white space at the ends do not matter and a newline is a space; in formulas
    (`category` is `FORMULAS`) case matters and no space does.

    Raises:
      ValueError: an answer is empty: any text contains it.
    """
    plain = _plain_formula if category == FORMULAS else _plain
    parts = [plain(answer) for answer in answers]
    if not all(parts):
        raise ValueError(f"an empty reference answer, which any prediction contains: {answers!r}")
    said = plain(prediction)
    return float(any(part in said for part in parts))


def points(scores: Iterable[int | float], categories: Iterable[str]) -> Points:
    """Adds up the scores of questions by the groups of the paper.

    Raises:
      ValueError: a category is no kind of question of OCRBench.
    """
    group_of = {kind: group for group, kinds in GROUPS.items() for kind in kinds}
    groups = dict.fromkeys(GROUPS, 0.0)
    for score, category in zip(scores, categories, strict=True):
        if category not in group_of:
            raise ValueError(f"{category!r} is no kind of question of OCRBench: {list(group_of)}")
        groups[group_of[category]] += score
    return Points(sum(groups.values()), groups)


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _plain_formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
