"""How experiments.evaluate measures the tasks beside perplexity, and what it writes and prints."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table

import llmprep_jax as lp
from experiments.command.measured import write
from experiments.command.outcome import result_of, show
from experiments.command.task_settings import (
    OF_TOWERS,
    PERPLEXITY,
    ZERO_SHOT,
    TaskSettings,
)
from llmprep_jax import processes
from llmprep_jax.cli import Outputs
from llmprep_jax.config import UsageError, changes_of
from llmprep_jax.evaluate import ocrbench
from llmprep_jax.evaluate.answers import answer
from llmprep_jax.evaluate.encoders import Embedder, Outcome, classify, retrieve
from llmprep_jax.evaluate.page import Example, write_page
from llmprep_jax.evaluate.pictures import read_captioned, read_labelled
from llmprep_jax.evaluate.questions import Question, read_questions
from llmprep_jax.evaluate.tasks import TASKS, Task, score
from llmprep_jax.evaluate.zero_shot import TEMPLATES
from llmprep_jax.models.tower_processor import TowerProcessor
from llmprep_jax.text.image_text import ImageTextProcessor


def refuse_unread(cfg: Any) -> None:
    """Refuses settings of an EvaluateConfig that perplexity alone goes by.

    Raises:
      UsageError: one is set.
    """
    unread = [f"data.{name}" for name, _ in changes_of(cfg.data) if name != "paths"]
    unread += ["split"] if cfg.split != "all" else []
    unread += ["max_batches"] if cfg.max_batches is not None else []
    if unread:
        raise UsageError(
            f"task={cfg.task.name} does not read {unread[0]}; its own are task.limit,"
            " task.batch_size, task.split and such"
        )


def check_kind(processor: Any, name: str, model: str) -> None:
    """Refuses a task that is not for a model of this kind.

    Raises:
      ValueError: it is not; the tasks that are for it are named.
    """
    has_towers = isinstance(processor, TowerProcessor)
    if has_towers == (name in OF_TOWERS):
        return
    kind = "is two towers, which say nothing" if has_towers else "is no model of two towers"
    others = OF_TOWERS if has_towers else (PERPLEXITY, *TASKS)
    raise ValueError(f"task={name}: {model} {kind}; take task={' or '.join(others)}")


def run(
    cfg: Any, processor: Any, load: Callable[[], Any], console: rich.console.Console
) -> Outputs:
    """Measures a task, prints it, and writes the numbers and the page of the worst cases.

    Args:
      cfg: an EvaluateConfig. load: gives the model, with its adapter.
    """
    if processes.are_several():
        raise UsageError(f"task={cfg.task.name} is for one process; give it a mesh of its devices")
    data = cfg.data.paths[0]
    outcome = _measure(cfg.task, cfg.model, data, processor, lambda: _merged(load()), console)
    show(outcome, console)
    path = write(cfg, result_of(outcome))
    page = path.with_suffix(".html")
    write_page(
        page,
        outcome.examples,
        title=f"{cfg.task.name}: {pathlib.Path(data).name}",
        report=outcome.report,
        facts=dict(changes_of(cfg)),
        count=cfg.task.worst,
    )
    return {"result": path, "worst cases": page}


def _merged(model: Any) -> Any:
    """A model with its adapter in its weights, where these are not packed."""
    is_mergeable = lp.peft.is_adapted(model) and not lp.quant.packed_layers(model)
    return lp.peft.merge(model) if is_mergeable else model


def _measure(
    settings: TaskSettings,
    model: str,
    data: str,
    processor: Any,
    load: Callable[[], Any],
    console: rich.console.Console,
) -> Outcome:
    """Reads what is asked, and only then loads the model and asks it.

    Args:
      model: its name, for errors. data: the file or folder. load: gives the model.

    Raises:
      FileNotFoundError, ValueError: in one line; what of the data cannot be asked, by file and
        line; pictures for a model that reads text alone.
    """
    if settings.name not in OF_TOWERS:
        return _measure_questions(settings, model, data, processor, load, console)
    read = read_labelled if settings.name == ZERO_SHOT else read_captioned
    pictures = read(data, settings.limit)
    embedder = Embedder(load().frozen(), processor, settings.batch_size, console)
    if settings.name == ZERO_SHOT:
        return classify(embedder, pictures, settings.templates or TEMPLATES)
    return retrieve(embedder, pictures)


def _measure_questions(
    settings: TaskSettings,
    model: str,
    data: str,
    processor: Any,
    load: Callable[[], Any],
    console: rich.console.Console,
) -> Outcome:
    task = settings.task()
    questions = read_questions(data, task, splits=settings.split, limit=settings.limit)
    seen = next((question for question in questions if question.images), None)
    sees = isinstance(processor, ImageTextProcessor)
    if seen is not None and not sees and not settings.blind:
        raise ValueError(
            f"{seen.name}: asks about a picture, and {model} reads text alone; take a model that"
            " sees, or task.blind=true"
        )
    _ = processor.chat  # refuses a model without a chat template before it is loaded
    texts = answer(
        load(),
        processor,
        questions,
        max_new_tokens=task.max_new_tokens,
        batch_size=settings.batch_size,
        blind=settings.blind,
        console=console,
    )
    return _score(settings.name, task, questions, texts)


def _score(name: str, task: Task, questions: Sequence[Question], texts: Sequence[str]) -> Outcome:
    splits = [question.splits for question in questions]
    report = score(task, texts, [question.answers for question in questions], splits)
    numbers: dict[str, Any] = {"score": report.overall, "questions": len(questions)}
    kinds = [own[0] if own else "" for own in splits]
    known = {kind for group in ocrbench.GROUPS.values() for kind in group}
    if name == "ocrbench" and known.issuperset(kinds):
        points = ocrbench.points(report.per_example, kinds)
        numbers |= {"points": points.total, "groups": points.groups}
    examples = [
        Example(
            question=question.text,
            answers=question.answers,
            prediction=text,
            score=one,
            images=question.images,
            category=question.splits,
            name=question.name,
        )
        for question, text, one in zip(questions, texts, report.per_example, strict=True)
    ]
    return Outcome(numbers, report, examples)
