"""Meshes by name: how many devices lie along each axis (data, fsdp, tensor, expert).

`mesh=NAME` in a command takes one of these; `mesh.fsdp=4 mesh.tensor=2` gives sizes in place of a
name. -1 is whatever number of devices is left. `fsdp` shards weights and batch, `tensor` heads,
MLPs and vocabulary, `expert` batch and experts (and what else `fsdp` shards), `data` repeats
weights: over slices that a slow network joins. The batch is parted over data times fsdp times
expert, so the rows of a microbatch must be a multiple of that product.
"""

import difflib

import jax

from llmprep_jax.config import UsageError
from llmprep_jax.sharding import MeshSizes, make_mesh

MESHES: dict[str, dict[str, int]] = {
    "fsdp": {"fsdp": -1},
    "tensor": {"tensor": -1},
    "cpu_8": {"fsdp": 8},
    "cpu_4x2": {"fsdp": 4, "tensor": 2},
    "cpu_2x4": {"fsdp": 2, "expert": 4},
    "v5e_8": {"fsdp": 8},
    "v5e_16": {"fsdp": 16},
    "v5p_64": {"fsdp": 64},
    "v5p_2x64": {"data": 2, "fsdp": 64},
    "v5p_8x64": {"data": 8, "expert": 64},
    "v6e_8": {"fsdp": 8},
    "v6e_256": {"fsdp": 256},
    "h100_8": {"fsdp": 8},
    "h100_expert_8": {"expert": 8},
    "h100_8x8": {"data": 8, "fsdp": 8},
}


def get_mesh(mesh: str | MeshSizes | None) -> jax.sharding.Mesh | None:
    """The mesh of a name, or of sizes, on the devices at hand; None for None.

    Raises:
      UsageError: no such name, or another number of devices.
    """
    if mesh is None:
        return None
    if isinstance(mesh, str) and mesh not in MESHES:
        near = difflib.get_close_matches(mesh, MESHES, n=3, cutoff=0.5) or MESHES
        raise UsageError(f"unknown mesh {mesh}; did you mean {' or '.join(near)}?")
    try:
        return make_mesh(MESHES[mesh] if isinstance(mesh, str) else mesh.axes())
    except ValueError as error:
        label = f"mesh={mesh}" if isinstance(mesh, str) else "mesh"
        raise UsageError(f"{label}: {error}") from None
