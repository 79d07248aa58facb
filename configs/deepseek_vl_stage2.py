"""Stage 2 of DeepSeek-VL: projector and language model learn together, texts among the images.

Two rows of three are of text, as in the paper seven of ten are, so that the language model does not
forget it; `data.weights` are shares of rows. See deepseek_vl_stages.py. Hardware: two CPU cores, 1
GiB, two minutes.
"""

from configs.data.shapes import FILE
from configs.data.shipped import DATA
from configs.deepseek_vl_stages import stage
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return stage(
        2,
        model="runs/deepseek_vl_stage1",
        data=dict(paths=(str(FILE), str(DATA)), weights=(1.0, 2.0)),
        optim=dict(lr=3e-3, warmup_steps=20, weight_decay=0.0),
        steps=300,
    )
