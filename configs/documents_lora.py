"""What runs with adapters on generated documents have in common.

Each is a config of its own: deepseek_vl2_lora.py, gemma3_vision_lora.py. Documents: `python -m
experiments.synthesize data/documents count=2000`.
"""

import pathlib
from typing import Any

from llmprep_jax.data import DataConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig

DOCUMENTS = "data/documents"


def tune(name: str, *, seq_len: int, max_images: int, **settings: Any) -> RunConfig:
    """The run of a name; `settings` are fields of RunConfig."""
    sizes = dict(seq_len=seq_len, batch_size=8, max_images=max_images)
    return RunConfig(
        data=DataConfig(paths=(f"{DOCUMENTS}/train.jsonl",), decoders=4, **sizes),
        eval_data=DataConfig(paths=(f"{DOCUMENTS}/heldout.jsonl",), **sizes),
        eval_batches=16,
        compute=Compute(dtype="bfloat16", param_dtype="bfloat16", remat="full"),
        optim=OptimConfig(lr=2e-4, warmup_steps=20, weight_decay=0.0),
        steps=500,
        eval_every=100,
        checkpoint=CheckpointConfig(every=100),
        out=pathlib.Path(f"runs/{name}"),
        **settings,
    )
