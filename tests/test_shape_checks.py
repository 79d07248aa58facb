"""The checks of shapes and types that tests run under see what they are there for."""

import beartype
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx

from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.weights import hub


def test_shapes_are_checked_while_tests_run():
    norm = RMSNorm(8, rngs=nnx.Rngs(0))
    norm(jnp.ones((2, 8)))
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        norm(jnp.ones((2, 8), jnp.int32))


def test_types_of_functions_without_shapes_are_checked():
    with pytest.raises(beartype.roar.BeartypeCallHintParamViolation, match="revision"):
        hub.resolve("a/b", revision=3)


def test_fields_of_dataclasses_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="lr"):
        OptimConfig(lr="much")
