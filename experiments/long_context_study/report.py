"""The tables and the figure of `experiments.long_context`."""

import dataclasses
import itertools
import math
import pathlib
import statistics
from typing import Any

import numpy as np

from experiments.study.report import table, write_numbers
from llmprep_jax import cli

Losses = np.ndarray  # nats of each byte [B, T]


@dataclasses.dataclass(frozen=True)
class Way:
    """What one way to train at the long context takes.

    Attributes:
      temporaries: bytes of the compiled step, by length of the row.
    """

    trainable: int
    step_seconds: float
    temporaries: dict[int, int]


def write_report(
    settings: Any,
    losses: dict[str, Losses],
    ways: dict[str, Way],
    gains: dict[str, list[float]],
) -> cli.Outputs:
    """Prints the tables and writes all files.

    Args:
      losses: by model, on the same rows. gains: nats a byte that a context longer than the short
        one saves beyond it, one a row.
    """
    out: pathlib.Path = settings.out
    files = dict(numbers="json", table="md", figure="png")
    outputs = {kind: out / f"long_context.{end}" for kind, end in files.items()}
    ends = bucket_ends(settings.short, settings.long)
    buckets = list(itertools.pairwise(ends))
    by_bucket = {
        name: [math.exp(float(values[:, a:b].mean())) for a, b in buckets]
        for name, values in losses.items()
    }
    names = [f"{a} to {b}" for a, b in buckets]
    tables = [
        table(
            ["perplexity of a byte by its position", *names],
            [[name, *(f"{p:.2f}" for p in row)] for name, row in by_bucket.items()],
        ),
        table(
            ["", "trained weights", "a step", *(f"{n} tokens" for n in _lengths(ways))],
            [[name, *_cells(way)] for name, way in ways.items()],
        ),
        table(
            ["", "nats a byte saved by more context than the short one"],
            [[name, mean_and_error(values)] for name, values in gains.items()],
        ),
    ]
    print(*tables, sep="\n")
    outputs["table"].write_text("\n".join(tables))
    numbers = {
        "positions": buckets,
        "perplexity": by_bucket,
        "ways": {name: dataclasses.asdict(way) for name, way in ways.items()},
        "gains": gains,
    }
    write_numbers(outputs["numbers"], settings, numbers)
    draw(outputs["figure"], ends, by_bucket, settings.short)
    return outputs


def bucket_ends(short: int, long: int) -> list[int]:
    """0, short / 2, short, 2 short, ... doubling up to long."""
    ends = [0, short // 2]
    while ends[-1] < long:
        ends.append(min(2 * ends[-1], long))
    return ends


def mean_and_error(values: list[float]) -> str:
    """The mean over rows and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def _lengths(ways: dict[str, Way]) -> list[int]:
    return list(next(iter(ways.values())).temporaries)


def _cells(way: Way) -> list[str]:
    memory = (f"{size / 2**20:.0f} MiB" for size in way.temporaries.values())
    return [f"{way.trainable:,}", f"{way.step_seconds:.2f} s", *memory]


def draw(
    path: pathlib.Path, ends: list[int], by_bucket: dict[str, list[float]], short: int
) -> None:
    """Perplexity by position, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, values in by_bucket.items():
        style = ":" if "window" in name else "-"
        panel.stairs(values, ends, label=name, baseline=None, linestyle=style, linewidth=1.8)
    panel.axvline(short, color="grey", linewidth=0.8)
    panel.set(xlabel="position of a byte in its row", ylabel="perplexity of a byte", yscale="log")
    for formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        formatter("{x:g}")
    panel.set_xlim(0, ends[-1])
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    # below, where no line is
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
