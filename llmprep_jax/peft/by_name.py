"""Several adapters on one base, by name: put together, and one chosen for a call or for each row.

All arrays are shared. One name selected gives the very model that has that adapter alone, so
training, saving and merging are as ever; names of rows give a model for batches of as many rows.
The combined model itself has no adapter chosen, and refuses to compute.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft.adapter import (
    Adapted,
    adapters,
    is_adapted,
    map_adapted,
    methods,
    split,
    strip,
)
from llmprep_jax.peft.experts import experts
from llmprep_jax.peft.peft_format import load
from llmprep_jax.peft.several import Several, check_names
from llmprep_jax.peft.targets import is_table
from llmprep_jax.sharding import has_mesh, on_own_mesh, spec


@on_own_mesh
def combine(
    adapted: Mapping[str, nnx.Module | str | Path], base: nnx.Module | None = None
) -> nnx.Module:
    """A model with several adapters, by name, of models that share one base or of PEFT folders.

    Methods, ranks and targeted layers may differ. None is chosen yet: see `select` and `merge`.

    Args:
      base: what folders are loaded onto; None: the base of the first model.

    Raises:
      ValueError: no model, one without an adapter or with several, or bases that differ.
    """
    models = {name: model for name, model in adapted.items() if isinstance(model, nnx.Module)}
    if base is None and not models:
        raise ValueError("there is no model to combine; give base=model for the folders")
    base = strip(next(iter(models.values()))) if base is None else base
    by_name: dict[str, dict[str, Adapted]] = {}
    for name, model in adapted.items():
        model = models[name] if name in models else load(base, model)
        _check(name, model, base)
        by_name[name] = adapters(model)

    def visit(path: tuple, node: Any) -> Any:
        at = ".".join(map(str, path))
        parts = {name: layers[at] for name, layers in by_name.items() if at in layers}
        return Several(node, tuple(by_name), parts) if parts else node

    return nnx.recursive_map(visit, base)


def _check(name: str, model: nnx.Module, base: nnx.Module) -> None:
    """Refuses what has no adapter, several, another base, or trains something else too."""
    if not is_adapted(model):
        raise ValueError(f"the model {name!r} has no adapter; give it one by lp.peft.inject")
    methods(model)  # refuses several
    own = [
        getattr(layer, attribute) for layer in adapters(model).values() for attribute in layer.names
    ]
    trained = sum(isinstance(variable, AdapterParam) for variable in own)
    if trained != len(jax.tree.leaves(split(model)[0])):
        raise ValueError(
            f"the model {name!r} trains more than adapters of linear layers and cannot be"
            " combined; use it alone, or merge it"
        )
    if not _same(strip(model), base):
        raise ValueError(
            f"the adapter {name!r} is around another base; save it by lp.peft.save and give its"
            " folder, to put it on this one"
        )


def _same(model: nnx.Module, other: nnx.Module) -> bool:
    """Whether two models are of one structure and of equal arrays."""
    if jax.tree.structure(model) != jax.tree.structure(other):
        return False
    return all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(jnp.array_equal(a, b)))
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True)
    )


@on_own_mesh
def select(model: nnx.Module, which: str | Sequence[str | None] | None) -> nnx.Module:
    """A combined model's one adapter, its base (None), or an adapter for each row of a batch.

    Args:
      which: a name, None, or a name or None for each row. Names that change from batch to batch
        compile nothing anew as long as there are as many.

    Raises:
      ValueError: an unknown name, no rows, a model without adapters by name, or rows for an
        embedding, a head or a layer that routes tokens to experts.
    """
    order = names(model)
    if which is None or isinstance(which, str):
        check_names(order, [which])
        return map_adapted(model, lambda layer: layer.each().get(which, layer.base))
    check_names(order, which)
    if not which:
        raise ValueError("no rows are given; give a name, or None, for each row of the batch")
    for path, layer in adapters(model).items():
        if is_table(layer.base):
            raise ValueError(
                f"{path} is adapted, and an embedding or a head takes no adapter by row; select"
                " one adapter for the whole batch"
            )
        x_dims, y_dims = layer.base.eqn.split(",")[0], layer.base.eqn.split("->")[1]
        if experts(layer.base) or x_dims[0] != y_dims[0]:
            raise ValueError(
                f"{path} is adapted, and {layer.base.eqn} keeps no rows of a batch; select"
                " one adapter for the whole batch"
            )
    rows = jnp.asarray([0 if name is None else order.index(name) + 1 for name in which], jnp.int32)
    rows = jax.device_put(rows, spec(None)) if has_mesh() else rows
    return map_adapted(model, lambda layer: layer.by_row(rows))


def names(model: nnx.Module) -> tuple[str, ...]:
    """The names of a combined model's adapters.

    Raises:
      ValueError: the model is none.
    """
    orders = {layer.order for layer in adapters(model).values() if isinstance(layer, Several)}
    if not orders:
        raise ValueError("the model holds no adapters by name; put them on it by lp.peft.combine")
    return orders.pop()
