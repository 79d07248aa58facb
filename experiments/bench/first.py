"""What a model's first answer costs after its load: tracing and compiling, without a compile cache
and from one that an earlier process filled."""

import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import rich.console
import rich.table

DTYPES = ("float32", "bfloat16", "int8", "nf4")
PROMPT, NEW = 64, 16  # tokens
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of `jax.monitoring`


def compare(model: str, out: pathlib.Path | None) -> dict[str, pathlib.Path]:
    """Prints the first answers of a model by the dtype that it is loaded in, and writes them.

    Each is a process of its own, and is asked twice: the difference is what was made ready.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            cache = {
                "JAX_COMPILATION_CACHE_DIR": f"{folder}/{dtype}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            }
            for kind in ("compiled", "from the cache"):
                print(f"{dtype}, {kind}", flush=True)
                rows.append({"dtype": dtype, "programs": kind, **_in_process(model, dtype, cache)})
    _show(rows)
    if out is None:
        return {}
    out.write_text(json.dumps({"title": "first answer", "rows": rows}, indent=2) + "\n")
    return {"first answers": out}


def _in_process(model: str, dtype: str, environment: dict[str, str]) -> dict[str, float]:
    # a new interpreter takes over the environment as it is when it starts
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(first_answer, (model, dtype))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def first_answer(model: str, dtype: str) -> dict[str, float]:
    """Seconds and CPU-seconds of a first and a second answer, and seconds of XLA's compiling, which
    with a cache is reading from it."""
    import jax

    import llmprep_jax as lp

    durations: list[float] = []

    def hear(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            durations.append(seconds)

    loaded = lp.load_model(model, dtype=dtype)
    jax.monitoring.register_event_duration_secs_listener(hear)
    tokens = np.arange(PROMPT)[None] % loaded.cfg.vocab_size

    def answer() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        np.asarray(lp.generate_tokens(loaded, tokens, max_new_tokens=NEW))
        return time.perf_counter() - start, time.process_time() - cpu

    names = ("seconds", "cpu_seconds")
    results = dict(zip(names, answer(), strict=True))
    results |= {"compile_seconds": sum(durations), "num_programs": len(durations)}
    return results | dict(zip([f"second_{name}" for name in names], answer(), strict=True))


def _show(rows: list[dict[str, Any]]) -> None:
    table = rich.table.Table(title=f"first answer after load: {PROMPT} tokens in, {NEW} out")
    for column in ("", "programs", "first", "CPU", "of it XLA", "second", "CPU"):
        table.add_column(column)
    for row in rows:
        names = (
            "seconds",
            "cpu_seconds",
            "compile_seconds",
            "second_seconds",
            "second_cpu_seconds",
        )
        numbers = [f"{row[name]:.1f} s" for name in names]
        table.add_row(row["dtype"], f"{row['num_programs']}, {row['programs']}", *numbers)
    rich.console.Console(width=132).print(table)
