"""Memory and time of the loss of a linear output head, by its forms: in parts, whole, plain.

    python -m experiments.bench_cross_entropy [target=v5p:2x2x1] [tokens=4096] [words=262144]

Without a target each form is compiled for the devices at hand and timed, value and gradients, one
after the other in each round. With one, the name of a TPU topology, they are compiled for one chip
of it and not run, which takes the package libtpu and no TPU. Temporaries are what the compiled
program holds beside its inputs and outputs; "plain" is JAX's gradient of the logits' loss.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_cross_entropy:Settings", compile_cache=False)

import dataclasses
import json
import os
import pathlib
import statistics
import time
from typing import Any, Literal

import rich.console
import rich.table

from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override
from llmprep_jax.text.vocab import one_line

FORMS = {"in parts": "chunked", "whole": "whole", "plain": "reference"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the head, and what it is compiled for."""

    tokens: int = 4096  # whose loss is taken
    words: int = 262144  # of the vocabulary
    width: int = 2560  # of the model
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of hidden states and weights
    target: str | None = None  # a TPU topology, "v5p:2x2x1"; None: the devices at hand, and timed
    rounds: int = 5  # timed calls of each form
    out: pathlib.Path | None = None  # a JSON file for the numbers


def compile_forms(settings: Settings) -> dict[str, Any]:
    """Compiled value and gradients by form, of (x, w, targets)."""
    import jax
    import jax.numpy as jnp

    from llmprep_jax.kernels.cross_entropy import linear_cross_entropy

    place = None if settings.target is None else _chip(settings.target)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    sizes = (settings.tokens, settings.width), (settings.width, settings.words)
    arrays = [array(shape, settings.dtype) for shape in sizes]
    arrays.append(array((settings.tokens,), jnp.int32))
    compiled = {}
    for form, impl in FORMS.items():

        def total(x: Any, w: Any, targets: Any, impl: str = impl) -> Any:
            return jnp.sum(linear_cross_entropy(x, w, targets, impl=impl))

        lowered = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arrays)
        compiled[form] = lowered.compile()
    return compiled


def _chip(topology: str) -> Any:
    import jax
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of the plugin, whatever is wrong
        raise ValueError(
            f"target={topology}: {one_line(error)}; install libtpu, and give a topology such as"
            " v5p:2x2x1"
        ) from error
    return jax.sharding.SingleDeviceSharding(chips[0])


def time_forms(compiled: dict[str, Any], settings: Settings) -> dict[str, float]:
    """Median seconds of a call by form, each called in turn."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (settings.tokens, settings.width), settings.dtype)
    w = jax.random.normal(keys[1], (settings.width, settings.words), settings.dtype) * 0.02
    targets = jax.random.randint(keys[2], (settings.tokens,), 0, settings.words)
    seconds: dict[str, list[float]] = {form: [] for form in compiled}
    for _ in range(settings.rounds + 1):  # the first is not counted
        for form, call in compiled.items():
            begun = time.perf_counter()
            jax.block_until_ready(call(x, w, targets))
            seconds[form].append(time.perf_counter() - begun)
    return {form: statistics.median(times[1:]) for form, times in seconds.items()}


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    compiled = compile_forms(settings)
    times = {} if settings.target else time_forms(compiled, settings)
    rows = {}
    table = rich.table.Table("form", "temporaries, MiB", "seconds", box=rich.box.SIMPLE_HEAD)
    for form, program in compiled.items():
        size = program.memory_analysis().temp_size_in_bytes / 2**20
        rows[form] = {"temporaries_mib": size, "seconds": times.get(form)}
        table.add_row(form, f"{size:,.0f}", f"{times[form]:.3f}" if form in times else "")
    rich.console.Console().print(table)
    if settings.out is None:
        return {}
    settings.out.write_text(json.dumps(dataclasses.asdict(settings) | rows, default=str, indent=2))
    return {"numbers": settings.out}


if __name__ == "__main__":
    cli.run(main)
