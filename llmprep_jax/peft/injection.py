"""Putting a method around a model's layers: which are targeted, and how their parameters begin.

Which layers are taken goes by PEFT's rules (`targets.py`). A stack has its adapters whole, so of
layers that `layers_to_transform` leaves out the parameters are zeros, which is the identity and
gets no gradient; methods of which that is not true refuse it.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Einsum, Embed
from llmprep_jax.peft import biases, tokens
from llmprep_jax.peft.adapter import is_adapted, wrap
from llmprep_jax.peft.experts import each_expert, experts, num_experts
from llmprep_jax.peft.method import Method, Params
from llmprep_jax.peft.targets import (
    Names,
    bases,
    check_keys,
    is_among,
    is_table,
    linear_layers,
    modules,
    offered,
    select,
    stacked,
    words,
)
from llmprep_jax.peft.tied import refuse_head
from llmprep_jax.peft.tuned import choose, tune
from llmprep_jax.sharding import has_mesh, on_own_mesh, spec
from llmprep_jax.types import Array

Progress = Callable[[str], None]


@on_own_mesh
def inject(
    model: nnx.Module, method: Method, seed: int = 0, progress: Progress = lambda place: None
) -> nnx.Module:
    """A model with `method` around its targeted layers; the given model is unchanged.

    Targets are "all-linear" (every linear layer but the output head), "language" (those of the
    language model or text tower), "vision" (those of other towers and of projectors), names, or one
    regex for whole paths. A name is ours ("attn.q") or Hugging Face's ("q_proj"), matched as PEFT
    does: the path equals it or ends with "." and it. Routed experts and multi-token prediction
    modules, which PEFT does not see, are taken by targets alone that say "experts" or "mtp".
    Modules that are trained whole are no targets.

    Args:
      seed: of what is drawn.
      progress: called with each layer before a method looks at its weight, as PiSSA does.

    Raises:
      ValueError: a target matches no layer, a rank exceeds a layer's dimensions, or the model has
        adapters.
    """
    if is_adapted(model):
        raise ValueError("the model has adapters already; inject into lp.peft.strip(model)")
    model = method.prepare(model)
    layers, of_model = linear_layers(model), bases(model)
    whole = choose(model, method.modules_to_save)
    chosen = _chosen(model, method, layers, whole)
    targeted = {path: of_model[path] for path in chosen}
    for label in ("rank_pattern", "alpha_pattern"):
        check_keys(label, getattr(method, label), chosen)
    refuse_embedding(method, targeted)
    methods = {path: _resolve(method, path, names) for path, names in chosen.items()}
    idle = _idle(method, chosen, targeted)
    for path, own in methods.items():
        _check(path, own, targeted[path])
    rngs = nnx.Rngs(seed)
    # so another target changes no other
    order = sorted(layers, key=lambda path: (is_table(of_model[path]), path))
    keys = {path: rngs.params() for path in order}
    params = _init(methods, targeted, keys, progress)
    params |= {path: _without(params[path], is_idle) for path, is_idle in idle.items()}
    shared = place_shared(method.draw_shared(targeted.values()))
    adapted = {path: theirs.keys() for path, theirs in modules(model).items() if path in methods}
    trained = biases.names_of(model, method.bias, adapted, whole)
    if method.bias != "none" and not trained:
        raise ValueError(
            f'bias is {method.bias!r}, but no layer that it means has one; leave it "none"'
        )
    kept = {path: tuple(np.flatnonzero(~is_idle).tolist()) for path, is_idle in idle.items()}
    model = tune(wrap(model, methods, params, shared, kept), whole, method.dtype)
    model = biases.free(model, trained, method.dtype)
    return tokens.train(model, method.trainable_token_indices, method.dtype)


def targeted(model: nnx.Module, method: Method) -> tuple[list[str], list[str]]:
    """The paths of the layers that `inject` would adapt, and of the modules that it would train
    whole; errors are its own."""
    whole = choose(model, method.modules_to_save)
    return list(_chosen(model, method, linear_layers(model), whole)), whole


def _chosen(
    model: nnx.Module,
    method: Method,
    layers: Mapping[str, Sequence[Names]],
    whole: Collection[str],
) -> dict[str, Sequence[Names]]:
    """The names of the layers that are taken, by path; of a stack all, some of which may be idle.

    Args:
      whole: what is trained whole.
    """
    refuse_head(model, method.targets)
    targets, among = offered(model, method.targets, layers)
    targeted = select(targets, among, needed=words(model))
    excluded = []
    if method.exclude_modules:
        excluded = select(method.exclude_modules, layers, label="module to exclude")
    targeted = [path for path in targeted if path not in {*whole, *excluded}]
    chosen = {path: layers[path] for path in targeted if any(_kept(method, layers[path]))}
    if not chosen:
        raise ValueError(
            "of the targets none is left by exclude_modules, modules_to_save and"
            " layers_to_transform; leave more"
        )
    return chosen


def _kept(method: Method, layers: Sequence[Names]) -> list[bool]:
    """Which layers of a path `layers_to_transform` takes."""
    numbers, within = method.layers_to_transform, method.layers_pattern
    return [
        numbers is None or any(is_among(numbers, within, name) for name in names)
        for names in layers
    ]


def _idle(
    method: Method, chosen: Mapping[str, Sequence[Names]], bases: Mapping[str, Einsum]
) -> dict[str, np.ndarray]:
    """Which layers of stacks are left out, by path."""
    idle = {}
    for path, names in chosen.items():
        kept = _kept(method, names)
        if all(kept):
            continue
        if not method.leaves_layers:
            raise ValueError(
                f"layers_to_transform takes some layers of the stack {path} and leaves others,"
                f" which {type(method).__name__} cannot; unstack(model.layers) first"
            )
        if method.bias == "lora_only":
            raise ValueError(
                f"layers_to_transform leaves layers of the stack {path}, whose biases"
                ' bias="lora_only" would train; unstack(model.layers) first'
            )
        # experts with names of their own are those of one layer
        idle[path] = ~np.array(kept).reshape(stacked(bases[path]) or 1, -1).any(axis=1)
    return idle


def _without(params: Params, idle: np.ndarray) -> Params:
    """A stack's parameters with zeros for layers that are left out."""
    return {
        name: jnp.where(idle.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros((), x.dtype), x)
        for name, x in params.items()
    }


