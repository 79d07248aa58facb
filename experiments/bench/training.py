"""Training steps to be timed: ours, and those of transformers (+ PEFT) on torch.

The same work for both: AdamW, gradients clipped by their norm, r16 LoRA on all linear layers or all
weights, the same tokens. Each function builds a model of random weights and returns the call.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

Kind = Literal["lora", "full"]
RANK, ALPHA, RATE = 16, 32, 1e-4


def batch_of(rows: int, length: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Random rows of tokens and what follows each."""
    rows_BT = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
    return {
        "tokens": rows_BT[:, :-1],
        "targets": rows_BT[:, 1:],
        "loss_mask": np.ones((rows, length), np.float32),
    }


def our_step(cfg: Any, kind: Kind, batch: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    """A call that takes one of our training steps and returns its loss, maybe still under way."""
    import jax
    from flax import nnx

    from llmprep_jax import peft
    from llmprep_jax.models import registry
    from llmprep_jax.nn.param import TRAINED, AdapterParam

    model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
    if kind == "lora":
        model = peft.inject(model, peft.LoRA(rank=RANK, alpha=ALPHA))
    return training_call(model, AdapterParam if kind == "lora" else TRAINED, batch)


def training_call(model: Any, trainable: Any, batch: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    """A call that takes one step on the batch by AdamW and returns its loss."""
    from llmprep_jax.train.optim import OptimConfig
    from llmprep_jax.train.trainer import FitConfig, Trainer

    optim = OptimConfig(lr=RATE, schedule="constant", router_bias_until=1.0)
    trainer = Trainer(model, trainable, FitConfig(steps=1000, optim=optim))
    steps = trainer.steps(itertools.repeat(batch))
    return lambda: next(steps)["loss"]


def their_step(
    hf: Mapping[str, Any],
    kind: Kind,
    batch: Mapping[str, np.ndarray],
    dtype: Literal["float32", "bfloat16", "autocast"],
    compiled: bool = False,
) -> Callable[[], Any]:
    """A call that takes one step of transformers' Llama and returns its loss.

    Args:
      hf: fields of its config.json.
      dtype: of weights and activations; "autocast" is bf16 activations with float32 weights.
      compiled: by torch.compile.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    with torch.device(device):
        config = LlamaConfig(**hf, attn_implementation="sdpa")
        model = AutoModelForCausalLM.from_config(config, dtype=kept)
    if kind == "lora":
        settings = dict(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        model = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=device == "cuda")
    tokens = torch.tensor(batch["tokens"], device=device).long()
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, dtype == "autocast")
    model = torch.compile(model) if compiled else model

    def call():
        with autocast():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return call
