"""WebDataset's tar shards as documents: members of one stem are one sample.

`7.jpg` and `7.txt` are a picture and its caption, `7.cls` the number of its class, `7.json` an
object of further fields (a question, messages, ...). Members are found by their headers once and
read where they lie; nothing is unpacked. A stem ends at the first dot of a name, so `7.0.jpg`
and `7.1.jpg` are two pictures of one sample.
"""

import dataclasses
import pathlib
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmprep_jax.data.documents import Document
from llmprep_jax.data.images import beside
from llmprep_jax.data.json_files import parse_line
from llmprep_jax.data.records import CONVERSATIONS, IMAGES, RecordFormat, to_document
from llmprep_jax.data.refs import Member

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif", "pdf")
_TEXTS = {"txt": "text", "caption": "caption", "cls": "label"}  # what a member of text says
_MAX_TEXT = 2**26  # bytes


@dataclasses.dataclass(frozen=True)
class Shard:
    """The members of a tar by sample: about 200 bytes a sample.

    Attributes:
      stems: of the samples, in the order of their first members.
      starts: of each sample, its first member; and the end. [samples + 1]
      suffixes: of the members. spans: their offsets and sizes. [members, 2]
    """

    file: pathlib.Path
    stems: list[str]
    starts: np.ndarray
    suffixes: list[str]
    spans: np.ndarray

    def members(self, sample: int) -> list[tuple[str, Member]]:
        """(suffix, member) of a sample."""
        members = []
        for i in range(int(self.starts[sample]), int(self.starts[sample + 1])):
            name = f"{self.stems[sample]}.{self.suffixes[i]}"
            place = map(int, self.spans[i])
            members.append(
                (self.suffixes[i], Member(str(self.file.parent), name, self.file.name, *place))
            )
        return members


