"""Attention in a shape by every backend here, run or compiled, and by torch beside them."""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from experiments.bench.checks import Absent
from experiments.bench.shapes import Shape, Work

# backends that are of one platform; others are of all
ONLY = {
    **dict.fromkeys(("pallas_tpu", "splash"), "tpu"),
    **dict.fromkeys(("pallas_gpu", "mosaic_gpu", "cudnn"), "gpu"),
}
# kernels that read latents once, for keys and values: of a platform, and how they are asked for;
# a GPU's is the first of those that nobody names
LATENTS = {"mosaic_latents": ("gpu", None), "pallas_tpu on latents": ("tpu", "pallas_tpu")}


def backends(platform: str, shape: Shape) -> list[str]:
    """Names of ours that a platform may be served by."""
    from llmprep_jax.kernels.flash_attention.api import IMPLS

    latents = [name for name, (of, _) in LATENTS.items() if of == platform and shape.latent]
    return [*on_platform(IMPLS, platform), *latents]


def on_platform(impls: Iterable[str], platform: str) -> list[str]:
    """Those that are not of another platform."""
    return [name for name in impls if ONLY.get(name, platform) == platform]


def refusal(
    name: str,
    shape: Shape,
    dtype: str,
    backward: bool,
    soft_cap: float | None = None,
    given: Any = (),
) -> str | None:
    """Why a backend cannot do it, in its own words; None: it can.

    Args:
      given: the names of what there is by token: "positions", "segments", "spans".

    Raises:
      Absent: what it is made of is not installed.
    """
    import jax
    import jax.numpy as jnp

    from llmprep_jax.kernels import flash_attention
    from llmprep_jax.kernels.flash_attention.masks import Rule

    try:
        module = importlib.import_module(f"{flash_attention.__name__}.{name.split()[0]}")
    except ImportError as error:
        raise Absent(f"not here: {error}") from None
    is_decode = "decode" in shape.works
    queries = 1 if is_decode else shape.T
    sizes = (shape.N, queries, shape.H), (shape.K, shape.T, shape.H), (shape.K, shape.T, shape.U)
    heads = [jax.ShapeDtypeStruct((shape.B, *size), jnp.dtype(dtype)) for size in sizes]
    if name == "reference" and 4 * shape.B * shape.N * queries * shape.T >= 2**33:
        return "its scores take 8 GiB or more"
    given = ("positions",) if is_decode else tuple(given)
    width = shape.U if name in LATENTS else None
    rule = Rule(shape.causal, shape.window, shape.H**-0.5, soft_cap, None, given, width)
    reasons: list[str | None] = []
    jax.eval_shape(lambda *x: reasons.append(module.refusal(*x, rule, backward)), *heads)
    return reasons[0]


def function(name: str | None, shape: Shape, work: Work) -> Callable[..., Any]:
    """attention(q, k, v) of a shape by a backend; None: whatever a layer would use."""
    import jax.numpy as jnp

    def call(q, k, v):
        places = {}
        if work == "decode":  # the last of T tokens, as a cache has it
            k_positions = jnp.broadcast_to(jnp.arange(shape.T), (shape.B, shape.T))
            places = dict(q_positions=k_positions[:, -1:], k_positions=k_positions)
        return attend(name, shape, q, k, v, **places)

    return call


def attend(name: str | None, shape: Shape, q: Any, k: Any, v: Any, **rest: Any) -> Any:
    """A call of the seam; values of latents are read with their keys, or sliced from them."""
    from llmprep_jax.kernels.flash_attention import attention

    options = dict(causal=shape.causal, window=shape.window, impl=name)
    if name in LATENTS:
        v, options = None, options | dict(impl=LATENTS[name][1], value_width=shape.U)
    elif shape.latent:
        v = k[..., : shape.U]
    return attention(q, k, v, **options, **rest)


def arrays(shape: Shape, work: Work, dtype: str) -> tuple[Any, ...]:
    """q, k, v of random numbers, and what comes back to o."""
    import jax

    queries = 1 if work == "decode" else shape.T
    sizes = (
        (shape.B, queries, shape.N, shape.H),
        (shape.B, shape.T, shape.K, shape.H),
        (shape.B, 1 if shape.latent else shape.T, shape.K, shape.U),
        (shape.B, queries, shape.N, shape.U),
    )
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return tuple(draw(key, size, dtype) for key, size in zip(keys, sizes, strict=True))


def by_head(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on keys and values that lie head by head, as a cache has them."""
    return lambda q, k, v: run(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
