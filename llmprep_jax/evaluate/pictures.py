"""Pictures with a label or with captions, as models of two towers are measured on.

A set to classify is a folder with a folder of pictures for each class, or a file of records with
`image` and `label`; one to retrieve from is a file of records with `image` and `captions`.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from llmprep_jax.data.json_files import read_records
from llmprep_jax.data.refs import Ref
from llmprep_jax.evaluate.questions import find_picture
from llmprep_jax.vision.open import image_size

SUFFIXES = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif"]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture and the texts that belong to it: its class, or its captions.

    Attributes:
      name: where it is from.
    """

    name: str
    image: Ref
    texts: tuple[str, ...]


def read_labelled(path: str | pathlib.Path, limit: int | None = None) -> list[Picture]:
    """Pictures with the name of their class; an underscore in a folder's name is a space.

    Args:
      limit: at most so many pictures, of a folder as many of each class; None: all.

    Raises:
      FileNotFoundError, ValueError: there are none, or one that cannot be read; by file and line.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        return _read(path, _label, limit)
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir())
    each = None if limit is None else -(-limit // max(len(classes), 1))
    pictures = []
    for folder in classes:
        files = sorted(f for f in folder.iterdir() if f.suffix[1:].lower() in SUFFIXES)
        for file in files[:each]:
            image_size(file)
            name = file.relative_to(path).as_posix()
            pictures.append(Picture(name, Ref(str(path), name), (folder.name.replace("_", " "),)))
    if not pictures:
        raise ValueError(f"{path}: has no folders with pictures in them, one a class")
    return pictures[:limit]


def read_captioned(path: str | pathlib.Path, limit: int | None = None) -> list[Picture]:
    """Pictures with their captions.

    Raises as `read_labelled`.
    """
    return _read(pathlib.Path(path).expanduser(), _captions, limit)


def _read(
    path: pathlib.Path, texts_of: Callable[[Mapping[str, Any]], Any], limit: int | None
) -> list[Picture]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .jsonl file, an object a line")
    records = itertools.islice(read_records(path), limit)
    pictures = [_picture(name, record, path.parent, texts_of) for name, record in records]
    if not pictures:
        raise ValueError(f"{path}: holds no pictures; write an object a line, with image and texts")
    return pictures


def _picture(
    name: str, record: Mapping[str, Any], folder: pathlib.Path, texts_of: Callable
) -> Picture:
    try:
        return Picture(name, find_picture(record.get("image"), folder), texts_of(record))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from None


def _label(record: Mapping[str, Any]) -> tuple[str, ...]:
    label = record.get("label")
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f'"label" is {label!r}; give the name of the class, a text')
    return (label.strip(),)


def _captions(record: Mapping[str, Any]) -> tuple[str, ...]:
    captions = record.get("captions", record.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(x, str) and x for x in captions or [0]):
        raise ValueError('has no captions; give "captions", a list of texts, or "caption"')
    return tuple(captions)
