"""LoRA on DeepSeek-VL2 Tiny: questions about generated documents in English and Chinese.

The adapter is on attention, experts and shared experts of the language model; the projector is
trained whole beside it, and the tower stays as it is. Weights: deepseek-ai/deepseek-vl2-tiny (3.4 B
parameters) from the hub or by `model=FOLDER`. Documents: `python -m experiments.synthesize
data/documents count=2000 language=en,zh-Hans`. A picture is cut into up to nine tiles beside the
whole, 421 to 2,101 tokens. Hardware: one GPU of 40 GiB or eight TPU v5e (`mesh=v5e_8`). Only
smaller models of this shape have been run here.
"""

import pathlib

from llmprep_jax.data import DataConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.peft import LoRA
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig

DOCUMENTS = "data/documents"


def get_config() -> RunConfig:
    return RunConfig(
        model="deepseek-ai/deepseek-vl2-tiny",
        adapter=LoRA(rank=16, alpha=32.0, modules_to_save="projector"),
        freeze=("vision",),
        data=DataConfig(
            paths=(f"{DOCUMENTS}/train.jsonl",),
            seq_len=2304,
            batch_size=8,
            max_images=10,
            decoders=4,
        ),
        eval_data=DataConfig(
            paths=(f"{DOCUMENTS}/heldout.jsonl",), seq_len=2304, batch_size=8, max_images=10
        ),
        eval_batches=16,
        compute=Compute(dtype="bfloat16", param_dtype="bfloat16", remat="full"),
        optim=OptimConfig(lr=2e-4, warmup_steps=20, weight_decay=0.0),
        accumulate=8,
        steps=500,
        eval_every=100,
        checkpoint=CheckpointConfig(every=100),
        out=pathlib.Path("runs/deepseek_vl2_lora"),
    )
