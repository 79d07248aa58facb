"""Crops of real photographs, and captions that say what can be seen to be true of them.

Seventeen photographs that scikit-image and scikit-learn ship. A scene is a photograph, the part of
it that is shown, whether it is mirrored, its colours and how near it is; its caption says these and
nothing else. A fifth of all scenes, by a hash of the caption, is never trained on; the crops of a
scene differ in place and size, so no crop is seen twice either.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

from llmprep_jax.config import UsageError

SIDE = 48  # pixels of a crop
HELD_OUT = 0.2
PLACES = {
    "the top left of": (0.28, 0.28),
    "the top right of": (0.72, 0.28),
    "the middle of": (0.5, 0.5),
    "the bottom left of": (0.28, 0.72),
    "the bottom right of": (0.72, 0.72),
}
SIZES = {"from afar": 0.54, "close up": 0.34}  # of a crop, as a share of the shorter side
SHIFT, STRETCH = 0.02, 0.05  # what crops of a scene differ by at most, as shares
TINTS = {"in red": (255, 70, 60), "in blue": (70, 120, 255)}
TONES = ("in colour", "in black and white", *TINTS)
# in the folders of images of two packages: what each shows, and whether parts can be told apart
FILES = {
    "skimage/data": {
        "astronaut.png": ("an astronaut", True),
        "brick.png": ("a brick wall", True),
        "camera.png": ("a man with a camera", True),
        "chelsea.png": ("a cat", True),
        "coffee.png": ("a cup of coffee", True),
        "coins.png": ("old coins", True),
        "grass.png": ("grass", False),
        "gravel.png": ("gravel", False),
        "hubble_deep_field.jpg": ("galaxies", False),
        "ihc.png": ("stained tissue", False),
        "moon.png": ("the moon", True),
        "motorcycle_left.png": ("a motorcycle", True),
        "page.png": ("a printed page", True),
        "retina.jpg": ("a retina", True),
        "rocket.jpg": ("a rocket", True),
    },
    "sklearn/datasets/images": {
        "china.jpg": ("a pagoda", True),
        "flower.jpg": ("a dahlia", True),
    },
}


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A picture, what it shows, and whether its parts can be told apart."""

    image: Image.Image
    what: str
    has_parts: bool

    @property
    def tones(self) -> tuple[str, ...]:
        """In which colours it can be shown: of a grey one "in colour" would be no difference."""
        return TONES if self.image.mode == "RGB" else TONES[1:]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is shown; `place` is of `PLACES`, or "" where parts cannot be told apart."""

    what: str
    place: str
    is_mirrored: bool
    tone: str
    size: str

    @property
    def caption(self) -> str:
        mirrored = " mirrored" if self.is_mirrored else ""
        return f"{self.place} {self.what}{mirrored} {self.tone} {self.size}".strip()

    @property
    def is_held_out(self) -> bool:
        number = int.from_bytes(hashlib.blake2b(self.caption.encode(), digest_size=8).digest())
        return number < HELD_OUT * 2.0**64


def find_photographs() -> dict[str, Photograph]:
    """The photographs by what they show. Their packages are found and not imported.

    Raises:
      UsageError: a package is not installed.
    """
    found = {}
    for folder, files in FILES.items():
        package, _, inner = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UsageError(
                "the photographs are not installed: pip install --no-deps scikit-image scikit-learn"
            )
        for name, (what, has_parts) in files.items():
            with Image.open(pathlib.Path(spec.origin).parent / inner / name) as image:
                image = image.convert("L" if image.mode == "L" else "RGB")
            image.thumbnail((320, 320))  # the closest crop is then still larger than SIDE
            found[what] = Photograph(image, what, has_parts)
    return found


def scenes_of(photographs: Mapping[str, Photograph]) -> list[Scene]:
    """All scenes of all photographs."""
    scenes = []
    for photograph in photographs.values():
        places = tuple(PLACES) if photograph.has_parts else ("",)
        mirrors = (False, True) if photograph.has_parts else (False,)
        choices = itertools.product(places, mirrors, photograph.tones, SIZES)
        scenes += [Scene(photograph.what, *choice) for choice in choices]
    return scenes


def crop(photograph: Photograph, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A crop of a scene, bytes [SIDE, SIDE, 3]."""
    image, (across, down) = photograph.image, PLACES.get(scene.place) or rng.uniform(0.3, 0.7, 2)
    short = min(image.size)
    edge = SIZES[scene.size] * short * (1 + rng.uniform(-STRETCH, STRETCH))
    shift = rng.uniform(-SHIFT, SHIFT, 2)
    center = ((across + shift[0]) * image.width, (down + shift[1]) * image.height)
    corner = [
        float(np.clip(at - edge / 2, 0, most - edge))
        for at, most in zip(center, image.size, strict=True)
    ]
    box = (*corner, corner[0] + edge, corner[1] + edge)
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    small = ImageOps.mirror(small) if scene.is_mirrored else small
    return np.asarray(_toned(small, scene.tone))


def _toned(image: Image.Image, tone: str) -> Image.Image:
    if tone == "in colour":
        return image
    grey = image.convert("L")
    return ImageOps.colorize(grey, "black", TINTS[tone]) if tone in TINTS else grey.convert("RGB")


def crops(
    photographs: Mapping[str, Photograph], scenes: Sequence[Scene], rng: np.random.Generator
) -> np.ndarray:
    """One crop of each scene, bytes [scenes, SIDE, SIDE, 3]."""
    return np.stack([crop(photographs[scene.what], scene, rng) for scene in scenes])


def draw_scenes(scenes: Sequence[Scene], count: int, seed: int) -> Iterator[list[Scene]]:
    """Batches of scenes that are all different, so that no text of a batch is true of two crops."""
    rng = np.random.default_rng(seed)
    while True:
        yield [scenes[i] for i in rng.choice(len(scenes), count, replace=False)]
