"""LoRA on DeepSeek-VL2 Tiny: questions about generated documents in English and Chinese.

The adapter is on attention, experts and shared experts of the language model; the projector is
trained whole beside it, and the tower stays as it is. Weights: deepseek-ai/deepseek-vl2-tiny (3.4 B
parameters) from the hub or by `model=FOLDER`. Documents: `python -m experiments.synthesize
data/documents count=2000 language=en,zh-Hans`. A picture is cut into up to nine tiles beside the
whole, 421 to 2,101 tokens. Hardware: one GPU of 40 GiB or eight TPU v5e (`mesh=v5e_8`). Only
smaller models of this shape have been run here.
"""

from configs.documents_lora import tune
from llmprep_jax.peft import LoRA
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return tune(
        "deepseek_vl2_lora",
        seq_len=2304,
        max_images=10,
        model="deepseek-ai/deepseek-vl2-tiny",
        adapter=LoRA(rank=16, alpha=32.0, modules_to_save="projector"),
        freeze=("vision",),
        accumulate=8,
    )
