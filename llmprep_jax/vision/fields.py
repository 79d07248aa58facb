"""Processor files of a Hugging Face folder: reading, checking one field, writing.

transformers 5 writes what an image processor is under "image_processor" in processor_config.json,
and what it reads there wins; older versions, and others who serve these models, read
preprocessor_config.json alone. Both are written. DeepSeek-VL2's fields lie at the top of
processor_config.json, where its own code reads them.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmprep_jax.vision.source import one_line

PROCESSOR, PREPROCESSOR, NESTED = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor",
)
MAX_EDGE = 2**13  # of a picture that is made: 800 MB of float32


class Files(NamedTuple):
    """What a folder's files say: of pictures, and of how they stand in text."""

    image: dict[str, Any]
    processor: dict[str, Any]
    path: Path  # the file that the first is of


def read_files(folder: str | Path) -> Files:
    """Reads both files.

    Raises FileNotFoundError where neither says anything of pictures, ValueError on a damaged file.
    """
    processor_path, image_path = Path(folder) / PROCESSOR, Path(folder) / PREPROCESSOR
    processor = read_object(processor_path)
    nested = processor.pop(NESTED, None)
    if nested is not None and not isinstance(nested, dict):
        raise ValueError(f"{processor_path}: {NESTED} is {short(nested)}; write an object there")
    if nested is not None:
        return Files(nested, processor, processor_path)
    if image_path.is_file():
        return Files(read_object(image_path), processor, image_path)
    if "candidate_resolutions" in processor:
        return Files(processor, {}, processor_path)
    raise FileNotFoundError(
        f"{folder}: no {PREPROCESSOR}, and no {NESTED} in a {PROCESSOR}; copy the model's files"
        " there"
    )


def write_files(
    folder: str | Path, image: Mapping[str, Any], processor: Mapping[str, Any], nested: bool = True
) -> None:
    """Writes both files; with `nested` False one, its fields at the top, and removes the other."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if nested:
        _write_object(folder / PREPROCESSOR, image)
        _write_object(folder / PROCESSOR, {**processor, NESTED: dict(image)})
    else:
        _write_object(folder / PROCESSOR, {**processor, **image})
        (folder / PREPROCESSOR).unlink(missing_ok=True)  # one of another model would be read first


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} when the file is not there. Raises ValueError on anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, not an object; download it again")
    return value


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def short(value: Any) -> str:
    """A value for an error, at most 60 characters of it."""
    try:
        return one_line(repr(value), 60)
    except RecursionError:
        return type(value).__name__


class Fields:
    """The fields of one file over a kind's defaults; each is checked when it is asked for.

    null means the default, as in transformers.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.given, self.defaults, self.where = copy.deepcopy(dict(given)), defaults, where

    def get(self, name: str) -> Any:
        value = self.given.get(name)
        return self.defaults.get(name) if value is None else value

    def all(self) -> dict[str, Any]:
        """What is written back: all that was read, known or not, and the defaults beside it."""
        return copy.deepcopy({**self.defaults, **self.given})

    def wrong(self, name: str, remedy: str) -> ValueError:
        return ValueError(f"{self.where}: {name} is {short(self.get(name))}; write {remedy}")

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        return self._whole(name, self.get(name), low, high)

    def number(self, name: str, low: float, high: float) -> float:
        value = self.get(name)
        if not _is_number(value) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def triple(self, name: str, low: float, high: float) -> tuple[float, float, float]:
        """A number a channel; one number stands for three."""
        value = self.get(name)
        values = value if isinstance(value, list | tuple) else [value] * 3
        if len(values) != 3 or not all(_is_number(x) and low <= x <= high for x in values):
            raise self.wrong(name, f"three numbers from {low:g} to {high:g}")
        return tuple(float(x) for x in values)

    def size(self, name: str, *, square: bool = True) -> tuple[int, int] | int:
        """(width, height), or the shorter edge where that is what is said.

        Files say {"height", "width"} or {"shortest_edge"}; older ones a number, which is the side
        of a square or, with `square` False, the shorter edge; or a list, height first.
        """
        value = self.get(name)
        if isinstance(value, Mapping):
            keys = {key for key, side in value.items() if side is not None}
            if keys == {"shortest_edge"} and not square:
                return self._whole(name, value["shortest_edge"], 1, MAX_EDGE)
            if keys == {"height", "width"}:
                value = [value["height"], value["width"]]
        if isinstance(value, list | tuple) and len(value) == 2:
            height, width = (self._whole(name, side, 1, MAX_EDGE) for side in value)
            return width, height
        if isinstance(value, int):
            edge = self._whole(name, value, 1, MAX_EDGE)
            return (edge, edge) if square else edge
        shape = '{"height": 384, "width": 384}'
        raise self.wrong(name, shape if square else f'{shape} or {{"shortest_edge": 224}}')

    def _whole(self, name: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"whole numbers from {low} to {high}")
        return value


def _is_number(value: Any) -> bool:
    # an integer of 400 digits is no float, and isfinite raises on it
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -1e300 < value < 1e300 and math.isfinite(value)
