"""Where an image of a document is: in a file, a tar, a column of Parquet, a record of TFDS.

A document names its images as JSON and holds no bytes. A file is a string, its path from the folder
of the data; the others are objects, whose `name` alone counts for the side of a hold-out:

  {"archive": "shard-0.tar", "name": "7.jpg", "offset": 1536, "size": 48211}
  {"table": "train.parquet", "row": 7, "column": "image", "item": 0, "name": "7.jpg"}
  {"split": "train", "record": 7, "feature": "image", "item": 0}

`item` numbers the images of a list.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Ref:
    """A file: `name` as the document has it, relative to `folder`, that of the data."""

    folder: str
    name: str

    @property
    def title(self) -> str:
        """What errors call it."""
        return str(pathlib.Path(self.folder, self.name))

    def content(self) -> Any:
        """What `vision.open_image` takes: a path, or the bytes of the encoded picture.

        Raises:
          FileNotFoundError, ValueError: it is not where it was, on one line with its title.
        """
        return pathlib.Path(self.folder, self.name)


@dataclasses.dataclass(frozen=True)
class Member(Ref):
    """A part of an archive that is not compressed: `size` bytes from `offset` on."""

    archive: str
    offset: int
    size: int

    @property
    def title(self) -> str:
        return f"{pathlib.Path(self.folder, self.archive)}: {self.name}"

    def content(self) -> bytes:
        with pathlib.Path(self.folder, self.archive).open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"{self.title}: the archive has become shorter; begin a new run")
        return data


@dataclasses.dataclass(frozen=True)
class Cell(Ref):
    """A value, or item of a value, of a column of Parquet; `name` is the table's."""

    row: int
    column: str
    item: int | None = None

    @property
    def title(self) -> str:
        of_list = "" if self.item is None else f" {self.item + 1}"
        return f"{pathlib.Path(self.folder, self.name)}:row {self.row + 1}: {self.column}{of_list}"

    def content(self) -> Any:
        from llmprep_jax.data.row_groups import read_value

        value = read_value(str(pathlib.Path(self.folder, self.name)), self.row, self.column)
        value = _item_of(value, self.item)
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path")
            if data is None and isinstance(path, str):
                return Ref(self.folder, checked_path(path)).content()
            value = data
        if not isinstance(value, bytes):
            raise ValueError(f"{self.title}: there is no picture; leave the row out")
        return value


@dataclasses.dataclass(frozen=True)
class Feature(Ref):
    """An image feature of a record that TFDS prepared in `folder`; `name` is the feature's."""

    split: str
    record: int
    item: int | None = None

    @property
    def title(self) -> str:
        of_list = "" if self.item is None else f" {self.item + 1}"
        return f"{self.folder}:{self.split} {self.record + 1}: {self.name}{of_list}"

    def content(self) -> bytes:
        from llmprep_jax.data.tfds_text import read_image

        value = _item_of(read_image(self.folder, self.split, self.record, self.name), self.item)
        if not isinstance(value, bytes):
            raise ValueError(f"{self.title}: there is no picture; leave the record out")
        return value


def read_ref(value: Any, folder: str) -> Ref:
    """What a part of a message says of its image.

    Raises:
      ValueError: nothing, or a place outside `folder`.
    """
    if isinstance(value, str):
        return Ref(folder, checked_path(value))
    if isinstance(value, Mapping):
        if "archive" in value:
            archive, numbers = (
                checked_path(_text(value, "archive")),
                _numbers(value, "offset", "size"),
            )
            return Member(folder, _text(value, "name"), archive, *numbers)
        if "table" in value:
            (row,), item = _numbers(value, "row"), _number_of_item(value)
            return Cell(
                folder, checked_path(_text(value, "table")), row, _text(value, "column"), item
            )
        if "record" in value:
            (record,), item = _numbers(value, "record"), _number_of_item(value)
            return Feature(folder, _text(value, "feature"), _text(value, "split"), record, item)
    raise ValueError(
        'an image part names no file; write {"type": "image", "image": "images/1.png"}'
    )


def checked_path(name: str) -> str:
    """A path. Raises ValueError where it leads out of the folder of the data."""
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"image {name!r} does not lie beside the data file; give a path from it")
    return name


def _item_of(value: Any, item: int | None) -> Any:
    if item is None:
        return value
    return value[item] if isinstance(value, list) and item < len(value) else None


def _text(value: Mapping[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str):
        raise ValueError(f"an image part has {key!r} {value.get(key)!r}; give a string")
    return value[key]


def _numbers(value: Mapping[str, Any], *keys: str) -> list[int]:
    for key in keys:
        number = value.get(key)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
            raise ValueError(f"an image part has {key!r} {number!r}; give a number from 0")
    return [value[key] for key in keys]


def _number_of_item(value: Mapping[str, Any]) -> int | None:
    return None if value.get("item") is None else _numbers(value, "item")[0]
