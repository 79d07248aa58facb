"""`ImageProcessor`: pictures of any size to the bytes that a tower takes, as a model was released.

A kind (`kinds.py`) says how sizes are made equal. Pixels stay bytes until `normalize`: a quarter of
the memory on the way to the device, and nothing is lost, since all of these models resize in bytes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from llmprep_jax.vision.fields import Fields, read_files, write_files
from llmprep_jax.vision.normalize import Normalization, Triple
from llmprep_jax.vision.open import open_rgb
from llmprep_jax.vision.source import MAX_PIXELS, name_of

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 2**20  # of one picture


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What a call made of N images: n pictures, all of one size.

    `pieces` says how many of them each image became, in order: the whole first, then its crops or
    tiles. `grids` are the tiles of each image as (width, height), zeros where there are none.
    `high` are the pictures of a second tower (DeepSeek-VL 7B), else None.
    """

    values: UInt8[np.ndarray, "n H W 3"]
    pieces: Int32[np.ndarray, " N"]
    grids: Int32[np.ndarray, "N 2"]
    high: UInt8[np.ndarray, "n P Q 3"] | None = None


class Views(NamedTuple):
    """The pictures that one image becomes."""

    pictures: list[Image.Image]
    grid: tuple[int, int] = (0, 0)
    high: Image.Image | None = None


