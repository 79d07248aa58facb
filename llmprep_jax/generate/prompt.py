"""Prompts: as a user gives them to one batch on the host, and read into a cache on the device.

Rows of unequal length start in the first column (padding right, which takes no slot of a cache);
there are few widths, so that few programs are compiled. A long prompt is read in blocks, which
bounds what is computed of all its tokens at once, and those behind the longest row are skipped.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.generate.prompt_cache import is_cache
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Bool, Float, Int

MIN_PROMPT = 32  # tokens of the narrowest batch
MAX_BLOCK = 4096  # tokens of a row that are read at once


def read_batch(tokens: Any, mask: Any | None, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] int32 and where they are real, each row starting in the first column.

    Args:
      tokens: ints [B, T], or rows of unequal length, which are padded. mask: True on real tokens;
        padding may stand left or right.

    Raises:
      ValueError: an empty or misshapen batch, a row without a token, or an id outside the
        vocabulary.
    """
    if mask is None and _is_ragged(tokens):
        tokens, mask = _join(tokens)
    tokens_BT = np.asarray(tokens)
    if tokens_BT.ndim != 2 or not tokens_BT.size or tokens_BT.dtype.kind not in "iu":
        raise ValueError(f"tokens are {tokens_BT.dtype} {tokens_BT.shape}; give integers [B, T]")
    mask_BT = np.ones(tokens_BT.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask_BT.shape != tokens_BT.shape or not mask_BT.any(axis=1).all():
        raise ValueError(f"mask is {mask_BT.shape} for tokens {tokens_BT.shape}, or hides a row")
    check_ids(tokens_BT, mask_BT, vocab_size)
    # a stable sort by the mask moves the padding to the right and keeps the order of the rest
    order_BT = np.argsort(~mask_BT, axis=1, kind="stable")
    tokens_BT = np.take_along_axis(np.where(mask_BT, tokens_BT, 0), order_BT, axis=1)
    mask_BT = np.take_along_axis(mask_BT, order_BT, axis=1)
    width = int(mask_BT.sum(axis=1).max())
    return tokens_BT[:, :width].astype(np.int32), mask_BT[:, :width]


def check_ids(tokens_BT: np.ndarray, mask_BT: np.ndarray, vocab_size: int) -> None:
    """Refuses ids that a model has no row for; a lookup would take the nearest."""
    outside_BT = mask_BT & ((tokens_BT < 0) | (tokens_BT >= vocab_size))
    if outside_BT.any():
        row, column = np.argwhere(outside_BT)[0]
        raise ValueError(
            f"token {tokens_BT[row, column]} (row {row}, column {column}) is outside the model's"
            f" vocabulary of {vocab_size} (ids 0 to {vocab_size - 1}); use the tokenizer that"
            " belongs to the model, or mask padding"
        )


def check_length(
    tokens_BT: np.ndarray, max_new_tokens: int, max_seq_len: int, image_id: int | None = None
) -> None:
    """Refuses what goes beyond a model's context; `image_id`: of prompts with images."""
    length = tokens_BT.shape[1]
    if length + max_new_tokens <= max_seq_len:
        return
    tokens, remedy = f"{length} prompt tokens", "the prompt"
    if image_id is not None:
        num_of_images = int(np.max(np.sum(tokens_BT == image_id, axis=1)))
        tokens, remedy = f"{tokens}, {num_of_images} of them of images,", "the prompt, give fewer"
        remedy += " or smaller images,"
    raise ValueError(
        f"{tokens} and {max_new_tokens} new exceed the model's context of {max_seq_len}; shorten"
        f" {remedy} or max_new_tokens"
    )


def _is_ragged(tokens: Any) -> bool:
    """Whether these are rows of unequal length."""
    is_rows = isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes)
    return is_rows and all(np.ndim(row) == 1 for row in tokens) and len({*map(len, tokens)}) > 1


def _join(rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(row) for row in rows]
    for number, row in enumerate(arrays):
        if not row.size or row.dtype.kind not in "iu":
            raise ValueError(f"row {number} of the tokens is {rows[number]!r}; give whole numbers")
    lengths_B1 = np.array([[len(row)] for row in arrays])
    mask_BT = np.arange(lengths_B1.max()) < lengths_B1
    tokens_BT = np.zeros(mask_BT.shape, np.int64)
    tokens_BT[mask_BT] = np.concatenate(arrays)
    return tokens_BT, mask_BT


def bucket(length: int, least: int) -> int:
    """The power of two, or `least`, that holds so many."""
    return max(1 << (length - 1).bit_length(), least)


def pad(x_BT: np.ndarray, width: int) -> np.ndarray:
    """Zeros on the right up to a width."""
    return np.pad(x_BT, ((0, 0), (0, width - x_BT.shape[1])))


