"""Pictures of large shapes on white with two captions each, and which of all pictures one is like.

A picture is of one of four shapes, six colours and five places (configs/data/shapes.py). Every
fifth combination is held out, so that each shape, colour and place, and each two of them, are seen
in training. The nearest picture is the one of least squared error in pixels, among all of them,
those of training too.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import llmprep_jax as lp
from configs.data import shapes
from experiments.drawing.drawer import SIDE, write_processor
from llmprep_jax import data
from llmprep_jax.models.janus.processor import Processor

Kinds = tuple[str, str, str]
ASPECTS = ("shape", "colour", "place")
CHOICES = (shapes.SHAPES, tuple(shapes.COLOURS), tuple(shapes.PLACES))
SIZE, GROUND = "large", "white"
LENGTH = 38  # tokens of a row: up to 20 of a prompt, 16 codes, and what ends them
MARGIN = 2  # pixels that are cut off: places are then whole codes apart, and a shape 2 x 2 of them


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A folder of pictures, `train.jsonl` and the processor."""

    folder: pathlib.Path
    processor: Processor

    @functools.cached_property
    def kinds(self) -> list[Kinds]:
        return list(itertools.product(*CHOICES))

    @functools.cached_property
    def pictures(self) -> np.ndarray:
        """All of them, uint8 [N, H, W, 3]."""
        return np.stack([draw(kinds) for kinds in self.kinds])

    def numbers(self, *, held_out: bool) -> list[int]:
        """Of pictures that are held out, or of those that are not."""
        return [i for i, kinds in enumerate(self.kinds) if is_held_out(kinds) == held_out]

    def caption(self, number: int) -> str:
        """What is said of a picture, in the one way or the other by turns."""
        return captions(self.kinds[number])[number % 2]

    def values(self, numbers: Sequence[int]) -> np.ndarray:
        """Pictures as the autoencoder takes them, from -1 to 1."""
        return self.pictures[list(numbers)].astype(np.float32) / 127.5 - 1

    def batches(self, name: str, rows: int, seed: int, **settings: Any) -> "data.Batches":
        """Of a jsonl file of the folder; `settings` are further fields of DataConfig."""
        sizes = dict(seq_len=LENGTH, batch_size=rows, max_images=1, packing="padded")
        return lp.load_data(self.processor, self.folder / name, seed=seed, **sizes, **settings)

    def nearest(self, drawn: np.ndarray) -> list[int]:
        """The number of the picture that each of [B, H, W, 3] is most like."""
        ours = self.pictures.astype(np.float32)
        errors = [np.square(ours - one.astype(np.float32)).mean((1, 2, 3)) for one in drawn]
        return [int(error.argmin()) for error in errors]

    def score(self, numbers: Sequence[int], nearest: Sequence[int]) -> dict[str, float]:
        """The share of pictures that are most like the one that was asked for, and like one of the
        same shape, colour and place."""
        pairs = [(self.kinds[i], self.kinds[j]) for i, j in zip(numbers, nearest, strict=True)]
        shares = {"all": float(np.mean([a == b for a, b in pairs]))}
        for place, aspect in enumerate(ASPECTS):
            shares[aspect] = float(np.mean([a[place] == b[place] for a, b in pairs]))
        return shares


def write_gallery(folder: pathlib.Path) -> Gallery:
    """Draws all pictures and writes what is to be learnt: each picture twice, once a caption."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    texts = [text for kinds in itertools.product(*CHOICES) for text in captions(kinds)]
    gallery = Gallery(folder, write_processor(folder / "processor", texts))
    for number, picture in enumerate(gallery.pictures):
        Image.fromarray(picture).save(folder / name_of(number))
    chosen = gallery.numbers(held_out=False)
    lines = [line for number in chosen for line in records(number, gallery.kinds[number])]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "one.jsonl").write_text(records(chosen[0], gallery.kinds[chosen[0]])[0])
    return gallery


def records(number: int, kinds: Kinds) -> list[str]:
    """Lines of conversations in which the assistant draws, one a caption."""
    answer = {"role": "assistant", "content": [{"type": "image", "image": name_of(number)}]}
    asked = [{"role": "user", "content": text} for text in captions(kinds)]
    return [json.dumps({"messages": [ask, answer]}) + "\n" for ask in asked]


def name_of(number: int) -> str:
    return f"images/{number:03}.png"


def captions(kinds: Kinds) -> list[str]:
    shape, colour, place = kinds
    return shapes.captions(shape, colour, SIZE, place, GROUND)


def draw(kinds: Kinds) -> np.ndarray:
    shape, colour, place = kinds
    image = shapes.draw(shape, colour, SIZE, place, GROUND)
    inner = (MARGIN, MARGIN, shapes.SIDE - MARGIN, shapes.SIDE - MARGIN)
    return np.asarray(image.crop(inner).resize((SIDE, SIDE), Image.Resampling.BOX))


def is_held_out(kinds: Kinds) -> bool:
    places = [choices.index(kind) for choices, kind in zip(CHOICES, kinds, strict=True)]
    return sum(places) % 5 == 0
