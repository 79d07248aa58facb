"""Softmax attention by one function, whatever computes it (Dao et al. 2022; Dao 2023).

One rule of derivatives serves every backend: forward keeps its inputs, its output and the
log-sum-exp of each query's scores, backward computes the scores again a block at a time. A backend
is a file of three functions over head-major arrays: `forward`, `backward` and `refusal`, which says
what it cannot do; `reference` says what is meant. Sinks and biases of low rank are the same for all
and are dealt with here: a sink is one more term of the sum, a low-rank bias is more head width.
"""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmprep_jax.kernels.flash_attention.layout import (
    Layout,
    join_widths,
    layout_of,
    repeat_heads,
)
from llmprep_jax.kernels.flash_attention.masks import Bias, Places, Rule
from llmprep_jax.kernels.platforms import platform, tell_once

OUTPUT = "attention"  # the name under which remat policies may keep outputs and lse

# each platform's backends, best first; what one refuses falls to the next
BACKENDS = {
    "cpu": ("chunked",),
    "tpu": ("pallas_tpu", "chunked"),
    "gpu": ("mosaic_latents", "cudnn", "tokamax", "pallas_gpu", "chunked"),
    None: ("chunked",),  # a mesh without devices
}
IMPLS = (
    "reference",
    "chunked",
    "pallas_tpu",
    "splash",
    "pallas_gpu",
    "cudnn",
    "tokamax",
    "mosaic_gpu",
)

Array = jax.Array
Factors = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]
Pair = tuple[jax.typing.ArrayLike | None, jax.typing.ArrayLike | None]  # of queries and of keys


def attention(
    q: jax.typing.ArrayLike,
    k: jax.typing.ArrayLike,
    v: jax.typing.ArrayLike | None,
    *,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_positions: jax.typing.ArrayLike | None = None,
    k_positions: jax.typing.ArrayLike | None = None,
    q_segments: jax.typing.ArrayLike | None = None,
    k_segments: jax.typing.ArrayLike | None = None,
    q_spans: jax.typing.ArrayLike | None = None,
    k_spans: jax.typing.ArrayLike | None = None,
    sinks: jax.typing.ArrayLike | None = None,
    bias: Bias | Factors | None = None,
    value_width: int | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """softmax(scale q k^T + bias) v over the keys that each query may see, [B, T, N, U].

    A key j is visible to a query i when it is of its segment, and is not later or of the same span
    (or `causal` is off), and i - j < window (|i - j| < window where not causal). A query that sees
    nothing gives 0. Operands of products are in q's dtype; scores, softmax and sums in float32.

    Args:
      q: queries [B, T, N, H]. k: keys [B, S, K, H]. v: values [B, S, K, U]; query heads of one
        group are neighbours: heads 0 to N/K - 1 see key head 0.
      soft_cap: c of scores c tanh(s / c) (Gemma 2). scale: None is H^-0.5.
      q_positions, k_positions: int [B, T], [B, S]; None: columns, from 0 on for both, and what a
        mask leaves out is then left out of the program.
      q_segments, k_segments: 0 is padding; None: all of one. q_spans, k_spans: 0 is none.
      sinks: [N], a logit beside each query's scores that takes probability and gives no value.
      bias: a function of integer arrays (query head, query position, key position) that is
        elementwise, such as ALiBi's, and gets no gradient; or two arrays a [B or 1, T, N or 1, R],
        b [B or 1, S, N or 1, R] whose product over R it is (SAM's decomposed relative positions).
      value_width: with v None: values are the first so many numbers of the keys, and are read
        once for both by backends that can (the latents of MLA).
      impl: a backend by name; None: the best for the platform of the mesh in force. One that
        cannot do what is asked falls to the next, and says so once.
      return_lse: also the log of the sum of exponentials of each query's scores, [B, T, N] in
        float32, sinks counted; -2.4e38 where it sees nothing.

    Raises:
      ValueError: shapes that do not fit each other, both of v and `value_width` or neither, a
        window below 1, or an unknown `impl`.
    """
    if (v is None) != (value_width is not None):
        raise ValueError("give v, or value_width where values are the first numbers of the keys")
    q, k = jnp.asarray(q), jnp.asarray(k)
    v = k[..., :value_width] if v is None else jnp.asarray(v)
    _check(q, k, v, window)
    if impl not in (None, *IMPLS):
        raise ValueError(f"unknown impl {impl!r}; there are {', '.join(IMPLS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if isinstance(bias, tuple):
        q, k, v, scale, bias = *_widen(q, k, v, bias, scale), None
    places = _places(q, k, (q_positions, k_positions), (q_segments, k_segments), (q_spans, k_spans))
    given = tuple(name for name, values in places[0]._asdict().items() if values is not None)
    rule = Rule(causal, window, scale, soft_cap, bias, given, value_width)
    layout = layout_of(q, k, splits_heads=bias is None)
    q, k, v, places = layout.place(q, k, v, places)
    o, lse = _attention(q, k, v, places, rule, impl, layout)
    if sinks is not None:
        all_lse = jnp.logaddexp(lse, sinks.astype(jnp.float32))
        o, lse = (o * jnp.exp(lse - all_lse)[..., None]).astype(o.dtype), all_lse
    return (o, lse) if return_lse else o


def _check(q: Array, k: Array, v: Array, window: int | None) -> None:
    """Refuses shapes that do not fit each other."""
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] == v.shape[0]
    fits = fits and q.shape[3] == k.shape[3] and k.shape[1:3] == v.shape[1:3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}; they must be [B, T, N, H], [B, S, K, H] and"
            " [B, S, K, U], with N a multiple of K"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window}; it counts the query itself, so it must be 1 or more")


