"""Write generated documents (letters, tables, charts, receipts, signs, menus) with questions.

    python -m experiments.synthesize FOLDER [count=100] [name=value ...]
    python -m experiments.synthesize data/receipts count=500 kind=receipt language=zh-Hans
    python -m experiments.synthesize data/small count=2000 level=tiny width=96 pdf=false
    python -m experiments.synthesize data/worn kind=letter,menu level=varied grounding=true

FOLDER is new or empty. Pictures and PDFs are written with train.jsonl and heldout.jsonl, a question
a line as a conversation; documents.jsonl, a document a line with its text and the boxes of its
words; and sheet.png, a contact sheet. Chinese pages need a font: apt-get install fonts-noto-cjk.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.synthesize:Synthesis", compile_cache=False)

import dataclasses

import rich.console

from llmprep_jax import cli
from llmprep_jax.config import UsageError, override, print_config, split_arguments
from llmprep_jax.data import synthetic_documents


@dataclasses.dataclass(frozen=True)
class Synthesis(synthetic_documents.Settings):
    """What is written.

    Attributes:
      count: how many documents.
      pdf: whether PDFs are written too, with text that can be searched.
      workers: processes; None: one a core where each has 100 documents, or 1,000 tiny ones.
    """

    count: int = 100
    pdf: bool = True
    workers: int | None = None

    def documents(self) -> synthetic_documents.Settings:
        """The settings of the documents themselves."""
        fields = dataclasses.fields(synthetic_documents.Settings)
        values = {field.name: getattr(self, field.name) for field in fields}
        return synthetic_documents.Settings(**values)


def main(arguments: list[str]) -> cli.Outputs:
    positional, overrides = split_arguments(arguments)
    if len(positional) != 1:
        raise UsageError(f"give one folder to write, not {len(positional)}")
    settings = override(Synthesis(), overrides)
    console = rich.console.Console()
    print_config(settings, console)
    folder = synthetic_documents.write(
        positional[0],
        settings.count,
        settings.documents(),
        pdf=settings.pdf,
        workers=settings.workers,
        console=console,
    )
    sides = {name: folder / f"{name}.jsonl" for name in ("train", "heldout", "documents")}
    counts = {name: path.read_text(encoding="utf-8").count("\n") for name, path in sides.items()}
    console.print(
        f"{counts['documents']:,} documents, {counts['train']:,} questions to train on,"
        f" {counts['heldout']:,} held out"
    )
    return {**sides, "contact sheet": folder / "sheet.png"}


if __name__ == "__main__":
    cli.run(main)
