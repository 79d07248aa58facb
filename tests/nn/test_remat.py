"""Rematerialisation by name: what is computed again, what is kept, and where."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from llmprep_jax.config import override
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.remat import NAMES, check
from llmprep_jax.train.losses import next_token_loss
from tests.kernels.ahead import tpu_devices
from tests.models.tiny import CONFIGS, random_model
from tests.programs import equations

ALL = ",".join(NAMES)
ROWS, LENGTH, LAYERS = 2, 64, 3
CFG = CONFIGS["llama-tied-9-3-heads"]


def make(**compute):
    return random_model(dataclasses.replace(CFG, compute=Compute(**compute)))


def batch():
    tokens = np.random.default_rng(0).integers(1, 96, (ROWS, LENGTH + 1), dtype=np.int32)
    mask = np.ones((ROWS, LENGTH), np.int32)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=mask)


def loss(model, batch):
    return next_token_loss(model, batch).total


@functools.cache
def products(remat):
    """How many a step has, of which a loop over layers has each once."""
    program = jax.make_jaxpr(jax.grad(loss))(make(remat=remat), batch())
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(program.jaxpr))


@pytest.mark.parametrize(
    ("remat", "again"),
    [
        (ALL, 0),
        ("dots", 0),
        ("qkv,attention,mlp_in", 2),  # gate and up
        ("qkv, attention", 3),  # and the attention's output projection
        ("attention", 6),  # and queries, keys and values
        ("mlp_in", 7),  # not that projection, but the attention's two products
        ("full", 8),
    ],
)
def test_each_name_saves_the_products_before_it(remat, again):
    assert products(remat) - products("none") == again


@functools.cache
def gradient(**compute):
    """(leaves of the loss's gradient, temporary bytes of its program)."""
    model = make(**compute)
    program = jax.jit(jax.grad(loss)).lower(model, batch()).compile()
    leaves = jax.tree.leaves(program(model, batch()))
    return leaves, program.memory_analysis().temp_size_in_bytes


def test_what_is_kept_by_name_takes_memory_between_all_and_nothing_and_changes_no_gradient():
    ways = ["none", "attention,mlp_in", "full"]
    found = {remat: gradient(remat=remat) for remat in ways}
    memory = [size for _, size in found.values()]
    assert memory == sorted(memory, reverse=True)
    kept = LAYERS * ROWS * LENGTH * (9 * 8 + 9 + 48) * 4  # outputs, log-sum-exp, and mlp_in
    assert 0.5 * kept < memory[1] - memory[2] < 1.1 * kept
    for gradients, _ in found.values():
        chex.assert_trees_all_close(gradients, found["none"][0], rtol=1e-4, atol=1e-5)


def test_offloaded_activations_change_no_gradient():
    found, _ = gradient(remat="full", offload="block_in,attention")
    chex.assert_trees_all_close(found, gradient(remat="full")[0], rtol=1e-4, atol=1e-5)


def test_on_a_tpu_what_is_offloaded_waits_in_host_memory():
    place = jax.sharding.SingleDeviceSharding(tpu_devices("v5e")[0])

    model = make(remat="full", offload="block_in")
    values, structure = jax.tree.flatten((model, batch()))

    def run(*values):
        return jax.tree.leaves(jax.grad(loss)(*jax.tree.unflatten(structure, values)))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in values]
    program = jax.jit(run).lower(*shapes).compile()
    # with what the layout adds to a width of 48; without `offload` it is 0
    inputs = LAYERS * ROWS * LENGTH * 48 * 4
    assert inputs <= program.memory_analysis().host_temp_size_in_bytes <= 3 * inputs
    assert "S(5)" in program.as_text()  # XLA's number of host memory


def test_activations_to_keep_and_to_offload_are_settings_of_a_command():
    found = override(Compute(), ["remat=attention,mlp_in", "offload=block_in"])
    assert found == Compute(remat="attention,mlp_in", offload="block_in")
    check(found)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            dict(remat="some"),
            "remat='some'; it is none, full, dots, or names .* the names are block",
        ),
        (
            dict(remat="attention,mlp"),
            "'attention,mlp'; .* block_in, qkv, attention, mlp_in, mlp_hidden",
        ),
        (dict(remat="attention,none"), "'attention,none'"),
        (dict(remat="full", offload="dots"), "offload='dots'; the names are block_in, qkv"),
        (dict(offload="block_in"), "offload='block_in' with remat=\"none\", which keeps all"),
    ],
    ids=str,
)
def test_unknown_names_are_refused_with_the_known_ones(settings, says):
    with pytest.raises(ValueError, match=says):
        check(Compute(**settings))
