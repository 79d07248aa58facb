"""LoRA on Gemma 3 4B with images: questions about generated documents.

The adapter is on the language model alone; `freeze=` takes the tower and the projector in too, and
`adapter.targets=q_proj,v_proj` fewer layers. Weights: google/gemma-3-4b-it, under the Gemma Terms
of Use (https://ai.google.dev/gemma/terms), from the hub or by `model=FOLDER`. Documents: `python -m
experiments.synthesize data/documents count=2000`. An image has 256 tokens. Hardware: one GPU of 40
GiB or eight TPU v5e (`mesh=v5e_8`); on a GPU of 16 GiB `adapter=QLoRA`. Only smaller models of this
shape have been run here.
"""

from configs.documents_lora import tune
from llmprep_jax.peft import LoRA
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return tune(
        "gemma3_vision_lora",
        seq_len=1024,
        max_images=3,
        model="google/gemma-3-4b-it",
        adapter=LoRA(rank=16, alpha=32.0),
        freeze=("vision", "projector"),
        accumulate=4,
    )
