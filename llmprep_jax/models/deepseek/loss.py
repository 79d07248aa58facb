"""What DeepSeek-V2 and V3 are trained by: the next token, further tokens, and balance (V3, section
2.1.2 and 2.2, eq. 17 to 25).

The loss is (sum of the next tokens' cross-entropies + lambda / D times those of the D modules) /
tokens + the balance losses of all routers. Module k is given the embedding of the token k further
on and predicts the one after it, so at the end of a document the last k of them have no target.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from llmprep_jax.nn.attention import place_tokens
from llmprep_jax.nn.language_model import SumLosses, Terms
from llmprep_jax.types import Array, Float


def training_terms(
    model: Any, x_BTD: Float[Array, "B T D"], batch: Mapping[str, Array], sum_losses: SumLosses
) -> Terms:
    """(total, count, statistics) of a batch, as `train.losses.training_loss` has them.

    Args:
      x_BTD: embeddings of the tokens.
      batch: as `train.losses.next_token_loss`.
      sum_losses: (hidden states, targets, weights) -> weighted sum of their cross-entropies.
    """
    segments_BT, shape = batch.get("segment_ids"), x_BTD.shape[:2]
    place, _ = place_tokens(shape, batch.get("positions"), segments_BT, None, in_order=True)
    x_BTD, _, load = model.run(x_BTD, place)
    weights_BT = batch["loss_mask"].astype(jnp.float32)
    count = jnp.sum(weights_BT)
    main = sum_losses(x_BTD, batch["targets"], weights_BT)
    loads = {"moe_layers.mlp.router": load.counts_E}
    balance, dropped = jnp.sum(load.loss), jnp.sum(load.dropped)
    further, rope = jnp.zeros(()), model.rope(place)
    for depth, module in enumerate(model.mtp, 1):
        next_BTD = model.embed_inputs(_ahead(batch["targets"], depth - 1))
        x_BTD, _, load = module(x_BTD, next_BTD, place, rope)
        targets_BT, weights_BT = _ahead(batch["targets"], depth), _ahead(weights_BT, 1)
        if segments_BT is not None:
            weights_BT = weights_BT * (segments_BT == _ahead(segments_BT, depth))
        further += sum_losses(x_BTD, targets_BT, weights_BT) / len(model.mtp)
        loads[f"mtp.{depth - 1}.block.mlp.router"] = load.counts_E
        balance, dropped = balance + load.loss, dropped + load.dropped
    total = main + model.cfg.mtp_weight * further + count * balance
    parts = {"next_token_loss": main, "balance_loss": count * balance}
    parts |= {"mtp_loss": further} if len(model.mtp) else {}
    return total, count, {"parts": parts, "loads": loads, "dropped": dropped}


def _ahead(x_BT: Array, num: int) -> Array:
    """What stands `num` tokens further on; zeros at the end."""
    return jnp.pad(x_BT[:, num:], ((0, 0), (0, num)))