class ImageProcessor:
    """What all kinds share. `from_fields` and `from_folder` find the kind; a family may name it.

    Attributes:
      tokens: image tokens of one picture; None where nothing says it.
      normalization: mean, std and scale, for arithmetic on the device.
      processor_fields: what processor_config.json says beside the pictures' own fields.
    """

    kind: ClassVar[str]  # transformers' name
    defaults: ClassVar[Mapping[str, Any]]

    def __init__(
        self,
        fields: Mapping[str, Any] | None = None,
        *,
        tokens: int | None = None,
        processor_fields: Mapping[str, Any] | None = None,
        where: str = "image processor",
        max_pixels: int = MAX_PIXELS,
    ):
        """Checks every field.

        Args:
          fields: of preprocessor_config.json; what is left out or null is as in transformers.
          tokens: image tokens of one picture, where no file says it.
          processor_fields: of processor_config.json.
          where: the file that errors name.
          max_pixels: how many an image may have before it is resized.

        Raises ValueError, on one line, naming the file and the field.
        """
        self._fields = Fields(fields or {}, self.defaults, where)
        self.processor_fields = dict(processor_fields or {})
        self.max_pixels = max_pixels
        self._read(self._fields)
        self.tokens = self._find_tokens(tokens)

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Any], model_type: str | None = None, **settings: Any
    ) -> "ImageProcessor":
        """The kind that the fields name, else that of the model's type; settings as in __init__."""
        from llmprep_jax.vision.kinds import find_kind

        where = settings.get("where", "image processor")
        named = {**(settings.get("processor_fields") or {}), **fields}
        kind = find_kind(named, model_type, where) if cls is ImageProcessor else cls
        return kind(fields, **settings)

    @classmethod
    def from_folder(
        cls, folder: str | Path, model_type: str | None = None, **settings: Any
    ) -> "ImageProcessor":
        """Reads the two files of a folder; what is nested in processor_config.json wins.

        Raises FileNotFoundError or ValueError, on one line, naming the file.
        """
        files = read_files(folder)
        return cls.from_fields(
            files.image,
            model_type,
            processor_fields=files.processor,
            where=str(files.path),
            **settings,
        )

    def fields(self) -> dict[str, Any]:
        """What preprocessor_config.json holds; what was read and is not known here is kept."""
        return {"image_processor_type": self.kind, **self._fields.all()}

    def save(self, folder: str | Path, **processor_fields: Any) -> None:
        """Writes both files, for transformers 5 and for what reads older ones."""
        write_files(folder, self.fields(), {**self.processor_fields, **processor_fields})

    def __call__(
        self, images: Any, names: Sequence[str] | None = None, num_images: int | None = None
    ) -> Pixels:
        """The pictures of an image, or of a sequence of them: those of one conversation, in order.

        Args:
          images: each as `open_image` takes them.
          names: what errors call them; None: their paths, else "image 0".
          num_images: of the conversation, where these are some of them; None: these are all.

        Raises FileNotFoundError or ValueError, on one line, naming the image.
        """
        sources = _listed(images)
        names = names or [_name(source, i) for i, source in enumerate(sources)]
        views = []
        for source, name in zip(sources, names, strict=True):
            image = open_rgb(source, name=name, max_pixels=self.max_pixels)
            try:
                views.append(self._view(image, num_images or len(sources)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        highs = [view.high for view in views if view.high is not None]
        return Pixels(
            _stack([picture for view in views for picture in view.pictures]),
            np.array([len(view.pictures) for view in views], np.int32),
            np.array([view.grid for view in views], np.int32),
            _stack(highs) if highs else None,
        )

    def normalize(self, values: UInt8[np.ndarray, "*N H W 3"]) -> Float32[np.ndarray, "*N H W 3"]:
        """(values x scale - mean) / std: what `model(images=...)` takes."""
        return self.normalization(values)

    def normalize_high(
        self, values: UInt8[np.ndarray, "*N P Q 3"]
    ) -> Float32[np.ndarray, "*N P Q 3"]:
        """As `normalize`, of the pictures of a second tower."""
        raise ValueError(f"{self._fields.where}: {self.kind} makes no pictures of high resolution")

    @property
    def pixels(self) -> dict[str, Normalization]:
        """How each kind of pictures is normalised, by its name in a batch."""
        return {"images": self.normalization}

    @property
    def mean(self) -> Triple:
        return self.normalization.mean

    @property
    def std(self) -> Triple:
        return self.normalization.std

    def count_pictures(self, width: int, height: int, num_images: int = 1) -> int:
        """How many pictures an image of that size becomes, one of `num_images` in all."""
        return 1

    def count(self, width: int, height: int, num_images: int = 1) -> int:
        """Image tokens of an image of that size, one of `num_images` of a conversation.

        Raises ValueError where nothing says how many tokens a picture has.
        """
        if self.tokens is None:
            raise ValueError(
                f"{self._fields.where}: does not say how many tokens a picture has; write"
                " num_image_tokens into processor_config.json"
            )
        return self.tokens * self.count_pictures(width, height, num_images)

    def _read(self, fields: Fields) -> None:
        """Sets a kind's attributes, `normalization` among them."""
        self.normalization = read_normalization(fields, "image_mean", "image_std")

    def _view(self, image: Image.Image, num_images: int) -> Views:
        """The pictures of one image, one of `num_images`."""
        raise TypeError(f"{type(self).__name__} is no kind; use ImageProcessor.from_fields")

    def _find_tokens(self, fallback: int | None) -> int | None:
        """Of the files, whose writers have several ways to say it."""
        said = Fields({**self._fields.given, **self.processor_fields}, {}, self._fields.where)
        for name in ("image_seq_length", "num_image_tokens"):
            if said.get(name) is not None:
                return said.integer(name, 1, MAX_TOKENS)
        return fallback


def read_normalization(
    fields: Fields, mean: str, std: str, flag: str = "do_normalize"
) -> Normalization:
    """Mean and std by the names of their fields, and the scale."""
    scale = fields.number("rescale_factor", 1e-6, 255.0) if fields.flag("do_rescale") else 1.0
    if not fields.flag(flag):
        return Normalization(scale=scale)
    return Normalization(fields.triple(mean, -1e3, 1e3), fields.triple(std, 1e-6, 1e3), scale)


def _listed(images: Any) -> list[Any]:
    """One image or several, as a list."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return _listed(list(images))
    if not isinstance(images, list | tuple):
        return [images]
    if not images:
        raise ValueError("there are no images; give at least one, or leave images out")
    return list(images)


def _name(source: Any, index: int) -> str:
    is_bare = isinstance(source, bytes | bytearray | memoryview | np.ndarray)
    if is_bare or (isinstance(source, Image.Image) and not getattr(source, "filename", "")):
        return f"image {index}"
    return name_of(source)


def _stack(pictures: list[Image.Image]) -> UInt8[np.ndarray, "n H W 3"]:
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        (width, height), (wider, higher), *_ = sizes
        raise ValueError(
            f"images stay {width} x {height} and {wider} x {higher}, and a batch has one size;"
            " resize them, or set do_resize in preprocessor_config.json"
        )
    width, height = sizes[0]
    out = np.empty((len(pictures), height, width, 3), np.uint8)
    for i, picture in enumerate(pictures):
        out[i] = picture
    return out


def check_count(width: int, height: int, num_images: int) -> None:
    """Raises ValueError on sizes and numbers that no image has."""
    if min(width, height, num_images) < 1:
        raise ValueError(f"{num_images} images of {width} x {height}; give whole numbers from 1")
