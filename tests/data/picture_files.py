"""The same captioned pictures as jsonl beside a folder, tar shards, Parquet and TFDS."""

import io
import json
import pathlib
import tarfile
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
from PIL import Image

SIDE = 4


def png(shade: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: pathlib.Path, members: Sequence[tuple[str, bytes | str]]) -> pathlib.Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def write_parquet(path: pathlib.Path, columns: Mapping[str, list], rows: int = 2) -> pathlib.Path:
    """In groups of few rows."""
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=rows)
    return path


def of_files(folder: pathlib.Path, records: Sequence[tuple[int, dict]]) -> str:
    lines = []
    for shade, fields in records:
        (folder / f"{shade}.png").write_bytes(png(shade))
        lines.append(json.dumps({"image": f"{shade}.png", **fields}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return str(folder / "data.jsonl")


def of_tars(folder: pathlib.Path, records: Sequence[tuple[int, dict]]) -> str:
    """Two shards."""
    for shard in (0, 1):
        half = len(records) // 2
        members = []
        for shade, fields in records[half:] if shard else records[:half]:
            members += [(f"{shade}.png", png(shade)), (f"{shade}.json", json.dumps(fields))]
        write_tar(folder / f"shard-{shard}.tar", members)
    return str(folder / "shard-*.tar")


def of_parquet(folder: pathlib.Path, records: Sequence[tuple[int, dict]]) -> str:
    images = [{"bytes": png(shade), "path": f"{shade}.png"} for shade, _ in records]
    columns = {key: [fields[key] for _, fields in records] for key in records[0][1]}
    return str(write_parquet(folder / "a.parquet", {"image": images, **columns}))


def of_bytes(folder: pathlib.Path, records: Sequence[tuple[int, dict]]) -> str:
    images = [png(shade) for shade, _ in records]
    columns = {key: [fields[key] for _, fields in records] for key in records[0][1]}
    return str(write_parquet(folder / "b.parquet", {"image": images, **columns}))


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Records as they are given, by features as they are given."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, records: Sequence[dict] = (), features: Mapping, **kwargs):
        self._records, self._features = records, features
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": enumerate(self._records)}

    def _generate_examples(self):
        raise AssertionError("the splits are given")


def prepare(folder: pathlib.Path, features: Mapping, records: Sequence[dict]) -> str:
    builder = Pictures(
        records=records, features=features, data_dir=str(folder), file_format="array_record"
    )
    builder.download_and_prepare(download_dir=str(folder / "none"))
    return str(builder.data_path)


def of_tfds(folder: pathlib.Path, records: Sequence[tuple[int, dict]]) -> str:
    texts = {key: tfds.features.Text() for key in records[0][1]}
    rows = [{"image": io.BytesIO(png(shade)), **fields} for shade, fields in records]
    return prepare(folder, {"image": tfds.features.Image(), **texts}, rows)


LAYOUTS = {
    "files": of_files,
    "tars": of_tars,
    "parquet": of_parquet,
    "bytes": of_bytes,
    "tfds": of_tfds,
}
