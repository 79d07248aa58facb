"""What a task's outcome is written and printed as."""

from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table

from llmprep_jax.evaluate.encoders import Outcome


def result_of(outcome: Outcome) -> dict[str, Any]:
    """What is written to the JSON file: numbers, splits, and each case."""
    return {
        **outcome.numbers,
        "by_split": {name: split.__dict__ for name, split in outcome.report.by_split.items()},
        "examples": [
            {
                "name": example.name,
                "question": example.question,
                "answers": list(example.answers),
                "prediction": example.prediction,
                "score": example.score,
            }
            for example in outcome.examples
        ],
    }


def show(outcome: Outcome, console: rich.console.Console) -> None:
    """Prints the splits and the numbers as a table."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("split", overflow="fold")
    for name in ("cases", "score"):
        table.add_column(name, justify="right")
    for name, split in outcome.report.by_split.items():
        table.add_row(rich.markup.escape(name), f"{split.count:,}", f"{split.score:.4f}")
    table.add_section()
    table.add_row("all", f"{len(outcome.examples):,}", f"{outcome.report.overall:.4f}")
    console.print(table)
    for name, value in outcome.numbers.items():
        if isinstance(value, float):
            console.print(f"{name:16} {value:.4f}", highlight=False)
