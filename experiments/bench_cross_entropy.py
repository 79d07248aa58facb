"""Memory and time of the loss of a linear output head, by its forms: chunked, whole, reference.

    python -m experiments.bench_cross_entropy [target=v5p:2x2x1] [tokens=4096] [words=262144]

Without a target each form is compiled for the devices at hand and timed, value and gradients, one
after the other in each round. With one, the name of a TPU topology or "h100", they are compiled for
one such chip and not run, which takes the package libtpu, or jax-cuda12-plugin and jax-cuda12-pjrt,
and no chip. Temporaries are what the compiled program holds beside its inputs and outputs;
"reference" is JAX's gradient of the logits' loss.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_cross_entropy:Settings", compile_cache=False)

import dataclasses
import functools
import pathlib
from typing import Any, Literal

from experiments.bench import environment
from experiments.bench.ahead import chip
from experiments.bench.attention import on_platform
from experiments.bench.checks import one_line
from experiments.bench.results import Results, line
from experiments.bench.timing import Contender, in_turn
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

WORDS = """Value and gradients with respect to hidden states [{tokens:,}, {width:,}] and a head of
{words:,} words, in {dtype}. Temporaries are what the compiled program holds beside its inputs and
outputs. FLOPs are those of three products (logits, and both gradients), 6 x tokens x words x width,
whatever a form computes again."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the head, and what it is compiled for."""

    tokens: int = 4096  # whose loss is taken
    words: int = 262144  # of the vocabulary
    width: int = 2560  # of the model
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of hidden states and weights
    target: str | None = None  # "v5p:2x2x1" or "h100"; None: the devices at hand, and timed
    rounds: int = 5  # timed calls of each form
    out: pathlib.Path | None = None  # a folder for the numbers; None: docs/results/DEVICE


def compile_form(impl: str, settings: Settings, device: Any) -> Any:
    """Compiled value and gradients of (x, w, targets)."""
    import jax
    import jax.numpy as jnp

    from llmprep_jax.kernels.cross_entropy import linear_cross_entropy
    from llmprep_jax.sharding import make_mesh, use_mesh

    def total(x: Any, w: Any, targets: Any) -> Any:
        return jnp.sum(linear_cross_entropy(x, w, targets, impl=impl))

    mesh = make_mesh({"data": 1}, [device])
    place = jax.sharding.NamedSharding(mesh, jax.P())
    arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for x in jax.eval_shape(functools.partial(draw, settings))
    ]
    with use_mesh(mesh):
        return jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arrays).compile()


def draw(settings: Settings) -> tuple[Any, Any, Any]:
    """Hidden states, a head and targets."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (settings.tokens, settings.width), settings.dtype)
    w = jax.random.normal(keys[1], (settings.width, settings.words), settings.dtype) * 0.02
    return x, w, jax.random.randint(keys[2], (settings.tokens,), 0, settings.words)


def time_forms(compiled: dict[str, Any], settings: Settings) -> dict[str, float]:
    """Median seconds of a call by form, each called in turn."""
    import jax

    arrays = jax.jit(draw, static_argnums=0)(settings)
    contenders = {
        form: Contender(functools.partial(call, *arrays), jax.block_until_ready)
        for form, call in compiled.items()
    }
    return in_turn(contenders, settings.rounds)


def main(arguments: list[str]) -> cli.Outputs:
    import jax

    from llmprep_jax.kernels.cross_entropy.api import IMPLS

    settings = override(Settings(), only_overrides(arguments))
    compiled, notes = {}, {}
    # that there is no such chip is told before anything is compiled
    device = chip(settings.target) if settings.target else jax.devices()[0]
    forms = on_platform(IMPLS, device.platform if device.platform in ("cpu", "tpu") else "gpu")
    for form in forms:
        try:
            compiled[form] = compile_form(form, settings, device)
        except Exception as error:  # too large for the device, say: the others go on
            notes[form] = one_line(error)
    times = {} if settings.target else time_forms(compiled, settings)
    target = settings.target and f"{settings.target}, ahead of time"
    words = WORDS.format(**dataclasses.asdict(settings))
    results = Results(settings.out, "cross_entropy", target or environment.device_name(), words)
    flops = 6 * settings.tokens * settings.words * settings.width
    for form in forms:
        row: dict[str, Any] = {"section": "loss", "form": form, "note": notes.get(form)}
        if form in compiled:
            size = compiled[form].memory_analysis().temp_size_in_bytes / 2**20
            row |= {"temporaries, MiB": size}
        if form in times:
            row |= {"ms": times[form] * 1e3, "TFLOP/s": flops / times[form] / 1e12}
        results.add({key: value for key, value in row.items() if value is not None})
        print(line(results.rows[-1]))
    return {"numbers": results.numbers, "tables": results.tables}


if __name__ == "__main__":
    cli.run(main)
