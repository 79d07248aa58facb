"""LoRAs of layers that transformers has in one matrix: a qkv, or experts' gate and up.

Its outputs are the gate's and then up's, so PEFT's LoRA of it has one A for both and a B whose
halves are theirs. Read, both layers get that A. Written, layers whose A have been trained apart
become one LoRA of rank 2 r, A = [A_gate; A_up] and B block-diagonal, with twice alpha for the same
scale, as PEFT converts adapters of experts that were stored apart. The gradient of PEFT's A is the
sum of those of our two. Of a qkv there are three.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.peft.adapter import Adapted, adapters
from llmprep_jax.peft.adapter_file import AdapterFile
from llmprep_jax.peft.layout import dims
from llmprep_jax.peft.targets import bases, plain, rows, table_of

_MARK = "#"  # "<tensor>#1/2" is the second of two layers' parts of a tensor


def _groups(model: nnx.Module) -> list[list[str]]:
    """Paths of the layers that make up one parameter of transformers', in its order."""
    table, groups = rows(model), {}
    for path in bases(model):
        row = table.get(f"{plain(path)}.w")
        if row is not None and row.part[1] > 1:
            numbers = tuple(part for part in path.split(".") if part.isdigit())
            groups.setdefault((row.name, numbers), []).append((row.part, path))
    return [[path for _, path in sorted(parts)] for parts in groups.values()]


def marks(model: nnx.Module) -> dict[str, str]:
    """What the names of tensors end in, by path of layers that share them."""
    return {
        path: f"{_MARK}{i}/{len(group)}" for group in _groups(model) for i, path in enumerate(group)
    }


def join(model: nnx.Module) -> nnx.Module:
    """The model with one A for layers of one parameter; of the ranks' sum where theirs differ.

    Raises:
      ValueError: some of them have an adapter and others none, or another one.
    """
    layers, changed = adapters(model), {}
    for group in _groups(model):
        parts = [layers[path] for path in group if path in layers]
        if not parts or not all(part.method.adds_product for part in parts):
            continue
        if len(parts) < len(group) or len({(part.method, part.kept) for part in parts}) > 1:
            raise ValueError(
                f"{' and '.join(group)} are one parameter in transformers, with one LoRA in PEFT;"
                " adapt them alike, or save the merged model (lp.peft.merge)"
            )
        if any(not jnp.array_equal(part.lora_a[...], parts[0].lora_a[...]) for part in parts):
            changed |= zip(group, _side_by_side(parts), strict=True)
    visit = lambda path, node: changed.get(".".join(map(str, path)), node)  # noqa: E731
    return nnx.recursive_map(visit, model) if changed else model


def _side_by_side(parts: list[Adapted]) -> list[Adapted]:
    """The same adapters with one A, and zeros in B where it is another's."""
    number, method = len(parts), parts[0].method
    alpha = method.alpha * (math.sqrt(number) if method.rslora else number)
    joined = dataclasses.replace(method, rank=number * method.rank, alpha=alpha)
    a, layers = jnp.concatenate([part.lora_a[...] for part in parts], axis=-1), []
    for i, part in enumerate(parts):
        b, num_outs = part.lora_b[...], len(dims(part.base)[2])
        room = [(0, 0)] * b.ndim
        room[b.ndim - num_outs - 1] = i * method.rank, (number - 1 - i) * method.rank
        params = {"lora_a": a, "lora_b": jnp.pad(b, room)}
        layers.append(Adapted(part.base, joined, params, kept=part.kept))
    return layers


def join_tensors(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of tensors, those of layers of one parameter together."""
    waiting: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors:
        whole, number, count = _split(name)
        if not count:
            yield name, array
            continue
        parts = waiting.setdefault(whole, {})
        parts[number] = np.array(array)
        if len(parts) == count:
            in_order = [parts[i] for i in range(count)]
            del waiting[whole]
            yield whole, np.concatenate(in_order) if _is_b(whole) else in_order[0]


def split_names(names: Iterable[str], expected: Iterable[str]) -> list[str]:
    """A file's names, with those of parts for the tensors of which parts are expected."""
    parts: dict[str, list[str]] = {}
    for name in expected:
        whole, _, count = _split(name)
        if count:
            parts.setdefault(whole, []).append(name)
    return [part for name in names for part in parts.get(name, [name])]


def _split(name: str) -> tuple[str, int, int]:
    """(name of the whole tensor, number of the part, how many there are; 0 of a whole one)."""
    whole, mark, numbers = name.partition(_MARK)
    number, count = map(int, numbers.split("/")) if mark else (0, 0)
    return whole, number, count


def _is_b(name: str) -> bool:
    return name.endswith("lora_B.weight")


class PartsFile(AdapterFile):
    """A file of adapters that answers for parts of tensors too; `names` are those of whole ones."""

    def __contains__(self, name: str) -> bool:
        return super().__contains__(_split(name)[0])

    def shape(self, name: str) -> tuple[int, ...]:
        whole, _, count = _split(name)
        shape = super().shape(whole)
        if not count or not _is_b(whole) or not shape or shape[0] % count:
            return shape
        return (shape[0] // count, *shape[1:])

    def dtype(self, name: str) -> np.dtype:
        return super().dtype(_split(name)[0])

    def read(self, name: str) -> np.ndarray:
        whole, number, count = _split(name)
        tensor = super().read(whole)
        return np.split(tensor, count)[number] if count and _is_b(whole) else tensor


def leaves(model: nnx.Module) -> frozenset[str]:
    """Last names of experts' layers in files, "gate_proj", where transformers has fused them.

    PEFT 0.21 takes these in target_modules for the fused parameters, even where a dense layer of
    this name is meant, so those are named in target_parameters, by "gate_proj.weight".
    """
    names = [row.name.removesuffix(".weight") for row in table_of(model).values() if row.module]
    return frozenset(name.rsplit(".", 1)[-1] for name in names)
