"""Experts on several devices: tokens go to where their experts are, and the results come back.

Each token of a mixture of experts is computed by A of E experts. Experts lie over the expert axis
of the mesh and tokens over every batch axis, that one included, so copies of tokens change devices
twice a layer. `run_experts` does it all in one `jax.shard_map`; what crosses the network is up to
a transport:

    ragged    each copy to its expert's device, by `ragged_all_to_all` (TPU)
    emulated  the same with that collective written out, for backends without it (CPU)
    ring      all tokens to all devices, which add up what their own experts make of them (GPU)
    capacity  `all_to_all` of a fixed number of rows for each expert

What a device receives has room for `buffer_factor` times an even load, or for the worst case. In
the worst case all tokens go to one device's experts, which takes 32 times an even load on 64
devices of 4 experts each. Of what does not fit, the last tokens' copies are dropped: by one limit
for each sender and expert of a device (`routes.share`), so that only the busiest ones lose. They
are counted. Padding goes to no expert and takes no room.

Tokens that are not split over the expert axis (a decode step of few rows) need none: each device
runs its own experts on them and a sum over the axis adds up. The A experts of a token are distinct,
as those of a top-k are, and buffers are sized for that: a device of E/n experts gets at most min(A,
E/n) copies of a token.

Letters: M tokens of a device, A experts of a token (one copy each), R rows sorted by expert, E
experts, C rows for an expert, I sending and J receiving devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from llmprep_jax.nn.routes import combine, gather_rows, lay, pack, share, sort_copies, undo
from llmprep_jax.sharding import has_mesh, platform, spec
from llmprep_jax.types import Array, Bool, Float, Int

# (rows_RD, sizes_E, params) -> rows_RD
Apply = Callable[[Array, Array, Any], Array]


class Experts(NamedTuple):
    """The experts of one device.

    Attributes:
      apply: runs them on rows that are sorted by expert.
      params: their weights.
      count: how many they are.
      axis: the mesh axes that experts lie over; None if one device has them all.
      buffer_factor: room for rows, as a multiple of an even load; None: as many as there may be.
    """

    apply: Apply
    params: Any
    count: int
    axis: str | tuple[str, ...] | None
    buffer_factor: float | None

    def room(self, even: int | float, most: int) -> int:
        """Rows of a buffer, of at most so many where the load is even and where it is not."""
        factor = self.buffer_factor
        return most if factor is None else min(most, math.ceil(factor * even))


@runtime_checkable
class Transport(Protocol):
    """Has a device's tokens computed by the experts of all devices along `experts.axis`.

    Every device calls it with as many tokens. Returns the weighted sums, and how many copies this
    device dropped.
    """

    def __call__(
        self, x_MD: Array, experts_MA: Array, weights_MA: Array, experts: Experts
    ) -> tuple[Array, Array | int]: ...


def run_experts(
    x_BTD: Float[Array, "B T D"],
    experts_BTA: Int[Array, "B T A"],
    weights_BTA: Float[Array, "B T A"],
    params: Any,
    axes: Any,
    apply: Apply,
    *,
    num_experts: int,
    mask_BT: Bool[Array, "B T"] | None = None,
    transport: str | None = None,
    buffer_factor: float | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """y = sum over a of weights_a expert_a(x), summed in float32.

    Args:
      experts_BTA: the experts of each token, all different.
      params: weights of the experts, a pytree of arrays whose first dimension is E.
      axes: the same tree of tuples of logical axes, of which the first is "expert". Dimensions
        called "mlp" stay sharded, and the results are summed over their shards; others are whole.
      apply: (rows_RD, sizes_E, params) -> rows_RD for the experts of one device, on rows sorted by
        expert; what it makes of rows beyond the sum of sizes, which are zeros, does not count.
      transport: a name in `TRANSPORTS`; the default goes by the platform of the mesh's devices.
      mask_BT: False for padding, which goes to no expert; its result is 0.
      buffer_factor: room for the rows that a device receives ("capacity": for an expert from each
        device), as a multiple of an even load; None: for the worst case, which drops nothing.

    Returns:
      y in x's dtype, sharded as ("batch", "seq", "act_embed"); how many copies were dropped.

    Raises:
      ValueError: an unknown transport, or experts that the expert axis does not divide.
    """
    send = _find_transport(transport)
    if mask_BT is not None:
        experts_BTA = jnp.where(mask_BT[..., None], experts_BTA, num_experts)
    if not has_mesh():
        experts = Experts(apply, params, num_experts, None, None)
        return _run_tokens(_run_own, x_BTD, experts_BTA, weights_BTA, experts)
    tokens, axis = spec("batch", "seq", None, shape=x_BTD.shape), spec("expert")[0]
    split, across = _names(tokens), _names(jax.P(axis))
    assert across <= split or not across & split, "tokens lie over a part of the expert axes"
    specs = jax.tree.map(functools.partial(_weight_spec, split), params, axes)
    varying = split.union(across, *map(_names, jax.tree.leaves(specs)))
    count, send = _count(num_experts, across), send if across & split else _run_own

    def run(*operands):
        x_BTD, experts_BTA, weights_BTA, params = _vary(operands, varying)
        params = jax.tree.map(functools.partial(_gather_weight, split), params, specs)
        experts = Experts(apply, params, count, axis, buffer_factor)
        y_BTD, dropped = _run_tokens(send, x_BTD, experts_BTA, weights_BTA, experts)
        # of tensor-parallel experts, or of all experts of the axis if tokens are not split over it
        y_BTD = jax.lax.psum(y_BTD, tuple(varying - split))
        return y_BTD, jax.lax.psum(dropped, tuple(varying)) // _ways(varying - split - across)

    arrays = [jax.reshard(z, tokens) for z in (x_BTD, experts_BTA, weights_BTA)]
    params = jax.tree.map(jax.reshard, params, specs)
    in_specs, out_specs = (tokens, tokens, tokens, specs), (tokens, jax.P())
    y_BTD, dropped = jax.shard_map(run, in_specs=in_specs, out_specs=out_specs)(*arrays, params)
    return jax.reshard(y_BTD, spec("batch", "seq", "act_embed", shape=x_BTD.shape)), dropped


def _find_transport(name: str | None) -> Transport:
    name = name or _DEFAULTS.get(platform(), "ring")
    if name not in TRANSPORTS:
        raise ValueError(f"unknown transport {name!r}; they are {', '.join(TRANSPORTS)}")
    return TRANSPORTS[name]


def _count(num_experts: int, across: frozenset[str]) -> int:
    """Experts of one device."""
    num_devices = _ways(across)
    if num_experts % num_devices:
        raise ValueError(
            f"{num_experts} experts do not divide over {num_devices} devices of a mesh"
        )
    return num_experts // num_devices


def _ways(names: frozenset[str]) -> int:
    """The number of devices along mesh axes."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def _weight_spec(split: frozenset[str], w: Array, axes: tuple[str | None, ...]) -> jax.P:
    """How a weight goes into the dispatch: experts and "mlp" stay where they are.

    So does what lies over the devices of tokens, for `_gather_weight`; the rest becomes whole.
    """
    first, *rest = spec(*axes, shape=w.shape)
    over = [_names(jax.P(dim)) for dim in rest]
    kept = [
        names <= split or (axis == "mlp" and not names & split)
        for names, axis in zip(over, axes[1:], strict=True)
    ]
    return jax.P(first, *[dim if keep else None for dim, keep in zip(rest, kept, strict=True)])


