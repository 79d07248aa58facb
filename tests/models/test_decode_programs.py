"""A decode step as compiled for chips that are not there: it copies nothing of what is cached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.nn.param import Compute
from llmprep_jax.sharding import use_mesh
from tests.kernels.ahead import h100_devices, tpu_devices

ROWS = 8
BF16 = Compute(dtype="bfloat16", param_dtype="bfloat16")
# widths of 64, 256 and 576
SIZES = dict(vocab_size=512, dim=128, mlp_dim=256, num_layers=4, max_seq_len=8192)
MODELS = {
    "llama-3.2-1b": SIZES,
    "gemma3-1b": SIZES | dict(num_layers=12),
    "deepseek-v2-lite": SIZES | dict(expert_dim=64),
}
KINDS = [{}, {"dtype": "int8"}, {"page_size": 128}, {"page_size": 128, "dtype": "int8"}]


def memory_of_steps(name, kind, device, slots):
    """(bytes of the cache, temporary bytes) of four tokens in a loop."""
    mesh = jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Explicit,), devices=[device])
    cfg = dataclasses.replace(registry.preset(name), compute=BF16, **MODELS[name])

    def steps(model, leaves, tokens):
        def step(_, carry):
            out = model(carry[1], cache=structure.unflatten(carry[0]))
            token = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
            return jax.tree.leaves(out.cache), token

        return jax.lax.fori_loop(0, 4, step, (leaves, tokens))

    structure = None

    def make(model):
        nonlocal structure
        leaves, structure = jax.tree.flatten(model.init_cache(ROWS, slots, **kind))
        return leaves

    def placed(x):
        laid = jax.P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, laid))

    with use_mesh(mesh):
        model = jax.eval_shape(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
        leaves = jax.eval_shape(make, model)
        model, leaves = jax.tree.map(placed, (model, leaves))
        tokens = jax.ShapeDtypeStruct(
            (ROWS, 1), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("fsdp"))
        )
        program = jax.jit(steps, donate_argnums=1).lower(model, leaves, tokens).compile()
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)
    return size, program.memory_analysis().temp_size_in_bytes


def growth(name, kind, device):
    """Temporary bytes for each byte more of the cache."""
    few, many = [memory_of_steps(name, kind, device, slots) for slots in (2048, 8192)]
    return (many[1] - few[1]) / (many[0] - few[0])


CELLS = [("llama-3.2-1b", kind) for kind in KINDS]
CELLS += [(name, kind) for name in ("gemma3-1b", "deepseek-v2-lite") for kind in KINDS[::3]]
cells = pytest.mark.parametrize(("name", "kind"), CELLS, ids=str)


@pytest.mark.slow
@cells
def test_a_tpu_reads_and_writes_its_cache_where_it_lies(name, kind):
    assert growth(name, kind, tpu_devices("v5p")[0]) < 0.1


@pytest.mark.slow
@cells
def test_a_gpu_too(name, kind):
    is_cut = name == "deepseek-v2-lite" and not kind  # Mosaic's kernel gets a copy of one layer
    assert growth(name, kind, h100_devices()[0]) < (0.25 if is_cut else 0.1)
