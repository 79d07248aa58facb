"""The study's table and figure."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.study.report import spread, table
from llmprep_jax import cli

COLUMNS = ("method", "trained", "learning rate", "loss on B", "forgotten of A", "step", "peak",
           "merge error")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """What one method came to.

    Attributes:
      round: "equal steps" or "equal parameters". trainable: parameters. before: loss on B of the
        base. loss, forgetting: nats a token after, one a seed: held-out B, and held-out A less the
        base's. step_seconds: median. peak_bytes: arguments and temporaries of the compiled step.
      merge_error: largest difference of logits, as a share of the largest.
    """

    method: str
    round: str
    trainable: int
    lr: float
    before: float
    loss: list[float]
    forgetting: list[float]
    step_seconds: float
    peak_bytes: int
    merge_error: float

    def cells(self) -> list[str]:
        return [
            self.method,
            f"{self.trainable:,}",
            f"{self.lr:g}",
            spread(self.loss),
            spread(self.forgetting),
            f"{self.step_seconds * 1e3:.0f} ms",
            f"{self.peak_bytes / 2**20:,.1f} MiB",
            f"{self.merge_error:.0e}" if self.merge_error else "",
        ]

    def line(self) -> str:
        return f"{self.round}: " + ", ".join(
            f"{name} {cell}" for name, cell in zip(COLUMNS, self.cells(), strict=True) if cell
        )


def write_report(
    out: pathlib.Path, rows: Sequence[Row], settings: dict[str, Any], budget: int
) -> cli.Outputs:
    """Writes adapters.json, adapters.md and adapters.png."""
    numbers = {"settings": settings, "budget": budget, "rows": [vars(row) for row in rows]}
    (out / "adapters.json").write_text(json.dumps(numbers, indent=2, default=str) + "\n")
    rounds = list(dict.fromkeys(row.round for row in rows))
    parts = [f"Loss on B of the base: {rows[0].before:.3f} nats a token."]
    for title in rounds:
        lines = [row.cells() for row in rows if row.round == title]
        parts += [f"## {title.capitalize()}", table(COLUMNS, lines).rstrip()]
    (out / "adapters.md").write_text("\n\n".join(parts) + "\n")
    names = {"numbers": "adapters.json", "table": "adapters.md", "figure": "adapters.png"}
    _draw(out / names["figure"], rows, rounds)
    return {kind: out / name for kind, name in names.items()}


def _draw(path: pathlib.Path, rows: Sequence[Row], rounds: Sequence[str]) -> None:
    """Loss on B against trained parameters, and forgetting of A by method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    names = list(dict.fromkeys(row.method for row in rows))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    marks = dict(zip(rounds, ("o", "s"), strict=False))
    for row in rows:
        y, style = statistics.mean(row.loss), dict(color=colours[row.method], ms=7, capsize=2)
        error = statistics.stdev(row.loss) if len(row.loss) > 1 else 0.0
        for panel, x in zip(panels, (row.trainable, statistics.mean(row.forgetting)), strict=True):
            panel.errorbar(x, y, error, fmt=marks[row.round], **style)
    for name in names:
        panels[0].plot([], [], "o", color=colours[name], label=name)
    for title, mark in marks.items():
        panels[0].plot([], [], mark, color="#666666", label=title)
    panels[0].axhline(rows[0].before, color="#999999", ls="--", lw=1)
    panels[0].annotate(
        "the base", (rows[0].trainable, rows[0].before), color="#666666", va="bottom"
    )
    panels[0].set(xscale="log", xlabel="trained parameters", ylabel="loss on B, held out (nats)")
    panels[1].set(xlabel="loss on A, held out, less the base's (nats)")
    panels[0].set_title("What is learnt, by size", loc="left")
    panels[1].set_title("What is learnt, and what is forgotten", loc="left")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
