"""Next-token cross-entropy in float32, as a sum and the number of tokens it is over.

Sums and counts add up over microbatches, hosts and mesh axes where means do not: the caller divides
once, so every token weighs the same however the batch is cut. Logits of all tokens and words exist
only where they are small (`kernels.cross_entropy`); of a head that is no plain matrix, because it
has an adapter or is packed, they exist for some positions of each row at a time, forward and
backward. There the target's logit is a masked sum over the vocabulary and no gather, since that is
what stays local where the mesh shards the vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.cross_entropy import linear_cross_entropy
from llmprep_jax.sharding import has_mesh, sharding_of, spec
from llmprep_jax.train.batches import Pixels, media_of
from llmprep_jax.types import Array, Float, Int

Batch = Mapping[str, Array]
LOGITS_AT_A_TIME = 2**24  # of a head that is no plain matrix


class LossSum(NamedTuple):
    """A loss summed over tokens, and the sum of the tokens' weights; both float32 scalars.

    `stats` are further sums for the metrics: of a model's own `training_terms`.
    """

    total: Array
    count: Array
    stats: Mapping[str, Any] | None = None


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], z_loss: float = 0.0
) -> Float[Array, "B T"]:
    """-log softmax(logits)[target], plus z_loss * logsumexp(logits)^2 (PaLM, section 5).

    Ids outside the vocabulary count as a logit of 0: mask them out.
    """
    # float32: in bf16 a logsumexp near 11, as of 49,152 words, is rounded to 1/16
    logits_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    ids_BTV = jax.lax.broadcasted_iota(
        jnp.int32, logits_BTV.shape, 2, out_sharding=sharding_of(logits_BTV)
    )
    hit_BTV = ids_BTV == targets_BT[..., None]
    loss_BT = lse_BT - jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)
    return loss_BT + z_loss * jnp.square(lse_BT) if z_loss else loss_BT


def next_token_loss(
    model: Any, batch: Batch, *, z_loss: float = 0.0, pixels: Pixels | None = None
) -> LossSum:
    """The loss of a language model on a batch.

    Args:
      model: a `models.protocol.CausalModel`.
      batch: tokens, targets, loss_mask; positions and segment_ids where rows are packed; [B, T].
        The tokens of a document stand in order. Of images those of `batches.MEDIA`.
      z_loss: weight of the squared logsumexp; 0: none.
      pixels: how bytes of images are normalised; None: there are none.

    Raises:
      ValueError: images that the model does not read, or bytes without `pixels`.
    """
    summed = functools.partial(sum_losses, model.decoder, z_loss)
    return LossSum(*model.next_token_terms(*_inputs(model, batch, pixels), summed))


def training_loss(
    model: Any, batch: Batch, *, z_loss: float = 0.0, pixels: Pixels | None = None
) -> LossSum:
    """What a model is trained by: `next_token_loss`, or `training_terms` of its own.

    Of statistics, "parts" are sums that the metrics divide by count; "means", which some have,
    pairs of a sum and what it is divided by; "loads" the tokens of each
    expert, by the paths of routers, which their biases follow (`train.step`); "dropped" the choices
    of experts that were not computed.
    """
    summed = functools.partial(sum_losses, model.decoder, z_loss)
    return LossSum(*model.training_terms(*_inputs(model, batch, pixels), summed))


def _inputs(model: Any, batch: Batch, pixels: Pixels | None) -> tuple[Array, Batch]:
    """What the decoder reads, and the batch with the runs of tokens that see each other."""
    media, spans_BT = media_of(batch, pixels), model.spans(batch["tokens"])
    if media:
        media = model.read_drawn(**model.by_row(batch["tokens"], media))
    more = {"spans": spans_BT, "codes": media.get("codes")}
    more = {name: x for name, x in more.items() if x is not None}
    return model.embed_inputs(batch["tokens"], **media), {**batch, **more}


@jax.named_scope("loss")
def sum_losses(
    model: Any,
    z_loss: float,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    head: Any = None,
) -> Float[Array, ""]:
    """The weighted sum of cross-entropies of a decoder's final hidden states.

    Args:
      head: what unembeds them in the decoder's place.
    """
    model = model if head is None else head
    head = model.unembedding()
    if head is None:
        return _sum_by_positions(model, z_loss, x_BTD, targets_BT, weights_BT)
    tokens = (x_BTD, jnp.where(weights_BT != 0, targets_BT, -1), weights_BT)
    x_ND, targets_N, weights_N = map(_merge_rows, tokens)
    losses_N = linear_cross_entropy(
        x_ND,
        head.w,
        targets_N,
        soft_cap=head.soft_cap,
        z_loss=z_loss,
        is_table=head.is_table,
        dtype=head.dtype,
    )
    if has_mesh():  # a mesh may share tokens out among more devices than share the rows
        losses_N = jax.reshard(losses_N, jax.typeof(weights_N).sharding.spec)
    return jnp.sum(losses_N * weights_N)


def _merge_rows(x: Array) -> Array:
    """[B, T, ...] to [B * T, ...]; whole rows on each device."""
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    if not has_mesh():
        return x.reshape(shape)
    rest = (None,) * (x.ndim - 1)
    x = jax.reshard(x, spec("batch", *rest, shape=x.shape))
    return jax.lax.reshape(x, shape, out_sharding=jax.P(jax.typeof(x).sharding.spec[0], *rest[1:]))


def _sum_by_positions(model, z_loss, x_BTD, targets_BT, weights_BT):
    """The same of any model that unembeds, so many positions of each row at a time that their
    logits take 64 MiB of a device."""

    def loss_of(x_BTD, targets_BT, weights_BT):
        losses_BT = cross_entropy(model.unembed(x_BTD), targets_BT, z_loss)
        # where, not a product alone: a masked token whose loss is infinite must not make a NaN
        return jnp.sum(jnp.where(weights_BT != 0, losses_BT, 0.0) * weights_BT)

    num_positions, logits_BTV = x_BTD.shape[1], jax.eval_shape(model.unembed, x_BTD)
    shape = logits_BTV.shape
    if has_mesh():  # of one device
        shape = logits_BTV.sharding.shard_shape(shape)
    chunk = max(1, LOGITS_AT_A_TIME // (shape[0] * shape[2]))
    tokens = (x_BTD, targets_BT, weights_BT)
    if chunk >= num_positions:
        return loss_of(*tokens)
    pad = -num_positions % chunk

    def body(total, part):
        return total + jax.checkpoint(loss_of)(*part), None

    if has_mesh():  # positions that lie on one device are cut into chunks
        whole = spec("batch", None, "act_embed", shape=x_BTD.shape)
        tokens = (jax.reshard(x_BTD, whole), *tokens[1:])
    parts = jax.tree.map(lambda x: _split_positions(x, pad, chunk), tokens)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]


def _split_positions(x: Array, pad: int, chunk: int) -> Array:
    """[B, T, ...] to [T / chunk, B, chunk, ...], padded with zeros, which weigh nothing."""
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
