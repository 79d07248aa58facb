"""Compiles for chips that nobody has at hand: TPUs by libtpu, which pip installs."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def tpu_devices(generation: str) -> list[Any]:
    """Of the smallest topology; the test is skipped without libtpu."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing is compiled for TPUs")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[generation])
    return list(topology.devices)


def compile_on(device: Any, function: Callable, *arrays: Any) -> jax.stages.Compiled:
    """`function` of whole arrays, as inside `jax.shard_map` on a mesh of one device."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,), devices=[device])
    place = jax.sharding.NamedSharding(mesh, jax.P())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place), arrays
    )
    with jax.set_mesh(mesh):
        call = jax.shard_map(function, in_specs=jax.P(), out_specs=jax.P())
        return jax.jit(call).lower(*shapes).compile()


def temporaries(compiled: jax.stages.Compiled) -> float:
    """MiB beside inputs and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20
