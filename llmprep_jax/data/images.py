"""Images of documents: where they are, which tokens stand for them, and their pixels in a batch.

A document names its images and holds no bytes: sizes are read from headers, which is all that
packing needs, and pictures are decoded when a batch is made, of this process's rows alone.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmprep_jax.data.decoding import Decoder, Picture
from llmprep_jax.data.documents import Document
from llmprep_jax.data.refs import Ref, read_ref
from llmprep_jax.text.chat import Edit
from llmprep_jax.text.image_text import ImageTextProcessor, expand_markers, replace_markers
from llmprep_jax.vision.open import image_size
from llmprep_jax.vision.views import View

MARKER = "<image>"  # in LLaVA's conversations
_SOURCES = ("image", "path")  # keys of a part that names its image
Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The tokens of an image in a piece.

    Attributes:
      start, length: the first, and how many there are.
      pictures: what the tower sees of it, the whole and its tiles.
      ref: the image. num_images: how many its conversation has.
      view: the part of it that is looked at; None: all.
      drawn: whether the assistant says it, and the model learns to draw it.
    """

    start: int
    length: int
    pictures: int
    ref: Ref
    num_images: int
    view: View | None = None
    drawn: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.length

    def moved(self, by: int) -> "Run":
        """So many tokens later."""
        return dataclasses.replace(self, start=self.start + by)


class ImageReader:
    """What data need of a processor that sees.

    Args:
      processor: its template writes a marker for an image part.
      max_images: M, pictures of a row.
      workers: processes that decode them; 0: this one.
    """

    def __init__(self, processor: ImageTextProcessor, max_images: int, workers: int = 0):
        self.processor, self.max_images = processor, max_images
        # a column of a table may be megabytes to read for the few bytes of a header
        self._size = functools.lru_cache(1 << 16)(_size_of)
        self._decoder = Decoder(processor.images, workers)
        blank = processor.images(np.zeros((8, 8, 3), np.uint8))
        self._shapes = {"images": (max_images, *blank.values.shape[1:])}
        if blank.high is not None:
            self._shapes["images_high"] = (max_images, *blank.high.shape[1:])
        self._has_grids = bool(blank.grids.any())

    def drawn(self, messages: Messages) -> tuple[bool, ...]:
        """Which images of a conversation are the assistant's, for a model that draws.

        Raises:
          ValueError: there are such, and bytes do not become the values that codes are of.
        """
        draws = self.processor.draws
        drawn = tuple(
            draws and message.get("role") == "assistant"
            for message in messages
            for part in _parts(message)
            if _is_image(part)
        )
        images = self.processor.images
        if any(drawn) and not images.normalization.reaches_ones:
            raise ValueError(
                "pictures that are drawn have values from -1 to 1, which"
                f" image_mean={list(images.mean)} and image_std={list(images.std)} do not make of"
                " bytes; set both to [0.5, 0.5, 0.5] in preprocessor_config.json, as released, and"
                " do_rescale and do_normalize to true"
            )
        return drawn

    def writer(self, refs: Sequence[Ref], drawn: Sequence[bool] = ()) -> Edit | None:
        """What rewrites a conversation's text around its images; None: nothing is written there.

        Args:
          drawn: which of them are drawn: these follow the header of their turn at once, as they do
            where a picture is asked for, and nothing is put before the whole.

        Raises:
          ValueError: an image is to be seen in pieces, each with tokens of its own.
        """
        sizes = [self._size(ref) for ref in refs]
        pictures = [self.processor.images.count_pictures(*size, len(refs)) for size in sizes]
        written = self.processor.wrapped(pictures)
        if written is None:
            return None
        if any(count > 1 for count in pictures):
            raise ValueError(
                "do_pan_and_scan cuts an image into pieces whose tokens lie apart, which is not"
                " trained on; set it to false in preprocessor_config.json and processor_config.json"
            )
        marker, opened = self.processor.marker, self.processor.opened

        def edit(text: str, literals: Sequence[int]) -> tuple[str, Callable[[int], int]]:
            text, moved = replace_markers(text, marker, written, literals, drawn)
            if any(drawn):
                return text, moved
            text, added = opened(text)
            return text, lambda place: moved(place) + added

        return edit

    def place(
        self,
        ids: Sequence[int],
        marks: Sequence[bool],
        refs: Sequence[Ref],
        drawn: Sequence[bool] = (),
    ) -> tuple[list[int], list[bool], tuple[Run, ...]]:
        """Ids with each marker as many times as its image has tokens, which nobody learns to say;
        of those that are drawn neither what begins and ends them.

        Raises:
          FileNotFoundError, ValueError: other images than markers, or one that is no picture.
        """
        marker = self.processor.image_id
        sizes = [self._size(ref) for ref in refs]
        lengths = [self.processor.images.count(*size, len(refs)) for size in sizes]
        ids = list(ids)
        expanded, places = expand_markers(ids, marker, lengths)
        kept = iter(mark for i, mark in zip(ids, marks, strict=True) if i != marker)
        is_image = np.zeros(len(expanded), bool)
        for start, length in places:
            is_image[start : start + length] = True
        marks = [False if hidden else next(kept) for hidden in is_image]
        drawn = tuple(drawn) or (False,) * len(refs)
        for (start, length), is_drawn in zip(places, drawn, strict=True):
            if is_drawn:
                marks[start - 1] = marks[start + length] = False
        pictures = [self.processor.images.count_pictures(*size, len(refs)) for size in sizes]
        runs = zip(places, pictures, refs, drawn, strict=True)
        count = len(refs)
        placed = tuple(Run(*place, n, ref, count, drawn=own) for place, n, ref, own in runs)
        return expanded, marks, placed

    def refuse_marker(self, ids: np.ndarray, name: str) -> None:
        """Raises ValueError where a text without images has the token that stands for one."""
        if (ids == self.processor.image_id).any():
            raise ValueError(
                f"{name}: spells {self.processor.marker}, and a text has no images; set"
                " data.special_tokens=chat, or write it as messages"
            )

    def decode(self, rows: Sequence[Sequence[Run]]) -> dict[str, np.ndarray]:
        """The images of rows, by the names of `train.batches.KEYS`; zeros where there are none.

        Raises:
          FileNotFoundError, ValueError: a picture cannot be decoded; the line names its file.
        """
        shapes, M = self._shapes, self.max_images
        out = {name: np.zeros((len(rows), *shape), np.uint8) for name, shape in shapes.items()}
        out["image_mask"] = np.zeros((len(rows), M), bool)
        if self._has_grids:
            out["grids"] = np.zeros((len(rows), M, 2), np.int32)
        if self.processor.draws:
            out["drawn"] = np.zeros((len(rows), M), bool)
        pictures = [Picture(run.ref, run.num_images) for runs in rows for run in runs]
        decoded = self._decoder(pictures)
        for b, runs in enumerate(rows):
            at = 0
            for n, run in enumerate(runs):
                pixels = next(decoded)
                if len(pixels.values) != run.pictures:
                    raise ValueError(
                        f"{run.ref.title}: has changed since it was packed; begin a new run"
                    )
                part = b, slice(at, at + run.pictures)
                out["images"][part], out["image_mask"][part] = pixels.values, True
                if pixels.high is not None:
                    out["images_high"][part] = pixels.high
                if self._has_grids:
                    out["grids"][b, n] = pixels.grids[0]
                if run.drawn:
                    out["drawn"][part] = True
                at += run.pictures
        return out


