"""How the base that an adapter folder names spells its modules, and whether it has them.

A multimodal model holds the language model in a module of its own, and PEFT leaves out in silence
what it finds no module for; so what is saved for such a base is spelled as transformers does.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from llmprep_jax.nn.base_model import BaseModel
from llmprep_jax.peft.adapter_file import PREFIX, in_language
from llmprep_jax.peft.targets import table_of
from llmprep_jax.weights import hub
from llmprep_jax.weights.folder import read_json

_BODY = "model."
_LISTS = ("target_modules", "target_parameters", "modules_to_save", "feedforward_modules")
_OBJECTS = ("rank_pattern", "alpha_pattern")


def named_as(model: nnx.Module, names: Sequence[str]) -> nnx.Module:
    """The model with the names of the form that such are of; other modules have one form."""
    return model.named_as(names) if isinstance(model, BaseModel) else model


class BaseSpelling:
    """The spelling of the base of this name, where it is on this machine; else the model's own.

    Args:
      name: path or hub id of the base; None: where the model was loaded from.
    """

    def __init__(self, model: nnx.Module, name: str | None):
        if name is None and isinstance(model, BaseModel):
            name = model.source.path
        folder = None if name is None else hub.cached(name)
        self._folder, self._stored, self._whole = None, [], None
        if folder is not None and (folder / "config.json").is_file():
            self._folder = folder
            if list(Path(folder).glob("*.safetensors")):
                self._stored = hub.open_checkpoint(folder).names
        self._table = table_of(self.named(model))
        if self._folder is not None:
            kind = read_json(folder / "config.json").get("model_type")
            wholes = {whole.model_type: whole for whole in self._table.within}
            self._whole = wholes.get(kind)

    def named(self, model: nnx.Module) -> nnx.Module:
        """The model with the names of the base's form."""
        return named_as(model, self._stored)

    def module(self, name: str) -> str:
        """A module's name, or a tensor's without PEFT's prefix."""
        if self._whole is None or not name.startswith(_BODY):
            return name
        return self._whole.body + name.removeprefix(_BODY)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """An adapter_config.json with the base's names."""
        config = dict(config)
        if self._whole is None:
            return config
        for field in _LISTS:
            if config.get(field):
                config[field] = [self.module(name) for name in config[field]]
        for field in _OBJECTS:
            if config.get(field):
                config[field] = {self.module(name): x for name, x in config[field].items()}
        # names such as "q_proj" are those of layers of other parts too
        others = "|".join(re.escape(part) for part in self._whole.others)
        return config | ({"exclude_modules": rf".*({others})\..*"} if others else {})

    def tensors(
        self, tensors: Iterable[tuple[str, np.ndarray]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """A file's tensors with the base's names.

        Raises:
          ValueError: the base has no module of a tensor's name.
        """
        known = self._names()
        for name, array in tensors:
            inner = name.removeprefix(PREFIX)
            is_known = not known or ".experts." in inner or _is_in(inner, known)
            if name != inner and not is_known:
                raise ValueError(
                    f"{self._folder} has no module for {inner}, so peft would leave it out; name"
                    " the base that the model was loaded from in base_model"
                )
            yield (PREFIX + self.module(inner) if name != inner else name), array

    def _names(self) -> set[str]:
        """Modules of the base's file, in this model's spelling."""
        modules = set()
        for stored in self._stored:
            name = self._table.module_name(self._table.rename(stored)).rpartition(".")[0]
            inner = in_language(f"{name}.").removesuffix(".")
            modules |= {name, inner, f"{_BODY}{inner}"}
        return modules | {"lm_head"} if modules else set()


def _is_in(name: str, modules: set[str]) -> bool:
    """Whether a tensor is of one of these modules."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(len(parts) - 1, 1, -1)) or (
        parts[0] in modules
    )
