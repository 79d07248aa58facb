"""One base, trained on text A, adapted to text B by every method: what is learnt, and at what cost.

    python -m experiments.adapters [base=tiny] [steps=100] [seeds=3] [out=runs/adapters]

A is Python's reference manual, which comes with Python, B Ambrose Bierce's "The Devil's Dictionary"
(1911). base=tiny first trains a byte-level model of 4 layers on A; base=smollm2 adapts
SmolLM2-135M as it is. Two rounds: all methods with usual settings, then those with a rank at LoRA's
number of trained parameters. Every method has its own learning rate, the best of a sweep by `lr=`
on seed 0. Ends with a table (adapters.md), a figure (adapters.png) and all numbers (adapters.json).
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.adapters:Settings")

import dataclasses
import pathlib
import statistics
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich
from flax import nnx

import llmprep_jax as lp
from configs.data.shipped import find_smollm2
from experiments.adapter_study.methods import at_budget, methods
from experiments.adapter_study.report import Row, write_report
from experiments.study.text import Batch, held_out, read_texts
from experiments.study.trainer import StudyTrainer
from llmprep_jax import cli, peft
from llmprep_jax.config import UsageError, only_overrides, override
from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config
from llmprep_jax.nn.param import AdapterParam, Compute, Param
from llmprep_jax.train.losses import next_token_loss

TINY = Config(vocab_size=256, dim=128, mlp_dim=384, num_layers=4, num_heads=4, num_kv_heads=2,
              head_dim=32, max_seq_len=1024, tie_embeddings=True)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Attributes:
      steps: of each adaptation. base_steps: of training the tiny base on A.
      rows, length: of a batch. methods: names of those that are run; (): all.
      lr: in place of every method's own, for a sweep, which has the first round alone.
    """

    base: Literal["tiny", "smollm2"] = "tiny"  # as above
    steps: int = 100
    base_steps: int = 600
    seeds: int = 3  # runs of each method
    rows: int = 8
    length: int = 128
    methods: tuple[str, ...] = ()
    lr: float | None = None
    out: pathlib.Path = pathlib.Path("runs/adapters")  # a folder


def main(arguments: list[str]) -> cli.Outputs:
    cfg = override(Settings(), only_overrides(arguments))
    known = methods(cfg.steps)
    unknown = set(cfg.methods) - set(known)
    if unknown:
        raise UsageError(f"methods={min(unknown)}; the methods are {', '.join(known)}")
    cfg.out.mkdir(parents=True, exist_ok=True)
    base, texts = prepare(cfg)
    usual = {name: known[name] for name in cfg.methods or known}
    budget = peft.count(peft.inject(base, known["LoRA"].settings)).trainable
    swept = {} if cfg.lr else usual
    equal = {name: at_budget(method, base, budget) for name, method in swept.items()}
    rows = []
    for title, chosen in (("equal steps", usual), ("equal parameters", equal)):
        for name, method in chosen.items():
            if method is not None:
                rows.append(study(cfg, name, title, method, base, texts))
                rich.print(rows[-1].line())
    return write_report(cfg.out, rows, dataclasses.asdict(cfg), budget)


def prepare(cfg: Settings) -> tuple[nnx.Module, dict[str, np.ndarray]]:
    """The base model and both texts as its tokens."""
    if cfg.base == "smollm2":
        compute = Compute(dtype="float32", matmul_dtype="bfloat16", param_dtype="float32")
        encode = lp.load_processor(find_smollm2()).tokenizer.encode
        return lp.load_model(find_smollm2(), compute=compute), read_texts(encode)
    texts = read_texts(None)
    model = jax.jit(lambda: registry.build(TINY, rngs=nnx.Rngs(0)))()
    trained = StudyTrainer(
        model, Param, lr=3e-3, steps=cfg.base_steps, rows=cfg.rows, length=cfg.length
    )
    trained.run(model, texts["A"], seed=0)
    return trained.model, texts


def study(cfg: Settings, name: str, title: str, method: Any, base: nnx.Module, texts: dict) -> Row:
    """Adapts the base to B by one method, once a seed."""
    tests = {text: held_out(tokens, 32, cfg.length) for text, tokens in texts.items()}
    start = {text: nll(base, batch) for text, batch in tests.items()}
    kind = Param if method.settings is None else AdapterParam
    trainer, ends, errors = None, [], []
    for seed in range(cfg.seeds):
        model = method.apply(base, seed)
        trainer = trainer or StudyTrainer(
            model, kind, lr=cfg.lr or method.lr, steps=cfg.steps, rows=cfg.rows, length=cfg.length
        )
        trainer.run(model, texts["B"], seed)
        ends.append({text: nll(trainer.model, batch) for text, batch in tests.items()})
        errors.append(merge_error(trainer.model, texts["B"][: cfg.length]))
    return Row(
        method=name,
        round=title,
        trainable=trainer.trainable,
        lr=trainer.lr,
        before=start["B"],
        loss=[end["B"] for end in ends],
        forgetting=[end["A"] - start["A"] for end in ends],
        step_seconds=statistics.median(trainer.seconds),
        peak_bytes=trainer.peak_bytes,
        merge_error=max(errors),
    )


@jax.jit
def _nll(model: nnx.Module, batch: Batch) -> jax.Array:
    loss = next_token_loss(model, batch)
    return loss.total / loss.count


def nll(model: nnx.Module, batch: Batch) -> float:
    """Nats a token."""
    return float(_nll(model, batch))


def merge_error(model: nnx.Module, tokens: np.ndarray) -> float:
    """How far the merged model's logits are from the adapted one's, as a share of the largest."""
    if not peft.is_adapted(model):
        return 0.0
    expected, merged = (m(tokens[None]).logits for m in (model, peft.merge(model)))
    return float(jnp.max(jnp.abs(merged - expected)) / jnp.max(jnp.abs(expected)))


if __name__ == "__main__":
    cli.run(main)