def prompt_width(length: int) -> int:
    """The power of two, or three quarters of it, that holds so many tokens."""
    whole = bucket(length, MIN_PROMPT)
    fits = length <= whole * 3 // 4 and whole > MIN_PROMPT
    return whole * 3 // 4 if fits else whole


def block_size(width: int) -> int:
    """How many tokens of rows so wide are read at once: all, if they are not too many.

    SmolLM2 on two cores reads 2,048 tokens at once in 0.76 of the time that four quarters take.
    """
    return width // -(-width // MAX_BLOCK)


class Inputs(NamedTuple):
    """Prompts with images in them, as the decoder reads them.

    Attributes:
      x_BTD: embeddings and features. spans_BT: numbers of runs whose tokens see each other, of
        which each is in one block; None: there is none.
    """

    x_BTD: Array
    spans_BT: Array | None = None


def columns_of_blocks(
    mask_BT: np.ndarray, spans_BT: np.ndarray | None, length: int, width: int
) -> tuple[np.ndarray, int]:
    """(which token stands in each column, -1 for padding; tokens of a block), so that no run of
    tokens that see each other lies in two blocks.

    A run that would is moved to where the next block begins.
    """
    block = block_size(width)
    if spans_BT is None:
        columns_BT = np.where(mask_BT, np.arange(mask_BT.shape[1]), -1)
        return np.pad(columns_BT, ((0, 0), (0, width - length)), constant_values=-1), block
    rows = []
    longest = max(np.max(np.bincount(row[row > 0]), initial=0) for row in spans_BT)
    block = max(block, bucket(int(longest), 1))
    for real, spans in zip(mask_BT, spans_BT, strict=True):
        row: list[int] = []
        for column in np.flatnonzero(real):
            is_first = spans[column] > 0 and (column == 0 or spans[column - 1] != spans[column])
            if is_first:
                left = -len(row) % block
                if left and left < np.sum(spans == spans[column]):
                    row.extend([-1] * left)
            row.append(int(column))
        rows.append(row)
    width = -(-max(width, *map(len, rows)) // block) * block
    columns_BT = np.full((len(rows), width), -1)
    for columns, row in zip(columns_BT, rows, strict=True):
        columns[: len(row)] = row
    return columns_BT, block


def read_prompt(
    model: nnx.Module,
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    cache: Any,
    *,
    block: int,
    last_only: bool = False,
    inputs: Inputs | None = None,
    is_new: bool = False,
) -> tuple[Float[Array, "B _ D"], Any]:
    """(final hidden states, the cache with the prompt in it).

    Args:
      tokens_BT, mask_BT: padded on the right to a multiple of `block`.
      block: tokens of a row that are read at once.
      last_only: the hidden states of each row's last token alone, [B, 1, D].
      inputs: in place of the tokens, which then only tell their number.
      is_new: whether the cache is known to be empty; one block then attends to itself alone.
    """
    B, T = tokens_BT.shape
    assert T % block == 0, (T, block)
    end_B = jnp.max(jnp.where(mask_BT, 1 + jnp.arange(T), 0), axis=1)
    tokens_BT, mask_BT = [by_row(x_BT) for x_BT in (tokens_BT, mask_BT)]
    inputs = None if inputs is None else jax.tree.map(by_row, inputs)

    def part(x: Array, index: int | Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1)

    def read(index: int | Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        hidden, cache = carry
        if inputs is None:
            x_BTD, spans_BT = model.embed_inputs(part(tokens_BT, index)), None
        else:
            x_BTD, spans_BT = (x if x is None else part(x, index) for x in inputs)
        places = dict(mask=part(mask_BT, index), spans=spans_BT)
        x_BTD, cache = model.features(x_BTD, **places, cache=cache)
        x_BTD = everywhere(x_BTD)
        if last_only:
            at_B11 = (end_B - 1 - index * block)[:, None, None]
            last_B1D = jnp.take_along_axis(x_BTD, jnp.clip(at_B11, 0, block - 1), axis=1)
            return jnp.where((at_B11 >= 0) & (at_B11 < block), last_B1D, hidden), cache
        return jax.lax.dynamic_update_slice_in_dim(hidden, x_BTD, index * block, axis=1), cache

    hidden = jnp.zeros((B, 1 if last_only else T, model.cfg.dim), model.cfg.compute.dtype)
    if block == T:
        if is_new:
            cache = jax.tree.map(KVCache.fresh, cache, is_leaf=is_cache)
        return read(0, (hidden, cache))
    return jax.lax.fori_loop(0, -(-jnp.max(end_B) // block), read, (hidden, cache))


def by_row(x: Array) -> Array:
    """Rows over the devices of a mesh, as a model takes them."""
    if not has_mesh():
        return x
    return jax.reshard(x, spec("batch", *[None] * (x.ndim - 1), shape=x.shape))


def everywhere(x: Array) -> Array:
    """An array whole on every device of a mesh: what is drawn is small, and is drawn by all."""
    return jax.reshard(x, jax.P(*[None] * x.ndim)) if has_mesh() else x
