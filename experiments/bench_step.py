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
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

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


def batch_of(settings: Settings, vocab_size: int) -> dict[str, np.ndarray]:
    shape = (settings.batch, settings.seq + 1)
    rows_BT = np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32)
    return {
        "tokens": rows_BT[:, :-1],
        "targets": rows_BT[:, 1:],
        "loss_mask": np.ones((settings.batch, settings.seq), np.float32),
    }


def ours(settings: Settings, operands: str) -> Callable[[], Any]:
    """A call that takes one of our training steps."""
    import jax
    from flax import nnx

    from llmprep_jax import peft
    from llmprep_jax.models import registry
    from llmprep_jax.models.llama.config import Config
    from llmprep_jax.nn.param import TRAINED, AdapterParam, Compute

    cfg = registry.preset("smollm2-135m")
    if settings.work == "tiny":
        cfg = Config(head_dim=64, max_seq_len=2048, tie_embeddings=True, **TINY)
    cfg = dataclasses.replace(cfg, compute=Compute(matmul_dtype=operands))
    model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
    if settings.work == "lora":
        model = peft.inject(model, peft.LoRA(rank=16, alpha=32))
    trainable = AdapterParam if settings.work == "lora" else TRAINED
    return training_call(model, trainable, batch_of(settings, cfg.vocab_size))


def training_call(model: Any, trainable: Any, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A call that takes one step on the batch by AdamW."""
    from llmprep_jax.train.optim import OptimConfig
    from llmprep_jax.train.trainer import FitConfig, Trainer

    optim = OptimConfig(lr=1e-4, schedule="constant", router_bias_until=1.0)
    trainer = Trainer(model, trainable, FitConfig(steps=1000, optim=optim))
    steps = trainer.steps(itertools.repeat(batch))
    return lambda: float(next(steps)["loss"])


def theirs(settings: Settings, dtype: str) -> Callable[[], Any]:
    """A call that takes one step of transformers (+ PEFT) on torch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    sizes |= dict(num_attention_heads=9, num_key_value_heads=3)
    if settings.work == "tiny":
        sizes = dict(vocab_size=4096, hidden_size=256, intermediate_size=1024)
        sizes |= dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    model = model.to(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    if settings.work == "lora":
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    tokens = torch.tensor(batch_of(settings, sizes["vocab_size"])["tokens"], device=device).long()
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, dtype == "autocast")

    def call():
        with autocast():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return call


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
