"""The forward kernel for Hopper: compiled for an H100, and interpreted where JAX can."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.flash_attention import attention, mosaic_gpu, reference
from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from tests.grids import cases

PLACES = (Places(), Places())
# (queries, keys, width, key heads of two, rule): tiles seen whole and in part, none in two places
# more than once, rows that see nothing, keys that end within a tile
ROWS = [
    (300, 300, 64, 1, Rule()),
    (150, 200, 128, 2, Rule(causal=False)),
    (400, 400, 64, 1, Rule(window=70)),
    (200, 100, 64, 2, Rule(window=30)),
    (100, 300, 64, 1, Rule(window=50, causal=False)),
]


@pytest.mark.parametrize(("T", "S", "H", "K", "rule"), cases(ROWS, fast=ROWS[:1], slow=ROWS[1:]))
def test_forward_equals_the_reference(T, S, H, K, rule, capfd):
    pytest.importorskip("jax", minversion="0.11.2", reason="this JAX does not interpret the kernel")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    draw = np.random.default_rng(0).standard_normal
    shapes = (1, 2, T, H), (1, K, S, H), (1, K, S, H)
    q, k, v = [jnp.asarray(draw(shape), "bfloat16") for shape in shapes]
    rule = rule._replace(scale=H**-0.5)
    params = plgpu.InterpretGPUParams(detect_races=True)
    o, lse = mosaic_gpu.forward(q, k, v, PLACES, rule, interpret=params)
    wanted_o, wanted_lse = reference.forward(q, k, v, PLACES, rule)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    o, wanted_o = np.float32(o), np.float32(wanted_o)
    np.testing.assert_allclose(o, wanted_o, atol=1e-2 * np.max(np.abs(wanted_o)))
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("H", "options"), [(128, {}), (128, dict(window=512)), (64, dict(causal=False))], ids=str
)
def test_forward_compiles_to_asynchronous_products(card, H, options, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    with jax.set_mesh(card):
        place = jax.NamedSharding(card, jax.P())
        shapes = [(2, 1000, 8, H), (2, 1000, 2, H), (2, 1000, 2, H)]
        arrays = [jax.ShapeDtypeStruct(x, "bfloat16", sharding=place) for x in shapes]

        def call(q, k, v):
            return attention(q, k, v, impl="mosaic_gpu", **options)

        program = jax.jit(call).lower(*arrays).compile()
    text = "".join(capfd.readouterr())
    assert ".target sm_90a" in text
    assert re.search(r"wgmma\.mma_async\S*m64n128k16", text)
    assert " 0 bytes spill stores" in text
    # the log-sum-exp and nothing else: no array is transposed
    assert program.memory_analysis().temp_size_in_bytes < 2 * 8 * 1024 * 4 * 1.1


def test_what_it_cannot_do_it_says(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "platform", lambda: "gpu")

    def reason(width=128, value=128, dtype="bfloat16", backward=False, T=8, **rule):
        q, v = jnp.zeros((1, 2, T, width), dtype), jnp.zeros((1, 2, T, value), dtype)
        return mosaic_gpu.refusal(q, q, v, Rule(**rule), backward)

    assert reason() is None
    assert reason(window=9, causal=False) is None
    assert reason(backward=True) == "it has no backward pass"
    assert reason(given=("segments",)) == "it masks by columns, not by segments"
    assert reason(soft_cap=1.0) == "a bias, a soft cap or a scale of 0 or less"
    assert reason(width=192) == "heads of width 64 or 128, not 192 with values of 128"
    assert reason(width=80, value=80) == "heads of width 64 or 128, not 80 with values of 80"
    assert reason(dtype="float32") == "it multiplies bfloat16 and float16, not float32"
    assert reason(T=0) == "an array is empty"
    monkeypatch.setattr(mosaic_gpu, "platform", lambda: "cpu")
    monkeypatch.setattr(mosaic_gpu, "mosaic_interpreter", lambda: None)
    assert reason() == "this JAX does not interpret it"
