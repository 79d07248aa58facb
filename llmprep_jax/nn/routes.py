"""Which copy of which token stands in which row: rows sorted by expert, and the way back.

Each token has A copies, one for each expert it goes to, and each copy a row. Sorting, going back
and summing are gathers in both directions of differentiation, since both a row's copy and a copy's
row are known. The one thing a reader would get wrong: autodiff of a gather is a scatter, which
XLA's CPU compiler does row by row; hence the custom rules.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.types import Array


class Routes(NamedTuple):
    """Where copies of tokens stand.

    Attributes:
      copies_R: the copy in each row, m * A + a; M * A in an empty row.
      rows_MA: the row of each copy; R for a copy without one.
      sizes_E: rows of each expert.
    """

    copies_R: Array
    rows_MA: Array
    sizes_E: Array


def sort_copies(experts_MA: Array, num_experts: int, num_rows: int) -> Routes:
    """Rows in the order of their experts, then of their tokens.

    Copies for experts outside 0..num_experts have no row; the others fit into `num_rows`.
    """
    num_copies = experts_MA.size
    ids, index = experts_MA.reshape(-1), jnp.arange(num_copies)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_ids, order = jax.lax.sort((ids, index), num_keys=1)
    rows = jax.lax.sort((order, index), num_keys=1)[1]
    starts = jnp.searchsorted(sorted_ids, jnp.arange(num_experts + 1)).astype(jnp.int32)
    copies_R = jnp.where(index < starts[-1], order, num_copies)[:num_rows]
    rows_MA = jnp.where(rows < starts[-1], rows, num_rows).reshape(experts_MA.shape)
    return Routes(copies_R, rows_MA, jnp.diff(starts))


def place_in_slots(experts_MA: Array, num_experts: int, num_slots: int) -> Routes:
    """Rows in `num_slots` slots for each expert; the last tokens' copies may find none left."""
    routes = sort_copies(experts_MA, num_experts, experts_MA.size)
    starts_E, slots = jnp.cumsum(routes.sizes_E) - routes.sizes_E, jnp.arange(num_slots)
    index_EC = starts_E[:, None] + slots
    copies_EC = routes.copies_R.at[index_EC].get(mode="clip")
    is_taken = slots < routes.sizes_E[:, None]
    rank_MA = routes.rows_MA - starts_E[experts_MA]
    rows_MA = jnp.where(
        rank_MA < num_slots, experts_MA * num_slots + rank_MA, num_experts * num_slots
    )
    copies_R = jnp.where(is_taken, copies_EC, experts_MA.size).reshape(-1)
    return Routes(copies_R, rows_MA, jnp.minimum(routes.sizes_E, num_slots))


def undo(routes: Routes) -> Routes:
    """The way back, for one copy a token: `gather_rows` of it puts rows where they came from."""
    return Routes(routes.rows_MA[:, 0], routes.copies_R[:, None], routes.sizes_E)


@jax.custom_vjp
def gather_rows(x_MD: Array, routes: Routes) -> Array:
    """The token of each row's copy, [R, D]; zeros in empty rows."""
    return _take(x_MD, routes.copies_R // routes.rows_MA.shape[1])


def _gather_rows_forward(x_MD, routes):
    return gather_rows(x_MD, routes), routes


def _gather_rows_backward(routes, dy_RD):
    dy_MAD = _take(dy_RD, routes.rows_MA).astype(jnp.float32)
    return dy_MAD.sum(1).astype(dy_RD.dtype), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def combine(y_RD: Array, weights_MA: Array, routes: Routes) -> Array:
    """Weighted sum of the rows of each token's copies, [M, D] in float32."""
    y_MAD = _take(y_RD, routes.rows_MA).astype(jnp.float32)
    return (weights_MA[..., None] * y_MAD).sum(1)


def _combine_forward(y_RD, weights_MA, routes):
    return combine(y_RD, weights_MA, routes), (y_RD, weights_MA, routes)


def _combine_backward(residuals, dz_MD):
    y_RD, weights_MA, routes = residuals
    dz_RD = _take(dz_MD, routes.copies_R // routes.rows_MA.shape[1])
    weights_R = _take(weights_MA.reshape(-1), routes.copies_R)
    y_MAD = _take(y_RD, routes.rows_MA).astype(jnp.float32)
    dweights_MA = (dz_MD[:, None] * y_MAD).sum(-1)
    return (weights_R[:, None] * dz_RD).astype(y_RD.dtype), dweights_MA, None


combine.defvjp(_combine_forward, _combine_backward)


def _take(x, index):
    return x.at[index].get(mode="fill", fill_value=0)
