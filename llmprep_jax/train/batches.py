"""The arrays of a batch: what each is called, what its axes are, and how they come onto devices.

A row is whole: its tokens and its images are cut from a batch, and put on a device, together.
Images stay bytes until they are there: floats would be four times as many to move.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from llmprep_jax.sharding import batch_shards, has_mesh, spec
from llmprep_jax.types import Array, Float

# by name, the axes; the first is what microbatches, devices and processes share out
KEYS = {
    **dict.fromkeys(("tokens", "targets", "loss_mask"), ("rows", "tokens")),
    **dict.fromkeys(("positions", "segment_ids", "mask"), ("rows", "tokens")),
    **dict.fromkeys(("images", "images_high"), ("rows", "images", "height", "width", "channels")),
    "image_mask": ("rows", "images"),
    "drawn": ("rows", "images"),  # True of pictures that are to be drawn, not seen
    "grids": ("rows", "images", "sides"),  # in tiles, of the images that `images` are tiles of
    "doc_ids": ("rows", "documents"),
}
MEDIA = ("images", "images_high", "grids", "drawn")  # what `embed_inputs` takes beside tokens
HOST_ONLY = ("doc_ids",)  # for error messages; the devices never see them

Triple = tuple[float, float, float]


@runtime_checkable
class Normalization(Protocol):
    """As `vision.normalize.Normalization`, of an image processor: a channel's mean and std each.

    Must be hashable: programs are compiled for it.
    """

    mean: Triple
    std: Triple
    scale: float


# of each kind of media, by its name in a batch
Pixels = Mapping[str, Normalization]


def media_of(batch: Mapping[str, Array], pixels: Pixels | None) -> dict[str, Array]:
    """What `embed_inputs` takes of a batch beside its tokens, bytes normalised.

    Args:
      pixels: how; None: images are none, or normalised already.

    Raises:
      ValueError: there are bytes, and nothing says how they are normalised.
    """
    media = {name: batch[name] for name in MEDIA if name in batch}
    for name, values in media.items():
        if values.dtype != jnp.uint8:
            continue
        if name not in (pixels or {}):
            raise ValueError(
                f"{name} are bytes, and nothing says how they are normalised; give"
                " pixels=processor.images.pixels"
            )
        how = pixels[name]
        media[name] = normalize_images(values, how.mean, how.std, how.scale)
    return media


def normalize_images(
    images: Array, mean: Triple, std: Triple, scale: float = 1 / 255
) -> Float[Array, "..."]:
    """(x * scale - mean) / std of bytes, float32; others are taken as normalised."""
    if images.dtype != jnp.uint8:
        return images
    mean, std = jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32)
    return (images.astype(jnp.float32) * jnp.float32(scale) - mean) / std


def own_rows(rows: int, accumulate: int = 1) -> list[int]:
    """The numbers of the rows of a batch that this process's devices hold, in order.

    Args:
      rows: of the whole batch. accumulate: microbatches that it is cut into.

    Raises:
      ValueError: the rows do not part into microbatches, or a microbatch not over the mesh.
    """
    if rows % accumulate:
        raise ValueError(f"a batch of {rows} rows is no multiple of accumulate={accumulate}")
    check_rows(rows // accumulate)
    shards = batch_shards()
    numbers = np.arange(rows).reshape(accumulate, shards.count, -1)
    return numbers[:, list(shards.own)].reshape(-1).tolist()


def check_batch(batch: Mapping[str, np.ndarray]) -> None:
    """Refuses what is no batch: doc_ids, of the rows of all processes, may have more rows.

    Raises:
      ValueError: an unknown name, other axes than its own, or other rows than those of tokens.
    """
    rows = None
    for name, values in batch.items():
        axes = KEYS.get(name)
        if axes is None:
            known = ", ".join(KEYS)
            raise ValueError(f"a batch has no {name!r}; its arrays are called {known}")
        if np.ndim(values) != len(axes):
            raise ValueError(f"{name} {np.shape(values)}: its axes are {', '.join(axes)}")
        if name in HOST_ONLY:
            continue
        rows = rows or (name, len(values))
        if len(values) != rows[1]:
            raise ValueError(
                f"{name} are of {len(values)} rows and {rows[0]} of {rows[1]}; a row is whole, with"
                " all that belongs to it"
            )


def place_batch(batch: Mapping[str, np.ndarray], accumulate: int = 1) -> dict[str, jax.Array]:
    """Puts a host batch on the devices as `accumulate` microbatches, sharded for the mesh.

    Args:
      batch: numpy arrays [B, ...] by the names of `KEYS`, of `own_rows`: all rows, where there is
        one process; doc_ids are left out.
      accumulate: A.

    Returns:
      Arrays [A, B / A, ...] of the rows of all processes.

    Raises:
      ValueError: an unknown name, other axes than its own or other rows than those of tokens; the
        rows do not part into A microbatches, or a microbatch not over the mesh.
    """
    check_batch(batch)
    placed = {}
    for name, rows in batch.items():
        if name in HOST_ONLY:
            continue
        if len(rows) % accumulate:
            raise ValueError(
                f"a batch of {len(rows)} rows is no multiple of accumulate={accumulate}"
            )
        micro = rows.reshape(accumulate, -1, *rows.shape[1:])
        placed[name] = _place(micro)
    return placed


def _place(micro: np.ndarray) -> jax.Array:
    if not has_mesh():
        return jax.device_put(micro)
    shards = batch_shards()
    rows = -(-micro.shape[1] * shards.count // len(shards.own))  # of all processes
    check_rows(rows)
    size = rows // shards.count
    mesh, axes = jax.sharding.get_mesh(), jax.P(None, *spec("batch"))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[1].indices(rows)
        first = shards.own.index(start // size) * size
        return micro[(index[0], slice(first, first + stop - start), *index[2:])]

    shape = (len(micro), rows, *micro.shape[2:])
    return jax.make_array_from_callback(shape, jax.sharding.NamedSharding(mesh, axes), part)


def check_rows(rows: int) -> None:
    """Refuses a microbatch of so many rows, over all processes, that does not part over the mesh.

    Raises:
      ValueError: it does not.
    """
    if not has_mesh():
        return
    mesh = jax.sharding.get_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec("batch")))
    try:
        sharding.shard_shape((rows,))
    except ValueError:
        sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"a microbatch of {rows} rows does not part over the mesh {sizes}; "
            "change data.batch_size, accumulate or mesh"
        ) from None
