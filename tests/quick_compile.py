"""For tests that trace and compile hundreds of programs and run each for a millisecond: LLVM's
passes are left out, programs are kept on disk while the tests of a folder or file run, and Python
looks for garbage seldom."""

import contextlib
import gc
import pathlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def quick_compile(cache: str | pathlib.Path) -> Iterator[None]:
    """Compiles quickly inside; several calls of `fit`, each of which jits anew, compile once."""
    settings = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.02,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    # tracing makes so many objects that the collector, as it comes, takes a fifteenth of all time
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        for name, value in before.items():
            jax.config.update(name, value)


def make_room() -> None:
    """Linux gives a process 65,530 memory maps; programs take some each, and XLA crashes beyond."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
