"""A context of 512 bytes made one of 4,096: what each position's byte costs, before and after.

    python -m experiments.long_context [base_steps=2000] [steps=200] [out=runs/long_context]

A small Llama of bytes is trained on modules of Python's standard library at `short` tokens, and is
lost beyond them. Its positions are interpolated (Chen et al. 2023), and it is trained on at `long`
tokens by LongLoRA, whose groups see a quarter of a row, and for comparison by the same LoRA with
full attention. All are evaluated with full attention, on equal rows. Ends with tables
(long_context.md), a figure (long_context.png) and all numbers (long_context.json).
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.long_context:Settings")

import dataclasses
import functools
import pathlib
import statistics

import jax
import numpy as np
import rich
from flax import nnx

import llmprep_jax as lp
from experiments.long_context_study.positions import losses
from experiments.long_context_study.report import Way, write_report
from experiments.study.text import held_out, read_modules
from experiments.study.trainer import StudyTrainer
from llmprep_jax import cli, peft
from llmprep_jax.config import only_overrides, override
from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config
from llmprep_jax.nn.param import AdapterParam, Compute, Param
from llmprep_jax.nn.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Attributes:
      base_steps: of the training at `short`, on `rows` rows each. steps: of each extension, on one
        row each. dim, layers: of the model.
      test_rows: held-out rows of `long`.
    """

    base: pathlib.Path | None = None  # a folder of a model of bytes, in place of training one
    base_steps: int = 2000
    rows: int = 2  # of a batch
    steps: int = 200
    short: int = 512  # tokens of a row
    long: int = 4096  # tokens of a row; a multiple of `short`
    dim: int = 128
    layers: int = 2
    base_lr: float = 3e-3  # peak learning rate at `short`
    lr: float = 3e-3  # peak learning rate of an extension
    test_rows: int = 8
    out: pathlib.Path = pathlib.Path("runs/long_context")  # a folder


def main(arguments: list[str]) -> cli.Outputs:
    cfg = override(Settings(), only_overrides(arguments))
    cfg.out.mkdir(parents=True, exist_ok=True)
    text = read_modules(least=4 * cfg.long)
    tests = held_out(text, cfg.test_rows, cfg.long)
    evaluate = functools.partial(losses, tokens=tests["tokens"], targets=tests["targets"])
    base = lp.load_model(cfg.base) if cfg.base else train_base(cfg, text)
    wide = interpolate(base, cfg.long / cfg.short)
    curves = {
        "trained at short": evaluate(base),
        "the same, a window of short": evaluate(base, window=cfg.short),
        "interpolated": evaluate(wide),
    }
    ways, gains = {}, {}
    for name, method in methods().items():
        way, model = extend(cfg, method, wide, text)
        ways[name], curves[name] = way, evaluate(model)
        in_window = curves[f"{name}, a window of short"] = evaluate(model, window=cfg.short)
        gains[name] = (in_window - curves[name])[:, cfg.short :].mean(axis=1).tolist()
        rich.print(f"{name}: {way.step_seconds:.2f} s a step")
    return write_report(cfg, curves, ways, gains)


def train_base(cfg: Settings, text: np.ndarray) -> nnx.Module:
    """A model trained at `short`, which is written to base/ as well."""
    model_cfg = Config(
        vocab_size=256,
        dim=cfg.dim,
        mlp_dim=3 * cfg.dim,
        num_layers=cfg.layers,
        num_heads=cfg.dim // 32,
        num_kv_heads=cfg.dim // 64,
        head_dim=32,
        max_seq_len=cfg.short,
        tie_embeddings=True,
        compute=Compute(),
    )
    model = jax.jit(lambda: registry.build(model_cfg, rngs=nnx.Rngs(0)))()
    trainer = StudyTrainer(
        model, Param, lr=cfg.base_lr, steps=cfg.base_steps, rows=cfg.rows, length=cfg.short
    )
    trainer.run(model, text, seed=0)
    lp.save_model(trainer.model, cfg.out / "base")
    rich.print(f"trained at {cfg.short}: {statistics.median(trainer.seconds):.2f} s a step")
    return trainer.model


def interpolate(model: nnx.Module, factor: float) -> nnx.Module:
    """The same weights at positions divided by `factor`."""
    scaling = RopeScaling("linear", factor)
    max_seq_len = int(model.cfg.max_seq_len * factor)
    cfg = dataclasses.replace(model.cfg, rope_scaling=scaling, max_seq_len=max_seq_len)
    return nnx.merge(nnx.split(registry.abstract(cfg))[0], nnx.split(model)[1])


def methods() -> dict[str, peft.LoRA]:
    """LongLoRA, and the LoRA that it is without its groups."""
    long = peft.LongLoRA()
    same = {f.name: getattr(long, f.name) for f in dataclasses.fields(peft.LoRA)}
    return {"LongLoRA": long, "full attention": peft.LoRA(**same)}


def extend(
    cfg: Settings, method: peft.LoRA, base: nnx.Module, text: np.ndarray
) -> tuple[Way, nnx.Module]:
    """The base trained on at `long`, and what that takes."""
    model = peft.inject(base, method)
    make = functools.partial(StudyTrainer, model, AdapterParam, lr=cfg.lr, steps=cfg.steps, rows=1)
    lengths = [cfg.long // 4, cfg.long // 2, cfg.long]
    trainers = [make(length=length) for length in lengths]
    trainer = trainers[-1]
    trainer.run(model, text, seed=1)
    temporaries = {n: t.temporary_bytes for n, t in zip(lengths, trainers, strict=True)}
    return Way(trainer.trainable, statistics.median(trainer.seconds), temporaries), trainer.model


if __name__ == "__main__":
    cli.run(main)
