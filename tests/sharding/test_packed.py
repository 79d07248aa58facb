"""Packed weights on a mesh: what a device holds, what it keeps, and what it is sent."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Buffer, Compute, Param
from llmprep_jax.nn.stack import scan, stack
from llmprep_jax.quant import product
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.sharding.collectives import collectives

GIB = 2**30
BF16 = Compute(dtype="bfloat16", param_dtype="bfloat16")


def bytes_of_a_device(tree) -> int:
    arrays = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


MIXED = {"fsdp": 4, "tensor": 2}
SIZES = [({"fsdp": 8}, "nf4", 4.11), (MIXED, "int8", 7.97), (MIXED, "int4", 4.17)]
SIZES = [(MIXED, "nf4", 4.11), *[pytest.param(*x, marks=pytest.mark.slow) for x in SIZES]]


@pytest.mark.parametrize(("axes", "kind", "packed"), SIZES, ids=str)
def test_of_a_70_b_base_in_few_bits_a_device_holds_an_eighth(axes, kind, packed):
    cfg = dataclasses.replace(registry.preset("llama-3.1-70b"), compute=BF16)

    def make():
        model = lp.quant.quantize_model(registry.build(cfg, rngs=nnx.Rngs(0)), kind)
        return lp.peft.inject(model, lp.peft.LoRA(rank=16, alpha=16))

    with use_mesh(make_mesh(axes)):
        model = jax.eval_shape(make)
    held = [bytes_of_a_device(nnx.state(model, x)) / GIB for x in (Buffer, Param, AdapterParam)]
    assert held[0] == pytest.approx(packed, abs=0.01)  # 68.45 billion weights; nf4: 4.127 bits each
    assert held[1] == pytest.approx(0.49, abs=0.01)  # table and head in bf16
    assert held[2] < 0.54


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_layers_come_together_packed_one_at_a_time_and_are_not_kept(remat, monkeypatch):
    monkeypatch.setattr(product, "TILE", 2**16)
    size, depth, axes = 1024, 64, (("embed", "mlp"), ("batch", "seq", "mlp"))

    def make():
        layer = functools.partial(Einsum, "BTD,DF->BTF", (size, size), *axes, compute=BF16)
        return lp.quant.quantize_model(nnx.List([stack(layer, depth, rngs=nnx.Rngs(0))]), "nf4")

    def total(x, layers):
        step = lambda layer, x: jnp.tanh(layer(x))  # noqa: E731
        return scan(step, layers[0], x, compute=dataclasses.replace(BF16, remat=remat)).sum()

    with use_mesh(make_mesh({"fsdp": 8})):
        layers = jax.eval_shape(make)
        place = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("fsdp"))
        x = jax.ShapeDtypeStruct((8, 4, size), jnp.bfloat16, sharding=place)
        lowered = jax.jit(jax.grad(total)).lower(x, layers)
        gathered = [x for x in collectives(lowered) if x.op == "all-gather"]
    assert max(x.num_bytes for x in gathered) == size * size // 2  # the codes of one layer
    assert {x.dtype for x in gathered if x.num_bytes > 4096} == {"u8"}
    # all layers' codes take 32 MiB
    assert lowered.compile().memory_analysis().temp_size_in_bytes < depth * size * size // 4
