"""Goals of measured rows, and which of them are missed.

H100: FlashAttention-3's chart has 602 TFLOP/s forward at d128, 8k, causal; the best published
backward from JAX is 410; FlashMLA reads latents at 3,000 GB/s; NeMo trains 12,473 tokens/s by LoRA.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench.llama import LAYERS
from experiments.bench.results import Row, best

HOPPER = ("H100", "H200", "GH200")
CUDNN = ("cudnn", "torch sdpa cudnn")


@dataclasses.dataclass(frozen=True)
class Goal:
    """Something to be reached.

    Attributes:
      value: of the rows; None where they have nothing of it.
      devices: parts of the names of devices that it is for; none: all.
    """

    what: str
    least: float
    value: Callable[[Sequence[Row]], float | None]
    devices: tuple[str, ...] = ()


def missed(rows: Sequence[Row], device: str) -> list[Row]:
    """A row for each error over its limit, and each goal that is not reached or not measured."""
    found = []
    for row in rows:
        limit = row.get("limit")
        errors = [x for key, x in row.items() if key.startswith(("error", "worst"))]
        if limit is not None and errors and not max(errors) <= limit:
            what = " ".join(str(x) for x in row.values() if isinstance(x, str))
            found.append({"what": what, "found": max(errors), "goal": f"<= {limit:g}"})
    for goal in GOALS:
        if goal.devices and not any(name in device for name in goal.devices):
            continue
        value = goal.value(rows)
        if value is None or value < goal.least:
            shown = "not measured" if value is None else value
            found.append({"what": goal.what, "found": shown, "goal": f">= {goal.least:g}"})
    return [{"section": "short of a goal"} | row for row in found]


def _ours(key: str, **alike: Any) -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        own = [row for row in rows if "torch" not in str(row.get("contender"))]
        return best(own, key, **alike)

    return value


def _ratio(
    key: str, over: tuple[str, ...], under: str | None = None, **alike: Any
) -> Callable[[Sequence[Row]], float | None]:
    """Ours, or that of one name, over the best of others."""

    def value(rows: Sequence[Row]) -> float | None:
        mine = best(rows, key, contender=under or "ours", **alike)
        peers = [best(rows, key, contender=name, **alike) for name in over]
        peer = max((x for x in peers if x is not None), default=None)
        return None if mine is None or peer is None else mine / peer

    return value


_D128 = dict(shape="d128")
_TORCH = ("torch sdpa", "torch compiled")
GOALS = (
    Goal(
        "d128 forward, best of ours, TFLOP/s",
        600.0,
        _ours("TFLOP/s", section="forward", **_D128),
        HOPPER,
    ),
    Goal(
        "d128 backward, best of ours, TFLOP/s",
        450.0,
        _ours("TFLOP/s", section="backward", **_D128),
        HOPPER,
    ),
    Goal(
        "d128 forward, pallas_gpu over cuDNN",
        0.8,
        _ratio("TFLOP/s", CUDNN, "pallas_gpu", section="forward", **_D128),
        HOPPER,
    ),
    Goal(
        "d128 backward, pallas_gpu over cuDNN",
        0.8,
        _ratio("TFLOP/s", CUDNN, "pallas_gpu", section="backward", **_D128),
        HOPPER,
    ),
    Goal(
        "absorbed decode 576/512, 16 heads, best of ours, GB/s",
        2000.0,
        _ours("GB/s", section="decode", shape="deepseek-v3-decode-tp8"),
        HOPPER,
    ),
    Goal(
        "absorbed decode 576/512, 128 heads, best of ours, GB/s",
        2000.0,
        _ours("GB/s", section="decode", shape="deepseek-v3-decode"),
        HOPPER,
    ),
    Goal(
        f"LoRA step at {LAYERS} layers over transformers + PEFT's best",
        1.0,
        _ratio("tokens/s", _TORCH, section="step, lora"),
    ),
    Goal(
        f"full step at {LAYERS} layers over transformers' best",
        1.0,
        _ratio("tokens/s", _TORCH, section="step, full"),
    ),
    Goal(
        f"LoRA step at {LAYERS} layers, tokens/s (NeMo)",
        12473.0,
        _ours("tokens/s", section="step, lora"),
        HOPPER,
    ),
    Goal(
        "decode of one row over transformers",
        1.0,
        _ratio("decode, tokens/s", _TORCH, section="generation", rows=1),
    ),
    Goal(
        "prefill of one row over transformers",
        1.0,
        _ratio("prefill, tokens/s", _TORCH, section="generation", rows=1),
    ),
)
