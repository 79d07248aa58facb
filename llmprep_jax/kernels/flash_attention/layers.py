"""One layer's keys and values out of arrays that hold those of all layers.

A kernel takes whole arrays, so a layer cut out of a stack for it is a copy of all slots at each
step. By our own kernels the stack is read in place, as a pool with a page for each layer and row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.layout import layout_of
from llmprep_jax.kernels.platforms import platform

SLOTS = 512  # a page of whole tiles of keys
FEW = 16  # queries; for more of them a GPU has better backends, which read no pages

Array = jax.Array


def attend_layer(
    attend: Callable[..., Any], arrays: dict[str, Array | None], layer: Any, options: dict[str, Any]
) -> Any:
    """`attend` to one layer.

    Args:
      arrays: of the call, by name; k and v are [L, B, S, K, ...], and so are their scales.
      options: the call's other arguments.
    """
    arrays = {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}
    layer = jnp.asarray(layer, jnp.int32)
    names = [name for name in ("k", "v", "k_scales", "v_scales") if name in arrays]
    layout = layout_of(arrays["q"], arrays["k"][0], splits_heads=options["bias"] is None)
    fits = not layout.shares_keys and arrays["k"].shape[2] % SLOTS == 0
    if not (fits and _reads_pools(arrays["q"].shape[1], options)):
        picked = {
            name: jax.lax.dynamic_index_in_dim(arrays[name], layer, keepdims=False)
            for name in names
        }
        return attend(**arrays | {"v": None} | picked, **options)

    def run(arrays: dict[str, Array], layer: Array) -> Any:
        num_rows = len(arrays["q"])
        pools = {name: arrays[name].reshape(-1, *arrays[name].shape[2:]) for name in names}
        pages_B1 = (layer * num_rows + jnp.arange(num_rows, dtype=jnp.int32))[:, None]
        return attend(**arrays | {"v": None} | pools, pages=pages_B1, **options)

    if not layout.is_mesh:
        return run(arrays, layer)
    specs = layout.specs()
    specs |= {name: jax.P(None, *specs["keys"][: arrays[name].ndim - 1]) for name in names}
    specs |= dict(q=specs["queries"], sinks=jax.P(layout.heads or None))
    ins = {name: specs.get(name, specs["places"]) for name in arrays}
    arrays = {name: jax.reshard(x, ins[name]) for name, x in arrays.items()}
    outs = (specs["queries"], specs["rows"]) if options["return_lse"] else specs["queries"]
    on_devices = jax.shard_map(run, in_specs=(ins, jax.P()), out_specs=outs, check_vma=False)
    return on_devices(arrays, layer)


def _reads_pools(num_queries: int, options: dict[str, Any]) -> bool:
    """Whether a kernel of ours is the one to read, and it reads pages."""
    on, impl = platform(), options["impl"]
    if on == "gpu":  # Mosaic's kernel of latents reads none
        return impl in (None, "pallas_gpu") and num_queries <= FEW and not options["value_width"]
    return on == "tpu" and impl in (None, "pallas_tpu")
