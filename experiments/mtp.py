"""Multi-token prediction: what it does to the loss of the next token, and what it drafts for.

    python -m experiments.mtp [steps=300] [seeds=3] [weight=0.3] [out=FOLDER]

A small DeepSeek-V3 of bytes is trained on Python's reference manual with and without a module that
predicts a byte further (DeepSeek-V3, section 2.2, lambda `weight`), for equal steps. Then the model
with it goes on from held-out text, greedy: plainly, and with its module as the draft, which gives
the same text. Ends with a table (mtp.md), a figure (mtp.png) and all numbers (mtp.json).
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.mtp:Settings")

import dataclasses
import pathlib
import time

import jax
import numpy as np
import rich
from flax import nnx

import llmprep_jax as lp
from experiments.study.moe import TINY, Sizes, train
from experiments.study.report import draw_curves, spread, table, write_numbers
from experiments.study.text import Batch, held_out, read_texts
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override
from llmprep_jax.models import registry
from llmprep_jax.nn.param import Compute
from llmprep_jax.train.losses import next_token_loss

COLUMNS = (
    "prediction modules",
    "loss of the next byte",
    "tokens a verifying pass",
    "speed against plain",
)
PROMPTS, PROMPT, NEW = 8, 64, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sizes):
    """Sizes of the study; `weight` is that of the further token's loss, `rate` of the biases."""

    weight: float = 0.3  # of the loss of the further token
    rate: float = 0.01  # by which biases of routers move a step
    out: pathlib.Path = pathlib.Path("runs/mtp")  # a folder


@dataclasses.dataclass(frozen=True)
class Result:
    """By seed: nats of the next byte held out and by step, tokens a verifying pass, speed-up."""

    loss: list[float] = dataclasses.field(default_factory=list)
    by_step: list[list[float]] = dataclasses.field(default_factory=list)
    tokens_per_pass: list[float] = dataclasses.field(default_factory=list)
    speed_up: list[float] = dataclasses.field(default_factory=list)

    def cells(self) -> list[str]:
        drafted = (self.tokens_per_pass, self.speed_up)
        return [spread(self.loss), *(spread(values) if values else "" for values in drafted)]


def main(arguments: list[str]) -> cli.Outputs:
    cfg = override(Settings(), only_overrides(arguments))
    cfg.out.mkdir(parents=True, exist_ok=True)
    text = read_texts(None)["A"]
    tests, results = held_out(text, 64, cfg.length), {}
    for num_mtp in (0, 1):
        result = results["one" if num_mtp else "none"] = Result()
        model_cfg = dataclasses.replace(TINY, num_mtp=num_mtp, mtp_weight=cfg.weight)
        for seed, (model, series) in enumerate(train(model_cfg, cfg, text, cfg.rate)):
            result.loss.append(float(evaluate(model, tests)))
            result.by_step.append(series["loss"])
            line = f"{num_mtp} modules, seed {seed}: loss {result.loss[-1]:.3f}"
            if num_mtp:
                prompts = tests["tokens"][:PROMPTS, :PROMPT]
                tokens_per_pass, speed_up = draft(in_float32(model), prompts)
                result.tokens_per_pass.append(tokens_per_pass)
                result.speed_up.append(speed_up)
                line += f", {tokens_per_pass:.2f} tokens a pass, {speed_up:.2f} x as fast"
            rich.print(line)
    return report(cfg, results)


@jax.jit
def evaluate(model: nnx.Module, batch: Batch) -> jax.Array:
    """Nats of the next byte."""
    loss = next_token_loss(model, batch)
    return loss.total / loss.count


def in_float32(model: nnx.Module) -> nnx.Module:
    """The same weights computed with in float32: in bf16, near ties go either way."""
    cfg = dataclasses.replace(model.cfg, compute=Compute())
    abstract = registry.abstract(cfg)
    return nnx.merge(nnx.split(abstract)[0], nnx.split(model)[1])


def draft(model: nnx.Module, prompts: np.ndarray) -> tuple[float, float]:
    """(tokens a verifying pass, plain time over drafted), one prompt at a time.

    Raises:
      RuntimeError: the texts differ.
    """
    acceptances, seconds = [], {None: 0.0, "mtp": 0.0}
    for number, prompt in enumerate([prompts[:1], *prompts[:, None]]):
        texts = []
        for kind in seconds:
            began = time.perf_counter()
            options = dict(max_new_tokens=NEW, draft=kind, report=acceptances.append)
            texts.append(np.asarray(lp.generate_tokens(model, prompt, **options)))
            if number:  # the first one compiles
                seconds[kind] += time.perf_counter() - began
        if not np.array_equal(*texts):
            raise RuntimeError(f"drafting changed the text after prompt {number}")
    tokens_per_pass = float(np.mean([acceptance.tokens_per_step for acceptance in acceptances]))
    return tokens_per_pass, seconds[None] / seconds["mtp"]


def report(cfg: Settings, results: dict[str, Result]) -> cli.Outputs:
    outputs = {
        kind: cfg.out / f"mtp.{end}"
        for kind, end in dict(numbers="json", table="md", figure="png").items()
    }
    write_numbers(outputs["numbers"], cfg, {name: vars(result) for name, result in results.items()})
    outputs["table"].write_text(table(COLUMNS, [[name, *r.cells()] for name, r in results.items()]))
    curves = {f"{name}, held out {spread(r.loss)}": r.by_step for name, r in results.items()}
    draw_curves(outputs["figure"], curves, "loss of the next byte (nats)")
    return outputs


if __name__ == "__main__":
    cli.run(main)
