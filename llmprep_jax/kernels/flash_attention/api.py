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

from llmprep_jax.kernels.flash_attention.layers import attend_layer
from llmprep_jax.kernels.flash_attention.layout import (
    Layout,
    join_widths,
    layout_of,
    repeat_heads,
)
from llmprep_jax.kernels.flash_attention.masks import Bias, Places, Rule
from llmprep_jax.kernels.flash_attention.stored import NOT_STORED, Stored, num_slots, pools_of_head
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
    pages: jax.typing.ArrayLike | None = None,
    k_scales: jax.typing.ArrayLike | None = None,
    v_scales: jax.typing.ArrayLike | None = None,
    layer: jax.typing.ArrayLike | None = None,
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
      pages: int [B, J] where a cache is paged: k and v are then pools [P, page, K, H] and
        [P, page, K, U], and slots j page to (j + 1) page - 1 of row b are page `pages[b, j]`.
        What is said by key stays [B, S], S = J page. -1 is no page: its slots are of segment 0.
      k_scales, v_scales: float32 [B, S, K] (with pages [P, page, K]) of int8 keys and values, a
        factor a token and head. With `value_width` those of the keys are the values' too.
      layer: k, v and scales are those of all layers, [L, B, S, K, ...], of which one is meant: a
        kernel for TPUs reads it in place. Not with pages, whose numbers may say the layer.
      impl: a backend by name; None: the best for the platform of the mesh in force. One that
        cannot do what is asked falls to the next, and says so once.
      return_lse: also the log of the sum of exponentials of each query's scores, [B, T, N] in
        float32, sinks counted; -2.4e38 where it sees nothing.

    Keys of segment 0 may hold anything, NaN included. Keys in pages or with scales have no
    gradients, and neither have the queries that meet them.

    Raises:
      ValueError: shapes that do not fit each other, both of v and `value_width` or neither, a
        window below 1, or an unknown `impl`; scales of one of keys and values, or of what is not
        int8; factors of a bias, or a derivative, with pages or scales.
    """
    if layer is not None:
        arrays = dict(q=q, k=k, v=v, k_scales=k_scales, v_scales=v_scales, sinks=sinks)
        arrays |= dict(q_positions=q_positions, k_positions=k_positions)
        arrays |= dict(q_segments=q_segments, k_segments=k_segments)
        arrays |= dict(q_spans=q_spans, k_spans=k_spans)
        options = dict(causal=causal, window=window, soft_cap=soft_cap, scale=scale, bias=bias)
        options |= dict(value_width=value_width, impl=impl, return_lse=return_lse)
        return attend_layer(attention, arrays, layer, options)
    if (v is None) != (value_width is not None):
        raise ValueError("give v, or value_width where values are the first numbers of the keys")
    q, k = jnp.asarray(q), jnp.asarray(k)
    v = k[..., :value_width] if v is None else jnp.asarray(v)
    stored = _stored(q, k, v, (pages, k_scales, v_scales), value_width, bias)
    _check(q, k, v, window, stored)
    if impl not in (None, *IMPLS):
        raise ValueError(f"unknown impl {impl!r}; there are {', '.join(IMPLS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not stored.names():  # else a backend does, a block at a time
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    if isinstance(bias, tuple):
        q, k, v, scale, bias = *_widen(q, k, v, bias, scale), None
    slots = (
        k.shape[:2] if pages is None else (q.shape[0], num_slots(k.swapaxes(1, 2), stored.pages))
    )
    places = _places(
        q.shape[:2], slots, (q_positions, k_positions), (q_segments, k_segments), (q_spans, k_spans)
    )
    given = tuple(name for name, values in places[0]._asdict().items() if values is not None)
    rule = Rule(causal, window, scale, soft_cap, bias, given, value_width, stored.names())
    layout = layout_of(q, k, splits_heads=bias is None)
    arrays = layout.place(q, k, v, places, stored)
    o, lse = _attention(*arrays, rule, impl, layout)
    if sinks is not None:
        all_lse = jnp.logaddexp(lse, sinks.astype(jnp.float32))
        o, lse = (o * jnp.exp(lse - all_lse)[..., None]).astype(o.dtype), all_lse
    return (o, lse) if return_lse else o


def _check(q: Array, k: Array, v: Array, window: int | None, stored: Stored) -> None:
    """Refuses shapes that do not fit each other."""
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[0] == v.shape[0]
    fits = fits and (q.shape[0] == k.shape[0] or stored.pages is not None)
    fits = fits and q.shape[3] == k.shape[3] and k.shape[1:3] == v.shape[1:3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}; they must be [B, T, N, H], [B, S, K, H] and"
            " [B, S, K, U], with N a multiple of K"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window}; it counts the query itself, so it must be 1 or more")


def _stored(
    q: Array,
    k: Array,
    v: Array,
    given: tuple[jax.typing.ArrayLike | None, ...],
    value_width: int | None,
    bias: Bias | Factors | None,
) -> Stored:
    """Pages within the pool and scales, where there are any."""
    pages, k_scales, v_scales = [None if x is None else jnp.asarray(x) for x in given]
    if pages is not None:
        if pages.ndim != 2 or len(pages) != len(q) or 0 in (*pages.shape[1:], *k.shape[:2]):
            raise ValueError(
                f"pages {pages.shape} of pools {k.shape} for {len(q)} rows; they must be [B, J] of"
                " [P, page, K, H], with J, P and page 1 or more"
            )
        pages = jnp.clip(pages.astype(jnp.int32), 0, k.shape[0] - 1)
    if (v_scales is not None) != (k_scales is not None and value_width is None):
        raise ValueError("give k_scales and v_scales, or k_scales alone where keys hold the values")
    scales = [x for x in (k_scales, v_scales) if x is not None]
    if scales and ({x.shape for x in scales}, {k.dtype, v.dtype}) != (
        {k.shape[:3]},
        {jnp.dtype("int8")},
    ):
        raise ValueError(
            f"scales {', '.join(str(x.shape) for x in scales)} of {k.dtype} and {v.dtype} keys and"
            f" values; they must be {k.shape[:3]}, of int8"
        )
    stored = Stored(
        pages, *[None if x is None else x.astype(jnp.float32) for x in (k_scales, v_scales)]
    )
    if stored.names() and isinstance(bias, tuple):
        raise ValueError("factors of a bias lie beside the keys, and a cache has no room for them")
    return stored


def _widen(
    q: Array, k: Array, v: Array, bias: Factors, scale: float
) -> tuple[Array, Array, Array, float]:
    """Queries and keys whose scores hold a bias a b^T; the scale is then in the queries."""
    a, b = [jnp.asarray(x, q.dtype) for x in bias]
    if b.shape[2] > k.shape[2]:  # keys differ by query head
        k, v = [repeat_heads(x, q.shape[2] // k.shape[2]) for x in (k, v)]
    return join_widths(q * scale, a), join_widths(k, b), v, 1.0


def _places(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], *pairs: Pair
) -> tuple[Places, Places]:
    """Both sides with the same values given; missing ones are columns, segment 1, no span."""
    sides = []
    for side, shape in enumerate((q_shape, k_shape)):
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    places: tuple[Places, Places],
    stored: Stored,
    rule: Rule,
    impl: str | None,
    layout: Layout,
) -> tuple[Array, Array]:
    return _run(q, k, v, places, stored, rule, impl, layout)


def _run(q, k, v, places, stored, rule, impl, layout):
    def run(q_BTNH, k_BSKH, v_BSKU, places, stored):
        head = None if stored.pages is None else layout.own_head(q_BTNH, k_BSKH)
        scales = stored.k_scales, stored.v_scales
        if head is None:
            k_BSKH, v_BSKU, scales = layout.own_heads(q_BTNH, k_BSKH, v_BSKU, scales)
        *heads, scales = jax.tree.map(_swap, (q_BTNH, k_BSKH, v_BSKU, scales))
        stored = Stored(stored.pages, *scales)
        if head is not None:
            q_BNTH, k_PKSH, v_PKSU = heads
            *pools, stored = pools_of_head(k_PKSH, v_PKSU, stored, head)
            heads = [q_BNTH, *pools]
        more = (stored,) if rule.stored else ()
        with jax.named_scope("attention"):
            o_BNTU, lse_BNT = backend(impl, *heads, rule).forward(*heads, places, rule, *more)
        return _swap(o_BNTU), _swap(lse_BNT)

    run = layout.on_devices(run, outs=("queries", "rows"))
    o, lse = run(q, k, v, places, stored)
    return checkpoint_name(o, OUTPUT), checkpoint_name(lse, OUTPUT)


def _forward(q, k, v, places, stored, rule, impl, layout):
    if rule.stored:
        raise ValueError("keys in pages or with scales have no derivatives")
    o, lse = _run(q, k, v, places, stored, rule, impl, layout)
    return (o, lse), (q, k, v, places, o, lse)


def _backward(rule, impl, layout, residuals, cotangents):
    def run(q_BTNH, k_BSKH, v_BSKU, places, _, o_BTNU, lse_BTN, do_BTNU, dlse_BTN):
        heads = [_swap(x) for x in (q_BTNH, *layout.own_heads(q_BTNH, k_BSKH, v_BSKU))]
        sums_BTN = jnp.einsum("btnu,btnu->btn", do_BTNU, o_BTNU, preferred_element_type=jnp.float32)
        numbers = map(_swap, (lse_BTN, do_BTNU, sums_BTN - dlse_BTN))
        with jax.named_scope("attention_backward"):
            module = backend(impl, *heads, rule, backward=True)
            dq, dk, dv = map(_swap, module.backward(*heads, *numbers, places, rule))
        dk, dv = layout.sum_heads(dk, dv, k_BSKH)
        return dq, dk.astype(k_BSKH.dtype), dv.astype(v_BSKU.dtype)

    q, k, v, places, o, lse = residuals
    run = layout.on_devices(run, outs=("queries", "keys", "keys"))
    return *run(q, k, v, places, NOT_STORED, o, lse, *cotangents), None, None


_attention.defvjp(_forward, _backward)


def _swap(x_BTN: Array) -> Array:
    """Between [B, T, N, ...] and [B, N, T, ...]."""
    return x_BTN.swapaxes(1, 2)


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
