"""A training step of long rows: what attention and the loss keep is linear in length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.models import registry
from llmprep_jax.nn.param import Compute
from llmprep_jax.train.losses import training_loss
from tests.models.tiny import make_model


def temporaries(length: int) -> float:
    """GiB of Llama-3.2-1B's loss and gradients of one row, compiled for this machine."""
    cfg = registry.preset("llama-3.2-1b")
    cfg = dataclasses.replace(cfg, compute=Compute(dtype="bfloat16", remat="full"))
    shape = (1, length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = jax.jit(jax.grad(lambda model, batch: training_loss(model, batch).total))
    compiled = step.lower(registry.abstract(cfg), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**30


@pytest.mark.slow  # compiles a model of 1.2 billion parameters twice
def test_a_step_of_llama_1b_at_32k_tokens_fits_24_gib():
    short, long = temporaries(8192), temporaries(32768)
    assert long < 24 - 4.6  # beside the weights in float32
    assert long < 4 * short


def test_packed_rows_are_computed_as_in_order():
    model, (B, T) = make_model("llama-tied-9-3-heads"), (1, 1024)
    names = ("tokens", "targets", "positions", "segment_ids")
    batch = {name: np.zeros((B, T), np.int32) for name in names}
    batch["loss_mask"] = np.ones((B, T), np.float32)

    def by_value(model, batch):
        places = {name: batch[name] for name in ("positions", "segment_ids")}
        return model.features(model.embed_inputs(batch["tokens"]), **places)[0]

    loss = lambda model, batch: training_loss(model, batch).total  # noqa: E731
    flops = [jax.jit(run).lower(model, batch).cost_analysis()["flops"] for run in (loss, by_value)]
    assert flops[0] < 0.8 * flops[1]
