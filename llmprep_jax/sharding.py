"""Logical axes to mesh axes, whose names only this file and configs/meshes.py know.

Parameters and contractions name their dimensions by logical axes ("embed", "heads"); `spec` turns
these into a `PartitionSpec` for the mesh in force, or into None where there is none, so one code
runs in a unit test and on a pod. A mesh axis is used once in a spec: the first dimension that asks
for it gets it. The model dimension has two names: weights are laid out by "embed", activations by
"act_embed", which no axis splits by default. With `shape`, a dimension that a mesh axis does not
divide (9 heads on 2 devices) is replicated over it instead of refused.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

MESH_AXES = ("data", "fsdp", "tensor", "expert")

MeshAxes = str | tuple[str, ...] | None
Function = TypeVar("Function", bound=Callable[..., Any])
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes each logical axis is laid over; None replicates.

    Attributes:
      batch, seq: rows and tokens of activations. embed, act_embed: the model dimension of weights
        and of activations. heads, kv_heads, head: of attention, and the width of one. mlp, vocab,
        expert: of both. latent: of weights. packed: the rows of packed weights, which are brought
        together one layer at a time.
    """

    batch: MeshAxes = ("data", "fsdp", "expert")
    seq: MeshAxes = None
    embed: MeshAxes = ("fsdp", "expert")
    act_embed: MeshAxes = None
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head: MeshAxes = None
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    expert: MeshAxes = "expert"
    latent: MeshAxes = ("fsdp", "expert")
    packed: MeshAxes = ("fsdp", "expert", "tensor")


# a part of jit's cache key, so that other rules are another program
_rules = jax.make_user_context(ShardingRules())


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """How many devices lie along each mesh axis; one may be -1, for all that are left.

    Attributes:
      data: repeats weights and parts the batch. fsdp: parts weights and batch. tensor: parts heads,
        MLPs and vocabulary. expert: parts batch and experts.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self):
        check_sizes(self.axes())

    def axes(self) -> dict[str, int]:
        """Sizes by name, of the axes that have several devices; of one axis where none has."""
        sizes = dataclasses.asdict(self)
        return {name: size for name, size in sizes.items() if size != 1} or {MESH_AXES[0]: 1}


def check_sizes(axes: Mapping[str, int]) -> None:
    """Refuses sizes of mesh axes that are no counts of devices, and more than one -1.

    Raises:
      ValueError: there are such.
    """
    for name, size in axes.items():
        if size < 1 and size != -1:
            raise ValueError(f"{name}={size} of a mesh; it must be at least 1, or -1 for the rest")
    if list(axes.values()).count(-1) > 1:
        raise ValueError(f"a mesh of {dict(axes)}; only one size may be -1")


def make_mesh(
    axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Makes a mesh with explicit axes from sizes by name, e.g. `{"fsdp": 4, "tensor": 2}`.

    One size may be -1: it takes the devices that are left.

    Raises:
      ValueError: an unknown axis name, or sizes whose product is not the number of devices.
    """
    unknown = sorted(set(axes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; the axes are {', '.join(MESH_AXES)}")
    check_sizes(axes)
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in axes.values() if size != -1)
    sizes = {name: len(devices) // known if size == -1 else size for name, size in axes.items()}
    if math.prod(sizes.values()) != len(devices):
        # a CPU is one device unless it is told otherwise
        more = "; JAX_NUM_CPU_DEVICES=N makes N of a CPU" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"a mesh of {dict(axes)} does not fit {len(devices)} devices; the product of its sizes"
            f" must be their number, and one of them may be -1 for what is left{more}"
        )
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), explicit, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: AnyMesh | None, rules: ShardingRules | None = None) -> Iterator[None]:
    """Puts a mesh (None: no mesh) and, if given, its rules in force for a `with` block.

    Raises:
      ValueError: `mesh` is something else.
    """
    if not isinstance(mesh, AnyMesh | None):
        raise ValueError(f"mesh is {mesh!r}; make one by sharding.make_mesh({{'fsdp': 8}})")
    with contextlib.nullcontext() if rules is None else _rules(rules), _enter(mesh):
        yield


