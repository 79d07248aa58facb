"""The tensors of a PEFT folder under the names that this library's tables give them.

Files differ in spelling: of a compiled model ("_orig_mod."), written from a state dict
("lora_A.default.weight"), or of a larger model that holds the language model in a module of its
own. The names in adapter_config.json are in the larger model's spelling too, so `spelled` gives
them.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmprep_jax.weights.safetensors import SafetensorsFile

PREFIX = "base_model.model."
_BODY = "model."  # what the language model's own layers begin with
_SPELLINGS = ((r"(^|\.)_orig_mod\.", r"\1"), (r"\.modules_to_save(?=\.)", ""))
_SPELLINGS = (*_SPELLINGS, (r"\.default(?=\.|$)", ""), (r"(magnitude_vector)\.weight$", r"\1"))


class AdapterFile(SafetensorsFile):
    """A file of adapters.

    Args:
      renames: (regex, replacement) pairs that bring a larger model's names to this one's.
      ignored: regexes of what is the larger model's alone.

    Raises:
      ValueError: two tensors have one name.
    """

    def __init__(
        self,
        path: str | Path,
        renames: Sequence[tuple[str, str]] = (),
        ignored: Sequence[str] = (),
    ):
        super().__init__(path)
        self._stored: dict[str, str] = {}
        self._body, foreign = _BODY, []
        for stored in super().names:
            name = stored
            for pattern, replacement in _SPELLINGS:
                name = re.sub(pattern, replacement, name)
            name = name if name.startswith("base_model.") else PREFIX + name
            if ".original_module." in name:
                continue  # as it was before it was trained whole
            inner = name.removeprefix(PREFIX)
            if any(re.search(pattern, inner) for pattern in ignored):
                foreign.append(stored)
                continue
            for pattern, replacement in renames:
                renamed = re.sub(pattern, replacement, inner)
                if renamed != inner and renamed.startswith(_BODY):
                    self._body = inner.removesuffix(renamed.removeprefix(_BODY))
                inner = renamed
            name = PREFIX + inner if name.startswith(PREFIX) else name
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
        return module if not module.startswith(_BODY) else self._body + module.removeprefix(_BODY)

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
