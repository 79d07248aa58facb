"""The benchmarks of questions about pictures: what is asked, how it is scored, how it is split.

Prompts are those of lmms-eval; a model that was trained on another is better asked by that. Its
numbers are of greedy decoding.
"""

import collections
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence

from llmprep_jax.evaluate.anls import anls
from llmprep_jax.evaluate.ocrbench import contains_answer
from llmprep_jax.evaluate.vqa import exact_match, relaxed_accuracy, vqa_accuracy

_SHORT = "\nAnswer the question using a single word or phrase."
Categories = Sequence[str | Sequence[str] | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      metric: of a prediction and its answers, in [0, 1].
      suffix: follows the question. ask: what is done to the question first.
      splits: the field of a record that names its category, or a list of them; None: no table.
      clean: what is done to a prediction before anything else.
      max_new_tokens: how long an answer may get.
      by_category: the metric takes the category too.
    """

    metric: Callable[..., float]
    suffix: str = _SHORT
    ask: Callable[[str], str] = str.strip
    splits: str | None = "category"
    clean: Callable[[str], str] = str.strip
    max_new_tokens: int = 32
    by_category: bool = False

    def prompt(self, question: str) -> str:
        """What a model is asked, beside its pictures."""
        return self.ask(question) + self.suffix


TASKS = {
    "docvqa": Task(anls, splits="question_types"),
    "infovqa": Task(anls, splits="answer_type"),
    "chartqa": Task(relaxed_accuracy, splits="type", max_new_tokens=16),
    "textvqa": Task(vqa_accuracy, ask=str.capitalize, splits=None),
    "ocrbench": Task(
        contains_answer, suffix="", splits="question_type", max_new_tokens=128, by_category=True
    ),
    "exact": Task(exact_match),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """The mean score of some of the questions, and how many they are."""

    score: float
    count: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a set of predictions scored.

    Attributes:
      overall: the mean over questions, in [0, 1]. OCRBench's points are the sum of per_example.
      by_split: by category, in alphabetic order; a question of two categories is in both, one
        without in none.
      per_example: a score a question, in order.
    """

    overall: float
    by_split: Mapping[str, Split]
    per_example: tuple[float, ...]


def get_task(name: str) -> Task:
    """A task by its name.

    Raises:
      ValueError: there is none of the name; near ones are named.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TASKS)}"
        raise ValueError(f"no task {name!r}; {hint}")
    return TASKS[name]


def score(
    task: str | Task,
    predictions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    categories: Categories | None = None,
) -> Report:
    """Scores predictions against the answers to each question.

    Args:
      task: a name of `TASKS`, or a task of one's own.
      answers: what is right, a text or several, by question.
      categories: of each question: one, several or None.

    Raises:
      ValueError: no predictions, or not as many answers or categories; what the metric refuses,
        with the number of the question.
    """
    task = get_task(task) if isinstance(task, str) else task
    categories = [None] * len(predictions) if categories is None else categories
    counts = {"predictions": len(predictions), "answers": len(answers)}
    counts["categories"] = len(categories)
    if len(set(counts.values())) > 1 or not predictions:
        raise ValueError(f"each question needs one of each; there are {counts}")
    scores = []
    for number, row in enumerate(zip(predictions, answers, categories, strict=True)):
        prediction, texts, category = row
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError(f"question {number} has no answers")
        names = _names(category)
        extra = (names[0] if names else None,) if task.by_category else ()
        try:
            scores.append(task.metric(task.clean(prediction), texts, *extra))
        except ValueError as error:
            raise ValueError(f"question {number}: {error}") from error
    return report_of(scores, categories)


def report_of(scores: Sequence[float], categories: Categories | None = None) -> Report:
    """The report of scores, one a question, and of the categories of each."""
    splits = collections.defaultdict(list)
    for one, category in zip(scores, categories or [None] * len(scores), strict=True):
        for name in dict.fromkeys(_names(category)):
            splits[name].append(one)
    by_split = {name: Split(_mean(splits[name]), len(splits[name])) for name in sorted(splits)}
    return Report(_mean(scores), by_split, tuple(scores))


def _names(category: str | Sequence[str] | None) -> list[str]:
    return [category] if isinstance(category, str) else list(category or ())


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)
