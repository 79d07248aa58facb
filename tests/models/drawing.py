"""A tiny model that sees and draws: pictures of 8 x 8 pixels, 16 codes each."""

import functools

from flax import nnx

from llmprep_jax.models import janus, llama, siglip
from tests.models.tiny import random_model

IMAGE, BEGIN, END, WORDS = 95, 94, 93, 90
CONFIG = janus.Config(
    llama.Config(
        vocab_size=96,
        dim=32,
        mlp_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_layers=2,
        max_seq_len=128,
    ),
    siglip.VisionConfig(16, 24, 2, 2, image_size=8, patch_size=2, act="gelu", has_pool=False),
    janus.VQConfig(40, 4, 12, 64, (1, 1), 1),
    image_id=IMAGE,
)
EACH = CONFIG.tokens_per_image


@functools.cache
def model() -> nnx.Module:
    return random_model(CONFIG)