def _gather_weight(split: frozenset[str], w: Array, dims: jax.P) -> Array:
    """A weight that is whole but for experts and "mlp"; the gradient is reduced and scattered."""
    for dim, names in enumerate(dims):
        if dim and _names(jax.P(names)) & split:
            w = jax.lax.all_gather(w, names, axis=dim, tiled=True)
    return w


def _names(dims: jax.P) -> frozenset[str]:
    """The mesh axes in a PartitionSpec."""
    return frozenset(jax.tree.leaves(tuple(dims)))


def _vary(operands: Any, axes: frozenset[str]) -> Any:
    """Marks what is alike on devices along axes as if it varied, so that gradients are summed."""

    def mark(x):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, operands)


def _run_tokens(send: Transport, x_BTD, experts_BTA, weights_BTA, experts: Experts):
    flat = [z.reshape(-1, z.shape[-1]) for z in (x_BTD, experts_BTA, weights_BTA)]
    y_MD, dropped = send(*flat, experts)
    return y_MD.reshape(x_BTD.shape), dropped


def _run_own(x_MD, experts_MA, weights_MA, experts, num_senders=1):
    """What this device's experts make of tokens that are all here, of senders one after another."""
    num_devices, first = 1, 0
    if experts.axis is not None:
        num_devices = jax.lax.axis_size(experts.axis)
        first = jax.lax.axis_index(experts.axis) * experts.count
    most = len(x_MD) * min(experts_MA.shape[1], experts.count)
    num_rows = experts.room(experts_MA.size / num_devices, most)
    # each sender's copies for an expert apart, so that none loses more than others
    own_MA = experts_MA - first
    senders_M1 = jnp.arange(len(x_MD))[:, None] // (len(x_MD) // num_senders)
    is_own_MA = (own_MA >= 0) & (own_MA < experts.count)
    groups_MA = jnp.where(is_own_MA, own_MA * num_senders + senders_M1, -1)
    copies = sort_copies(groups_MA, experts.count * num_senders)
    kept = copies.sizes_E if num_rows == most else share(copies.sizes_E, num_rows)
    routes, kept_E = pack(copies, kept, num_rows), kept.reshape(experts.count, -1).sum(1)
    y_RD = experts.apply(gather_rows(x_MD, routes), kept_E, experts.params)
    return combine(y_RD, weights_MA, routes), jnp.sum(copies.sizes_E - kept)


def _run_ring(x_MD, experts_MA, weights_MA, experts):
    gather = functools.partial(jax.lax.all_gather, axis_name=experts.axis, tiled=True)
    gathered, senders = map(gather, (x_MD, experts_MA, weights_MA)), jax.lax.axis_size(experts.axis)
    y, dropped = _run_own(*gathered, experts, senders)
    return jax.lax.psum_scatter(y, experts.axis, tiled=True), dropped


