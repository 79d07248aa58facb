"""ANLS, the score of DocVQA and InfographicVQA: how alike two answers are spelt.

Average Normalised Levenshtein Similarity (Biten et al., arXiv 1905.13648, eq. 1), in the form of
the challenge's own script (rrc.cvc.uab.es), which published numbers come from. It differs from the
paper twice: a similarity of exactly 0.5 counts (the paper gives 0), and a distance between texts
without case and surplus white space is divided by the length of the texts as they were, so that
white space around a prediction raises its score. Strip predictions first, as `tasks.score` does.
"""

from collections.abc import Sequence


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """The similarity of a prediction to the nearest of its answers, in [0, 1].

    1 - min over answers of (edits / length of the longer text); below `threshold` it is 0: another
    answer, not a slip of reading. A dataset's ANLS is the mean over its questions.

    Raises:
      ValueError: no answers are given.
    """
    if not answers:
        raise ValueError("no answers to compare a prediction with")
    similarity = 1 - min(_normalised_distance(prediction, answer) for answer in answers)
    return similarity if similarity >= threshold else 0.0


def levenshtein(left: str, right: str) -> int:
    """The least number of characters to insert, delete or replace that turns one into the other."""
    above = list(range(len(right) + 1))  # of the row before: distances to prefixes of `right`
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]


def _normalised_distance(prediction: str, answer: str) -> float:
    # the script measures in capitals: the German sharp s counts as two
    length = max(len(prediction.upper()), len(answer.upper()))
    if not length:
        return 0.0
    left, right = (" ".join(text.lower().split()) for text in (prediction, answer))
    return levenshtein(left, right) / length
