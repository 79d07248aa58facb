"""Reading a prompt with an image, to its first token: us and transformers, in turn in one run.

    python -m experiments.bench_see [rounds=7] [text=64] [out=FILE.json]

A small model of Gemma 3's shape: a SigLIP tower of 8 layers at 224 pixels, 64 tokens an image, 12
layers of language of width 640. Weights are random, the same for both, in float32 and in bf16.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_see:Settings", compile_cache=False)

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.study import contest
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

IMAGE, BEGIN, END = 8000, 8001, 8002
TOKENS, SIZE = 64, 224  # of an image


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is read; `rounds` timed calls of each contender."""

    text: int = 64  # tokens of text around the image
    rounds: int = 7  # timed calls of each contender
    out: pathlib.Path | None = None  # a JSON file for the numbers


def write_folder(folder: pathlib.Path) -> str:
    """A model of random weights."""
    from flax import nnx

    import llmprep_jax as lp
    from llmprep_jax.models import gemma3, gemma3_text, registry, siglip

    language = gemma3_text.Config(8192, 640, 2048, 12, 4, 1, max_seq_len=2048)
    vision = siglip.VisionConfig(512, 2048, 8, 8, image_size=SIZE, patch_size=14, has_pool=False)
    cfg = gemma3.Config(language, vision, TOKENS, IMAGE, BEGIN, END)
    return str(lp.save_model(registry.build(cfg, rngs=nnx.Rngs(0)), folder))


def draw(text: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt with an image in the middle of its text, and the image, normalised."""
    rng = np.random.default_rng(0)
    before, after = np.split(rng.integers(3, 7000, text), 2)
    image = [BEGIN, *[IMAGE] * TOKENS, END]
    tokens = np.concatenate([before, image, after])[None].astype(np.int32)
    return tokens, rng.uniform(-1, 1, (1, SIZE, SIZE, 3)).astype(np.float32)


def ours(folder: str, dtype: str, text: int) -> Callable[[], Any]:
    import llmprep_jax as lp

    model, (tokens, images) = lp.load_model(folder, dtype=dtype), draw(text)
    return lambda: lp.generate_tokens(model, tokens, media={"images": images}, max_new_tokens=1)


def transformers(folder: str, dtype: str, text: int) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    kind = getattr(torch, dtype)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=kind).eval()
    tokens, images = map(torch.tensor, draw(text))
    inputs = dict(
        input_ids=tokens.long(),
        attention_mask=torch.ones_like(tokens),
        token_type_ids=(tokens == IMAGE).long(),
        pixel_values=images.permute(0, 3, 1, 2).contiguous().to(kind),
    )

    def call():
        with torch.inference_mode():
            new = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
            return new[:, tokens.shape[1] :]

    return call


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    with tempfile.TemporaryDirectory() as temporary:
        folder, contenders = write_folder(pathlib.Path(temporary) / "model"), {}
        for make, dtype in itertools.product((ours, transformers), ("float32", "bfloat16")):
            own = dict(folder=folder, dtype=dtype, text=settings.text)
            contenders[f"{make.__name__}, {dtype}"] = (make, own)
        scores = contest.compete(contenders, rounds=settings.rounds)
    amount = settings.text + TOKENS + 2
    title = f"{settings.text} tokens of text and an image, to the first new token"
    return contest.report(settings.out, title, amount, scores)


if __name__ == "__main__":
    cli.run(main)
