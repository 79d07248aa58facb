"""The tensors of a PEFT folder under the names that this library's tables give them.

Files differ in spelling: of a compiled model ("_orig_mod."), written from a state dict
("lora_A.default.weight"), or of a larger model that holds the language model in a module of its
own. The names in adapter_config.json are in the larger model's spelling too, so `spelled` gives
them.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llmprep_jax.weights.rows import Table
from llmprep_jax.weights.safetensors import SafetensorsFile

PREFIX = "base_model.model."
_SPELLINGS = ((r"(^|\.)_orig_mod\.", r"\1"), (r"\.modules_to_save(?=\.)", ""))
_SPELLINGS = (*_SPELLINGS, (r"\.default(?=\.|$)", ""), (r"(magnitude_vector)\.weight$", r"\1"))
# what a model that sees calls its language model's modules, and what that itself does
_WHOLES = (
    (r"^(model\.language_model\.(model\.)?|language_model\.model\.|language\.model\.)", "model."),
    (r"^(model\.)?(language_model|language)\.lm_head\.", "lm_head."),
)


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
        idle = tuple(f"{module}." for module in idle)
        foreign: list[str] = []
        self._names = names = _Names(table, [_plain(name) for name in super().names])
        for stored in super().names:
            name = _plain(stored)
            if ".original_module." in name:
                continue  # as it was before it was trained whole
            inner = name.removeprefix(PREFIX)
            ours = names.ours(inner)
            if ours is None:
                foreign.append(stored)
                continue
            if ours.startswith(idle):
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

    def is_of(self, module: str) -> bool:
        """Whether the adapter's own base has what is a module here, be it adapted or not: that of a
        language model has no part that sees."""
        return not self._names.is_of_text or self._names.is_language(module)

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


def names_in(path: str | Path) -> list[str]:
    """The names of a file's tensors, without what wrappers and PEFT put into them."""
    return [_plain(name).removeprefix(PREFIX) for name in SafetensorsFile(path).names]


class _Names:
    """What tensors of an adapter are called here, whether it is of a language model or of a model
    that sees and has one.

    Args:
      table: of the model. names: of all tensors.

    Attributes:
      is_of_whole: whether the adapter is of a model that sees, and this one is its language model.
      is_of_text: the other way round.
    """

    def __init__(self, table: Table, names: Sequence[str]):
        in_memory = table.in_memory()
        self._table, stored = table, [row.name for row in in_memory.values()]
        self._known = {_beginning(name) for name in stored}
        embed, self._head = (
            "" if path is None else in_memory[path].name for path in (table.embed, table.head)
        )
        body = embed.rsplit(".", 2)[0] + "."
        self._body = body if body != "model." else ""  # nothing, of a model of text alone
        inner = (name.removeprefix(body) for name in stored if name.startswith(body))
        self._inner = {name.split(".")[0] for name in inner}
        names = [name.removeprefix(PREFIX) for name in names]
        self.is_of_whole = not self._body and any(in_language(name) != name for name in names)
        self.is_of_text = bool(self._body) and any(map(self._is_of_text, names))

    def ours(self, name: str) -> str | None:
        """A tensor's name here; None: it is of a part that this model has not."""
        if any(re.search(pattern, name) for pattern in self._table.ignored):
            return None
        if self._is_of_text(name):
            return self._body + name.removeprefix("model.")
        name = self._table.module_name(self._table.rename(name))
        name = name if self._body else in_language(name)
        return None if self.is_of_whole and _beginning(name) not in self._known else name

    def is_language(self, module: str) -> bool:
        """Whether a module here is of the language model."""
        return module.startswith(self._body) or f"{module}.weight" == self._head

    def _is_of_text(self, name: str) -> bool:
        first, _, rest = name.partition(".")
        is_other = bool(self._body) and _beginning(name) not in self._known
        return is_other and first == "model" and rest.split(".")[0] in self._inner


def in_language(name: str) -> str:
    """A name of a model that sees as its language model alone has it; others stay."""
    for pattern, replacement in _WHOLES:
        name = re.sub(pattern, replacement, name)
    return name


def _beginning(name: str) -> str:
    """A name's first two parts."""
    return ".".join(name.split(".")[:2])


def _plain(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name if name.startswith("base_model.") else PREFIX + name


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
