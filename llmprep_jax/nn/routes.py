"""Which copy of which token stands in which row: rows sorted by expert, and the way back.

Each token has A copies, one for each expert it goes to, and each copy a row. Sorting, going back
and summing are gathers in both directions of differentiation, since both a row's copy and a copy's
row are known. Autodiff of a gather is a scatter, which XLA's CPU compiler does row by row; hence
the custom rules.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.types import Array


class Copies(NamedTuple):
    """Copies in the order of their experts, then of their tokens.

    Attributes:
      experts_MA: the expert of each copy; E for a copy that goes to none.
      order: the copy in each place, m * A + a. places_MA: the place of each copy.
      sizes_E: copies of each expert.
    """

    experts_MA: Array
    order: Array
    places_MA: Array
    sizes_E: Array


class Routes(NamedTuple):
    """Where copies of tokens stand.

    Attributes:
      copies_R: the copy in each row, m * A + a; M * A in an empty row.
      rows_MA: the row of each copy; R for a copy without one.
    """

    copies_R: Array
    rows_MA: Array


def sort_copies(experts_MA: Array, num_experts: int) -> Copies:
    """The copies by expert; those for experts outside 0..num_experts go to none."""
    ids, index = experts_MA.reshape(-1), jnp.arange(experts_MA.size)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_ids, order = jax.lax.sort((ids, index), num_keys=1)
    places = jax.lax.sort((order, index), num_keys=1)[1]
    starts = jnp.searchsorted(sorted_ids, jnp.arange(num_experts + 1)).astype(jnp.int32)
    return Copies(
        ids.reshape(experts_MA.shape), order, places.reshape(experts_MA.shape), jnp.diff(starts)
    )


def pack(copies: Copies, kept_E: Array, num_rows: int) -> Routes:
    """Rows one after the other for the first `kept` copies of each expert; no more than fit."""
    return lay(copies, jnp.cumsum(kept_E) - kept_E, kept_E, num_rows)


def lay(copies: Copies, starts_E: Array, kept_E: Array, num_rows: int) -> Routes:
    """Rows from `starts`, in rising order, on for the first `kept` copies of each expert."""
    firsts_E, num_copies = jnp.cumsum(copies.sizes_E) - copies.sizes_E, copies.order.size
    rows_R = jnp.arange(num_rows)
    expert_R = jnp.searchsorted(starts_E, rows_R, side="right") - 1
    rank_R = rows_R - starts_E[expert_R]
    copy_R = copies.order.at[firsts_E[expert_R] + rank_R].get(mode="clip")
    copies_R = jnp.where(rank_R < kept_E[expert_R], copy_R, num_copies)

    def of_copies(x_E: Array, none: int) -> Array:
        return x_E.at[copies.experts_MA].get(mode="fill", fill_value=none)

    rank_MA = copies.places_MA - of_copies(firsts_E, 0)
    has_row_MA = rank_MA < of_copies(kept_E, -1)
    return Routes(copies_R, jnp.where(has_row_MA, of_copies(starts_E, 0) + rank_MA, num_rows))


def share(sizes: Array, room: int) -> Array:
    """How many of each are kept, so that all fit into `room`: those above a common limit lose.

    Where all fit, all are kept; else the limit is the highest whole number that does.
    """
    sorted_sizes = jnp.sort(sizes.reshape(-1))
    below, left = jnp.cumsum(sorted_sizes) - sorted_sizes, sizes.size - jnp.arange(sizes.size)
    limits = (room - below) // left  # what the larger ones get, if these and no others are cut
    is_cut = sorted_sizes > limits
    limit = jnp.where(jnp.any(is_cut), limits[jnp.argmax(is_cut)], sorted_sizes[-1])
    return jnp.minimum(sizes, limit)


def undo(routes: Routes) -> Routes:
    """The way back, for one copy a token: `gather_rows` of it puts rows where they came from."""
    return Routes(routes.rows_MA[:, 0], routes.copies_R[:, None])


@jax.custom_vjp
def gather_rows(x_MD: Array, routes: Routes) -> Array:
    """The token of each row's copy, [R, D]; zeros in empty rows."""
    return _take(x_MD, routes.copies_R // routes.rows_MA.shape[1])


def _gather_rows_forward(x_MD, routes):
    return gather_rows(x_MD, routes), routes


def _gather_rows_backward(routes, dy_RD):
    return _sum_copies(dy_RD, routes, None), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def combine(y_RD: Array, weights_MA: Array, routes: Routes) -> Array:
    """Weighted sum of the rows of each token's copies, [M, D]; summed in float32."""
    return _sum_copies(y_RD, routes, weights_MA)


def _combine_forward(y_RD, weights_MA, routes):
    return combine(y_RD, weights_MA, routes), (y_RD, weights_MA, routes)


def _combine_backward(residuals, dz_MD):
    y_RD, weights_MA, routes = residuals
    dz_RD = _take(dz_MD, routes.copies_R // routes.rows_MA.shape[1])
    weights_R = _take(weights_MA.reshape(-1), routes.copies_R)
    dweights = [
        jnp.sum(dz_MD.astype(jnp.float32) * _take(y_RD, rows_M), axis=-1)
        for rows_M in routes.rows_MA.T
    ]
    dy_RD = weights_R[:, None].astype(dz_RD.dtype) * dz_RD
    return dy_RD, jnp.stack(dweights, axis=1).astype(weights_MA.dtype), None


combine.defvjp(_combine_forward, _combine_backward)


def _sum_copies(y_RD: Array, routes: Routes, weights_MA: Array | None) -> Array:
    """Sums in float32, one copy of all tokens at a time: A of them at once are A times as large."""
    if weights_MA is None and routes.rows_MA.shape[1] == 1:
        return _take(y_RD, routes.rows_MA[:, 0])
    z_MD = 0.0
    for a, rows_M in enumerate(routes.rows_MA.T):
        y_MD = _take(y_RD, rows_M).astype(jnp.float32)
        z_MD += y_MD if weights_MA is None else weights_MA[:, a, None] * y_MD
    return z_MD.astype(y_RD.dtype)


def _take(x, index):
    return x.at[index].get(mode="fill", fill_value=0)
