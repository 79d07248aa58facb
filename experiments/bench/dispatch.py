"""Experts over the devices there are, by each way that tokens may take to them; one will do.

Each transport must give what experts without a mesh give, and is timed forward and backward.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.bench.agreement import LIMITS, compare
from experiments.bench.checks import Check
from experiments.bench.results import Row
from experiments.bench.timing import Contender, in_turn

ACTIVE = 4  # experts of a token
AXES = {"up": ("expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}


def checks(size: str) -> list[Check]:
    """One for each transport."""
    from llmprep_jax.nn.dispatch import TRANSPORTS

    return [Check(name, functools.partial(check, name, size)) for name in TRANSPORTS]


def check(transport: str, size: str) -> Iterator[Row]:
    """A transport's error and time, with 8 experts a device and 4 of them for each token."""
    import jax
    import jax.numpy as jnp

    from llmprep_jax.kernels.grouped_matmul.api import grouped_matmul
    from llmprep_jax.nn.dispatch import run_experts
    from llmprep_jax.sharding import make_mesh, spec, use_mesh

    count = jax.device_count()
    E, (T, D, F) = 8 * count, (2048, 2048, 1024) if size == "full" else (32, 32, 16)
    dtype = "float32" if size == "tiny" else "bfloat16"
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((2 * count, T // 2, D)), dtype)
    scores = draw.random((2 * count, T // 2, E))
    experts = jnp.asarray(np.argsort(scores)[..., :ACTIVE], jnp.int32)
    weights = jnp.full(experts.shape, 1 / ACTIVE, jnp.float32)
    shapes = {"up": (E, D, F), "down": (E, F, D)}
    params = {
        k: jnp.asarray(draw.standard_normal(s) * s[1] ** -0.5, dtype) for k, s in shapes.items()
    }

    def apply(rows_RD, sizes_E, params):
        up = grouped_matmul(rows_RD, params["up"], sizes_E, dtype=rows_RD.dtype)
        return grouped_matmul(jnp.tanh(up), params["down"], sizes_E, dtype=rows_RD.dtype)

    def results(x, weights, params, name=None) -> dict[str, Any]:
        def run(x, params):
            return run_experts(
                x, experts, weights, params, AXES, apply, num_experts=E, transport=name
            )[0]

        y, pull = jax.vjp(run, x, params)
        dx, dparams = pull(jnp.ones_like(y))
        return dict(y=y, dx=dx) | {f"d{name}": value for name, value in dparams.items()}

    wanted = jax.device_get(jax.jit(results)(x, weights, params))
    with use_mesh(make_mesh({"expert": count})):
        tokens = spec("batch", "seq", None, shape=x.shape)
        placed = [jax.reshard(array, tokens) for array in (x, weights)]
        on_mesh = {k: jax.reshard(w, spec(*AXES[k], shape=w.shape)) for k, w in params.items()}
        program = jax.jit(functools.partial(results, name=transport))
        row: dict[str, Any] = {"section": "dispatch", "transport": transport, "devices": count}
        row |= {"dtype": dtype, "limit": LIMITS[dtype]}
        row |= compare(jax.device_get(program(*placed, on_mesh)), wanted)
        call = Contender(functools.partial(program, *placed, on_mesh), jax.block_until_ready)
        seconds = in_turn({"": call}, rounds=3)[""]
    num_tokens = 2 * count * (T // 2)
    flops = 3 * 4 * num_tokens * ACTIVE * D * F  # two products, and twice as much backward
    yield row | {
        "ms": seconds * 1e3,
        "tokens/s": num_tokens / seconds,
        "TFLOP/s of a device": flops / seconds / count / 1e12,
    }
