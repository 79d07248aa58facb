"""LoRA on Gemma 3 4B with images: questions about generated documents.

The adapter is on the language model alone; `freeze=` takes the tower and the projector in too, and
`adapter.targets=q_proj,v_proj` fewer layers. Weights: google/gemma-3-4b-it, under the Gemma Terms
of Use (https://ai.google.dev/gemma/terms), from the hub or by `model=FOLDER`. Documents: `python -m
experiments.synthesize data/documents count=2000`. An image has 256 tokens. Hardware: one GPU of 40
GiB or eight TPU v5e (`mesh=v5e_8`); on a GPU of 16 GiB `adapter=QLoRA`. Only smaller models of this
shape have been run here.
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
        model="google/gemma-3-4b-it",
        adapter=LoRA(rank=16, alpha=32.0),
        freeze=("vision", "projector"),
        data=DataConfig(
            paths=(f"{DOCUMENTS}/train.jsonl",),
            seq_len=1024,
            batch_size=8,
            max_images=3,
            decoders=4,
        ),
        eval_data=DataConfig(
            paths=(f"{DOCUMENTS}/heldout.jsonl",), seq_len=1024, batch_size=8, max_images=3
        ),
        eval_batches=16,
        compute=Compute(dtype="bfloat16", param_dtype="bfloat16", remat="full"),
        optim=OptimConfig(lr=2e-4, warmup_steps=20, weight_decay=0.0),
        accumulate=4,
        steps=500,
        eval_every=100,
        checkpoint=CheckpointConfig(every=100),
        out=pathlib.Path("runs/gemma3_vision_lora"),
    )
