"""Caches in pages and of 8 bits: what each backend computes from them, and what it holds."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels.flash_attention import attention, chunked, layers, pallas_tpu
from llmprep_jax.kernels.platforms import tell_once
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from tests.grids import cases
from tests.kernels.flash_attention.caches import Cached
from tests.kernels.flash_attention.problems import assert_close

CACHES = [
    Cached(T=3, bits=8, window=30, soft_cap=2.0, sinks=True),
    Cached(page=0, bits=8, S=90, N=6, H=24, U=8),
    Cached(K=1, N=8, H=136, U=None, width=128, bits=8, page=64, S=192),
    Cached(bits=16, page=16, T=20, S=80, window=25),
    Cached(),
    Cached(K=1, N=8, H=40, U=None, width=32),
    Cached(page=0, bits=8, K=1, N=8, H=40, U=None, width=32, bias=True),
    Cached(bits=8, K=4, T=20, soft_cap=1.0),
    Cached(page=128, S=256, bits=8, T=2, bias=True),
    Cached(page=16, B=1, sinks=True),
    Cached(page=64, S=192, bits=16, window=11),
    Cached(page=0, S=90, bits=8, K=4),
]
FAST = CACHES[:4]


def run(options, impl):
    """(o, lse), compiled."""
    arrays = {k: x for k, x in options.items() if isinstance(x, jax.Array)}
    rest = {k: x for k, x in options.items() if k not in arrays}
    call = jax.jit(functools.partial(attention, **rest, impl=impl, return_lse=True))
    return dict(zip(("o", "lse"), call(**arrays), strict=True))


@functools.cache
def wanted_of(cache: Cached):
    """The reference of its rows, which each backend is compared with."""
    return run(cache.problem()[1], "reference")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of which rows have several; some tiles have pages, some pages have tiles."""
    for module, sizes in BLOCKS.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


BLOCKS = {
    chunked: dict(FEW_K_BLOCK=70, K_BLOCK=40),
    pallas_tpu: dict(Q_BLOCK=16, K_BLOCK=32, WIDE=16, FEW=4),
}


