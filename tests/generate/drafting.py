"""Tiny models whose multi-token prediction modules often, but not always, draft what comes next."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.tiny import CONFIGS, random_model


def drafting_model(num_mtp: int, layers: float = 0.25, **fields: Any) -> nnx.Module:
    """A model and modules that all predict from the last token, disturbed by their layers.

    Args:
      layers: how far the layers' outputs disturb it; at 0 every draft is right.
    """
    cfg = dataclasses.replace(CONFIGS["deepseek-v3"], num_mtp=num_mtp, **{"num_layers": 2} | fields)
    model = random_model(cfg)
    stacks = [getattr(model, name) for name in model.stacks if getattr(model, name) is not None]
    for block in (*stacks, *[module.block for module in model.mtp]):
        mlp = block.mlp
        parts = (mlp.experts, mlp.shared) if hasattr(mlp, "experts") else (mlp,)
        for linear in (block.attn.o, *[part.down for part in parts]):
            linear.w[...] = jnp.asarray(layers * np.asarray(linear.w[...]))
    for module in model.mtp:
        # the module's layer reads the embedding alone, as the model's first does
        module.proj.w[...] = jnp.eye(2 * cfg.dim, cfg.dim)
        module.embed_norm.scale[...] = jnp.ones(cfg.dim)
        module.norm.scale[...] = model.norm.scale[...]
    # of the size that the module's norm gives it
    table = np.asarray(model.embed.w[...])
    model.embed.w[...] = jnp.asarray(table / np.sqrt(np.mean(table**2, axis=1, keepdims=True)))
    return model


def with_modules(model: nnx.Module, number: int) -> nnx.Module:
    """The same model with its first modules only."""
    graph, state = nnx.split(model)
    changed = nnx.merge(graph, state)
    changed.mtp = nnx.List(list(model.mtp)[:number])
    changed.cfg = dataclasses.replace(model.cfg, num_mtp=number)
    return changed
