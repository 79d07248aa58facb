"""One LoRA of several, and the base out of merged weights.

The weighted sum of LoRAs is a LoRA whose rank is the sum of theirs: sum of w s B A = [w s B] [A],
columns and rows side by side (PEFT's combination_type "cat"). The model before a merge still has
its base (`strip`); `unmerge` is for who has the merged weights alone, and the adapter.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.base_model import without_source
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.adapter import Adapted, adapters, is_adapted, map_adapted, with_weights
from llmprep_jax.peft.by_name import names
from llmprep_jax.peft.layout import dims
from llmprep_jax.peft.several import Several, check_weights
from llmprep_jax.peft.targets import Number, bases
from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.types import Array

_ROUNDING = 1e-5  # of the largest merged weight


@on_own_mesh
def blend(model: nnx.Module, weights: Mapping[str, Number]) -> nnx.Module:
    """A model with one LoRA, the weighted sum of a combined model's, of the sum of their ranks.

    Raises:
      ValueError: an unknown name, an adapter that is no LoRA, or a rank above a layer's dimensions.
    """
    check_weights(names(model), weights)
    for path, layer in adapters(model).items():
        for name, adapted in layer.each().items():
            if name in weights and not adapted.method.adds_product:
                raise ValueError(
                    f"adapter {name!r} is {type(adapted.method).__name__} around {path}, and only"
                    " LoRAs add up to a LoRA; lp.peft.merge(model, weights) takes every method"
                )
    return map_adapted(model, lambda layer: _blended(layer, weights))


def _blended(layer: Several, weights: Mapping[str, Number]) -> nnx.Module:
    parts = {name: adapted.widened() for name, adapted in layer.each().items() if name in weights}
    if not parts:
        return layer.base
    a = [adapted.lora_a[...].astype(jnp.float32) for adapted in parts.values()]
    b = [
        adapted.lora_b[...].astype(jnp.float32) * (adapted.method.scale * weights[name])
        for name, adapted in parts.items()
    ]
    rank = sum(adapted.method.rank for adapted in parts.values())
    method = dataclasses.replace(
        next(iter(parts.values())).method, rank=rank, alpha=rank, rslora=False, dtype="float32"
    )
    method.check(layer.base)
    before_outs = -len(dims(layer.base)[2]) - 1
    joined = {"lora_a": jnp.concatenate(a, -1), "lora_b": jnp.concatenate(b, before_outs)}
    kept = None
    if all(adapted.kept is not None for adapted in parts.values()):
        kept = tuple(sorted({number for adapted in parts.values() for number in adapted.kept}))
    return Adapted(layer.base, method, joined, kept=kept)


@on_own_mesh
def unmerge(merged: nnx.Module, adapted: nnx.Module) -> nnx.Module:
    """The base of merged weights: what merges into them with the adapter of `adapted`.

    The base of `adapted` does not count, so it may be `load(merged, folder)`. It is exact to
    float32's rounding, or to that of the merged weights' dtype.

    Raises:
      ValueError: the adapter's merge has no inverse (DoRA's forgets the norms; a zero of (IA)^3 all
        that it multiplied), or is around layers that the merged model has not.
    """
    if is_adapted(merged):
        raise ValueError("the model to unmerge has adapters; give what lp.peft.merge gave")
    layers = bases(merged)
    bare = {path: _bare(path, layers, layer) for path, layer in adapters(adapted).items()}

    def visit(path: tuple, node: object) -> object:
        return bare.get(".".join(map(str, path)), node)

    return without_source(nnx.recursive_map(visit, merged))


def _bare(path: str, layers: Mapping[str, Einsum], adapted: Adapted) -> Einsum:
    """The layer without the adapter.

    All merges that have an inverse are s W + d, so two weights tell s and d; a third proves it.
    """
    layer = layers.get(path)
    if layer is None or layer.shape != adapted.base.shape:
        raise ValueError(
            f"{path} is adapted, and the merged model has no such layer; give the model that was"
            " merged with this adapter"
        )
    adapted.check_weights(None)
    bare, errors = _unmerge(adapted, layer)
    if not all(float(error) <= _ROUNDING for error in errors):
        raise ValueError(
            f"{type(adapted.method).__name__} around {path} cannot be taken out of merged weights;"
            " the model before the merge still has its base: lp.peft.strip"
        )
    return bare


@jax.jit  # op by op it compiles fifty programs a layer
def _unmerge(adapted: Adapted, layer: Einsum) -> tuple[Einsum, list[Array]]:
    """The layer without the adapter, and how far its merge is from the layer: of the largest."""
    dense = layer.with_weight(layer.weight())  # packed after the merge
    ours = [x[...].astype(jnp.float32) for x in (dense.w, dense.b) if x is not None]
    zero, one = [
        _merge_into(adapted, dense, [like(x) for x in ours])
        for like in (jnp.zeros_like, jnp.ones_like)
    ]
    bare = [(x - d) / (sd - d) for x, d, sd in zip(ours, zero, one, strict=True)]
    again = _merge_into(adapted, dense, bare)
    errors = [
        jnp.abs(x - merged).max() / jnp.abs(x).max() for x, merged in zip(ours, again, strict=True)
    ]
    return with_weights(dense, *bare, *[None] * (2 - len(bare))), errors


def _merge_into(adapted: Adapted, dense: Einsum, weights: Sequence[Array]) -> list[Array]:
    """What the adapter makes of a weight, and bias if there is one, of its layer."""
    graph, state = nnx.split(dense)
    for name, x in zip(("w", "b"), weights, strict=False):
        state[name] = state[name].replace(x)
    moved = nnx.merge(*nnx.split(adapted))
    moved.base = nnx.data(nnx.merge(graph, state))
    return [x for x in moved.merged() if x is not None]
