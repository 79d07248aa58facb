"""Generated pages to read aloud and to be asked about, and how a model's answers are scored.

Held-out pages state what no page of the training files does, and no question of theirs is asked
there with the same answer (`data.synthetic_documents`). "Blind" is the best that can be said
without a page: of all answers in training to the same question, or to any of that kind and
language, the most frequent.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import rich.progress
from flax import nnx
from PIL import Image

import llmprep_jax as lp
from experiments.seeing.reader import write_processor
from llmprep_jax import data
from llmprep_jax.data import synthetic_documents
from llmprep_jax.evaluate.anls import anls
from llmprep_jax.models.deepseek_vl2.processor import Processor
from llmprep_jax.runs import pixels_of
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer, make_loss

WIDTH = 96  # pixels of a page, each side
READ, ASK = "read", "ask"  # the two exercises
MAX_NEW = {READ: 32, ASK: 16}
# a batch: a page a row, which is seen twice, whole and as its one tile; pages packed to rows of 512
# tokens would pay for attention between them
LENGTH, ROWS, PICTURES = 80, 24, 2


@dataclasses.dataclass(frozen=True)
class Library:
    """A folder of pages and of exercises, `train_read.jsonl` to `heldout_ask.jsonl`."""

    folder: pathlib.Path
    processor: Processor

    def records(self, side: str, exercise: str) -> list[dict[str, Any]]:
        """Questions of "train" or "heldout" pages, with their answers and boxes."""
        lines = (self.folder / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
        records = map(json.loads, lines)
        return [x for x in records if (x["category"] == "text") == (exercise == READ)]

    def batches(self, exercise: str, seed: int) -> "data.Batches":
        path = self.folder / f"train_{exercise}.jsonl"
        sizes = dict(seq_len=LENGTH, batch_size=ROWS, max_images=PICTURES, packing="padded")
        return lp.load_data(self.processor, path, seed=seed, **sizes)

    def page(self, record: dict[str, Any]) -> Image.Image:
        return Image.open(self.folder / record["messages"][0]["content"][0]["image"])


def write_library(
    folder: pathlib.Path, count: int, settings: synthetic_documents.Settings
) -> Library:
    """Makes pages, exercises, and a processor that knows the words of the training side."""
    synthetic_documents.write(folder, count, settings, pdf=False, workers=1)
    library = Library(folder, write_processor(folder / "processor", _texts(folder), settings.width))
    for exercise in (READ, ASK):
        records = [{"messages": x["messages"]} for x in library.records("train", exercise)]
        _write_lines(folder / f"train_{exercise}.jsonl", records)
        _write_lines(folder / f"heldout_{exercise}.jsonl", library.records("heldout", exercise))
    return library


def _write_lines(path: pathlib.Path, records: Sequence[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def _texts(folder: pathlib.Path) -> Iterator[str]:
    """What is asked and answered in training."""
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        yield question(record)
        yield from record["answers"]


def train(
    model: nnx.Module, library: Library, exercise: str, *, steps: int, lr: float, seed: int
) -> tuple[nnx.Module, list[float]]:
    """The model after `steps` batches of an exercise, and the loss of each.

    All weights are trained, or the adapters where there are some.
    """
    optim = OptimConfig(lr=lr, warmup_steps=min(30, steps), weight_decay=0.05)
    cfg = FitConfig(steps=steps, optim=optim, seed=seed)
    trainer = Trainer(model, cfg=cfg, loss_fn=make_loss(pixels=pixels_of(library.processor)))
    batches, losses = library.batches(exercise, seed), []
    run = trainer.steps(batches)
    for _ in rich.progress.track(range(steps), f"training to {exercise}", transient=True):
        losses.append(next(run)["loss"])
    batches.close()
    return trainer.model(run.state), [round(float(loss), 4) for loss in losses]


def ask(
    model: nnx.Module,
    library: Library,
    records: Sequence[dict[str, Any]],
    *,
    blank: bool = False,
    max_new_tokens: int = 16,
    rows: int = 32,
) -> list[str]:
    """What the model says to each record's question and page, or to a blank page."""
    answers: list[str] = []
    for first in range(0, len(records), rows):
        part = records[first : first + rows]
        filled = [*part, *part[:1] * (rows - len(part))]  # one shape, one program
        pages = [library.page(record) for record in filled]
        pages = [Image.new("RGB", page.size, "white") for page in pages] if blank else pages
        prompts = [
            [{"role": "user", "content": [{"type": "image"}, record["messages"][0]["content"][1]]}]
            for record in filled
        ]
        settings = dict(images=[[page] for page in pages], max_new_tokens=max_new_tokens)
        said = lp.generate(model, library.processor, prompts, **settings)
        answers += [text.strip() for text in said[: len(part)]]
    return answers


def guess_blindly(train: Iterable[dict], records: Iterable[dict]) -> list[str]:
    """The most frequent answers of the training file to the records' questions."""
    by_question, by_kind = (collections.defaultdict(collections.Counter) for _ in range(2))
    for record in train:
        by_question[question(record)][record["answers"][0]] += 1
        by_kind[record["kind"], record["language"]][record["answers"][0]] += 1
    counts = [
        by_question.get(question(record)) or by_kind[record["kind"], record["language"]]
        for record in records
    ]
    return [count.most_common(1)[0][0] for count in counts]


def question(record: dict) -> str:
    """What is asked of a page."""
    return record["messages"][0]["content"][1]["text"]


def score(records: Sequence[dict], answers: Sequence[str]) -> list[float]:
    """ANLS of each answer."""
    return [anls(said, record["answers"]) for record, said in zip(records, answers, strict=True)]


def sample(records: Sequence[dict], count: int) -> list[dict]:
    """So many of them, by lot, the same each time."""
    return [records[i] for i in np.random.default_rng(0).permutation(len(records))[:count]]
