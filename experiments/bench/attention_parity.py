"""Attention by each backend beside its reference: whole rows, windows, spans, padding, decoding."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.bench import attention
from experiments.bench.agreement import LIMITS, compare
from experiments.bench.checks import Absent, one_line
from experiments.bench.results import Row
from experiments.bench.shapes import Shape

# shape, and what else there is: a soft cap, sinks, or values by token: segments of which the last
# is padding ("s"), spans that see each other ("i"), rows of which all is padding ("e")
CASES: dict[str, tuple[Shape, Mapping[str, Any]]] = {
    "grouped heads": (Shape(2, 500, 8, 2, 128, 128), {}),
    "segments": (Shape(2, 384, 4, 4, 64, 64), {"values": "s"}),
    "latent 192/128": (Shape(1, 260, 4, 4, 192, 128), {}),
    "window, cap, sinks": (Shape(1, 500, 4, 2, 256, 256, window=100), {"cap": 30.0, "sinks": 1}),
    "not causal, 72": (Shape(2, 200, 4, 4, 72, 72, causal=False), {"values": "e"}),
    "spans": (Shape(1, 300, 4, 1, 80, 80), {"values": "i"}),
    "decode": (Shape(3, 700, 8, 2, 128, 128, works=("decode",)), {}),
    "decode 576/512": (Shape(2, 700, 16, 1, 576, 512, latent=True, works=("decode",)), {}),
}


def check_attention(name: str, shape: Shape, rest: Mapping[str, Any], dtype: str) -> Iterator[Row]:
    """A row for each backend, forward and backward."""
    import jax
    import jax.numpy as jnp

    is_decode = "decode" in shape.works
    q, k, v, do = attention.arrays(shape, "decode" if is_decode else "forward", dtype)
    options = _options(shape, rest)
    names = [x for x in attention.backends(jax.default_backend(), shape) if x != "reference"]
    given = [name[2:] for name in options if name.startswith("k_")]
    refusal = functools.partial(attention.refusal, soft_cap=rest.get("cap"), given=given)
    reasons = {impl: _refusals(functools.partial(refusal, impl, shape, dtype)) for impl in names}
    known = [impl for impl in names if reasons[impl][0] is None]

    def results(impl: str, *arrays: Any) -> dict[str, Any]:
        sinks = jnp.linspace(-1.0, 1.0, shape.N) if "sinks" in rest else None

        def attend(q, k, v):
            more = dict(soft_cap=rest.get("cap"), sinks=sinks, return_lse=True)
            return attention.attend(impl, shape, q, k, v, **more, **options)

        q, k, v, do = arrays
        if is_decode or (impl != "reference" and reasons[impl][1] is not None):
            return dict(zip(("o", "lse"), attend(q, k, v), strict=True))
        (o, lse), pull = jax.vjp(attend, q, k, v)
        grads = pull((do, jnp.where(lse > -1e38, 0.1, 0.0)))
        return dict(o=o, lse=lse) | dict(zip(("dq", "dk", "dv"), grads, strict=True))

    exact = [x.astype(jnp.float32) for x in (q, k, v, do)]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(functools.partial(results, "reference"))(*exact)
        programs = _compile_together(
            {impl: (functools.partial(results, impl), (q, k, v, do)) for impl in known}
        )
    alike = {"section": "parity", "op": "attention", "case": name, "dtype": dtype}
    for impl in names:
        forward, backward = reasons[impl]
        row = alike | {"impl": impl, "limit": LIMITS[dtype]}
        if forward is not None:
            yield row | {"note": forward}
            continue
        try:
            found = programs[impl].result()(q, k, v, do)
            note = None if backward is None or is_decode else f"backward: {backward}"
            yield row | compare(found, wanted) | {"note": note}
        except Exception as error:  # of a compiler or a kernel: the others go on
            yield row | {"note": one_line(error)}
            jax.block_until_ready(jnp.ones(8) + 1)  # raises where the device is dead


def _refusals(refusal: Callable[..., str | None]) -> tuple[str | None, str | None]:
    """Why forward and why backward cannot be done."""
    try:
        return refusal(backward=False), refusal(backward=True)
    except Absent as reason:
        return str(reason), None


def _options(shape: Shape, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Positions, segments and spans."""
    import jax.numpy as jnp

    columns = np.tile(np.arange(shape.T), (shape.B, 1))
    values, options = rest.get("values", ""), {}
    if "decode" in shape.works:  # rows of several lengths
        lengths = shape.T - 1 - 97 * np.arange(shape.B)[:, None]
        options = dict(q_positions=lengths, k_positions=columns)
    if "s" in values or "e" in values:
        segments = 1 + columns * 3 // shape.T
        segments[:, -shape.T // 8 :] = 0
        segments[0] = 0 if "e" in values else segments[0]
        options |= dict(q_segments=segments, k_segments=segments)
    if "i" in values:
        spans = np.where((columns > 40) & (columns < 170), 1, 0) + np.where(columns > 180, 2, 0)
        options |= dict(q_spans=spans, k_spans=spans)
    return {name: jnp.asarray(value) for name, value in options.items()}


def _compile_together(
    functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]],
) -> dict[str, concurrent.futures.Future]:
    """Each function compiled for its arguments; compilers run side by side."""
    import jax

    pool = concurrent.futures.ThreadPoolExecutor(8)
    programs = {}
    for name, (function, arguments) in functions.items():
        try:
            lowered = jax.jit(function).lower(*arguments)
        except Exception as error:  # of a kernel that cannot be traced
            programs[name] = concurrent.futures.Future()
            programs[name].set_exception(error)
            continue
        programs[name] = pool.submit(lowered.compile)
    pool.shutdown(wait=False)
    return programs
