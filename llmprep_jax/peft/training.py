"""What a model with adapters does while it is trained, and at no other time.

The training loss calls `train_mode` on the model that it is given; evaluation, generation and
saving see the model itself. The one thing a reader would get wrong: nothing of it is state. The
switched model is another one with the same arrays, so there is no mode to leave, and what it drops
is a function of the key.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.attention import Attention
from llmprep_jax.nn.linear import Embed
from llmprep_jax.nn.param import Buffer
from llmprep_jax.peft.adapter import Adapted, methods
from llmprep_jax.peft.longlora import LongLoRA, ShiftedAttention
from llmprep_jax.peft.targets import plain, stacked
from llmprep_jax.sharding import on_own_mesh


@on_own_mesh
def train_mode(model: nnx.Module, key: jax.Array | None = None) -> nnx.Module:
    """The model as its adapters train it; the given model is unchanged.

    LongLoRA attends in shifted groups, and layers with `dropout` drop their adapter's inputs. A
    model of other methods, or without any, is as it was.

    Args:
      key: of this step's dropout; None: nothing is dropped.
    """
    of_model = methods(model)
    groups = {each.groups for each in of_model.values() if isinstance(each, LongLoRA)}
    drops = key is not None and any(getattr(each, "dropout", 0) for each in of_model.values())
    if not groups and not drops:
        return model

    def visit(path: tuple, node: Any) -> Any:
        if groups and isinstance(node, Attention):
            node.within = ShiftedAttention(*groups)
        if drops and _drops(node):
            node.key = nnx.data(Buffer(_keys(".".join(map(str, path)), stacked(node.base), key)))
        return node

    return nnx.recursive_map(visit, model)


def _drops(node: Any) -> bool:
    """Whether a node is an adapter with dropout; as in PEFT, none around an embedding has it."""
    if not isinstance(node, Adapted) or isinstance(node.base, Embed):
        return False
    return bool(getattr(node.method, "dropout", 0))


def _keys(path: str, num_layers: int | None, key: jax.Array) -> jax.Array:
    """The key of one layer, or those of a stack; the same for layers in a list."""
    key = jax.random.fold_in(key, zlib.crc32(plain(path).encode()))
    if num_layers is None:
        numbers = [int(part) for part in path.split(".") if part.isdigit()]
        return jax.random.fold_in(key, numbers[0] if numbers else 0)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_layers))
