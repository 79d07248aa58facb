"""A model of DeepSeek-VL2's shape that is small enough to learn to read on two cores.

All that the released Tiny has is there: tiles of a page and the page as a whole through a SigLIP
tower, the projector, newlines and separator, and a language model with experts and plain attention.
Its tokens are digits, words and Chinese characters: numbers are spelled, words are known as wholes.
"""

import json
import pathlib
from collections.abc import Iterable

import jax
import tokenizers
from flax import nnx

from llmprep_jax.models import deepseek, deepseek_vl2, registry, siglip
from llmprep_jax.models.deepseek_vl2.processor import Processor
from llmprep_jax.nn.moe import Routing
from llmprep_jax.nn.param import Compute

SPECIAL = ("<bos>", "<eos>", "<pad>", "<image>", "<unk>")
WRITTEN = "<|User|>: Assistant\n"  # by the chat template
PIECES = r" ?[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]"  # what a token may span at most
VOCABULARY = 1000  # tokens at most; fewer, where there are no more words
COMPUTE = Compute(unroll=0)  # 15 % faster than a scan at this size
PATCHES = 8  # across a page; 2 x 2 of them are a token


def write_processor(folder: pathlib.Path, texts: Iterable[str], width: int) -> Processor:
    """The processor of pages `width` pixels wide and high, whose tokens are the texts' words.

    Args:
      folder: where its files are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False
    )
    core.train_from_iterator([*texts, WRITTEN], trainer)
    core.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_config.json": {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
        },
        "processor_config.json": {
            "processor_class": "DeepseekVLV2Processor",
            "candidate_resolutions": [[width, width]],
            "patch_size": width // PATCHES,
            "downsample_ratio": 2,
            "image_token": "<image>",
            # white is 0: of features of mostly white pages by the usual 0.5, three quarters of the
            # spread are common to all pages, and 400 steps taught nothing of what is on them
            "image_mean": [1.0] * 3,
            "image_std": [0.25] * 3,
        },
    }
    for name, content in fields.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Processor.from_path(folder)


def make_reader(processor: Processor, seed: int, dim: int = 96, layers: int = 3) -> nnx.Module:
    """A model with random weights: one dense layer, and then layers of 4 experts, 2 active."""
    tokenizer, edge = processor.tokenizer, processor.images.edge
    ids = {name: vocab_id(processor, f"<{name}>") for name in ("bos", "eos", "pad", "image")}
    language = deepseek.Config(
        vocab_size=tokenizer.vocab_size,
        dim=dim,
        mlp_dim=3 * dim,
        expert_dim=dim,
        num_layers=layers,
        num_heads=4,
        routing=Routing(4, 2),
        attention="heads",
        q_rank=None,
        max_seq_len=1024,
        bos_id=ids["bos"],
        eos_ids=(ids["eos"],),
        pad_id=ids["pad"],
        model_type="deepseek_v2",
    )
    width = 3 * dim // 4
    vision = siglip.VisionConfig(
        dim=width,
        mlp_dim=4 * width,
        num_layers=layers,
        num_heads=4,
        image_size=edge,
        patch_size=edge // PATCHES,
        has_pool=False,
    )
    sizes = dict(image_id=ids["image"], resolutions=((edge, edge),))
    cfg = deepseek_vl2.Config(language, vision, **sizes).with_compute(COMPUTE)
    return jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(seed)))()


def vocab_id(processor: Processor, token: str) -> int:
    (number,) = processor.tokenizer.encode(token, add_special=False)
    return number
