"""Devices that nobody has at hand, for programs that are compiled for them and not run."""

import os
from typing import Any

from llmprep_jax.text.vocab import one_line


def chip(topology: str) -> Any:
    """The first device of a TPU topology, such as "v5p:2x2x1"; takes the package libtpu, no TPU.

    Raises:
      ValueError: no such topology, or no libtpu.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except Exception as error:  # of the plugin, whatever is wrong
        raise ValueError(
            f"target={topology}: {one_line(error)}; install libtpu, and give a topology such as"
            " v5p:2x2x1"
        ) from error
