"""A checkpoint on disk, whatever its files: a config and tensors by their Hugging Face names.

`Checkpoint` is what the loader reads from; this file has the one over a Hugging Face folder,
`gguf.py` the one over a GGUF file. An index file's word is checked against the shards before
anything is read, and pickled weights are never opened.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llmprep_jax.weights.safetensors import INDEX, SINGLE, SafetensorsFile, one_line, quoted

MISSING, MISSHAPEN = "missing", "of another shape"  # kinds of lines in a loader's error


@runtime_checkable
class Checkpoint(Protocol):
    """Tensors by name, and the config.json that describes them; implementations derive from it."""

    path: Path
    config: dict[str, Any]
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...

    def file(self, name: str) -> Path: ...

    def misfits(self, name: str, shape: tuple[int, ...]) -> dict[str, list[str]]:
        """What keeps a tensor from being read as one of `shape`: lines by what is the matter."""
        stored = tuple(self.shape(name))
        if stored == tuple(shape):
            return {}
        return {MISSHAPEN: [f"{name} is {dims(stored)}, expected {dims(shape)}"]}

    def token_id(self, text: str) -> int | None:
        """The id of a special token, of a tokenizer that is there too; None: nothing says it."""
        return None

    def is_spare(self, name: str) -> bool:
        """Whether a tensor that the model has no place for says nothing."""
        return False


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json and model.safetensors, or shards and their index.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or the weights are pickled.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        if not (self.path / "config.json").is_file():
            refuse_adapter(self.path)
        self.config = read_json(self.path / "config.json")
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

    def token_id(self, text: str) -> int | None:
        path = self.path / "tokenizer.json"
        added = read_json(path).get("added_tokens") if path.is_file() else None
        ids = [x.get("id") for x in added or () if isinstance(x, dict) and x.get("content") == text]
        return ids[0] if ids and isinstance(ids[0], int) else None

    def _open(self) -> dict[str, SafetensorsFile]:
        """Each tensor's file, by tensor."""
        if (self.path / SINGLE).is_file():  # first, as transformers does where both are there
            file = SafetensorsFile(self.path / SINGLE)
            return dict.fromkeys(file.names, file)
        if (self.path / INDEX).is_file():
            return self._open_shards(self.path / INDEX)
        pickled = sorted(
            p.name for kind in ("bin", "pt", "pth") for p in self.path.glob(f"*.{kind}")
        )
        if pickled:
            raise ValueError(
                f"{self.path} holds only pickled weights ({pickled[0]}), which can run code when"
                " opened; convert them where you trust them: transformers' from_pretrained, then"
                " save_pretrained(folder)"
            )
        refuse_adapter(self.path)
        raise FileNotFoundError(
            f"{self.path} holds no {SINGLE} and no {INDEX}; give the folder of a model"
        )

    def _open_shards(self, index: Path) -> dict[str, SafetensorsFile]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download the index again")
        shards: dict[str, SafetensorsFile] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(
                    f"{index} places {quoted(tensor)} in {quoted(name)}, which is no file name"
                )
            if name not in shards:
                if not (self.path / name).is_file():
                    raise FileNotFoundError(
                        f"{index} names the shard {quoted(name)}, which is not there;"
                        " download it again"
                    )
                shards[name] = SafetensorsFile(self.path / name)
            if tensor not in shards[name]:
                raise ValueError(
                    f"{index} places {quoted(tensor)} in {quoted(name)}, which has no such tensor;"
                    " download both again"
                )
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
        raise ValueError(f"{path} is no JSON ({one_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, no JSON object")
    return value


def refuse_adapter(folder: Path) -> None:
    """Raises ValueError when a folder that was taken for a model's holds an adapter."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = read_json(path).get("base_model_name_or_path")
    named = quoted(base) if base else "adapter_config.json does not name it"
    raise ValueError(
        f"{folder} holds an adapter; load its base model ({named}) and put the adapter on it:"
        f" lp.peft.load(model, {str(folder)!r}), in commands adapter={folder}"
    )


def dims(shape: Sequence[int]) -> str:
    """A shape for a message."""
    return f"[{', '.join(map(str, shape))}]"