class Tars:
    """Tar files that are not compressed; those of one pattern are read as one."""

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        field: str | None = None,
        record_format: RecordFormat = "auto",
        image: str | None = None,
    ):
        self._field, self._record_format, self._image = field, record_format, image
        self._shards = [index_shard(file) for file in files]
        self._first = np.cumsum([0, *(len(shard.stems) for shard in self._shards)])
        self._classes = {shard.file: _read_classes(shard.file) for shard in self._shards}

    def __len__(self) -> int:
        return int(self._first[-1])

    def _find(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[number], int(index - self._first[number])

    def name(self, index: int) -> str:
        """Shard and stem."""
        shard, sample = self._find(index)
        return f"{shard.file}: {shard.stems[sample]}"

    def __getitem__(self, index: int) -> Document:
        shard, sample = self._find(index)
        name, record, pictures = self.name(index), {}, []
        for suffix, member in shard.members(sample):
            kind = suffix.rsplit(".", 1)[-1].lower()
            if kind == self._image or (self._image is None and kind in PICTURES):
                pictures.append(member)
            elif kind == "json":
                value = parse_line(_read(member), member.title)
                if not isinstance(value, Mapping):
                    raise ValueError(f"{member.title}: is no JSON object; give one of fields")
                record |= value
            elif kind in _TEXTS:
                record[_TEXTS[kind]] = _text(member)
        try:
            record = self._with_class(_with_pictures(record, pictures), shard.file)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        document = to_document(record, self._field, name, self._record_format)
        return beside(document, shard.file.parent)

    def _with_class(self, record: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
        """With what `classnames.txt` beside the shards calls the number of a class."""
        names, label = self._classes[file], record.get("label")
        if names is None or not isinstance(label, str) or not label.isdecimal():
            return record
        if int(label) >= len(names):
            raise ValueError(f"class {label} is none of the {len(names)} in classnames.txt")
        return {**record, "label": names[int(label)]}


def _with_pictures(record: dict[str, Any], members: Sequence[Member]) -> dict[str, Any]:
    """A record whose images are members: those that its messages or fields name, or all in order.

    Raises:
      ValueError: a part names an image that the sample lacks.
    """
    if not members:
        return record
    by_name = {spelt: member for member in members for spelt in _spellings(member)}

    def find(name: str) -> dict[str, Any]:
        member = by_name.get(name) or by_name.get(pathlib.PurePosixPath(name).name)
        if member is None:
            raise ValueError(f"names image {name!r}; it has {', '.join(m.name for m in members)}")
        return _place(member)

    key = next((key for key in CONVERSATIONS if isinstance(record.get(key), list)), None)
    named = [part for part in _image_parts(record[key]) if _name_of(part)] if key else []
    if named:
        for part in named:
            part["image"] = find(_name_of(part))
        return {k: v for k, v in record.items() if k not in IMAGES}
    given = next((record[key] for key in IMAGES if record.get(key)), None)
    names = [given] if isinstance(given, str) else given
    try:  # in the order of the fields, if those are names of members
        images = [find(name) for name in names]
    except (TypeError, ValueError):
        images = [_place(member) for member in members]
    rest = {k: v for k, v in record.items() if k not in IMAGES}
    return {**rest, "image": images[0]} if len(images) == 1 else {**rest, "images": images}


def _spellings(member: Member) -> tuple[str, str, str]:
    base = member.name.rpartition("/")[2]
    return member.name, base, base.partition(".")[2]


def _image_parts(messages: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") == "image":
                yield part


def _name_of(part: Mapping[str, Any]) -> str | None:
    name = part.get("image") or part.get("path")
    return name if isinstance(name, str) else None


def index_shard(file: pathlib.Path) -> Shard:
    """Reads the headers of a tar.

    Raises:
      ValueError: it is compressed, cut short, no tar, or has a member twice; on one line.
    """
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name, offset, size in _walk(file):
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot or stem.startswith("__"):  # WebDataset's own notes are __name__
            continue
        members = found.setdefault(folder + slash + stem, [])
        if any(suffix == other for other, *_ in members):
            raise ValueError(f"{file}: holds {name} twice; write each sample once")
        members.append((sys.intern(suffix), offset, size))
    members = [member for some in found.values() for member in some]
    spans = np.array([span for _, *span in members], np.int64).reshape(-1, 2)
    starts = np.cumsum([0, *map(len, found.values())])
    return Shard(file, list(found), starts, [suffix for suffix, *_ in members], spans)


def _walk(file: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar."""
    length = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            raise ValueError(f"{file}: is compressed, so nothing in it can be found; gunzip it")
        stream.seek(0)
        last, at = "its start", -1
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # it would keep them all
                    if tar.offset <= at or member.size < 0:
                        raise ValueError("a header leads backwards")
                    last, at = member.name, tar.offset
                    if member.offset_data + member.size > length:
                        raise ValueError("it is cut short")
                    if member.isreg() and not member.issparse():
                        member.name.encode()
                        yield member.name, member.offset_data, member.size
                end = tar.offset
        except Exception as error:  # of many kinds, where headers are broken
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{file}: no tar that can be read, from {last} on ({reason}); copy it again"
            ) from None
        _check_end(stream, end, length, file, last)


def _check_end(stream: Any, end: int, length: int, file: pathlib.Path, last: str) -> None:
    """A tar ends in zeros. What lies behind them is not read by tar either, so is told of."""
    if end >= length:
        raise ValueError(f"{file}: is cut short behind {last}, without an end; copy it again")
    stream.seek(end)
    if stream.read(512).strip(b"\0"):  # tarfile takes a broken header for the end
        raise ValueError(f"{file}: a header is broken behind {last}; copy it again")
    while block := stream.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError(
                f"{file}: more follows its end, behind {last}; write tars that were put one after"
                " another as one"
            )


def _place(member: Member) -> dict[str, Any]:
    fields = dataclasses.asdict(member)
    return {key: fields[key] for key in ("archive", "name", "offset", "size")}


def _read(member: Member) -> bytes:
    if member.size > _MAX_TEXT:
        raise ValueError(f"{member.title}: has {member.size:,} bytes of text; leave it out")
    return member.content()


def _text(member: Member) -> str:
    try:
        return _read(member).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{member.title}: byte {error.start + 1} is no UTF-8; save it as UTF-8"
        ) from None


def _read_classes(file: pathlib.Path) -> list[str] | None:
    """Lines of classnames.txt beside a shard, or one folder up, as CLIP's benchmark has them."""
    for folder in (file.parent, file.parent.parent):
        if (folder / "classnames.txt").is_file():
            return (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
    return None