def _check(path: str, method: Method, base: Einsum) -> None:
    try:
        method.check(base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def place_shared(arrays: Mapping[str, np.ndarray]) -> Params:
    """What all layers share, one array for all of them, whole on every device."""
    place = spec(None, None) if has_mesh() else None
    return {
        name: jnp.asarray(x) if place is None else jax.device_put(x, place)
        for name, x in arrays.items()
    }


def refuse_embedding(method: Method, layers: Mapping[str, Einsum]) -> None:
    """Refuses embeddings as targets of a method that is of linear layers."""
    for path, base in layers.items():
        if isinstance(base, Embed) and not method.adapts_embeddings:
            raise ValueError(
                f"{type(method).__name__} does not adapt {path}, an embedding; use LoRA, or train"
                " it whole (modules_to_save)"
            )


def _resolve(method: Method, path: str, layers: Sequence[Names]) -> Method:
    """The one method that all layers of a path have."""
    one, *others = dict.fromkeys(method.resolve(names) for names in layers)
    if others:
        raise ValueError(
            f"rank_pattern or alpha_pattern sets layers of the stack {path} apart; give all of them"
            " one value, or unstack(model.layers) first"
        )
    return one


def init_layer(method: Method, base: Einsum, key: jax.Array) -> dict[str, Array]:
    """The parameters of one layer, or of each of its experts."""
    init = lambda base, key: dict(method.init(base, nnx.Rngs(key)))  # noqa: E731
    key = jax.random.split(key, num_experts(base)) if experts(base) else key
    return each_expert(init, base, key, dims=("",))


def derive(method: Method, base: Einsum) -> Params:
    """What a method keeps of the weight of a layer, or of each of its experts or a stack's layers.

    One layer after another, so that no two weights are looked at together.
    """
    if not method.frozen:  # spares most methods a program a layer
        return {}
    return _in_turn(_derive_layer, method, base)


def _derive_layer(method: Method, base: Einsum) -> Params:
    return each_expert(lambda base: dict(method.derived(base)), base, dims=(), result="")


def _init(
    methods: Mapping[str, Method],
    bases: Mapping[str, Einsum],
    keys: Mapping[str, jax.Array],
    progress: Callable[[str], None],
) -> dict[str, Params]:
    """The parameters of all adapters: of what is drawn in one program, op by op it takes seconds.

    Methods that look at weights do so one layer after another: temporaries are those of one.
    """
    drawn = {path: method for path, method in methods.items() if not method.reads_weight}
    pick = lambda values: {path: values[path] for path in drawn}  # noqa: E731
    params = _draw(tuple(drawn.items()), pick(bases), pick(keys)) if drawn else {}
    for path in methods.keys() - drawn.keys():
        base, key = bases[path], keys[path]
        keys_of_layers = key if stacked(base) is None else jax.random.split(key, stacked(base))
        params[path] = _in_turn(init_layer, methods[path], base, keys_of_layers, path, progress)
    return params


@functools.partial(jax.jit, static_argnums=0)
def _draw(
    methods: tuple[tuple[str, Method], ...],
    bases: Mapping[str, Einsum],
    keys: Mapping[str, jax.Array],
) -> dict[str, Params]:
    params = {}
    for path, method in methods:
        base, key = bases[path], keys[path]
        init = functools.partial(init_layer, method)
        if stacked(base) is not None:
            init, key = jax.vmap(init), jax.random.split(key, stacked(base))
        params[path] = init(base, key)
    return params


def _in_turn(
    function: Callable[..., Params],
    method: Method,
    base: Einsum,
    keys: jax.Array | None = None,
    path: str = "",
    progress: Callable[[str], None] = lambda place: None,
) -> Params:
    """A function of a layer, or of a stack's layers one after another."""
    more = () if keys is None else (keys,)
    if stacked(base) is None:
        progress(path)
        return _of_layer(function, method, (base, *more), None)
    params = []
    for layer in range(stacked(base)):
        progress(f"{path} {layer + 1}/{stacked(base)}")
        params.append(_of_layer(function, method, (base, *more), layer))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_layer(function: Callable[..., Params], method: Method, values: tuple, layer: Any) -> Params:
    """A function of a method and a layer's values; `layer` is its number in a stack."""
    if layer is not None:
        values = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, False), values)
    return function(method, *values)
