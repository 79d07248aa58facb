"""The tensors of a PEFT folder under the names that this library's tables give them.

Files differ in spelling: of a compiled model ("_orig_mod."), written from a state dict
("lora_A.default.weight"), or of a larger model that holds the language model in a module of its
own. The names in adapter_config.json are in the larger model's spelling too, so `spelled` gives
them.
"""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llmprep_jax.weights.rows import Table
from llmprep_jax.weights.safetensors import SafetensorsFile

PREFIX = "base_model.model."
_SPELLINGS = ((r"(^|\.)_orig_mod\.", r"\1"), (r"\.modules_to_save(?=\.)", ""))
_SPELLINGS = (*_SPELLINGS, (r"\.default(?=\.|$)", ""), (r"(magnitude_vector)\.weight$", r"\1"))


class AdapterFile(SafetensorsFile):
    """A file of adapters.

    Args:
      table: of the model, for other spellings of its names and for what it ignores.
      idle: modules that PEFT adapts and that compute nothing, so that their adapters are left out.

    Raises:
      ValueError: two tensors have one name.
    """

    def __init__(self, path: str | Path, table: Table, idle: Iterable[str] = ()):
        super().__init__(path)
        self._stored: dict[str, str] = {}
        self._beginnings: dict[str, str] = {}  # of modules' names here, as they are in the file
        foreign = []
        for stored in super().names:
            name = stored
            for pattern, replacement in _SPELLINGS:
                name = re.sub(pattern, replacement, name)
            name = name if name.startswith("base_model.") else PREFIX + name
            if ".original_module." in name:
                continue  # as it was before it was trained whole
            inner = name.removeprefix(PREFIX)
            if any(re.search(pattern, inner) for pattern in table.ignored):
                foreign.append(stored)
                continue
            ours = table.module_name(table.rename(inner))
            if ours.startswith(tuple(f"{module}." for module in idle)):
                continue
            if ours != inner:
                self._beginnings |= [_beginnings(ours, inner)]
            name = PREFIX + ours if name.startswith(PREFIX) else name
            if name in self._stored:
                raise ValueError(
                    f"{path} holds {name} twice, as {self._stored[name]} and as {stored};"
                    " save the adapter again"
                )
            self._stored[name] = stored
        if foreign:
            warnings.warn(
                f"{path}: {len(foreign)} tensors are of parts that this model has not, among them"
                f" {foreign[0]}; they are left out",
                stacklevel=2,
            )

    def spelled(self, module: str) -> str:
        """A module's name as the adapter's own base has it."""
        for ours in sorted(self._beginnings, key=len, reverse=True):
            if f"{module}.".startswith(ours):
                return (self._beginnings[ours] + f"{module}.".removeprefix(ours)).removesuffix(".")
        return module

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return super().shape(self._stored[name])

    def dtype(self, name: str) -> np.dtype:
        return super().dtype(self._stored[name])

    def read(self, name: str) -> np.ndarray:
        return super().read(self._stored[name])


def _beginnings(name: str, other: str) -> tuple[str, str]:
    """What two names begin with before the end that they share; of the first a part at least."""
    ends, of_other = name.split("."), other.split(".")
    shared = 0
    for one, two in zip(ends[:0:-1], of_other[::-1], strict=False):
        if one != two:
            break
        shared += 1
    return tuple(
        "".join(f"{part}." for part in parts[: len(parts) - shared]) for parts in (ends, of_other)
    )
