"""Which weights a run leaves as they are: LiT's locked tower (Zhai et al. 2022), the stages of
DeepSeek-VL (2403.05525, figure 3).

A name is that of a part (`BaseModel.parts`), a path ("language.layers.attn": all below it), or a
regex for whole names of parameters. What is frozen is a constant of the step: it has no gradient
and no optimizer state, weight decay does not reach it, and checkpoints do not hold it.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax import nnx

from llmprep_jax.nn.param import TRAINED
from llmprep_jax.peft import AnyMethod
from llmprep_jax.peft.injection import targeted


def trained_weights(model: nnx.Module, freeze: Sequence[str] = ()) -> Any:
    """What `Trainer(trainable=)` and `nnx.split` take to train all weights but those.

    Raises:
      ValueError: a name means no weight; near ones are listed.
    """
    if not freeze:
        return TRAINED
    frozen = frozen_weights(model, freeze)
    return nnx.All(TRAINED, lambda path, _: _name(path) not in frozen)


def frozen_weights(model: nnx.Module, freeze: Sequence[str]) -> frozenset[str]:
    """The names of the weights that are frozen, e.g. "vision.layers.attn.q.w".

    Raises:
      ValueError: a name means no weight; near ones are listed.
    """
    weights = [_name(path) for path, _ in nnx.to_flat_state(nnx.state(model, TRAINED))]
    parts = {  # a training loop is given any module
        part: paths
        for part, paths in getattr(model, "parts", {}).items()
        if any(_is_below(f"{path}.", [f"{name}." for name in weights]) for path in paths)
    }
    return frozenset(name for given in freeze for name in _meant(given, weights, parts))


def leave_out(model: nnx.Module, method: AnyMethod, freeze: Sequence[str]) -> AnyMethod:
    """An adapter's method whose targets are those of its layers that are not frozen.

    Raises:
      ValueError: a name means no weight, `modules_to_save` trains what is frozen, or nothing is
        left to adapt.
    """
    frozen = frozen_weights(model, freeze)
    layers, whole = targeted(model, method)
    for path in whole:
        if any(name.startswith(f"{path}.") for name in frozen):
            raise ValueError(
                f"freeze={','.join(freeze)} freezes {path}, which adapter.modules_to_save trains;"
                " leave it out of one of them"
            )
    left = tuple(path for path in layers if not _is_below(f"{path}.", frozen))
    if not left:
        raise ValueError(
            f"freeze={','.join(freeze)} leaves no layer for the adapter, whose targets are"
            f" {', '.join(layers[:5])}"
        )
    return dataclasses.replace(method, targets=left, exclude_modules=())


def _name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _is_below(start: str, names: Collection[str]) -> bool:
    return any(name.startswith(start) for name in names)


def _meant(
    given: str, weights: Sequence[str], parts: Mapping[str, tuple[str, ...]]
) -> Sequence[str]:
    """The weights that a name means."""
    starts = tuple(f"{path}." for path in parts.get(given, (given,)))
    below = [name for name in weights if f"{name}.".startswith(starts)]
    try:
        below = below or [name for name in weights if re.fullmatch(given, name)]
    except re.error as error:
        raise ValueError(f"freeze={given}: it is no regex ({error}), and no part") from None
    if below:
        return below
    paths = {name.rsplit(".", n)[0] for name in weights for n in range(name.count(".") + 1)}
    known = [*parts, *sorted(paths - parts.keys())]
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.5) or [*parts] or known[:6]
    raise ValueError(
        f"freeze={given}: no part, path or weight of the model is called that; near names:"
        f" {', '.join(near)}"
    )
