"""What a training step changes: parameters, moments, averages, step and key; one donated pytree.

Parameters are plain nested dicts of arrays (`nnx.to_pure_dict`), so paths in checkpoints and decay
masks are the names of the weights table. What is not trained stays outside and is never copied. A
state takes its arrays over: the model that it was split from must not be used after the first step,
and `merge` gives the trained one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llmprep_jax.nn.base_model import without_source
from llmprep_jax.nn.param import AdapterParam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step takes and returns.

    Attributes:
      step: steps done, int32.
      params: what is trained, a tree of arrays.
      opt_state: optax's.
      ema: running average of params, float32, or None.
      key: PRNG key that each step folds its number into.
    """

    step: Any  # Any throughout: abstract values and shardings come in states too
    params: Any
    opt_state: Any
    ema: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class Split:
    """A model in three: its structure, what is trained and what is frozen (trees of arrays)."""

    graphdef: Any
    params: Any
    frozen: Any


def split_model(model: nnx.Module, trainable: Any) -> Split:
    """Parts a model for training.

    Args:
      model: any module. One whose own weights are trained is no longer what it was loaded from;
        one with adapters still has its base.
      trainable: what is trained, as `nnx.split` takes it: a Variable class or a filter.

    Raises:
      ValueError: nothing in the model is trainable.
    """
    graphdef, params, frozen = nnx.split(model, trainable, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"nothing to train: the model has no {trainable}")
    if nnx.to_flat_state(nnx.filter_state(params, nnx.Not(AdapterParam))):
        graphdef = nnx.split(without_source(model))[0]  # other weights than were loaded
    return Split(graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen))


def merge(graphdef: Any, params: Any, frozen: Any) -> nnx.Module:
    """The model that `split_model` parted, with these arrays."""
    return nnx.merge(graphdef, params, frozen)


def create_state(
    params: Any, tx: optax.GradientTransformation, *, seed: int, ema: bool = False
) -> TrainState:
    """The state before the first step; `params` is donated to it.

    `jax.eval_shape` of this gives the abstract state that a checkpoint is restored into.
    """

    def create(params):
        average = jax.tree.map(lambda p: p.astype(jnp.float32), params) if ema else None
        return TrainState(
            jnp.zeros((), jnp.int32), params, tx.init(params), average, jax.random.key(seed)
        )

    return jax.jit(create, donate_argnums=0)(params)


def count(tree: Any) -> int:
    """The number of values in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_bytes(tree: Any) -> int:
    """The bytes of a tree of arrays or of their shapes, over all devices, each value once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as the dotted name of a parameter, e.g. "layers.attn.q.w"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