def _widen(
    q: Array, k: Array, v: Array, bias: Factors, scale: float
) -> tuple[Array, Array, Array, float]:
    """Queries and keys whose scores hold a bias a b^T; the scale is then in the queries."""
    a, b = [jnp.asarray(x, q.dtype) for x in bias]
    if b.shape[2] > k.shape[2]:  # keys differ by query head
        k, v = [repeat_heads(x, q.shape[2] // k.shape[2]) for x in (k, v)]
    return join_widths(q * scale, a), join_widths(k, b), v, 1.0


def _places(q: Array, k: Array, *pairs: Pair) -> tuple[Places, Places]:
    """Both sides with the same values given; missing ones are columns, segment 1, no span."""
    sides = []
    for side, x in enumerate((q, k)):
        shape = x.shape[:2]
        defaults = (
            jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
            jnp.ones(shape, jnp.int32),
            jnp.zeros(shape, jnp.int32),
        )
        values = []
        for pair, default in zip(pairs, defaults, strict=True):
            given = default if pair[side] is None else jnp.asarray(pair[side], jnp.int32)
            if given.shape != shape:
                raise ValueError(
                    f"positions, segments or spans of {'qk'[side]} are {given.shape}; they must be"
                    f" {shape}, a number a token"
                )
            values.append(None if all(x is None for x in pair) else given)
        sides.append(Places(*values))
    return tuple(sides)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    places: tuple[Places, Places],
    rule: Rule,
    impl: str | None,
    layout: Layout,
) -> tuple[Array, Array]:
    return _forward(q, k, v, places, rule, impl, layout)[0]


def _forward(q, k, v, places, rule, impl, layout):
    def run(q_BTNH, k_BSKH, v_BSKU, places):
        heads = [x.swapaxes(1, 2) for x in (q_BTNH, *layout.own_heads(q_BTNH, k_BSKH, v_BSKU))]
        with jax.named_scope("attention"):
            o_BNTU, lse_BNT = backend(impl, *heads, rule).forward(*heads, places, rule)
        return o_BNTU.swapaxes(1, 2), lse_BNT.swapaxes(1, 2)

    o, lse = layout.on_devices(run, outs=("queries", "rows"))(q, k, v, places)
    o, lse = checkpoint_name(o, OUTPUT), checkpoint_name(lse, OUTPUT)
    return (o, lse), (q, k, v, places, o, lse)


def _backward(rule, impl, layout, residuals, cotangents):
    def run(q_BTNH, k_BSKH, v_BSKU, places, o_BTNU, lse_BTN, do_BTNU, dlse_BTN):
        own_k, own_v = layout.own_heads(q_BTNH, k_BSKH, v_BSKU)
        heads = [x.swapaxes(1, 2) for x in (q_BTNH, own_k, own_v)]
        sums_BTN = jnp.einsum("btnu,btnu->btn", do_BTNU, o_BTNU, preferred_element_type=jnp.float32)
        numbers = [x.swapaxes(1, 2) for x in (lse_BTN, do_BTNU, sums_BTN - dlse_BTN)]
        with jax.named_scope("attention_backward"):
            module = backend(impl, *heads, rule, backward=True)
            dq, dk, dv = [x.swapaxes(1, 2) for x in module.backward(*heads, *numbers, places, rule)]
        dk, dv = layout.sum_heads(dk, dv, k_BSKH)
        return dq, dk.astype(k_BSKH.dtype), dv.astype(v_BSKU.dtype)

    q, k, v, places, o, lse = residuals
    run = layout.on_devices(run, outs=("queries", "keys", "keys"))
    return *run(q, k, v, places, o, lse, *cotangents), None


_attention.defvjp(_forward, _backward)


def backend(
    impl: str | None,
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    rule: Rule,
    backward: bool = False,
) -> ModuleType:
    """The first backend that can do it, of the one asked for and the platform's."""
    if 0 in (*q_BNTH.shape[:3], k_BKSH.shape[2]):
        impl = "reference"  # of zeros and empty arrays; blocks have a first token
    names = (*(() if impl is None else (impl,)), *BACKENDS[platform()])
    for name in names:
        module = importlib.import_module(f"{__package__}.{name}")
        reason = module.refusal(q_BNTH, k_BKSH, v_BKSU, rule, backward)
        if reason is None:
            return module
        if name == impl:
            tell_once(
                f"attention: impl={impl!r} cannot do this ({reason}); another takes its place"
            )
    raise AssertionError(names)  # chunked does all
