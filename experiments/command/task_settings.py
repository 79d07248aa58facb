"""The tasks of experiments.evaluate by name, and what is set of them."""

import dataclasses
import difflib
from typing import ClassVar

from llmprep_jax.evaluate.tasks import TASKS, Task

PERPLEXITY, ZERO_SHOT, RETRIEVAL = "perplexity", "zero_shot", "retrieval"
OF_TOWERS = (ZERO_SHOT, RETRIEVAL)
NAMES = (PERPLEXITY, *TASKS, *OF_TOWERS)
_ALL = ("batch_size", "limit", "worst")
_OF_QUESTIONS = ("prompt", "max_new_tokens", "split", "blind", *_ALL)
_READ = {  # what each task reads of its settings
    PERPLEXITY: (),
    **dict.fromkeys(TASKS, _OF_QUESTIONS),
    ZERO_SHOT: ("templates", *_ALL),
    RETRIEVAL: _ALL,
}


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What is measured; `task=NAME` sets the name.

    Attributes:
      name: perplexity; docvqa, infovqa, chartqa, textvqa, ocrbench or exact: questions about
        pictures; zero_shot or retrieval: of models of two towers.
      prompt: what a model is asked, with {} where the question goes; None: as the benchmark asks.
      max_new_tokens: of an answer, at most; None: as the benchmark has it.
      split: fields of a record by which scores are listed too; (): the benchmark's own, and those
        of category, kind and language that there are.
      templates: of zero_shot, texts with {} where a class's name goes, of which the mean is taken;
        (): seven of CLIP's.
      batch_size: questions, pictures or texts at a time.
      limit: at most so many questions or pictures, the first; None: all.
      worst: how many cases the page shows.
      blind: ask without the pictures, as a control: how much can be guessed.
    """

    name: str = "perplexity"
    prompt: str | None = None
    max_new_tokens: int | None = None
    split: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    batch_size: int = 8
    limit: int | None = None
    worst: int = 40
    blind: bool = False

    SET_BY: ClassVar[str] = "name"

    def __post_init__(self):
        if self.name not in NAMES:
            near = difflib.get_close_matches(self.name, NAMES)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(NAMES)}"
            raise ValueError(f"no task {self.name!r}; {hint}")
        for field in dataclasses.fields(self)[1:]:
            is_set = getattr(self, field.name) != field.default
            if is_set and field.name not in _READ[self.name]:
                read = ", ".join(_READ[self.name]) or "none of these; see max_batches and data"
                raise ValueError(f"{self.name} does not read {field.name}; it reads {read}")
        for name in ("max_new_tokens", "batch_size", "limit", "worst"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for text in filter(None, (self.prompt, *self.templates)):
            if text.count("{}") != 1:
                raise ValueError(f"{text!r} has not one {{}}, where the name or question goes")

    def task(self) -> Task:
        """The benchmark of questions, with what is set here."""
        task = TASKS[self.name]
        if self.max_new_tokens is not None:
            task = dataclasses.replace(task, max_new_tokens=self.max_new_tokens)
        if (prompt := self.prompt) is not None:
            ask = lambda question: prompt.replace("{}", question.strip())  # noqa: E731
            task = dataclasses.replace(task, ask=ask, suffix="")
        return task