@pytest.mark.parametrize("impl", ["reference", "chunked", "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("cache", cases(CACHES, fast=FAST), ids=str)
def test_a_cache_is_the_rows_that_it_holds(cache, impl, recwarn):
    tell_once.cache_clear()
    found, wanted = run(cache.problem()[0], impl), wanted_of(cache)
    assert not [x for x in recwarn if "another takes its place" in str(x.message)]
    assert_close(found, wanted, 2e-2 if cache.bits == 16 else 1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(pages=np.zeros((2, 3), int)), r"pages \(2, 3\) of pools .* for 3 rows"),
        (dict(v_scales=None), "give k_scales and v_scales, or k_scales alone"),
        (dict(k_scales=None), "give k_scales and v_scales, or k_scales alone"),
        (dict(k=np.zeros((6, 32, 2, 16), "float32")), "of float32 and int8 keys and values"),
        (dict(k_scales=np.zeros((3, 96, 2))), r"they must be \(6, 32, 2\), of int8"),
        (dict(bias=(np.zeros((3, 1, 1, 2)), np.zeros((3, 96, 1, 2)))), "factors of a bias"),
        (dict(k_segments=np.zeros((3, 16), int)), r"of k are \(3, 16\); they must be \(3, 96\)"),
    ],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused(changed, message):
    stored, _ = Cached(bits=8).problem()
    with pytest.raises(ValueError, match=message):
        attention(**stored | changed)


@pytest.mark.parametrize("cache", [Cached(), Cached(page=0, bits=8)], ids=str)
def test_a_cache_has_no_derivative_and_says_so(cache):
    stored, _ = cache.problem()
    with pytest.raises(ValueError, match="keys in pages or with scales have no derivatives"):
        jax.grad(lambda q: attention(**stored | dict(q=q)).sum())(stored["q"])


@pytest.mark.parametrize("impl", ["reference", "chunked", "pallas_tpu"])
def test_what_padding_holds_spreads_nowhere(impl):
    draw = np.random.default_rng(0).standard_normal
    q, k, v = [
        draw((2, T, heads, 16)).astype("float32") for T, heads in ((24, 4), (50, 2), (50, 2))
    ]
    segments = np.ones((2, 50), int)
    segments[:, 20:23], segments[:, 45:] = 0, 0
    is_real = segments[..., None, None] > 0

    def gradients(k, v):
        def loss(q, k, v):
            options = dict(q_segments=segments[:, :24], k_segments=segments, causal=False)
            o, lse = attention(q, k, v, **options, impl=impl, return_lse=True)
            return jnp.sum(jnp.sin(o) + jnp.where(lse > -1e38, lse, 0)[..., None])

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    found = gradients(*[np.where(is_real, x, np.nan) for x in (k, v)])
    wanted = gradients(*[np.where(is_real, x, 0) for x in (k, v)])
    chex.assert_trees_all_close(found, wanted, atol=1e-5)


@pytest.mark.slow  # each step of the grid by itself, in Python: 10 s
@pytest.mark.parametrize("cache", [CACHES[0], Cached(page=16, T=2)], ids=str)
def test_no_step_of_the_grid_races_with_another_over_pages(cache, capfd):
    stored, rows = cache.problem()
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(params):
        found = run(stored, "pallas_tpu")
    assert "race" not in capfd.readouterr().out.lower()
    assert_close(found, run(rows, "reference"), 1e-5)


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2), dict(tensor=8)], ids=str)
def test_rows_on_a_mesh_share_their_pools(mesh):
    stored, rows = Cached(B=4, N=8, bits=8).problem()
    wanted = run(rows, "reference")
    places = dict(q=("batch", None, "heads", None), pages=("batch", None))
    places |= {
        f"{side}_{name}": ("batch", None) for side in "qk" for name in ("positions", "segments")
    }
    places |= dict.fromkeys(("k", "v"), (None, None, "kv_heads", None))
    places |= dict.fromkeys(("k_scales", "v_scales"), (None, None, "kv_heads"))
    arrays = {k: x for k, x in stored.items() if isinstance(x, jax.Array)}
    rest = {k: x for k, x in stored.items() if k not in arrays}
    with use_mesh(make_mesh(mesh)):
        placed = {k: jax.device_put(x, spec(*places[k], shape=x.shape)) for k, x in arrays.items()}
        call = jax.jit(functools.partial(attention, **rest, return_lse=True))
        compiled = call.lower(**placed).compile()
        found = dict(zip(("o", "lse"), compiled(**placed), strict=True))
    assert_close(found, wanted, 1e-5)
    text = compiled.as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    P, page, K, H = stored["k"].shape
    if mesh["tensor"] > K:  # each device sees one head, which is not cut out of the pool
        assert f"s8[{P},{page},{K},{H}]" in text
        assert not {f"s8[{P},{page},1,{H}]", f"s8[{P},1,{page},{H}]"} & set(
            re.findall(r"s8\[[\d,]+\]", text)
        )


LAYERS = [
    Cached(B=8, N=8, page=0, sinks=True, window=30),
    Cached(B=8, N=8, K=1, H=136, U=None, width=128, page=0, bits=8, T=2),
]


MESH = dict(data=2, tensor=2, fsdp=2)


# fewer heads than devices are cut out on a mesh, and read where they lie without one
@pytest.mark.parametrize(
    ("cache", "mesh"),
    cases(
        itertools.product(LAYERS, [None, MESH]),
        fast=[(LAYERS[0], MESH), (LAYERS[1], None)],
        slow=[(LAYERS[1], MESH)],
    ),
    ids=str,
)
def test_a_layer_among_others_is_read_where_it_lies(monkeypatch, cache, mesh):
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    monkeypatch.setattr(layers, "SLOTS", 32)
    stored, wanted = cache.problem()[0], wanted_of(cache)
    for name in {"k", "v", "k_scales", "v_scales"} & set(stored):
        if stored[name] is not None:  # what the others hold is wrong
            stored[name] = jnp.stack([stored[name] * 0 + 3, stored[name], stored[name] * 0])
    with use_mesh(None if mesh is None else make_mesh(mesh)):
        heads = spec("batch", None, "heads", None, shape=stored["q"].shape)
        stored["q"] = stored["q"] if mesh is None else jax.device_put(stored["q"], heads)
        call = jax.jit(lambda q: attention(**stored | dict(q=q), layer=1, impl="pallas_tpu"))
        read = jax.make_jaxpr(call)(stored["q"])
        found = run(stored | dict(layer=jnp.int32(1)), "pallas_tpu")
        sliced = run(stored | dict(layer=jnp.int32(1)), "reference")
    assert_close(found, wanted, 1e-5)
    assert_close(sliced, wanted, 1e-5)
    is_cut = re.search(r"dynamic_slice\[slice_sizes=\(\d+(, \d+){4}\)", str(read)) is not None
    assert is_cut == (mesh is not None and cache.K == 1)  # fewer heads than devices
