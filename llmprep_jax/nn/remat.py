"""What the backward pass keeps of a layer, and what it computes again (Chen et al. 2016).

Activations at a few points of a layer have names. `Compute.remat` says which are kept: none but the
layer's input ("full"), all products ("dots"), or some by name ("attention,mlp_in"); those that
`Compute.offload` names wait in host memory. The one thing a reader would get wrong: a name saves a
product only if everything after it can be had from what is kept, so what goes into a norm is named
and not what comes out, which the norm's own derivative would compute again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from llmprep_jax.kernels.flash_attention.api import OUTPUT
from llmprep_jax.nn.linear import PRODUCT
from llmprep_jax.nn.param import Compute

BLOCK_IN, QKV, MLP_IN, MLP_HIDDEN = "block_in", "qkv", "mlp_in", "mlp_hidden"
NAMES = {
    BLOCK_IN: "what a layer is given; it is kept unless it is offloaded",
    QKV: "queries, keys and values as projected; of latent attention, queries and latents",
    OUTPUT: "what softmax attention gives, and its log-sum-exp",
    MLP_IN: "what a layer's MLP or experts are given, before their norm",
    MLP_HIDDEN: "gate and up of MLPs and experts",
}
POLICIES = ("none", "full", "dots")
HOST = "pinned_host"  # JAX's name of page-locked memory of the host

keep = checkpoint_name  # keep(x, name): x, which has a name now


def check(compute: Compute) -> None:
    """Refuses settings that name no policy and no activation.

    Raises:
      ValueError: there is such, or something is offloaded where nothing is rematerialised.
    """
    known = f"the names are {', '.join(NAMES)}"
    if compute.remat not in POLICIES and not set(_split(compute.remat)) <= set(NAMES):
        raise ValueError(
            f"compute.remat={compute.remat!r}; it is {', '.join(POLICIES)}, or names of activations"
            f" with commas between; {known}"
        )
    if not set(_split(compute.offload)) <= set(NAMES):
        raise ValueError(f"compute.offload={compute.offload!r}; {known}, with commas between")
    if compute.offload and compute.remat == "none":
        raise ValueError(
            f'compute.offload={compute.offload!r} with remat="none", which keeps all on the device;'
            ' set compute.remat to "full", "dots" or names of activations'
        )


def remat(
    run: Callable[..., Any],
    compute: Compute,
    in_loop: bool,
    policy_of_none: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """`run` rematerialised as `compute` says.

    Args:
      in_loop: whether `run` is in a loop, whose backward pass is another: nothing need then keep
        the compiler from taking forward values for those computed again.
      policy_of_none: what "none" keeps; None: all that autodiff does.

    Raises:
      ValueError: see `check`.
    """
    check(compute)
    if compute.remat == "none":
        if policy_of_none is None:
            return run
        return jax.checkpoint(run, policy=policy_of_none, prevent_cse=False)
    policy = _policy(compute.remat, compute.offload)
    return jax.checkpoint(run, policy=policy, prevent_cse=not in_loop)


@functools.cache
def _policy(kept: str, offloaded: str | None) -> Callable[..., Any]:
    names = {"full": (), "dots": (PRODUCT, OUTPUT)}.get(kept, _split(kept))
    host = _split(offloaded)
    on_device = [name for name in names if name not in host]
    if not host:
        return jax.checkpoint_policies.save_only_these_names(*on_device)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=on_device,
        names_which_can_be_offloaded=list(host),
        offload_src="device",
        offload_dst=HOST,
    )


def _split(names: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",")) if names else ()
