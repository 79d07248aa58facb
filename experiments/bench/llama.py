"""Steps of a Llama-3-8B of few layers, timed beside transformers' and laid out to all 32 by a line.

Two depths give the time of a layer and of what is not in layers (embedding, head, loss, updates of
both); the line through them is read at 32. FLOPs are 4 a token and frozen weight and 6 a trained
one, of weights in products, and attention's over half of the row (causal: counted once).
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.bench.checks import Absent, Check
from experiments.bench.results import Row
from experiments.bench.timing import Contender, in_turn
from experiments.bench.training import Kind, batch_of, our_step, their_step

DEPTHS, LAYERS = (2, 4), 32
CONTENDERS = {
    "full": ("ours", "torch sdpa", "torch compiled"),
    "tiny": ("ours", "torch sdpa"),  # compiling takes torch minutes of two cores
}
TINY = dict(vocab_size=512, dim=64, mlp_dim=128, num_heads=4, num_kv_heads=2, head_dim=16)
TINY |= dict(bos_id=1, eos_ids=(2,))


def config(size: str, num_layers: int) -> Any:
    """Llama-3-8B in bf16, of so many layers; all but its depth small where `size` is "tiny"."""
    from llmprep_jax.models import registry
    from llmprep_jax.nn.param import Compute

    cfg = dataclasses.replace(registry.preset("llama-3-8b"), num_layers=num_layers)
    cfg = dataclasses.replace(cfg, compute=Compute(dtype="bfloat16", param_dtype="bfloat16"))
    if size == "tiny":
        cfg = dataclasses.replace(cfg, compute=Compute(), **TINY)
    return cfg


def hf_fields(cfg: Any) -> dict[str, Any]:
    from llmprep_jax.models import registry

    fields = registry.to_hf(cfg)
    return {name: x for name, x in fields.items() if name not in ("architectures", "torch_dtype")}


def step_checks(contender: str, size: str) -> list[Check]:
    """A contender's LoRA steps at both depths, and those of all weights."""
    return [
        Check(f"{kind} step, {contender}", functools.partial(time_steps, kind, contender, size))
        for kind in ("lora", "full")
    ]


def time_steps(kind: Kind, contender: str, size: str) -> Iterator[Row]:
    """Seconds of a step at each depth, and what follows for all layers."""
    length = 4096 if size == "full" else 64
    seconds, first, memory = {}, 0.0, None
    for depth in DEPTHS:
        cfg = config(size, depth)
        call = _step(contender, cfg, kind, batch_of(1, length, cfg.vocab_size))
        begun = time.perf_counter()
        call.wait(call.call())
        first = max(first, time.perf_counter() - begun)
        rounds, at_once = (5, 0.3) if size == "full" else (2, 0.0)
        seconds[depth] = in_turn({"": call}, rounds, at_once)[""]
        memory = _peak_gib(contender)
        del call
        _free(contender)
    layer = (seconds[DEPTHS[1]] - seconds[DEPTHS[0]]) / (DEPTHS[1] - DEPTHS[0])
    whole = seconds[DEPTHS[0]] + (LAYERS - DEPTHS[0]) * layer
    row: Row = {"section": f"step, {kind}", "contender": contender}
    row = row | {f"{depth} layers, ms": seconds[depth] * 1e3 for depth in DEPTHS}
    if layer <= 0:
        yield row | {"note": "more layers took no longer: noise, and no line"}
        return
    yield row | {
        f"{LAYERS} layers, ms": whole * 1e3,
        "tokens/s": length / whole,
        "TFLOP/s": step_flops(config(size, LAYERS), kind, length) / whole / 1e12,
        "peak GiB": memory,
        "first call, s": first,
    }


def step_flops(cfg: Any, kind: Kind, length: int) -> float:
    """Of a step on one row, as this file counts them."""
    from flax import nnx

    from llmprep_jax.models import registry
    from llmprep_jax.nn.param import Param
    from llmprep_jax.train.flops import count_flops

    weights = nnx.state(registry.abstract(cfg), Param)
    # an adapter's own weights are under a hundredth
    params, frozen = (weights, {}) if kind == "full" else ({}, weights)
    return count_flops(cfg, params, frozen, length).per_token * length


def _step(contender: str, cfg: Any, kind: Kind, batch: dict[str, np.ndarray]) -> Contender:
    if contender == "ours":
        import jax

        return Contender(our_step(cfg, kind, batch), jax.block_until_ready)
    need("torch", "transformers", *(["peft"] if kind == "lora" else []))
    dtype = cfg.compute.dtype
    call = their_step(hf_fields(cfg), kind, batch, dtype, contender == "torch compiled")
    return Contender(call, lambda loss: loss.item())


def need(*packages: str) -> None:
    """Raises Absent where one of them is not installed."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Absent(f"{', '.join(missing)} not installed")


def _peak_gib(contender: str) -> float | None:
    """Of the device; None where it does not count."""
    if contender == "ours":
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return None if peak is None else peak / 2**30
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _free(contender: str) -> None:
    gc.collect()
    if contender != "ours":
        import torch

        torch.cuda.empty_cache()
