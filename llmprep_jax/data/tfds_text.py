"""A TFDS builder that writes documents of any source as ArrayRecord, and how to read it back.

ArrayRecord gives random access to data of any size without an index to build first. Nothing here
needs a network or TensorFlow. TFDS keeps what a folder already holds and says nothing, so
`write_array_record` refuses such a folder.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

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


def open_array_record(folder: str | pathlib.Path, split: str = "train") -> Sequence[dict[str, Any]]:
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
    try:
        return builder.as_data_source(split)
    except Exception as error:
        raise ValueError(
            f"{folder}: no random access ({_one_line(error)}); "
            "prepare it with file_format='array_record'"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
