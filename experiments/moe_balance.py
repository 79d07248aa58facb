"""Three ways to balance experts: none, a loss, and biases that follow the load, at equal seeds.

    python -m experiments.moe_balance [steps=300] [seeds=3] [alpha=0.01] [rate=0.01] [out=FOLDER]

A small DeepSeek-V3 of bytes (4 layers, 4 of 16 experts) is trained on Python's reference manual:
without any balance, with the loss of each sequence (DeepSeek-V3, eq. 17, weight `alpha`), and
without a loss but with biases that move by `rate` a step (2408.15664). MaxVio is by how much the
busiest expert is above the mean, as a share of it. Ends with a table (balance.md), a figure
(balance.png) and all numbers (balance.json).
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.moe_balance:Settings")

import dataclasses
import pathlib
import statistics

import jax
import rich
from flax import nnx

from experiments.study.moe import TINY, Sizes, train
from experiments.study.report import draw_curves, spread, table, write_numbers
from experiments.study.text import Batch, held_out, read_texts
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override
from llmprep_jax.nn.balance import Balance, load_metrics
from llmprep_jax.train.losses import training_loss

COLUMNS = ("balance by", "loss, held out", "MaxVio, held out", "MaxVio of the last steps' batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sizes):
    """Sizes of the study; `alpha` is the weight of the loss, `rate` the step of the biases."""

    alpha: float = 0.01  # weight of the balancing loss
    rate: float = 0.01  # by which biases move a step
    out: pathlib.Path = pathlib.Path("runs/moe_balance")  # a folder


@dataclasses.dataclass(frozen=True)
class Result:
    """By seed: nats of the next byte and MaxVio of held-out text, and MaxVio of every step."""

    loss: list[float] = dataclasses.field(default_factory=list)
    held_out: list[float] = dataclasses.field(default_factory=list)
    by_step: list[list[float]] = dataclasses.field(default_factory=list)

    def cells(self) -> list[str]:
        last = [statistics.mean(run[-max(1, len(run) // 10) :]) for run in self.by_step]
        return [spread(self.loss), spread(self.held_out), spread(last)]


def main(arguments: list[str]) -> cli.Outputs:
    cfg = override(Settings(), only_overrides(arguments))
    cfg.out.mkdir(parents=True, exist_ok=True)
    text = read_texts(None)["A"]
    tests = held_out(text, 64, cfg.length)
    balanced = dataclasses.replace(TINY, balance=Balance(expert=cfg.alpha))
    variants = {"nothing": (TINY, 0.0), "a loss": (balanced, 0.0), "biases": (TINY, cfg.rate)}
    results = {}
    for name, (model_cfg, rate) in variants.items():
        result = results[name] = Result()
        for seed, (model, series) in enumerate(train(model_cfg, cfg, text, rate)):
            loss, max_vio = map(float, evaluate(model, tests))
            result.loss.append(loss)
            result.held_out.append(max_vio)
            result.by_step.append(series["max_vio"])
            rich.print(f"{name}, seed {seed}: loss {loss:.3f}, MaxVio held out {max_vio:.2f}")
    return report(cfg, results)


@jax.jit
def evaluate(model: nnx.Module, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(nats of the next byte, MaxVio) of a batch."""
    loss = training_loss(model, batch)
    (counts,) = loss.stats["loads"].values()
    return loss.stats["parts"]["next_token_loss"] / loss.count, load_metrics(counts)["max_vio"]


def report(cfg: Settings, results: dict[str, Result]) -> cli.Outputs:
    names = {"numbers": "balance.json", "table": "balance.md", "figure": "balance.png"}
    outputs = {kind: cfg.out / name for kind, name in names.items()}
    write_numbers(outputs["numbers"], cfg, {name: vars(result) for name, result in results.items()})
    outputs["table"].write_text(table(COLUMNS, [[name, *r.cells()] for name, r in results.items()]))
    curves = {f"{name}: loss {spread(r.loss)}": r.by_step for name, r in results.items()}
    draw_curves(outputs["figure"], curves, "MaxVio of the batch, mean over layers")
    return outputs


if __name__ == "__main__":
    cli.run(main)
