"""A tiny DeepSeek-VL2 learns to read pages, and then, by LoRA, to answer questions about new ones.

    python -m experiments.document_study [read_steps=600] [ask_steps=200] [out=runs/documents]

Pages are generated signs of a few large words and numbers, in English and Chinese. The
base is trained, all of it, to write out what stands on a page, and to nothing else; LoRA on its
language model then learns from questions and answers, with the tower as it is. Held-out pages are
new combinations of known words, and of numbers. Compared by ANLS: the base, the tuned model, the
tuned model shown blank pages, and the best guess without a page. Ends with a table (documents.md),
all numbers (documents.json), pages with their answers (answers.png), the worst ones (worst.html),
the base as a Hugging Face folder and the adapter as a PEFT folder.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.document_study:Settings")

import dataclasses
import pathlib
import shutil
import statistics
import time

import rich

import llmprep_jax as lp
from experiments.seeing import documents, report
from experiments.seeing.documents import ASK, READ, Library
from experiments.seeing.reader import make_reader
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override
from llmprep_jax.data import synthetic_documents
from llmprep_jax.data.synthetic_documents.lexicon import Language
from llmprep_jax.data.synthetic_documents.settings import Kind

LANGUAGE = r"language\.model\.layers\..*_proj"  # attention and all experts, in PEFT's names
BASE, TUNED, BLANK, GUESS = "base", "LoRA", "LoRA, blank page", "best guess"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Attributes:
      pages: that are generated, a seventh of them held out. kind, language: theirs.
      questions: to held-out pages that are asked.
      read_steps, read_lr: of training the base. ask_steps, ask_lr, rank: of LoRA.
      seed: of the pages, the base's weights and the order of training.
      least: ANLS that the tuned model must reach. margin: by which it must exceed the others.
    """

    pages: int = 4000
    kind: tuple[Kind, ...] = ("sign",)
    language: tuple[Language, ...] = ("en", "zh-Hans")
    questions: int = 256
    read_steps: int = 600
    read_lr: float = 1.5e-3
    ask_steps: int = 200
    ask_lr: float = 4e-3
    rank: int = 16
    seed: int = 0
    least: float = 0.5
    margin: float = 0.2
    out: pathlib.Path = pathlib.Path("runs/documents")  # a folder, written anew


def main(arguments: list[str]) -> cli.Outputs:
    return study(override(Settings(), only_overrides(arguments)))


def study(cfg: Settings) -> cli.Outputs:
    """Trains, asks, compares."""
    began = time.process_time()
    library = open_library(cfg)
    records = documents.sample(library.records("heldout", ASK), cfg.questions)
    rich.print(f"[bold]Learn to read[/] {cfg.pages:,} pages: all weights, {cfg.read_steps} steps")
    base = make_reader(library.processor, cfg.seed)
    run = dict(steps=cfg.read_steps, lr=cfg.read_lr, seed=cfg.seed)
    base, read_losses = documents.train(base, library, READ, **run)
    lp.save_model(base, cfg.out / "base", processor=library.processor)
    answers = {BASE: documents.ask(base, library, records)}
    rich.print(f"[bold]Learn to answer[/] by LoRA of its language model, {cfg.ask_steps} steps")
    method = lp.peft.LoRA(rank=cfg.rank, alpha=2 * cfg.rank, targets=LANGUAGE)
    tuned = lp.peft.inject(base, method, seed=cfg.seed)
    run = dict(steps=cfg.ask_steps, lr=cfg.ask_lr, seed=cfg.seed)
    tuned, ask_losses = documents.train(tuned, library, ASK, **run)
    answers[TUNED] = documents.ask(tuned, library, records)
    answers[BLANK] = documents.ask(tuned, library, records, blank=True)
    answers[GUESS] = documents.guess_blindly(library.records("train", ASK), records)
    lp.peft.save(tuned, cfg.out / "adapter")
    scores = {way: documents.score(records, said) for way, said in answers.items()}
    losses, seconds = {READ: read_losses, ASK: ask_losses}, time.process_time() - began
    costs = {"losses": losses, "cpu_seconds": seconds}
    outputs = report.write_answers(cfg, library, records, answers, scores, costs)
    check(cfg, scores)
    return {**outputs, "base": cfg.out / "base", "adapter": cfg.out / "adapter"}


def open_library(cfg: Settings) -> Library:
    """The pages, made anew: they are a tenth of the work."""
    folder = cfg.out / "pages"
    if (folder / "settings.json").is_file():  # nothing else is removed
        shutil.rmtree(folder)
    pages = synthetic_documents.Settings(
        kind=cfg.kind,
        language=cfg.language,
        level="tiny",
        width=documents.WIDTH,
        transcribe=True,
        holdout=1 / 7,  # a seventh of pages whose languages come in turn is of both
        seed=cfg.seed,
    )
    return documents.write_library(folder, cfg.pages, pages)


def check(cfg: Settings, scores: dict[str, list[float]]) -> None:
    """That the tuned model reads, and does not guess."""
    means = {way: statistics.mean(values) for way, values in scores.items()}
    others = max(mean for way, mean in means.items() if way != TUNED)
    if means[TUNED] < cfg.least or means[TUNED] < others + cfg.margin:
        raise RuntimeError(
            f"ANLS is {means}; LoRA's must be {cfg.least} and exceed the others by {cfg.margin}"
        )


if __name__ == "__main__":
    cli.run(main)
