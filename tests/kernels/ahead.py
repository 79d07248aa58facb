"""Compiles for chips that nobody has at hand, by libtpu and by JAX's CUDA plugin, both from pip."""

import importlib.metadata
import os
import re
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


H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
"""


def h100_devices(count: int = 1) -> list[Any]:
    """Of one machine; the test is skipped without the plugin."""
    reason = "jax-cuda12-plugin is not installed: nothing is compiled for GPUs"
    pytest.importorskip("jax_cuda12_plugin", reason=reason)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x1x{count}"
    )
    return list(topology.devices)


def compile_on(device: Any, function: Callable, *arrays: Any) -> jax.stages.Compiled:
    """`function` of arrays, as inside `jax.shard_map` on a mesh of one device."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,), devices=[device])
    place = jax.sharding.NamedSharding(mesh, jax.P("data"))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place), arrays
    )
    with jax.set_mesh(mesh), jax.default_device(device):  # which some lowerings look at
        call = jax.shard_map(function, in_specs=jax.P("data"), out_specs=jax.P("data"))
        return jax.jit(call).lower(*shapes).compile()


def temporaries(compiled: jax.stages.Compiled) -> float:
    """MiB beside inputs and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def requirements() -> list[str]:
    """What pip installs for this JAX: its libtpu, and its plugin without NVIDIA's libraries."""
    version = importlib.metadata.version("jax")
    needs = [x for x in importlib.metadata.requires("jax") or () if x.startswith("libtpu")]
    (libtpu,) = {re.split(r"[ ;]", need)[0] for need in needs}
    return [libtpu, f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}"]


if __name__ == "__main__":
    print(*requirements())
