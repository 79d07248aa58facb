"""Whether kernels compute what their references mean, on the device at hand and in its dtypes.

The reference gets the same rounded numbers in float32 and multiplies them at the highest precision;
an error is the greatest difference over the greatest value, of the outputs and of each gradient.
"""

import concurrent.futures
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.bench import attention
from experiments.bench.checks import Absent, Check, one_line
from experiments.bench.results import Row
from experiments.bench.shapes import Shape

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}

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


def checks(size: str) -> list[Check]:
    """bf16 first, which is what models run in; attention, then the loss, then grouped products."""
    import jax

    todo = []
    for dtype in ("bfloat16", "float32"):
        for name, (shape, rest) in CASES.items():
            if size == "tiny" and name not in ("grouped heads", "spans"):
                continue
            run = functools.partial(check_attention, name, shape, rest, dtype)
            todo.append(Check(f"attention, {name}, {dtype}", run))
        todo += [
            Check(f"{op}, {dtype}", functools.partial(run, dtype))
            for op, run in (("cross-entropy", check_loss), ("grouped matmul", check_grouped))
        ]
    if jax.default_backend() == "cpu":  # where both dtypes are multiplied alike
        todo = [check for check in todo if check.name.endswith("float32")]
    return todo


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


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, float]:
    """The error of the outputs, and the worst of the gradients."""
    errors = {}
    for name, value in found.items():
        x, y = [np.asarray(a, np.float64) for a in (value, wanted[name])]
        if name == "lse":  # a query that sees nothing
            x, y = [np.where(a < -1e38, 0.0, a) for a in (x, y)]
        # no number is the worst error
        error = np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-3)
        errors[name] = float(error) if np.isfinite(error) else float("inf")
    outputs = {f"error of {name}": errors[name] for name in ("o", "lse", "y") if name in errors}
    gradients = [error for name, error in errors.items() if name.startswith("d")]
    return outputs | ({"worst gradient's": max(gradients)} if gradients else {})


def check_loss(dtype: str) -> Iterator[Row]:
    """Linear cross-entropy by each form: ignored targets, a soft cap, a z-loss, odd sizes."""
    import jax
    import jax.numpy as jnp

    from llmprep_jax.kernels.cross_entropy import linear_cross_entropy
    from llmprep_jax.kernels.cross_entropy.api import IMPLS

    N, D, V = 300, 256, 4100
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (N, D), dtype), jax.random.normal(keys[1], (D, V), dtype)
    targets = jax.random.randint(keys[2], (N,), -1, V)

    def results(impl: str, x: Any, w: Any) -> dict[str, Any]:
        terms = dict(soft_cap=30.0, z_loss=1e-3, chunk=None if impl == "whole" else 1024)
        losses = lambda x, w: linear_cross_entropy(x, w * 0.05, targets, impl=impl, **terms)  # noqa: E731
        y, pull = jax.vjp(losses, x, w)
        return dict(y=y) | dict(zip(("dx", "dw"), pull(jnp.ones_like(y)), strict=True))

    impls = [x for x in attention.on_platform(IMPLS, jax.default_backend()) if x != "reference"]
    yield from _compare("cross-entropy", impls, results, (x, w))


def check_grouped(dtype: str) -> Iterator[Row]:
    """Grouped products by each form: empty groups, rows of no group, sizes that no tile divides."""
    import jax
    import jax.numpy as jnp

    from llmprep_jax.kernels.grouped_matmul import reference
    from llmprep_jax.kernels.grouped_matmul.api import IMPLS, grouped_matmul

    impls = attention.on_platform(IMPLS, jax.default_backend())
    M, D, F = 700, 256, 320
    sizes = jnp.asarray([0, 130, 1, 300, 0, 201], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (M, D), dtype)
    w = jax.random.normal(keys[1], (len(sizes), D, F), dtype)
    dy = jax.random.normal(keys[2], (M, F), dtype)

    def results(impl: str, x: Any, w: Any) -> dict[str, Any]:
        def product(x, w):
            if impl == "reference":
                return reference.grouped_matmul(x, w, sizes).astype(x.dtype)
            return grouped_matmul(x, w, sizes, dtype=x.dtype, impl=impl)

        y, pull = jax.vjp(product, x, w)
        return dict(y=y) | dict(zip(("dx", "dw"), pull(dy.astype(y.dtype)), strict=True))

    yield from _compare("grouped matmul", impls, results, (x, w))


def _compare(
    op: str, impls: list[str], results: Callable[..., dict[str, Any]], arrays: tuple[Any, ...]
) -> Iterator[Row]:
    """A row for each form of an op."""
    import jax
    import jax.numpy as jnp

    dtype = str(arrays[0].dtype)
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) for x in arrays]
        wanted = jax.jit(functools.partial(results, "reference"))(*exact)
        for impl in impls:
            row = {"section": "parity", "op": op, "dtype": dtype, "impl": impl}
            row["limit"] = LIMITS[dtype]
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    found = jax.jit(functools.partial(results, impl))(*arrays)
                note = next((str(x.message) for x in said if "impl" in str(x.message)), None)
                yield row | compare(found, wanted) | {"note": note}
            except Exception as error:  # of a compiler or a kernel: the others go on
                yield row | {"note": one_line(error)}
