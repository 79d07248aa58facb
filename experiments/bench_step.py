"""Training speed: us and transformers + PEFT, in turn in one run.

    python -m experiments.bench_step [work=lora] [rounds=7] [batch=2] [seq=256] [out=FILE.json]

work: lora (r16 on all linear layers), full, or tiny (a 4-layer model, all weights). Random weights
of SmolLM2-135M's shape, AdamW, the same number of tokens a step for all. Each contender is a
process of its own, all on huge pages; they take turns, one step each a round. A ratio is the peer's
median over ours. MFU is not given: on a CPU there is no stated peak.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_step:Settings", compile_cache=False)

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

from experiments.bench.training import batch_of, our_step, their_step
from experiments.study import contest
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a step; `rounds` timed steps of each contender."""

    work: Literal["lora", "full", "tiny"] = "lora"  # as above
    batch: int = 2  # rows
    seq: int = 256  # tokens of a row
    rounds: int = 7  # timed calls of each contender
    out: pathlib.Path | None = None  # a JSON file for the numbers


TINY = dict(vocab_size=4096, dim=256, mlp_dim=1024, num_layers=4, num_heads=4, num_kv_heads=4)


def ours(settings: Settings, operands: str) -> Callable[[], Any]:
    """A call that takes one of our training steps."""
    from llmprep_jax.models import registry
    from llmprep_jax.models.llama.config import Config
    from llmprep_jax.nn.param import Compute

    cfg = registry.preset("smollm2-135m")
    if settings.work == "tiny":
        cfg = Config(head_dim=64, max_seq_len=2048, tie_embeddings=True, **TINY)
    cfg = dataclasses.replace(cfg, compute=Compute(matmul_dtype=operands))
    batch = batch_of(settings.batch, settings.seq, cfg.vocab_size)
    step = our_step(cfg, "lora" if settings.work == "lora" else "full", batch)
    return lambda: float(step())


def theirs(settings: Settings, dtype: str) -> Callable[[], Any]:
    """A call that takes one step of transformers (+ PEFT) on torch."""
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    sizes |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    if settings.work == "tiny":
        sizes |= dict(vocab_size=4096, hidden_size=256, intermediate_size=1024)
        sizes |= dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
    batch = batch_of(settings.batch, settings.seq, sizes["vocab_size"])
    step = their_step(sizes, "lora" if settings.work == "lora" else "full", batch, dtype)
    return lambda: step().item()


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    contenders = {
        "ours, float32": (ours, dict(settings=settings, operands="float32")),
        "ours, bf16 operands": (ours, dict(settings=settings, operands="bfloat16")),
        "torch, float32": (theirs, dict(settings=settings, dtype="float32")),
        "torch, bfloat16": (theirs, dict(settings=settings, dtype="bfloat16")),
        "torch, autocast to bf16": (theirs, dict(settings=settings, dtype="autocast")),
    }
    scores = contest.compete(contenders, rounds=settings.rounds)
    title = f"{settings.work}: {settings.batch} x {settings.seq} tokens a step"
    return contest.report(settings.out, title, settings.batch * settings.seq, scores)


if __name__ == "__main__":
    cli.run(main)
