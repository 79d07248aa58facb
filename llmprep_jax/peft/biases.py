"""Biases trained beside LoRA, PEFT's `bias`: of the adapted layers ("lora_only") or of all layers.

The linear layer keeps its bias as `b_base` and adds a trained copy, `b`, in its place, so that
neither the layer nor the adapter around it knows of it. PEFT trains the base's own biases in place,
so that its model is not its base when the adapters are switched off; `peft.strip` gives the biases
back.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft.targets import Place, plain
from llmprep_jax.peft.tuned import modules_of
from llmprep_jax.sharding import has_mesh
from llmprep_jax.weights.gather import to_host
from llmprep_jax.weights.rows import Row
from llmprep_jax.weights.safetensors import SafetensorsFile

KINDS = ("none", "lora_only", "all")
Names = Mapping[str, Mapping[Place, str]]  # PEFT's names of biases, by path and place in the stack


def names_of(
    model: nnx.Module,
    which: str,
    adapted: Mapping[str, Collection[Place]],
    whole: Collection[str],
) -> Names:
    """PEFT's names of the biases that are trained.

    Args:
      which: one of `KINDS`.
      adapted: the layers with an adapter, by path and place.
      whole: paths of the modules that are trained whole, their biases too.
    """
    by_path: dict[str, dict[Place, str]] = {}
    for path, rows in modules_of(model).items():
        if "b" not in rows or path in whole or which == "none":
            continue
        for place, name in rows["b"].names().items():
            if place in adapted.get(path, ()):
                name = f"{name.removesuffix('.bias')}.base_layer.bias"
            elif which != "all":
                continue
            by_path.setdefault(path, {})[place] = name
    return by_path


def free(model: nnx.Module, paths: Collection[str], dtype: str) -> nnx.Module:
    """A model that trains the biases of the linear layers of these paths, in `dtype`."""

    def visit(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path)).removesuffix(".base")
        if isinstance(node, Einsum) and name in paths:
            node.b_base = node.b
            # a true copy: a step of training may take its arrays over
            node.b = AdapterParam(jnp.array(node.b[...], dtype, copy=True))
        return node

    return nnx.recursive_map(visit, model) if paths else model


def settle(layer: Einsum, *, trained: bool) -> Einsum:
    """Leaves a layer, which is changed, with the bias that it had or with the trained one."""
    if not hasattr(layer, "b_base"):
        return layer
    before = layer.b_base
    layer.b = before.replace(layer.b[...].astype(before.dtype)) if trained else before
    del layer.b_base
    return layer


def table(model: nnx.Module, prefix: str) -> dict[str, Row]:
    """A weight table of the trained biases, with PEFT's names."""
    modules, entries = modules_of(model), {}
    for (*owner, name), _ in nnx.to_flat_state(nnx.state(model, AdapterParam)):
        path = ".".join(map(str, owner))
        if name != "b" or path.endswith(".trained"):
            continue
        row = modules[path.removesuffix(".base")]["b"]
        adapted = f"{row.name.removesuffix('.bias')}.base_layer.bias"
        theirs = adapted if path.endswith(".base") else row.name
        entries[f"{plain(path)}.b"] = row.renamed(prefix + theirs).row
    return entries


def shapes(model: nnx.Module, names: Names, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases' tensors."""
    rows = modules_of(model)
    return {
        prefix + name: rows[path]["b"].their_shape()
        for path, of_path in names.items()
        for name in of_path.values()
    }


def read(model: nnx.Module, names: Names, file: SafetensorsFile, prefix: str) -> nnx.Module:
    """The model with these biases trained as a file holds them."""
    rows, model = modules_of(model), free(model, names, "float32")

    def visit(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path)).removesuffix(".base")
        if isinstance(node, Einsum) and name in names:
            array = np.array(to_host(node.b[...]))
            for place, stored in names[name].items():
                array[(*place, ...)] = rows[name]["b"].to_ours(file.read(prefix + stored))
            sharding = node.b[...].sharding if has_mesh() else None
            node.b = AdapterParam(jax.device_put(array, sharding))
        return node

    return nnx.recursive_map(visit, model) if names else model
