"""Devices that nobody has at hand, for programs that are compiled for them and not run."""

import os
from typing import Any

from llmprep_jax.text.vocab import one_line

# what the card says of itself (CUDA's device properties), as XLA's GpuTargetConfigProto has it
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
"""


def chip(target: str) -> Any:
    """The first device of a TPU topology, such as "v5p:2x2x1", or an "h100"; takes no device.

    Raises:
      ValueError: no such topology, or no package to compile for it: libtpu, or jax-cuda12-plugin
        with jax-cuda12-pjrt.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if target == "h100":
        options = dict(platform="cuda", target_config=H100, topology="1x1x1")
    else:
        options = dict(platform="tpu", topology_name=target)
    try:
        return topologies.get_topology_desc(**options).devices[0]
    except Exception as error:  # of the plugin, whatever is wrong
        raise ValueError(
            f"target={target}: {one_line(error)}; install libtpu, and give a topology such as"
            " v5p:2x2x1, or jax-cuda12-plugin and jax-cuda12-pjrt, and give h100"
        ) from error
