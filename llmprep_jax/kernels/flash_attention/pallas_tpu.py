"""Attention by Pallas kernels on a TPU (Dao et al. 2022; Dao 2023), forward and backward.

Blocks of keys are the innermost axis of the grid, and only those are fetched that a block of
queries may see by its values. Query heads of a group read the same keys, which are never repeated:
few queries (a step of decoding) are folded, the heads of a group one after the other into one block
of rows, so that keys are read once for all of them. On a CPU the kernels are interpreted.
"""

import jax
import jax.numpy as jnp

from llmprep_jax.kernels import tpu
from llmprep_jax.kernels.flash_attention import tpu_backward, tpu_forward, tpu_tiles
from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from llmprep_jax.kernels.flash_attention.stored import NOT_STORED, Stored, num_slots

Q_BLOCK, K_BLOCK = 512, 1024  # tokens; half the keys where heads are wide
WIDE = 128
WIDEST = 1024
FEW = 128  # rows of queries
PAGES = 16  # of a tile at most, each an operand

Array = jax.Array
Sides = tuple[Places, Places]


def refusal(q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, rule: Rule, backward: bool) -> str | None:
    """Why the kernels cannot do it; None: they can."""
    if "pages" in rule.stored:
        page, limits = k_BKSH.shape[2], (K_BLOCK // 2, K_BLOCK, 2 * K_BLOCK)
        if None in [_page_tile(page, k_BKSH.dtype, limit) for limit in limits]:
            return f"no tile is made of pages of {page} slots of {k_BKSH.dtype.name}, or they of it"
    if q_BNTH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it multiplies float32 and bfloat16, not {q_BNTH.dtype}"
    if max(q_BNTH.shape[3], v_BKSU.shape[3]) > WIDEST:
        return f"a head may be {WIDEST} wide, not {max(q_BNTH.shape[3], v_BKSU.shape[3])}"
    if 0 in (*q_BNTH.shape, *k_BKSH.shape, *v_BKSU.shape):
        return "an array is empty"
    return None


def forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    places: Sides,
    rule: Rule,
    stored: Stored = NOT_STORED,
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`."""
    if rule.value_width is not None and rule.value_width % 128 == 0:
        return latent_forward(q_BNTH, k_BKSH, rule.value_width, places, rule, stored)
    if rule.value_width is not None and stored.k_scales is not None:
        stored = stored._replace(v_scales=stored.k_scales)
    return _forward(q_BNTH, k_BKSH, v_BKSU, places, rule, None, stored)


def latent_forward(
    q_BNTH: Array,
    z_BKSH: Array,
    width: int,
    places: Sides,
    rule: Rule,
    stored: Stored = NOT_STORED,
) -> tuple[Array, Array]:
    """As `forward` with keys z and values z[..., :width], read once for both.

    DeepSeek-V2 section 2.1.2, with the up-projections absorbed: K is 1, H 576 and the width 512.
    A width is a multiple of 128, and so should H be, else XLA lays slots out innermost and copies.
    """
    return _forward(q_BNTH, z_BKSH, None, places, rule, width, stored)


def _forward(q_BNTH, k_BKSH, v_BKSU, places, rule, latent, stored):
    spec, (q, k) = _plan(q_BNTH, k_BKSH, latent or v_BKSU.shape[-1], places, rule, stored.pages)
    spec = spec._replace(latent=latent)
    table, values = tpu_tiles.table_of(q, k, spec), tpu_tiles.values_of(q, k, spec)
    arrays = _fold(q_BNTH, spec), k_BKSH, v_BKSU
    o, lse = tpu_forward.forward(*arrays, values, table, spec, tpu.interprets(), stored)
    return tuple(x.reshape(*q_BNTH.shape[:3], *x.shape[3:]) for x in (o, lse))


def backward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    lse_BNT: Array,
    do_BNTU: Array,
    delta_BNT: Array,
    places: Sides,
    rule: Rule,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), as `reference.backward`."""
    spec, (q, k) = _plan(q_BNTH, k_BKSH, v_BKSU.shape[-1], places, rule)
    table, values = tpu_tiles.table_of(q, k, spec), tpu_tiles.values_of(q, k, spec)
    q, do, lse, delta = [_fold(x, spec) for x in (q_BNTH, do_BNTU, lse_BNT, delta_BNT)]
    rest = q, k_BKSH, v_BKSU, do.astype(q.dtype), lse, delta, values, table, spec, tpu.interprets()
    dq = tpu_backward.query_gradients(*rest)
    return dq.reshape(q_BNTH.shape), *tpu_backward.key_gradients(*rest)


def _plan(
    q_BNTH: Array, k_BKSH: Array, U: int, places: Sides, rule: Rule, pages: Array | None = None
) -> tuple[tpu_tiles.Spec, Sides]:
    """Statics, and places as the kernels see them."""
    (B, N, T, H), K, S = q_BNTH.shape, k_BKSH.shape[1], num_slots(k_BKSH, pages)
    group, folded = N // K, 1
    if group > 1 and group * T <= Q_BLOCK:
        group, folded = 1, group
        places = _fold_places(places, (B, T, S), folded, rule)
    q, _ = places
    names = tuple(name for name, x in q._asdict().items() if x is not None)
    T *= folded
    k_limit = K_BLOCK if max(H, U) <= WIDE else K_BLOCK // 2
    if T <= FEW:  # a step takes as long as its copy from memory: 1 MiB or half
        k_limit *= 2
    k_block, by_row, page = tpu.block(S, k_limit), bool(names), 0
    if pages is not None:
        page = k_BKSH.shape[2]
        k_block = min(_page_tile(page, k_BKSH.dtype, k_limit), S)
    q_block = tpu.block(T, Q_BLOCK)
    spec = tpu_tiles.Spec(rule, T, S, q_block, k_block, group, folded, names, by_row, page=page)
    return spec, places


def _page_tile(page: int, dtype: jax.typing.DTypeLike, limit: int) -> int | None:
    """Slots of a tile of keys: some pages, or a part of one; None: there is no such tile."""
    if page > limit:
        size = tpu.block(page, limit)
        return None if page % size else size
    count = min(limit // page, PAGES)
    # rows of a tile in VMEM: 8 of 32 bits, 32 of 8
    return None if count > 1 and page % (32 // jnp.dtype(dtype).itemsize) else count * page


def _fold_places(places: Sides, sizes: tuple[int, int, int], folded: int, rule: Rule) -> Sides:
    """Of the tokens of all heads of a group, one head after the other."""
    (q, k), (B, T, S) = places, sizes
    if q.positions is None and (rule.causal or rule.window is not None or rule.bias is not None):
        columns = [jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (B, n)) for n in (T, S)]
        q, k = [Places(x, *side[1:]) for x, side in zip(columns, (q, k), strict=True)]
    return jax.tree.map(lambda x: jnp.tile(x, (1, folded)), q), k


def _fold(x_BNT: Array, spec: tpu_tiles.Spec) -> Array:
    if spec.folded == 1:
        return x_BNT
    B, N, T, *rest = x_BNT.shape
    return x_BNT.reshape(B, N // spec.folded, spec.folded * T, *rest)