def _size_of(ref: Ref) -> tuple[int, int]:
    return image_size(ref.content(), name=ref.title)


def has_images(messages: Messages) -> bool:
    """Whether a part of a message is an image."""
    return any(_is_image(part) for message in messages for part in _parts(message))


def beside(document: Document, folder: pathlib.Path) -> Document:
    """One with images knows the folder that their places are told from."""
    if document.messages is None or not has_images(document.messages):
        return document
    return dataclasses.replace(document, folder=str(folder))


def split_images(messages: Messages, folder: str | None) -> tuple[Messages, tuple[Ref, ...]]:
    """(messages whose image parts are bare, as templates take them, what those parts named).

    Raises:
      ValueError: a part names no image, or one that does not lie beside the data file.
    """
    if not has_images(messages):
        return messages, ()
    if folder is None:
        raise ValueError(
            "images are named from the folder of their data file, and this document is of none;"
            " read them from .jsonl, .parquet or .tar"
        )
    refs, bare = [], []
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list):
            refs += [read_ref(_name_of(part), folder) for part in parts if _is_image(part)]
            message = {**message, "content": [_bare(part) for part in parts]}
        bare.append(message)
    return bare, tuple(refs)


def name_parts(messages: Messages, fields: Mapping[str, Any]) -> tuple[Messages, dict[str, Any]]:
    """Messages in which the record's `images` (or LLaVA's `image`) are named by the parts, or by
    <image> in a text, that they belong to; and the fields that are left.

    Raises:
      ValueError: there are more or fewer of them.
    """
    key = next((key for key in ("images", "image") if fields.get(key)), None)
    given = fields.get(key) if key else None
    names = [given] if isinstance(given, str | Mapping) else given
    if not isinstance(names, list) or not all(isinstance(n, str | Mapping) for n in names):
        return messages, dict(fields)
    opened = [_with_parts(message) for message in messages]
    places = [part for m in opened for part in _parts(m) if _is_image(part) and not _name_of(part)]
    if not places:
        return messages, dict(fields)
    if len(places) != len(names):
        raise ValueError(
            f"there are {len(places)} images in the messages and {len(names)} in {key!r}; give one"
            " for each"
        )
    for part, name in zip(places, names, strict=True):
        part["image"] = name
    return opened, {k: v for k, v in fields.items() if k != key}


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A copy, in which text that spells <image> is parts, without the line's end beside it."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [dict(p) if _is_image(p) else p for p in content]}
    if not isinstance(content, str) or MARKER not in content:
        return message
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(content.split(MARKER)):
        parts += [{"type": "image"}] if number else []
        text = text.removeprefix("\n") if number else text
        parts += [{"type": "text", "text": text}] if text.strip("\n") else []
    return {**message, "content": parts}


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _name_of(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in _SOURCES if part.get(key)), None)


def _bare(part: Any) -> Any:
    return {k: v for k, v in part.items() if k not in _SOURCES} if _is_image(part) else part
