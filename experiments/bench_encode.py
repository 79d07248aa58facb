"""Encoding images and texts by CLIP and SigLIP: us and transformers, in turn in one run.

    python -m experiments.bench_encode [model=all] [part=all] [batch_size=1,32] [out=FILE.json]

model: a preset ("clip-vit-base-patch32", "siglip-base-patch16-224", ...), or "all" for these two.
Weights are random, of both in float32, and so are products; the same numbers go in. A turn is as
many calls in a row as take 16 images, since the first after a pause finds cold caches.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_encode:Settings")

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from experiments.study import contest
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

PRESETS = ("clip-vit-base-patch32", "siglip-base-patch16-224")
PARTS = ("images", "texts")
A_TURN = 16  # images or texts, and a call at least


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed; `rounds` timed calls of each contender."""

    model: str = "all"  # a preset, or all of the two small ones
    part: Literal["all", "images", "texts"] = "all"  # which tower is timed
    batch_size: tuple[int, ...] = (1, 32)  # images or texts of a call
    rounds: int = 7  # timed calls of each contender
    out: pathlib.Path | None = None  # a JSON file for the numbers; of several, one with each name


def draw(name: str, part: str, batch_size: int) -> np.ndarray:
    """Images of the tower's size, or texts of its full length that have an end."""
    from llmprep_jax.models import registry

    cfg, rng = registry.preset(name), np.random.default_rng(0)
    if part == "images":
        size = cfg.vision.image_size
        return rng.normal(size=(batch_size, size, size, 3)).astype(np.float32)
    tokens = rng.integers(1, cfg.text.vocab_size - 1, (batch_size, cfg.text.max_seq_len))
    tokens[:, -1] = cfg.text.vocab_size - 1
    return tokens.astype(np.int32)


def ours(name: str, part: str, batch_size: int) -> Callable[[], Any]:
    import jax
    from flax import nnx

    from llmprep_jax.models import registry

    model = registry.build(registry.preset(name), rngs=nnx.Rngs(0)).frozen()
    inputs = jax.device_put(draw(name, part, batch_size))
    encode = model.encode_image if part == "images" else model.encode_text
    return in_a_row(lambda: encode(inputs).block_until_ready(), batch_size)


def transformers(name: str, part: str, batch_size: int) -> Callable[[], Any]:
    import torch
    import transformers

    from llmprep_jax.models import registry

    cfg = registry.preset(name)
    kind = transformers.CLIPConfig if cfg.model_type == "clip" else transformers.SiglipConfig
    model = transformers.AutoModel.from_config(kind(**registry.to_hf(cfg))).eval()
    inputs = torch.tensor(draw(name, part, batch_size))
    if part == "images":
        inputs, encode = inputs.permute(0, 3, 1, 2).contiguous(), model.get_image_features
    else:
        inputs, encode = inputs.long(), model.get_text_features

    @torch.inference_mode()
    def call():
        return encode(inputs)

    return in_a_row(call, batch_size)


def calls_of(batch_size: int) -> int:
    """How many calls are a turn."""
    return max(1, A_TURN // batch_size)


def in_a_row(call: Callable[[], Any], batch_size: int) -> Callable[[], None]:
    """The calls of a turn."""

    def turn():
        for _ in range(calls_of(batch_size)):
            call()

    return turn


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    outputs = {}
    names = PRESETS if settings.model == "all" else (settings.model,)
    parts = PARTS if settings.part == "all" else (settings.part,)
    for name in names:
        for part in parts:
            for batch_size in settings.batch_size:
                task = dict(name=name, part=part, batch_size=batch_size)
                contenders = {"ours": (ours, task), "transformers": (transformers, task)}
                scores = contest.compete(contenders, rounds=settings.rounds)
                label = f"{name}-{part}-{batch_size}"
                out = settings.out and settings.out.with_stem(f"{settings.out.stem}-{label}")
                amount = calls_of(batch_size) * batch_size
                title = f"{name}, {amount} {part}, {batch_size} a call"
                written = contest.report(out, title, amount, scores, part)
                outputs |= {f"{label} {what}": path for what, path in written.items()}
    return outputs


if __name__ == "__main__":
    cli.run(main)
