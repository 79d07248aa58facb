"""Meshes by name and by sizes, as commands take them."""

import jax
import pytest

from configs.meshes import MESHES, get_mesh
from experiments.convert import Settings
from llmprep_jax.config import UsageError, from_dict, override, to_dict
from llmprep_jax.sharding import MeshSizes, make_mesh


@pytest.mark.parametrize("before", [None, "cpu_8"], ids=str)
@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        (["mesh=cpu_4x2"], {"fsdp": 4, "tensor": 2}),
        (["mesh.fsdp=4", "mesh.tensor=2"], {"fsdp": 4, "tensor": 2}),
        (["mesh.data=2", "mesh.expert=-1"], {"data": 2, "expert": 4}),
        (["mesh=none"], None),
    ],
    ids=str,
)
def test_a_command_names_a_mesh_or_gives_its_sizes(before, overrides, shape):
    settings = override(Settings(mesh=before), overrides)
    mesh = get_mesh(settings.mesh)
    assert (mesh and dict(mesh.shape)) == shape
    assert from_dict(Settings, to_dict(settings)) == settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.fspd=4"], "unknown key mesh.fspd; did you mean mesh.fsdp?"),
        (["mesh.fsdp=0"], "mesh.fsdp: fsdp=0 of a mesh; it must be at least 1, or -1"),
        (["mesh.fsdp=-1", "mesh.data=-1"], "only one size may be -1"),
        (["mesh.fsdp=3"], "mesh: a mesh of {'fsdp': 3} does not fit 8 devices; the product of"),
        (["mesh=cpu_9"], "unknown mesh cpu_9; did you mean cpu_8"),
    ],
    ids=str,
)
def test_a_mesh_that_there_is_not_is_one_line(overrides, message):
    with pytest.raises(UsageError) as error:
        get_mesh(override(Settings(), overrides).mesh)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_named_meshes_have_sizes_that_a_mesh_may_have():
    for axes in MESHES.values():
        MeshSizes(**axes)
    assert dict(make_mesh(MeshSizes().axes(), jax.devices()[:1]).shape) == {"data": 1}
