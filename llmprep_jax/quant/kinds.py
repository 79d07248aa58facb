"""The formats by name: what `load_model(dtype=...)` and `quantize_model(kind=...)` take.

"nf4" is with double quantisation, as QLoRA uses it, and "int4" is asymmetric; the formats' own
modules have the settings.
"""

import functools
from collections.abc import Callable

from llmprep_jax.quant import fp8, int4, int8, nf4
from llmprep_jax.quant.packed import Packed
from llmprep_jax.types import Array

KINDS: dict[str, Callable[[Array], Packed]] = {
    "nf4": functools.partial(nf4.quantize, kind="nf4"),
    "fp4": functools.partial(nf4.quantize, kind="fp4"),
    "int8": int8.quantize,
    "int4": int4.quantize,
    "fp8": fp8.quantize,
}


def quantize(w: Array, kind: str) -> Packed:
    """Packs a matrix, outputs by inputs, with the settings that are usual for `kind`.

    Raises:
      ValueError: an unknown kind, or w is no matrix of floats.
    """
    check_kind(kind)
    return KINDS[kind](w)


def check_kind(kind: str) -> None:
    """Refuses an unknown kind."""
    if kind not in KINDS:
        raise ValueError(
            f"unknown kind {kind!r} of packed weights; the kinds are {', '.join(KINDS)}"
        )
