"""Stage 3 of DeepSeek-VL: fine-tuning of all but SAM's tower, on conversations.

See deepseek_vl_stages.py. Hardware: two CPU cores, 1 GiB, two minutes. Of 32 pictures that it has
not seen it says 26 captions to the word.
"""

from configs.deepseek_vl_stages import stage
from llmprep_jax.train.run import RunConfig


def get_config() -> RunConfig:
    return stage(
        3,
        model="runs/deepseek_vl_stage2",
        optim=dict(lr=1e-3, warmup_steps=10, weight_decay=0.0),
        steps=200,
    )
