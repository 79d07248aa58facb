"""A checkpoint on disk, whatever its files: a config and tensors by their Hugging Face names.

`Checkpoint` is what the loader reads from; this file has the one over a Hugging Face folder, `gguf.py` the
one over a GGUF file. The one thing a reader would get wrong: an index file's word is checked against the
shards before anything is read, and pickled weights are never opened.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmprep_jax.weights.safetensors import SafetensorsFile

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(Protocol):
    """Tensors by name, and the config.json that describes them."""

    path: Path
    config: dict[str, Any]
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...

    def file(self, name: str) -> Path: ...


class FolderCheckpoint:
    """A Hugging Face folder: config.json and model.safetensors, or shards and their index.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or the weights are pickled.
    """

    def __init__(self, folder: str | Path, with_config: bool = True):
        self.path = Path(folder)
        self.config = read_json(self.path / "config.json") if with_config else {}
        self._files = self._open()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def file(self, name: str) -> Path:
        return self._files[name].path

    def _open(self) -> dict[str, SafetensorsFile]:
        index = self.path / _INDEX
        if index.is_file():
            return self._open_shards(index)
        single = self.path / _SINGLE
        if single.is_file():
            file = SafetensorsFile(single)
            return dict.fromkeys(file.names, file)
        pickled = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(kind)]
        if pickled:
            raise ValueError(
                f"{self.path} holds only pickled weights ({pickled[0]}), which can run code when opened;"
                " convert them where you trust them: transformers' from_pretrained, then"
                " save_pretrained(folder, safe_serialization=True)"
            )
        raise FileNotFoundError(f"{self.path} holds no {_SINGLE} and no {_INDEX}")

    def _open_shards(self, index: Path) -> dict[str, SafetensorsFile]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download the index again")
        shards = {}
        for name in dict.fromkeys(weight_map.values()):
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index} names the shard {name!r}, which is no file name")
            if not (self.path / name).is_file():
                raise FileNotFoundError(f"{index} names the shard {name}, which is not there")
            shards[name] = SafetensorsFile(self.path / name)
        for tensor, name in weight_map.items():
            if tensor not in shards[name]._entries:
                raise ValueError(f"{index} places {tensor} in {name}, which has no such tensor")
        return {tensor: shards[name] for tensor, name in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      FileNotFoundError, ValueError: it is not there, or is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} holds no {path.name}; is it a model folder?"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, no JSON object")
    return value
