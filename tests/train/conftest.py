"""Compiles little: hundreds of programs that run for milliseconds, so LLVM's passes are left out.

`fit` jits anew each time it is called; programs compiled once are kept for the session. The one
thing a reader would get wrong: the slow tests' own processes compile as users do.
"""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compilation(tmp_path_factory):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.02,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
