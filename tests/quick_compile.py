"""For tests that compile hundreds of programs and run each for a millisecond: LLVM's passes are
left out, and programs are kept on disk while the tests of a folder or file run."""

import contextlib
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
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def make_room() -> None:
    """Linux gives a process 65,530 memory maps; programs take some each, and XLA crashes beyond."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
