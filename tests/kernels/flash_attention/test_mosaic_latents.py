"""The Hopper kernels: compiled for an H100, and against the reference where JAX interprets them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.flash_attention import mosaic_latents, reference
from llmprep_jax.kernels.flash_attention.masks import Places, Rule

RULE = Rule(scale=192**-0.5)


def latents(lengths, T, N, S):
    """(queries, latents, places) of rows of T queries after so many of S slots."""
    draw = np.random.default_rng(0).standard_normal
    B = len(lengths)
    q, z = [jnp.asarray(draw(x), "bfloat16") for x in ((B, N, T, 576), (B, S, 576))]
    columns, lengths = np.arange(S, dtype=np.int32), np.array(lengths, np.int32)[:, None]
    q_positions = lengths - T + np.arange(T, dtype=np.int32)
    sides = (
        (q_positions, np.broadcast_to(lengths > 0, q_positions.shape)),
        (np.tile(columns, (B, 1)), columns < lengths),
    )
    places = [Places(jnp.array(x), jnp.array(y, jnp.int32)) for x, y in sides]
    return q, z, tuple(places)


@pytest.mark.parametrize(
    ("lengths", "T", "N", "S", "parts"),
    [
        ([250, 0, 64], 1, 20, 300, 1),  # four tiles in two places
        pytest.param([700], 2, 80, 900, 3, marks=pytest.mark.slow),  # 20 s
    ],
    ids=["rows of any length", "two blocks of heads, two tokens, split keys"],
)
def test_latent_decode_equals_the_reference(lengths, T, N, S, parts, monkeypatch, capfd):
    pytest.importorskip("jax", minversion="0.11.2", reason="this JAX does not interpret the kernel")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, z, places = latents(lengths, T, N, S)
    monkeypatch.setattr(mosaic_latents, "num_splits", lambda *_, **__: parts)
    params = plgpu.InterpretGPUParams(detect_races=True)
    o, lse = mosaic_latents.latent_decode(q, z, places, RULE, interpret=params)
    k = z[:, None]
    wanted_o, wanted_lse = reference.forward(q, k, k[..., :512], places, RULE)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)
    o, wanted_o = np.float32(o), np.float32(wanted_o)
    np.testing.assert_allclose(o, wanted_o, atol=1e-2 * np.max(np.abs(wanted_o)))
    assert "race" not in capfd.readouterr().out.lower()


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2])
def test_latent_decode_compiles_to_asynchronous_products(card, T, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    with jax.set_mesh(card):
        place = jax.NamedSharding(card, jax.P())
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(lambda: latents([4096] * 4, T, 128, 8192)),
        )

        def decode(q, z, places):
            return mosaic_latents.latent_decode(q, z, places, RULE)

        decode = jax.shard_map(decode, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        program = jax.jit(decode).lower(*shapes).compile()
    text = capfd.readouterr().out
    assert ".target sm_90a" in text
    # two warpgroups: 36 steps of 16 for scores, two halves of two steps of 16 for sums
    assert len(re.findall(r"wgmma\.mma_async\S*m64n32k16", text)) == 2 * 36
    assert len(re.findall(r"wgmma\.mma_async\S*m64n256k16", text)) == 2 * 4
    # outputs of parts, and what is hidden; no copy of the latents, which are 36 MiB
    parts = 132 // (4 * T * 2)
    outputs = parts * 4 * T * 128 * 512 * 4
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * outputs


def test_what_latent_decode_cannot_do_it_says():
    def reason(width=576, value=512, T=1, dtype="bfloat16", **rule):
        q, z = jnp.zeros((1, 2, T, width), dtype), jnp.zeros((1, 8, width), dtype)
        return mosaic_latents.latent_refusal(q, z, value, Rule(**rule))

    assert reason() is None
    assert reason(width=320, value=256) == "latents of 576 with values of 512, not 320 with 256"
    assert reason(T=9) == "9 queries a row, at most 8"
    assert reason(dtype="float32") == "it multiplies bfloat16 and float16, not float32"
    assert reason(soft_cap=1.0) == "a bias, a soft cap or a scale of 0 or less"


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA A100"])
def test_it_takes_what_a_hopper_gpu_reads_once_for_keys_and_values(kind, monkeypatch):
    monkeypatch.setattr(mosaic_latents, "device_kind", lambda: kind)
    q, z = jnp.zeros((1, 2, 1, 576), "bfloat16"), jnp.zeros((1, 1, 8, 576), "bfloat16")

    def reason(z, rule, backward=False):
        return mosaic_latents.refusal(q, z, z[..., :512], rule, backward)

    latent = RULE._replace(value_width=512)
    assert reason(z, latent, backward=True) == "it has no backward pass"
    assert reason(z, RULE) == "its values are the first numbers of the keys of one head"
    assert reason(jnp.concatenate([z, z], 1), latent) == reason(z, RULE)
    is_hopper = "A100" not in kind
    assert (reason(z, latent) is None) == is_hopper
