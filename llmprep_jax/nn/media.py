"""Features of images in the places of their tokens.

Rows are whole: of a row's features [J, D] the j-th image token takes the j-th, whatever batch the
row is in. Nothing here moves between devices that share out the rows.

Letters of this file: J features of a row's images, M images of a row.
"""

import jax
import jax.numpy as jnp

from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Bool, Float, Int, Shaped


def count_tokens(is_image_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of each image token among those of its row, from 0 on; -1 of other tokens."""
    counts_BT = jnp.cumsum(is_image_BT.astype(jnp.int32), axis=1)
    return jnp.where(is_image_BT, counts_BT - 1, -1)


def number_runs(is_image_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of the run that each image token is in, from 1 on; 0 of other tokens."""
    before_BT = jnp.pad(is_image_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = is_image_BT & ~before_BT
    return jnp.where(is_image_BT, jnp.cumsum(starts_BT.astype(jnp.int32), axis=1), 0)


def place_features(
    x_BTD: Float[Array, "B T D"], index_BT: Int[Array, "B T"], features_BJD: Float[Array, "B J D"]
) -> Float[Array, "B T D"]:
    """Embeddings, and in their place the feature of the row that `index` names, where it is >= 0.

    Features beyond the row's last are its last: callers see to it that there are none.
    """
    if not has_mesh():
        return _place(x_BTD, index_BT, features_BJD)
    rows = x_BTD.shape[0]
    along_T = spec("batch", "seq", "act_embed", shape=x_BTD.shape)
    along_J = spec("batch", None, "act_embed", shape=features_BJD.shape)
    at = spec("batch", "seq", shape=index_BT.shape)
    assert rows == features_BJD.shape[0], (x_BTD.shape, features_BJD.shape)
    operands = [
        jax.reshard(x, axes)
        for x, axes in zip((x_BTD, index_BT, features_BJD), (along_T, at, along_J), strict=True)
    ]
    place = jax.shard_map(_place, in_specs=(along_T, at, along_J), out_specs=along_T)
    return place(*operands)


def _place(x_BTD: Array, index_BT: Array, features_BJD: Array) -> Array:
    index_BT1 = jnp.maximum(index_BT, 0)[..., None]
    taken_BTD = jnp.take_along_axis(features_BJD, index_BT1, axis=1, mode="clip")
    return jnp.where(index_BT[..., None] >= 0, taken_BTD.astype(x_BTD.dtype), x_BTD)


def merge_images(images: Shaped[Array, "B M ..."]) -> Shaped[Array, "N ..."]:
    """[B, M, ...] to [B * M, ...], a row's images on the devices of the row."""
    shape = (images.shape[0] * images.shape[1], *images.shape[2:])
    if not has_mesh():
        return images.reshape(shape)
    rest = (None,) * (images.ndim - 1)
    images = jax.reshard(images, spec("batch", *rest, shape=images.shape))
    by_row = jax.typeof(images).sharding.spec[0]
    return jax.lax.reshape(images, shape, out_sharding=jax.P(by_row, *rest[1:]))


def split_rows(features_NID: Shaped[Array, "N I D"], rows: int) -> Shaped[Array, "B J D"]:
    """[B * M, I, D] to [B, M * I, D], the inverse of `merge_images` with a row's images joined."""
    N, I, D = features_NID.shape
    shape = (rows, N // rows * I, D)
    if not has_mesh():
        return features_NID.reshape(shape)
    by_row = spec("batch", None, None, shape=(rows, N // rows * I, D))
    features_NID = jax.reshard(features_NID, jax.P(by_row[0], None, None))
    return jax.lax.reshape(features_NID, shape, out_sharding=by_row)


def of_rows(x: Float[Array, "N ..."], shape: tuple[int, ...]) -> Float[Array, "N ..."]:
    """Another shape of each row, on the devices of the row."""
    shape = (len(x), *shape)
    if not has_mesh():
        return x.reshape(shape)
    by_row = jax.typeof(x).sharding.spec[0]
    x = jax.reshard(x, jax.P(by_row, *[None] * (x.ndim - 1)))
    return jax.lax.reshape(x, shape, out_sharding=jax.P(by_row, *[None] * (len(shape) - 1)))
