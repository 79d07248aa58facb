"""A Janus that is small enough to learn to draw on two cores, and its processor of whole words."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import rich.progress
import tokenizers
from flax import nnx

from configs.data.shapes import TEMPLATE
from llmprep_jax.models import janus, llama, registry, siglip
from llmprep_jax.models.janus.processor import BEGIN, END, MARKER, Processor
from llmprep_jax.nn.param import Compute
from llmprep_jax.runs import pixels_of
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer, make_loss

SIDE, SCALE = 16, 4  # pixels of a picture, and of what a code stands for, each side
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", MARKER, BEGIN, END)
WRITTEN = "User: Assistant:"  # by the chat template
COMPUTE = Compute(unroll=0)  # no scan over three layers


def write_processor(folder: pathlib.Path, texts: Iterable[str]) -> Processor:
    """The processor of pictures and of the words of some texts, whose files are written."""
    folder.mkdir(parents=True, exist_ok=True)
    split = tokenizers.pre_tokenizers.Whitespace()
    words = {word for text in (*texts, WRITTEN) for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(words)))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    core.add_special_tokens(list(SPECIAL))
    core.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "chat_template": TEMPLATE,
        },
        "preprocessor_config.json": {
            "image_processor_type": "JanusImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
            "min_size": SIDE,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        "processor_config.json": {
            "processor_class": "JanusProcessor",
            "num_image_tokens": (SIDE // SCALE) ** 2,
        },
    }
    for name, content in fields.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Processor.from_path(folder)


def make_drawer(
    processor: Processor, seed: int, dim: int = 128, layers: int = 3, codes: int = 128
) -> nnx.Module:
    """A model with random weights. What it would see by is as small as can be: nothing is shown."""
    tokenizer = processor.tokenizer
    language = llama.Config(
        vocab_size=tokenizer.vocab_size,
        dim=dim,
        mlp_dim=3 * dim,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=dim // 4,
        max_seq_len=128,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
        pad_id=processor.pad_id,
    )
    vision = siglip.VisionConfig(
        16, 32, 1, 2, image_size=SIDE, patch_size=SCALE, act="gelu", has_pool=False
    )
    vq = janus.VQConfig(codes, 8, 32, base_dim=64, multipliers=(1, 1, 1), num_blocks=1)
    (image_id,) = tokenizer.encode(MARKER, add_special=False)
    cfg = janus.Config(language, vision, vq, image_id).with_compute(COMPUTE)
    return jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(seed)))()


def train(
    model: nnx.Module, processor: Processor, batches: Any, steps: int, lr: float
) -> tuple[nnx.Module, list[float]]:
    """The model after so many batches, and the code_loss of each; the autoencoder stays."""
    optim = OptimConfig(lr=lr, warmup_steps=min(20, steps), weight_decay=0.05)
    loss_fn = make_loss(pixels=pixels_of(processor))
    trainer = Trainer(model, cfg=FitConfig(steps=steps, optim=optim), loss_fn=loss_fn)
    run, losses = trainer.steps(batches), []
    for _ in rich.progress.track(range(steps), "training to draw", transient=True):
        losses.append(next(run)["code_loss"])
    batches.close()
    return trainer.model(run.state), [round(float(loss), 4) for loss in losses]