def _run_capacity(x_MD, experts_MA, weights_MA, experts):
    num_devices, num_tokens = jax.lax.axis_size(experts.axis), len(x_MD)
    num_experts = num_devices * experts.count
    num_slots = experts.room(experts_MA.size / num_experts, num_tokens)
    swap = functools.partial(
        jax.lax.all_to_all, axis_name=experts.axis, split_axis=0, concat_axis=0, tiled=True
    )
    copies = sort_copies(experts_MA, num_experts)
    kept_E = jnp.minimum(copies.sizes_E, num_slots)
    starts_E = num_slots * jnp.arange(num_experts)
    routes = lay(copies, starts_E, kept_E, num_experts * num_slots)
    taken_IE = swap(kept_E).reshape(num_devices, experts.count, 1)
    ids_IEC = jnp.arange(experts.count)[:, None]
    ids_IEC = jnp.where(jnp.arange(num_slots) < taken_IE, ids_IEC, experts.count)
    y_RD = swap(_run_arrived(swap(gather_rows(x_MD, routes)), ids_IEC.reshape(-1), experts))
    return combine(y_RD, weights_MA, routes), jnp.sum(copies.sizes_E - kept_E)


def _run_arrived(x_RD, experts_R, experts):
    """Runs experts on rows in the order in which they came; those of no expert are empty."""
    copies = sort_copies(experts_R[:, None], experts.count)
    routes = pack(copies, copies.sizes_E, len(x_RD))
    y_RD = experts.apply(gather_rows(x_RD, routes), copies.sizes_E, experts.params)
    return gather_rows(y_RD, undo(routes))


def _run_ragged(x_MD, experts_MA, weights_MA, experts, *, exchange=jax.lax.ragged_all_to_all):
    num_devices, me = jax.lax.axis_size(experts.axis), jax.lax.axis_index(experts.axis)
    most = num_devices * len(x_MD) * min(experts_MA.shape[1], experts.count)
    num_rows = experts.room(experts_MA.size, most)
    copies = sort_copies(experts_MA, num_devices * experts.count)
    sizes_IE = jax.lax.all_gather(copies.sizes_E, experts.axis)
    sizes_IJE = sizes_IE.reshape(num_devices, num_devices, experts.count)
    if num_rows < most:  # what all send to a device fits there; every device finds the same
        sizes_IJE = jax.vmap(share, (1, None), 1)(sizes_IJE, num_rows)
    sizes_IJ = sizes_IJE.sum(2)
    starts_IJ = jnp.cumsum(sizes_IJ, 1) - sizes_IJ  # of J's rows among those that I sends
    places_IJ = jnp.cumsum(sizes_IJ, 0) - sizes_IJ  # of I's rows among those that J receives
    exchange = functools.partial(exchange, axis_name=experts.axis)

    kept_E = sizes_IJE[me].reshape(-1)
    routes = pack(copies, kept_E, experts_MA.size)
    x_RD = gather_rows(x_MD, routes)
    room = jnp.zeros_like(x_RD, shape=(num_rows, x_RD.shape[1]))
    x_RD = exchange(x_RD, room, starts_IJ[me], sizes_IJ[me], places_IJ[me], sizes_IJ[:, me])
    # from each device rows come sorted by expert
    ends = jnp.cumsum(sizes_IJE[:, me].reshape(-1))
    index_R = jnp.searchsorted(ends, jnp.arange(num_rows), side="right")
    ids_R = jnp.where(index_R < len(ends), index_R % experts.count, experts.count)
    y_RD = _run_arrived(x_RD, ids_R, experts)
    room = jnp.zeros_like(y_RD, shape=(experts_MA.size, x_RD.shape[1]))
    y_RD = exchange(y_RD, room, places_IJ[:, me], sizes_IJ[:, me], starts_IJ[:, me], sizes_IJ[me])
    return combine(y_RD, weights_MA, routes), jnp.sum(copies.sizes_E - kept_E)


def exchange_gathered(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """`jax.lax.ragged_all_to_all`, one slice a device: every device gets everything, and picks."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    me, rows_R = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    froms_I, sizes_I, places_I = [
        gather(z)[:, me, None] for z in (input_offsets, send_sizes, output_offsets)
    ]
    at_IR = rows_R - places_I
    is_sent_IR = (at_IR >= 0) & (at_IR < sizes_I)
    devices_I = jnp.arange(len(froms_I))[:, None]
    index_R = jnp.where(is_sent_IR, devices_I * len(operand) + froms_I + at_IR, 0).sum(0)
    found_RD = gather(operand, tiled=True)[index_R]
    return jnp.where(is_sent_IR.any(0)[:, None], found_RD, output)


TRANSPORTS: dict[str, Transport] = {
    "ragged": _run_ragged,
    "emulated": functools.partial(_run_ragged, exchange=exchange_gathered),
    "ring": _run_ring,
    "capacity": _run_capacity,
}
_DEFAULTS = {"cpu": "emulated", "tpu": "ragged", None: "ragged"}  # others: "ring"
