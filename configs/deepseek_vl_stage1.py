"""Stage 1 of DeepSeek-VL: the projector learns to put images in terms of a language model.

See deepseek_vl_stages.py. Hardware: two CPU cores, 1 GiB, a minute. The language model is of random
weights here, so the loss falls a little and no more.
"""

from configs.deepseek_vl_stages import MODEL, stage
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return stage(
        1,
        architecture=MODEL,
        optim=dict(lr=3e-3, warmup_steps=10, weight_decay=0.0),
        steps=100,
    )
