"""A step of decoding from a cache, compiled for chips that are not there: it copies none of it."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from llmprep_jax.kernels.flash_attention import attention
from tests.grids import cases
from tests.kernels.ahead import TPUS, temporaries, tpu_devices

LLAMA = dict(N=32, K=8, H=128)
CACHES = {
    "int8": dict(LLAMA, bits=8),
    "pages of 128": dict(LLAMA, page=128),
    "pages of 64": dict(LLAMA, page=64),
    "int8 in pages of 128": dict(LLAMA, page=128, bits=8),
    "int8 in pages of 4,096": dict(LLAMA, page=4096, bits=8),
    "latents in pages of 64": dict(N=128, K=1, H=640, width=512, page=64),
    "int8 latents in pages of 128": dict(N=128, K=1, H=640, width=512, page=128, bits=8),
}


def compiled(device, impl, *, N, K, H, width=None, page=0, bits=16, layers=1):
    """8 rows of 8,192 slots, head-major; a pool has the pages of all layers, of which one is read.

    Scales lie as [P, K, 1, page]: as [P, K, page] TPUs would lay them out anew.
    """
    B, S = 8, 8192
    types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.Mesh([device], ("data",), axis_types=types)

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    count = B * S // page if page else B
    shape = (layers * count, K, page or S)
    cache = {"k": array(*shape, H, dtype="int8" if bits == 8 else "bfloat16")}
    if bits == 8:
        cache["k_scales"] = array(*shape[:2], 1, shape[2], dtype="float32")
    if width is None:
        cache |= {name.replace("k", "v"): x for name, x in cache.items()}
    options = {f"{side}_positions": array(B, n) for side, n in (("q", 1), ("k", S))}
    options |= {f"{side}_segments": array(B, n) for side, n in (("q", 1), ("k", S))}
    if page:
        options["pages"] = array(B, S // page)

    def step(q, cache, options, layer):
        cache = {n: x[:, :, 0] if "scales" in n else x for n, x in cache.items()}
        cache = {n: x.swapaxes(1, 2) for n, x in cache.items()}
        if page:
            pages = options["pages"]
            options = options | dict(pages=jnp.where(pages < 0, -1, pages + layer * count))
        return attention(q, cache.pop("k"), cache.pop("v", None), **cache, **options, **statics)

    statics = dict(impl=impl, value_width=width)
    with jax.set_mesh(mesh):
        q = array(B, 1, N, H, dtype="bfloat16")
        return jax.jit(step).lower(q, cache, options, array()).compile()


# 2 to 4 s each: every cache on one chip, and every chip with heads and with latents
ON_CHIPS = list(itertools.product(CACHES, TPUS))
SLOW = [
    (cache, chip)
    for cache, chip in ON_CHIPS
    if chip == "v5p" or cache in ("int8 in pages of 128", "latents in pages of 64")
]


@pytest.mark.parametrize(("cache", "chip"), cases(ON_CHIPS, slow=SLOW))
def test_a_tpu_reads_a_cache_where_it_lies(cache, chip):
    layers = 3 if "pages" in cache else 1
    program = compiled(tpu_devices(chip)[0], "pallas_tpu", **CACHES[cache], layers=layers)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert temporaries(program) < 1  # MiB; a layer of the smallest cache takes 40


@pytest.mark.slow  # 2 s each
@pytest.mark.parametrize("cache", CACHES)
def test_a_gpu_reads_a_cache_where_it_lies(card, cache):
    problem = CACHES[cache]
    layers = 3 if "pages" in cache else 1
    program = compiled(card.devices.flat[0], "pallas_gpu", **problem, layers=layers)
    assert "__gpu$xla.gpu.triton" in program.as_text()
    # outputs of the parts that keys are split into, 4 or 8 of them, in float32
    parts = 8 * 8 * problem["N"] * problem.get("width", 128) * 4 / 2**20
    assert temporaries(program) < 1.1 * parts
