"""A DeepSeek-V3 of 15.6 M parameters from random weights: latent attention, 16 experts, MTP.

Four layers, the first of them dense; 4 of 16 experts and a shared one a token, kept in balance by
biases without a loss to speak of; one module that predicts a token further. Hardware: two CPU
cores, 2 GiB; or eight CPU devices by `mesh=cpu_2x4` (JAX_NUM_CPU_DEVICES=8), experts over four of
them.
"""

import pathlib

from configs.data.shipped import DATA, find_smollm2
from llmprep_jax.data import DataConfig
from llmprep_jax.models.deepseek.presets import V3_TINY
from llmprep_jax.nn.param import Compute
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        architecture=V3_TINY,
        tokenizer=find_smollm2,
        data=DataConfig(paths=(str(DATA),), seq_len=128, batch_size=8, holdout=0.05),
        # a short run: the biases move ten times as far a step as in V3's long one
        optim=OptimConfig(lr=3e-3, warmup_steps=20, schedule="wsd", router_bias_rate=0.01),
        compute=Compute(matmul_dtype="bfloat16"),
        steps=300,
        eval_every=100,
        checkpoint=CheckpointConfig(every=100, keep_last=2),
        out=pathlib.Path("runs/deepseek_v3_tiny"),
    )
