"""Single rows of the embedding that are trained, PEFT's `trainable_token_indices`: for new tokens.

The rows stand in the place of the table's, in its lookup and, where the table is the output head
too, in the logits. What is trained is the rows themselves and no difference from the table's, so
weight decay does not hold for them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Embed, contract_logits, look_up
from llmprep_jax.nn.param import AdapterParam, Compute
from llmprep_jax.peft.targets import embedding, part
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Float, Int
from llmprep_jax.weights.rows import Row
from llmprep_jax.weights.safetensors import SafetensorsFile

_SUFFIX = "token_adapter.trainable_tokens_delta"


class TokenRows(nnx.Module):
    """An embedding of which the rows `ids` are trained."""

    is_by_row = False

    def __init__(self, base: Embed, ids: tuple[int, ...], rows: Float[Array, "R D"]):
        self.base, self.ids, self.rows = base, ids, AdapterParam(rows)

    @property
    def compute(self) -> Compute:
        """How the embedding computes."""
        return self.base.compute

    @property
    def table_dtype(self) -> jnp.dtype:
        """dtype of the table."""
        return self.base.table_dtype

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        y_BTD, tokens_BT = self.base(tokens_BT), jnp.asarray(tokens_BT)
        hit_BTR = tokens_BT[..., None] == jnp.asarray(self.ids)
        at_BT = jnp.argmax(hit_BTR, axis=-1)
        own_BTD = look_up(self.rows[...], at_BT, y_BTD.dtype, self.base.out_axes)
        return jnp.where(jnp.any(hit_BTR, axis=-1)[..., None], own_BTD, y_BTD)

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, of a tied embedding."""
        change_RD = self.rows[...].astype(jnp.float32) - table_rows(self.base, self.ids)
        dtype = self.compute.operand_dtype
        low_BTR = contract_logits("BTD,RD->BTR", x_BTD, change_RD, dtype)
        place_RV = jax.nn.one_hot(jnp.asarray(self.ids), self.base.layer_shape[0])
        added_BTV = contract_logits("BTR,RV->BTV", low_BTR, place_RV, jnp.dtype("float32"))
        return self.base.unembed(x_BTD) + added_BTV

    def merged(self) -> Embed:
        """The embedding with the trained rows in its table."""
        table_VD, ids = self.base.w[...], jnp.asarray(self.ids)
        return self.base.with_weight(table_VD.at[ids].set(self.rows[...].astype(table_VD.dtype)))


def table_rows(embed: Embed, ids: tuple[int, ...]) -> Float[Array, "R D"]:
    """Rows of a table, float32, whole on every device."""
    return look_up(embed.w[...], jnp.asarray(ids)[None], "float32", (None, None, None))[0]


def train(model: nnx.Module, ids: tuple[int, ...], dtype: str, rows: Any = None) -> nnx.Module:
    """A model that trains these rows of its embedding.

    Args:
      rows: what they are; None: the table's.

    Raises:
      ValueError: an id that the vocabulary has not, twice the same, or an embedding that is adapted
        or trained whole.
    """
    if not ids:
        return model
    path = embedding(model)
    embed = part(model, path)
    if type(embed) is not Embed:
        raise ValueError(
            "trainable_token_indices is given, but the embedding is a target or trained whole;"
            " leave it in one of them"
        )
    size = embed.layer_shape[0]
    wrong = [number for number in ids if type(number) is not int or not 0 <= number < size]
    wrong += [number for number in ids if ids.count(number) > 1]
    if wrong:
        raise ValueError(
            f"trainable_token_indices holds {wrong[0]!r}; give each token once, from 0 to"
            f" {size - 1}"
        )
    if rows is None:
        rows = table_rows(embed, ids)
    place = spec(None, None) if has_mesh() else None
    rows = jnp.asarray(rows, dtype) if place is None else jax.device_put(rows, place).astype(dtype)
    trained = TokenRows(embed, ids, rows)
    visit = lambda at, node: trained if ".".join(map(str, at)) == path else node  # noqa: E731
    return nnx.recursive_map(visit, model)


def trained_ids(model: nnx.Module) -> tuple[int, ...]:
    """The rows that a model trains."""
    path = embedding(model)
    embed = None if path is None else part(model, path)
    return embed.ids if isinstance(embed, TokenRows) else ()


def table(model: nnx.Module, prefix: str) -> dict[str, Row]:
    """A weight table of the rows, with PEFT's name."""
    if not trained_ids(model):
        return {}
    return {f"{embedding(model)}.rows": Row(name_of(model, prefix), "r d -> r d")}


def name_of(model: nnx.Module, prefix: str) -> str:
    """PEFT's name of the rows."""
    embed = model.weights.in_memory()[model.weights.embed]
    return prefix + embed.name.removesuffix("weight") + _SUFFIX


def shapes(model: nnx.Module, ids: tuple[int, ...], prefix: str) -> dict[str, tuple[int, ...]]:
    """The shape of the rows' tensor, where there are rows."""
    return (
        {name_of(model, prefix): (len(ids), part(model, embedding(model)).layer_shape[1])}
        if ids
        else {}
    )


def read(model: nnx.Module, ids: tuple[int, ...], file: SafetensorsFile, prefix: str) -> nnx.Module:
    """The model with these rows trained as a file holds them."""
    rows = np.array(file.read(name_of(model, prefix)), np.float32) if ids else None
    return train(model, ids, "float32", rows)
