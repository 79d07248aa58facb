"""A TFDS builder that writes documents of any source as ArrayRecord, and how to read it back.

ArrayRecord gives random access to data of any size without an index to build first. Nothing here
needs a network or TensorFlow. TFDS keeps what a folder already holds and says nothing, so
`write_array_record` refuses such a folder.
"""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from llmprep_jax.data.documents import Source


class TextDocuments(tfds.core.GeneratorBasedBuilder):
    """Records of three texts: `name`, `text` (empty for a conversation) and, as JSON, the `extra`
    that `Document` holds: messages, fields, answer, is_start, is_end.

    Args:
      documents: what to write; None to read what is prepared.
    """

    VERSION = tfds.core.Version("1.1.0")

    def __init__(self, *, documents: Source | None = None, **kwargs: Any):
        self._documents = documents
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {key: tfds.features.Text() for key in ("name", "text", "extra")}
        # in order, so that a document has the same number before and after
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(texts), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for i in range(len(self._documents)):
            document = self._documents[i]
            fields = dataclasses.asdict(document)
            name, text = fields.pop("name"), fields.pop("text") or ""
            extra = json.dumps(fields, ensure_ascii=False, default=str)
            yield i, {"name": name, "text": text, "extra": extra}


def write_array_record(documents: Source, folder: str | pathlib.Path) -> pathlib.Path:
    """Writes all documents of a source below `folder`.

    Returns:
      The folder to give as a path of `DataConfig`.

    Raises:
      ValueError: there is no document, one does not read, or there is such a dataset already.
    """
    if not len(documents):
        raise ValueError(f"{folder}: no document to write; check the source")
    builder = TextDocuments(documents=documents, data_dir=str(folder), file_format="array_record")
    path = pathlib.Path(builder.data_path)
    if path.exists():
        raise ValueError(f"{path} holds a dataset already; remove it or choose another folder")
    # TFDS says that it downloads, and makes a folder for that, though there is nothing to download
    with tempfile.TemporaryDirectory() as nothing, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=nothing)
    return path


class Prepared(NamedTuple):
    """What a folder of TFDS holds.

    Attributes:
      records: by number; images in them are encoded, lists of them arrays of objects.
      images: the features that are images, or lists of images.
      classes: the names of the classes of features that are their numbers.
    """

    records: Sequence[dict[str, Any]]
    images: tuple[str, ...]
    classes: dict[str, list[str]]


class _Encoded(tfds.decode.Decoder):
    """Leaves images as they are stored; tfds.decode.SkipDecoding does not know lists of NumPy."""

    def decode_example(self, serialized_example: Any) -> Any:
        return serialized_example

    decode_batch_example_np = decode_example


def open_array_record(folder: str | pathlib.Path, split: str = "train") -> Prepared:
    """Random access to the records of a folder that TFDS has prepared as ArrayRecord.

    Raises:
      ValueError: the folder does not read, is of another file format, or has no such split.
    """
    try:
        builder = tfds.builder_from_directory(str(folder))
        splits = list(builder.info.splits)
    except Exception as error:  # TFDS raises what its JSON and protobuf readers raise
        raise ValueError(f"{folder}: TFDS does not read it: {_one_line(error)}") from None
    if split not in splits:
        raise ValueError(f"{folder} has no split {split}; it has {', '.join(splits) or 'none'}")
    features = dict(builder.info.features.items())
    images = tuple(name for name, feature in features.items() if _is_image(feature))
    classes = {
        name: feature.names
        for name, feature in features.items()
        if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes
    }
    try:
        encoded = {name: _Encoded() for name in images}
        records = builder.as_data_source(split, decoders=encoded or None)
    except Exception as error:
        raise ValueError(
            f"{folder}: no random access ({_one_line(error)}); "
            "prepare it with file_format='array_record'"
        ) from None
    return Prepared(records, images, classes)


def _is_image(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
    return isinstance(inner, tfds.features.Image)


_opened = functools.lru_cache(maxsize=8)(open_array_record)  # of a process that decodes


def read_image(folder: str, split: str, record: int, feature: str) -> bytes | list[bytes]:
    """An encoded image of a record, or the list of them; records count from 0.

    Raises:
      ValueError: there is no such record or image.
    """
    records = _opened(folder, split).records
    if record >= len(records):
        raise ValueError(f"{folder}:{split} has {len(records)} records; begin a new run")
    value = records[record].get(feature)
    return value if isinstance(value, bytes) else list(() if value is None else value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
