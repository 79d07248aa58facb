"""Whether kernels compute what their references mean, on the device at hand and in its dtypes.

The reference gets the same rounded numbers in float32 and multiplies them at the highest precision;
an error is the greatest difference over the greatest value, of the outputs and of each gradient.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from experiments.bench import attention
from experiments.bench.agreement import LIMITS, compare
from experiments.bench.attention_parity import CASES, check_attention
from experiments.bench.checks import Check, one_line
from experiments.bench.results import Row


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
