"""A card that is not there."""

import jax
import pytest

from experiments.bench.ahead import chip


@pytest.fixture(scope="module")
def card():
    """A mesh of one H100; programs are compiled for it as a user's are."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="jax-cuda12-plugin is not installed")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield jax.sharding.Mesh([chip("h100")], ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    jax.config.update("jax_disable_most_optimizations", before)
