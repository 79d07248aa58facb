"""A pod's training step without a pod: DeepSeek-V3 at its size, traced and lowered on shapes alone.

Nothing is compiled here: lowering shows that shapes and shardings fit together, how large arrays
are, and that a step's program does not grow with depth, not that it fits memory.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs.meshes import MESHES
from llmprep_jax.models import registry
from llmprep_jax.nn.param import TRAINED, Compute
from llmprep_jax.sharding import spec
from llmprep_jax.train.losses import training_loss
from llmprep_jax.train.optim import OptimConfig, make_bias_schedule, make_optimizer, make_schedule
from llmprep_jax.train.state import create_state, split_model
from llmprep_jax.train.step import make_train_step
from tests.programs import equations

ROWS, LENGTH = 512, 4096
OPTIM = OptimConfig(moment_dtype="bfloat16")


def abstract_mesh(name: str) -> jax.sharding.AbstractMesh:
    axes = MESHES[name]
    explicit = (jax.sharding.AxisType.Explicit,) * len(axes)
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=explicit)


def trace(preset: str, **changes) -> tuple[jax.stages.Traced, nnx.State]:
    """(the step's program, the shapes of its state); call it under a mesh."""
    compute = Compute(dtype="bfloat16", param_dtype="float32", remat="full")
    cfg = dataclasses.replace(registry.preset(preset), compute=compute, **changes)
    model = jax.eval_shape(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
    parts = split_model(model, TRAINED)
    tx = make_optimizer(OPTIM, parts.params, 100)
    state = jax.eval_shape(lambda params: create_state(params, tx, seed=0), parts.params)
    step = make_train_step(
        parts.graphdef,
        tx,
        lambda model, batch, key: training_loss(model, batch),
        make_schedule(OPTIM, 100),
        bias_rate=make_bias_schedule(OPTIM, 100),
    )
    axes = jax.P(None, *spec("batch", shape=(ROWS,)))
    placed = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), axes)
    dtypes = dict(tokens=jnp.int32, targets=jnp.int32, loss_mask=jnp.float32)
    batch = {
        name: jax.ShapeDtypeStruct((1, ROWS, LENGTH), dtype, sharding=placed)
        for name, dtype in dtypes.items()
    }
    return step.trace(state, parts.frozen, batch), state


def lower(traced: jax.stages.Traced) -> str:
    """A program for TPUs."""
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def arrays_of_experts(traced: jax.stages.Traced) -> list[list[int]]:
    """For each dispatch of tokens to experts, and back in the gradient, the bytes of its arrays."""
    bodies = [e.params["jaxpr"] for e in equations(traced.jaxpr) if e.primitive.name == "shard_map"]
    found = []
    for body in map(list, map(equations, bodies)):
        if any(eqn.primitive.name == "ragged_dot_general" for eqn in body):
            outs = [x.aval for eqn in body for x in eqn.outvars if hasattr(x.aval, "size")]
            found.append([out.size * out.dtype.itemsize for out in outs])
    return found


def bytes_of_a_device(tree) -> int:
    """What one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.ndim  # counts of steps are whole everywhere
    )


@pytest.mark.slow  # traces and lowers for ten seconds
@pytest.mark.parametrize("mesh", ["v5p_8x64"])
def test_the_671_b_step_lowers_for_512_devices(mesh):
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        traced, state = trace("deepseek-v3")
        program, shallow = lower(traced), trace("deepseek-v3", num_layers=12)[0]
    # forward, its rematerialisation and the backward pass send tokens to experts and back; so does
    # the multi-token prediction module
    assert program.count("ragged_all_to_all") >= 10
    assert "callback" not in program
    # depth is data: other constants, but the same operations
    assert len(list(equations(traced.jaxpr))) == len(list(equations(shallow.jaxpr)))
    # a device of 4096 tokens has room for 2 x 8 copies of each, 7168 wide: 1.75 GiB in float32, as
    # products come. The worst case is 16 times as much, and 14 GiB even in bf16
    arrays = arrays_of_experts(traced)
    assert len(arrays) >= 4
    assert max(map(max, arrays)) == 2 * 8 * 4096 * 7168 * 4
    # as if nothing were fused or freed
    assert max(map(sum, arrays)) < 40 * 2**30
    # float32 weights and bf16 first and float32 second moments, over the 64 devices of a slice
    params = bytes_of_a_device(state.params)
    assert params == pytest.approx(682.6e9 * 4 / 64, rel=0.01)
    assert bytes_of_a_device(state.opt_state) == pytest.approx(params * 1.5, rel=0.01)
