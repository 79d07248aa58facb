"""Attention's contenders: every backend here, run or compiled, and torch's beside them."""

import concurrent.futures
import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments.bench import torch_attention
from experiments.bench.attention import arrays, backends, by_head, function, refusal
from experiments.bench.checks import Unfit
from experiments.bench.shapes import Shape, Work
from experiments.bench.timing import Contender


def ours(name: str, shape: Shape, work: Work, dtype: str) -> Contender:
    """A backend's call on the device at hand.

    Raises:
      Unfit: it cannot do it.
    """
    import jax

    reason = refusal(name, shape, dtype, backward=work == "backward")
    if reason is not None:
        raise Unfit(reason)
    q, k, v, do = arrays(shape, work, dtype)
    run = function(name, shape, work)
    if work == "backward":
        pull = jax.jit(lambda q, k, v: jax.vjp(run, q, k, v)[1])(q, k, v)
        call = functools.partial(jax.jit(lambda pull, do: pull(do)), pull, do)
    elif work == "decode":
        call = functools.partial(jax.jit(by_head(run)), q, k.swapaxes(1, 2), v.swapaxes(1, 2))
    else:
        call = functools.partial(jax.jit(run), q, k, v)
    return Contender(call, jax.block_until_ready)


def contenders(
    platform: str, shape: Shape, work: Work, dtype: str
) -> Mapping[str, Callable[[], Contender]]:
    """What makes each contender there is, ours by their names and torch's with "torch"."""
    makers: dict[str, Callable[[], Contender]] = {
        name: functools.partial(ours, name, shape, work, dtype)
        for name in backends(platform, shape)
    }
    if platform != "tpu":
        theirs = functools.partial(torch_attention.contender, shape, work, dtype)
        makers |= {
            f"torch {kernel}": functools.partial(theirs, kernel) for kernel in torch_attention.PEERS
        }
    return makers


def prepared(
    makers: Mapping[str, Callable[[], Contender]],
) -> dict[str, Contender | Exception]:
    """Each contender, called once, or why there is none; our compilers run side by side."""

    def once(make: Callable[[], Contender]) -> Contender | Exception:
        try:
            made = make()
            made.seconds(1)
            return made
        except Exception as error:  # of a compiler or a kernel: the others go on
            return error

    own = {name: make for name, make in makers.items() if not name.startswith("torch")}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = dict(zip(own, pool.map(once, own.values()), strict=True))
    return found | {name: once(make) for name, make in makers.items() if name not in own}


def compile_for(device: Any, name: str, shape: Shape, work: Work, dtype: str) -> Any:
    """A backend's program for a device that is not at hand.

    Raises:
      Unfit: it cannot do it.
    """
    import jax

    from llmprep_jax.sharding import make_mesh, use_mesh

    mesh = make_mesh({"data": 1}, [device])
    with use_mesh(mesh):
        reason = refusal(name, shape, dtype, backward=work == "backward")
    if reason is not None:
        raise Unfit(reason)
    place = jax.sharding.NamedSharding(mesh, jax.P())
    run = function(name, shape, work)

    def pull(q, k, v, do):
        return jax.vjp(run, q, k, v)[1](do)

    abstract = jax.eval_shape(functools.partial(arrays, shape, work, dtype))
    if work == "decode":
        run = by_head(run)
        q, *keys, do = abstract
        abstract = q, *jax.eval_shape(lambda x: [y.swapaxes(1, 2) for y in x], keys), do
    q, k, v, do = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in abstract]
    with use_mesh(mesh), jax.default_device(device):
        if work != "backward":
            return jax.jit(run).lower(q, k, v).compile()
        return jax.jit(pull).lower(q, k, v, do).compile()
