"""Tables, numbers and curves of studies."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_numbers(path: pathlib.Path, settings: Any, results: Any) -> None:
    numbers = {"settings": dataclasses.asdict(settings), "results": results}
    path.write_text(json.dumps(numbers, indent=2, default=str) + "\n")


def draw_curves(
    path: pathlib.Path, curves: Mapping[str, Sequence[Sequence[float]]], ylabel: str
) -> None:
    """A line for each name: the mean of its runs by step, smoothed over 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, runs in curves.items():
        mean = np.mean(runs, axis=0)
        window = min(20, len(mean))
        smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
        panel.plot(np.arange(window, len(mean) + 1), smooth, label=name)
    panel.set(xlabel="step", ylabel=ylabel)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