def _enter(mesh: AnyMesh | None) -> Any:
    """A context with this mesh in force, also while a function is traced."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    try:
        return jax.set_mesh(mesh)
    except ValueError:  # a function is being traced, which has no devices
        abstract = jax.sharding.AbstractMesh((), ()) if mesh is None else mesh.abstract_mesh
        return jax.sharding.use_abstract_mesh(abstract)


def mesh_of(tree: Any) -> AnyMesh | None:
    """The mesh that a tree's arrays lie on; abstract where they are, None on single devices."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.core.Tracer):
            # not by its attribute, which it has not: the error that says so is the work of ages
            sharding = jax.typeof(leaf).sharding
        else:
            sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and not sharding.mesh.empty:
            return sharding.mesh
    return None


@contextlib.contextmanager
def on_mesh_of(tree: Any) -> Iterator[None]:
    """Puts the mesh of a model's arrays in force, unless one is or they lie on a single device."""
    mesh = None if has_mesh() else mesh_of(tree)
    with contextlib.nullcontext() if mesh is None else _enter(mesh):
        yield


def on_own_mesh(function: Function) -> Function:
    """A method, or a function of a model, that runs `on_mesh_of` its first argument."""

    @functools.wraps(function)
    def run(owner, *args, **kwargs):
        with on_mesh_of(owner):
            return function(owner, *args, **kwargs)

    return run


def _listed(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _mesh_axes() -> dict[str, tuple[str, ...]]:
    """Of each logical axis, by the rules in force."""
    return {name: _listed(axes) for name, axes in vars(_rules.value).items()}


@contextlib.contextmanager
def without_axes(axes: MeshAxes) -> Iterator[None]:
    """Keeps mesh axes out of all specs inside, where a dimension laid over them is mapped over."""
    used = _listed(axes)
    left = {
        name: tuple(axis for axis in wanted if axis not in used) or None
        for name, wanted in _mesh_axes().items()
    }
    with _rules(ShardingRules(**left)):
        yield


def has_mesh() -> bool:
    """True where a mesh is in force."""
    return not jax.sharding.get_abstract_mesh().empty


def platform() -> str | None:
    """Platform of the devices in force: "cpu", "gpu", "tpu"; None where a mesh has no devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    return None if mesh.abstract_device is None else mesh.abstract_device.platform


def spec(*axes: str | None, shape: Sequence[int] | None = None) -> jax.P | None:
    """The PartitionSpec of logical axes under the mesh in force; None where there is no mesh.

    With `shape`, a dimension is laid over the first of its mesh axes that together divide it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    rules, free, dims = _mesh_axes(), dict(mesh.shape), []
    for dim, axis in enumerate(axes):
        wanted = rules[axis] if axis is not None else ()
        taken = tuple(name for name in wanted if name in free)
        while taken and shape is not None and shape[dim] % math.prod(free[n] for n in taken):
            taken = taken[:-1]
        if not taken:
            dims.append(None)
            continue
        for name in taken:
            del free[name]
        dims.append(taken if len(taken) > 1 else taken[0])
    return jax.P(*dims)


class Shards(NamedTuple):
    """In how many parts the rows of a batch lie over all devices, and which of them are here."""

    count: int
    own: tuple[int, ...]


def batch_shards() -> Shards:
    """The parts of a batch under the mesh in force, and those that this process's devices hold.

    They follow from the sharding alone: two processes whose devices lie along the tensor axis hold
    the same rows.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return Shards(1, (0,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec("batch")))
    count = mesh.size // sharding.shard_shape((mesh.size,))[0]
    indices = sharding.addressable_devices_indices_map((count,)).values()
    return Shards(count, tuple(sorted({rows.start or 0 for (rows,) in indices})))


def on_devices(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """An abstract array's sharding on the mesh in force, where one without is replicated."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return sharding
    return jax.sharding.NamedSharding(mesh, jax.P() if sharding is None else sharding.spec)


def sharding_of(x: jax.Array) -> jax.sharding.NamedSharding | None:
    """The sharding that the type of `x` carries; None without a mesh."""
    return jax.typeof(x).sharding if has_mesh() else None
