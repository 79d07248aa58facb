"""Optimizer state that waits in host memory between updates.

An array's type tells where it lies (`float32<host>[..]`), so nothing but the optimizer's `init` is
told to offload: the step fetches what lies on the host and brings it back. The state is on the
device while the parameters are updated, in whole; what is saved is its memory during the forward
and backward passes.
"""

from typing import Any

import jax
import optax

HOST = "pinned_host"  # JAX's name of page-locked memory of the host


def keep_on_host(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer whose state, but for scalars, begins in host memory.

    Raises:
      ValueError: the backend cannot address the host's memory.
    """
    device = jax.devices()[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(f"offload: {device.platform} has no {HOST} memory; set offload=False")

    def init(params):
        state = tx.init(params)
        return jax.tree.map(lambda x: _move(x, "Host") if x.ndim else x, state)

    return optax.GradientTransformation(init, tx.update)


def fetch(state: Any, after: Any) -> tuple[Any, Any]:
    """A state in device memory, and `after`: arrays that exist before the transfer begins."""
    if not any(map(_on_host, jax.tree.leaves(state))):
        return state, after
    # else the compiler may fetch at the step's beginning, when activations need the memory
    state, after = jax.lax.optimization_barrier((state, after))
    return jax.tree.map(lambda x: _move(x, "Device") if _on_host(x) else x, state), after


def put_back(state: Any, like: Any) -> Any:
    """A new state where the old one, `like`, lies."""
    return jax.tree.map(lambda x, old: _move(x, "Host") if _on_host(old) else x, state, like)


def retype(tree: Any) -> Any:
    """The same arrays, of types that say where they lie.

    jax 0.10.2 types what is assembled from shards, as Orbax does, as lying on the device whatever
    its sharding says, and a step compiled for that ends the process; a copy has the right type.
    """

    def retyped(x):
        if x.sharding.memory_kind != HOST or _on_host(x):
            return x
        return jax.device_put(x, x.sharding, may_alias=False)

    return jax.tree.map(retyped, tree)


def _on_host(x) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _move(x, space):
    return jax.device_put(x, jax.memory.Space[space])
