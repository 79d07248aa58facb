"""A tiny model that sees and draws: pictures of 8 x 8 pixels, 16 codes each."""

import functools
import json
import pathlib

import tokenizers
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


CHARS = "abcdefghijklmnopqrstuvwxyz .,?\n"
TEMPLATE = (
    "{% for m in messages %}{{ 'U:' if m.role == 'user' else 'A:' }}{% for p in m.content %}"
    "{{ ' ' }}{{ '<image_placeholder>' if p.type == 'image' else p.text }}{% endfor %}"
    "{{ '<eos>' if m.role != 'user' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
SPECIAL = {"<bos>": 1, "<eos>": 2, "<pad>": 3, "<end_of_image>": END, "<begin_of_image>": BEGIN}
SPECIAL |= {"<image_placeholder>": IMAGE}


def write_processor(folder: pathlib.Path, **fields) -> None:
    """Files of a processor of single characters for the model."""
    texts = {text: i for i, text in enumerate(["U", "A", ":", *CHARS], start=10)}
    used = {**SPECIAL, **texts}
    others = {f"<{i}>": i for i in range(96) if i not in used.values()}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(used | others, [], unk_token="<0>"))
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATE}))
    size = CONFIG.vision.image_size
    images = {"image_processor_type": "JanusImageProcessor", "image_mean": [0.5] * 3}
    images |= {"image_std": [0.5] * 3, "size": {"height": size, "width": size}, "min_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    kind = {"processor_class": "JanusProcessor", "num_image_tokens": EACH, **fields}
    (folder / "processor_config.json").write_text(json.dumps(kind))
