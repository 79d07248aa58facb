"""Attention of released models by every backend here, and by torch, which a table may compare.

FLOPs are those of the pairs of tokens that see each other, so causal attention counts once, not
twice: 2 (H + U) a pair and head forward (two products), 2 (3 H + 2 U) backward (five, the scores
computed again). Bytes are those of q, k, v and o once; of latents whose values are a part of the
keys, the keys alone.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from experiments.bench.checks import Absent, Unfit
from experiments.bench.timing import Contender

Work = Literal["forward", "backward", "decode"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one layer's attention.

    Attributes:
      B, T, N, K, H, U: rows, tokens, heads of queries and of keys, widths of keys and of values.
      works: what of it is timed; "decode" is one query a row after T keys.
      latent: whether values are the first U of the keys.
    """

    B: int
    T: int
    N: int
    K: int
    H: int
    U: int
    causal: bool = True
    window: int | None = None
    latent: bool = False
    works: tuple[Work, ...] = ("forward", "backward")

    def shrunk(self, factor: int) -> "Shape":
        """With fewer rows, tokens and heads, for a machine that is no accelerator."""
        K = max(1, self.K // 4)
        return dataclasses.replace(
            self,
            B=min(self.B, 2),
            T=max(64, self.T // factor),
            N=K * min(self.N // self.K, 4),
            K=K,
            window=None if self.window is None else max(16, self.window // factor),
        )

    @property
    def sizes(self) -> str:
        """B, T, N and K, for a table."""
        return f"{self.B} {self.T} {self.N} {self.K}"

    def pairs(self) -> int:
        """Queries and keys of a row that see each other."""
        if not self.causal:
            return self.T**2
        seen = np.arange(1, self.T + 1)
        return int((seen if self.window is None else np.minimum(seen, self.window)).sum())

    def flops(self, work: Work) -> int:
        """As this file counts them."""
        H, U, heads = self.H, self.U, self.B * self.N
        if work == "decode":
            return 2 * (H + U) * heads * self.T
        width = H + U if work == "forward" else 3 * H + 2 * U
        return 2 * width * heads * self.pairs()

    def bytes(self, work: Work, itemsize: int = 2) -> int:
        """Read and written, each array once: q, k, v, o, and backward do, dq, dk and dv too."""
        queries = 1 if work == "decode" else self.T
        q_and_o = self.B * queries * self.N * (self.H + self.U)
        keys = self.B * self.T * self.K * (self.H + (0 if self.latent else self.U))
        return itemsize * (q_and_o + keys) * (2 if work == "backward" else 1)


SHAPES = {
    "d128": Shape(2, 8192, 16, 16, 128, 128),  # the one of published charts
    "llama-3-8b": Shape(1, 8192, 32, 8, 128, 128),
    "gemma-3-4b-local": Shape(1, 8192, 8, 4, 256, 256, window=1024),
    "gemma-3-4b-global": Shape(1, 8192, 8, 4, 256, 256),
    "deepseek-v3": Shape(1, 4096, 128, 128, 192, 128),
    "siglip-so400m": Shape(16, 729, 16, 16, 72, 72, causal=False),
    "smollm2-135m": Shape(8, 2048, 9, 3, 64, 64),
    "llama-3-8b-decode": Shape(32, 8192, 32, 8, 128, 128, works=("decode",)),
    "gemma-3-4b-decode": Shape(32, 8192, 8, 4, 256, 256, works=("decode",)),
    "deepseek-v3-decode": Shape(64, 4096, 128, 1, 576, 512, latent=True, works=("decode",)),
    # of an eighth of the heads, so that memory decides
    "deepseek-v3-decode-tp8": Shape(64, 4096, 16, 1, 576, 512, latent=True, works=("decode",)),
}


# backends that are of one platform; others are of all
ONLY = {
    **dict.fromkeys(("pallas_tpu", "splash"), "tpu"),
    **dict.fromkeys(("pallas_gpu", "mosaic_gpu", "cudnn"), "gpu"),
}
# kernels that read latents once, for keys and values
LATENTS = {"mosaic_latents": "gpu", "pallas_tpu on latents": "tpu"}


def backends(platform: str, shape: Shape) -> list[str]:
    """Names of ours that a platform may be served by."""
    from llmprep_jax.kernels.flash_attention.api import IMPLS

    latents = [name for name, of in LATENTS.items() if of == platform and shape.latent]
    return [*on_platform(IMPLS, platform), *latents]


def on_platform(impls: Iterable[str], platform: str) -> list[str]:
    """Those that are not of another platform."""
    return [name for name in impls if ONLY.get(name, platform) == platform]


def refusal(
    name: str,
    shape: Shape,
    dtype: str,
    backward: bool,
    soft_cap: float | None = None,
    given: Any = (),
) -> str | None:
    """Why a backend cannot do it, in its own words; None: it can.

    Args:
      given: the names of what there is by token: "positions", "segments", "spans".

    Raises:
      Absent: what it is made of is not installed.
    """
    import jax
    import jax.numpy as jnp

    from llmprep_jax.kernels import flash_attention
    from llmprep_jax.kernels.flash_attention.masks import Rule

    try:
        module = importlib.import_module(f"{flash_attention.__name__}.{name.split()[0]}")
    except ImportError as error:
        raise Absent(f"not here: {error}") from None
    is_decode = "decode" in shape.works
    queries = 1 if is_decode else shape.T
    sizes = (shape.N, queries, shape.H), (shape.K, shape.T, shape.H), (shape.K, shape.T, shape.U)
    heads = [jax.ShapeDtypeStruct((shape.B, *size), jnp.dtype(dtype)) for size in sizes]
    if name == "reference" and 4 * shape.B * shape.N * queries * shape.T >= 2**33:
        return "its scores take 8 GiB or more"
    given = ("positions",) if is_decode else tuple(given)
    rule = Rule(shape.causal, shape.window, shape.H**-0.5, soft_cap, None, given)

    def ask(q, k, v):
        if name in LATENTS and hasattr(module, "latent_refusal"):
            return module.latent_refusal(q, k[:, 0], shape.U, rule)
        return module.refusal(q, k, v, rule, backward)

    reasons: list[str | None] = []
    jax.eval_shape(lambda *x: reasons.append(ask(*x)), *heads)
    return reasons[0]


def function(name: str | None, shape: Shape, work: Work) -> Callable[..., Any]:
    """attention(q, k, v) of a shape by a backend; None: whatever a layer would use."""
    import jax.numpy as jnp

    def call(q, k, v):
        places = {}
        if work == "decode":  # the last of T tokens, as a cache has it
            k_positions = jnp.broadcast_to(jnp.arange(shape.T), (shape.B, shape.T))
            places = dict(q_positions=k_positions[:, -1:], k_positions=k_positions)
        return attend(name, shape, q, k, v, **places)

    return call


def attend(name: str | None, shape: Shape, q: Any, k: Any, v: Any, **rest: Any) -> Any:
    """A call of the seam, or of a kernel that reads latents once for keys and values."""
    from llmprep_jax.kernels.flash_attention import attention

    if name in LATENTS:
        return _attend_latents(name, shape, q, k, **rest)
    v = k[..., : shape.U] if shape.latent else v
    return attention(q, k, v, causal=shape.causal, window=shape.window, impl=name, **rest)


def _attend_latents(
    name: str,
    shape: Shape,
    q: Any,
    z: Any,
    q_positions: Any,
    k_positions: Any,
    return_lse: bool = False,
    **rest: Any,
) -> Any:
    from llmprep_jax.kernels import flash_attention
    from llmprep_jax.kernels.flash_attention.masks import Places, Rule

    assert all(value is None for value in rest.values()), rest
    module = importlib.import_module(f"{flash_attention.__name__}.{name.split()[0]}")
    places = Places(q_positions), Places(k_positions)
    rule = Rule(scale=shape.H**-0.5, given=("positions",))
    heads = q.swapaxes(1, 2)
    if name == "mosaic_latents":
        o, lse = module.latent_decode(heads, z[:, :, 0], places, rule)
    else:
        o, lse = module.latent_forward(heads, z.swapaxes(1, 2), shape.U, places, rule)
    o, lse = o.swapaxes(1, 2), lse.swapaxes(1, 2)
    return (o, lse) if return_lse else o


def arrays(shape: Shape, work: Work, dtype: str) -> tuple[Any, ...]:
    """q, k, v of random numbers, and what comes back to o."""
    import jax

    queries = 1 if work == "decode" else shape.T
    sizes = (
        (shape.B, queries, shape.N, shape.H),
        (shape.B, shape.T, shape.K, shape.H),
        (shape.B, 1 if shape.latent else shape.T, shape.K, shape.U),
        (shape.B, queries, shape.N, shape.U),
    )
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return tuple(draw(key, size, dtype) for key, size in zip(keys, sizes, strict=True))


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
    else:
        call = functools.partial(jax.jit(run), q, k, v)
    return Contender(call, jax.block_until_ready)


def theirs(kernel: str, shape: Shape, work: Work, dtype: str) -> Contender:
    """torch's attention by one of its kernels, or that of the package flash-attn.

    Args:
      kernel: "sdpa" for torch's own choice, "sdpa flash", "sdpa cudnn" or "flash-attn".

    Raises:
      Unfit: it cannot do it, or is not installed.
    """
    try:
        import torch
    except ImportError:
        raise Absent("torch is not here") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = functools.partial(torch.randn, device=device, dtype=getattr(torch, dtype))
    queries = 1 if work == "decode" else shape.T
    q = draw(shape.B, queries, shape.N, shape.H)
    k, v = [draw(shape.B, shape.T, shape.K, width) for width in (shape.H, shape.U)]
    v = k[..., : shape.U] if shape.latent else v
    # a decode step sees all keys, which torch's causal mask of one query would hide
    attend = _torch_function(kernel, shape.causal and work != "decode", shape.window)

    def call():
        with torch.inference_mode():
            return attend(q, k, v)

    if work == "backward":
        inputs = [x.requires_grad_() for x in (q, k, v)]
        o = attend(*inputs)
        do = torch.randn_like(o)
        call = functools.partial(torch.autograd.grad, o, inputs, do, retain_graph=True)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Contender(call, lambda _: wait())


def _torch_function(kernel: str, causal: bool, window: int | None) -> Callable[..., Any]:
    """attention(q, k, v) of [B, T, heads, width]."""
    import torch

    if kernel == "flash-attn":
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            raise Absent("flash-attn is not here") from None
        windows = (-1, -1) if window is None else (window - 1, 0)
        return functools.partial(flash_attn_func, causal=causal, window_size=windows)
    kinds = {"sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}
    if kernel in kinds and not torch.cuda.is_available():
        raise Absent("needs a GPU")
    if window is not None:
        raise Unfit("has no window")

    def attend(q, k, v):
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        sdpa = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=causal, enable_gqa=True
        )
        if kernel not in kinds:
            return sdpa(*heads)
        kind = getattr(torch.nn.attention.SDPBackend, kinds[kernel])
        with torch.nn.attention.sdpa_kernel(kind):
            return sdpa(*heads)

    return attend


PEERS = ("sdpa", "sdpa flash", "sdpa cudnn", "flash-attn")


def contenders(
    platform: str, shape: Shape, work: Work, dtype: str
) -> Mapping[str, Callable[[], Contender]]:
    """What makes each contender there is, ours by their names and torch's with "torch"."""
    makers: dict[str, Callable[[], Contender]] = {
        name: functools.partial(ours, name, shape, work, dtype)
        for name in backends(platform, shape)
    }
    if platform != "tpu":
        makers |= {
            f"torch {kernel}": functools.partial(theirs, kernel, shape, work, dtype)
            for kernel in PEERS
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
    q, k, v, do = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in abstract]
    with use_mesh(mesh), jax.default_device(device):
        if work != "backward":
            return jax.jit(run).lower(q, k, v).compile()
        return jax.jit(pull).lower(q, k, v, do).compile()
