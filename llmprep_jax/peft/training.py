"""What a model with adapters does while it is trained, and what its methods ask of the training.

The training loss calls `train_mode` on the model that it is given and adds `extra_loss`;
evaluation, generation and saving see the model itself. An optimizer follows `rules` and goes
through `wrap_optimizer`. Nothing of `train_mode` is state: the switched model is another one with
the same arrays, so there is no mode to leave, and what it drops is a function of the key.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llmprep_jax.nn.attention import Attention
from llmprep_jax.nn.linear import Embed
from llmprep_jax.nn.moe import with_bounded_buffers
from llmprep_jax.nn.param import AdapterParam, Buffer
from llmprep_jax.peft.adapter import Adapted, adapters
from llmprep_jax.peft.longlora import ShiftedAttention
from llmprep_jax.peft.targets import plain, stacked
from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an adapter's parameter is updated.

    Attributes:
      decays: whether weight decay holds for it; it moves what it holds for to zero, which must be
        the identity.
      is_hastened: whether LoRA+ gives it a higher rate.
    """

    decays: bool = False
    is_hastened: bool = False


def owners(model: nnx.Module) -> dict[str, Adapted]:
    """The adapters by the path that the names of their parameters follow."""
    return {
        f"{path}.{inner}" if inner else path: owner
        for path, adapted in adapters(model).items()
        for inner, owner in adapted.owned().items()
    }


def rules(model: nnx.Module) -> dict[str, Rule]:
    """By path, how the parameters that adapters brought are updated.

    Copies of what the base has, trained whole, do not decay: they rest at the base's values.
    """
    adapted_layers, of_model = owners(model), {}
    for (*owner, name), _ in nnx.to_flat_state(nnx.state(model, AdapterParam)):
        path = ".".join(map(str, owner))
        adapted = adapted_layers.get(path)
        rule = Rule()
        if adapted is not None:
            rule = Rule(
                name in adapted.method.decayed, name in adapted.method.hastened(adapted.base)
            )
        of_model[f"{path}.{name}"] = rule
    return of_model


def wrap_optimizer(
    model: nnx.Module, tx: optax.GradientTransformation, params: Any, num_steps: int
) -> optax.GradientTransformation:
    """The optimizer with what the model's methods do after its updates.

    Args:
      params: the tree that is trained, of arrays or shapes. num_steps: of the run.

    Raises:
      ValueError: a method's settings do not fit the run.
    """
    for layers in _by_method(model).values():
        tx = layers[0].method.wrap_optimizer(tx, params, num_steps)
    return tx


def extra_loss(model: nnx.Module) -> Array | None:
    """What the model's methods add to the mean loss; None: nothing."""
    terms = [layers[0].method.extra_loss(layers) for layers in _by_method(model).values()]
    terms = [term for term in terms if term is not None]
    return sum(terms) if terms else None


def _by_method(model: nnx.Module) -> dict[type, list[Adapted]]:
    layers: dict[type, list[Adapted]] = {}
    for adapted in owners(model).values():
        layers.setdefault(type(adapted.method), []).append(adapted)
    return layers


@on_own_mesh
def train_mode(model: nnx.Module, key: jax.Array | None = None) -> nnx.Module:
    """The model as its adapters train it; the given model is unchanged.

    LongLoRA attends in shifted groups, layers with `dropout` drop their adapter's inputs, and
    experts have buffers of a bounded size. A model without any of these is as it was.

    Args:
      key: of this step's dropout; None: nothing is dropped.

    Raises:
      ValueError: adapters by row attend unlike each other.
    """
    methods = {adapted.method for adapted in owners(model).values()}
    groups = {method.groups for method in methods}
    drops = key is not None and any(method.dropout for method in methods)
    if len(groups) > 1:
        raise ValueError(
            "LongLoRA attends in groups, and other adapters of these rows do not; train them apart"
        )
    model = with_bounded_buffers(model)
    if groups <= {None} and not drops:
        return model

    def visit(path: tuple, node: Any) -> Any:
        if groups != {None} and isinstance(node, Attention) and node.causal:
            node.within = ShiftedAttention(*groups)
        if drops and _drops(node):
            node.key = nnx.data(Buffer(_keys(".".join(map(str, path)), stacked(node.base), key)))
        return node

    return nnx.recursive_map(visit, model)


def _drops(node: Any) -> bool:
    """Whether a node is an adapter with dropout; as in PEFT, none around an embedding has it."""
    if not isinstance(node, Adapted) or isinstance(node.base, Embed):
        return False
    return any(adapted.method.dropout for adapted in node.owned().values())


def _keys(path: str, num_layers: int | None, key: jax.Array) -> jax.Array:
    """The key of one layer, or those of a stack; the same for layers in a list."""
    key = jax.random.fold_in(key, zlib.crc32(plain(path).encode()))
    if num_layers is None:
        numbers = [int(part) for part in path.split(".") if part.isdigit()]
        return jax.random.fold_in(key, numbers[0] if numbers else 0)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_layers))
