"""Image preprocessing: us and transformers' Pillow processors, in turn in one run, a core each.

    python -m experiments.bench_images [kind=all] [rounds=7] [out=FILE.json]

kind: clip, siglip, gemma3, deepseek_vl, deepseek_vl_hybrid or all, at the sizes of the released
models. Each call makes float32 pixels of eight pictures of 640 x 480 to 1,600 x 1,200, which lie
decoded in memory as Pillow images, since both decode with Pillow.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_images:Settings", compile_cache=False)

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from experiments.study import contest
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

SIZES = [(640, 480), (480, 640), (800, 600), (1024, 768), (1200, 800), (900, 1200), (1600, 1200)]
SIZES += [(1280, 720)]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
KINDS = {  # transformers' class, and fields of released models that are not its defaults
    "clip": ("CLIPImageProcessor", {}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 384, "width": 384}}),
    "gemma3": ("Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}}),
    "deepseek_vl": ("DeepseekVLImageProcessor", HALF),
    "deepseek_vl_hybrid": ("DeepseekVLHybridImageProcessor", HALF),
}

Kind = Literal["all", "clip", "siglip", "gemma3", "deepseek_vl", "deepseek_vl_hybrid"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which processors are timed; `rounds` timed calls of each contender."""

    kind: Kind = "all"  # whose processor
    rounds: int = 7  # timed calls of each contender
    out: pathlib.Path | None = None  # a JSON file for the numbers; of all, one with each name


def draw_pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def ours(name: str) -> Callable[[], Any]:
    from llmprep_jax.vision import ImageProcessor

    type_name, fields = KINDS[name]
    processor = ImageProcessor.from_fields({"image_processor_type": type_name, **fields})
    pictures = draw_pictures()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def call():
        pixels = processor(pictures)
        high = pixels.high
        return processor.normalize(pixels.values), high is None or processor.normalize_high(high)

    return call


def transformers(name: str) -> Callable[[], Any]:
    import transformers

    type_name, fields = KINDS[name]
    processor = getattr(transformers, f"{type_name}Pil")(**fields)
    pictures = draw_pictures()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return lambda: processor(pictures, return_tensors="np")


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    outputs = {}
    for name in KINDS if settings.kind == "all" else (settings.kind,):
        contenders = {
            label: (make, dict(name=name))
            for label, make in (("ours", ours), ("transformers", transformers))
        }
        out = settings.out
        if out is not None and settings.kind == "all":
            out = out.with_stem(f"{out.stem}-{name}")
        scores = contest.compete(contenders, rounds=settings.rounds)
        written = contest.report(out, f"{name}, a core", len(SIZES), scores, "images")
        outputs |= {f"{name} {what}": path for what, path in written.items()}
    return outputs


if __name__ == "__main__":
    cli.run(main)
