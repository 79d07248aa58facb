"""Latent attention: its forms are one function, and its scale is the released one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.nn.attention import Tokens
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.mla import MLA
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.rope import RopeScaling, rope_angles, rope_frequencies
from tests.random_modules import random_module

D, N, T, S = 24, 3, 5, 9
SIZES = dict(nope_dim=12, rope_dim=8, value_dim=10, kv_rank=16)


def make(q_rank: int | None = 14, **more) -> MLA:
    return random_module(
        lambda: MLA(D, N, **SIZES, q_rank=q_rank, compute=Compute(), rngs=nnx.Rngs(0), **more)
    )


def rope_of(positions: np.ndarray) -> tuple:
    return rope_angles(jnp.asarray(positions), *rope_frequencies(SIZES["rope_dim"], 1e4))


def draw() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, S, D)).astype(np.float32)


PLACE = Tokens(np.tile(np.arange(S, dtype=np.int32), (2, 1)), np.ones((2, S), np.int32))


def columns(start: int, stop: int) -> Tokens:
    return jax.tree.map(lambda x: x[:, start:stop], PLACE)


@jax.jit
def run(mla: MLA, x: np.ndarray) -> jax.Array:
    return mla(x, PLACE, rope_of(PLACE.positions_BT))[0]


@functools.partial(jax.jit, static_argnums=2)
def gradients(mla: MLA, x: np.ndarray, absorbed: bool) -> tuple:
    """(result for the last T tokens, gradients of its sum of squares) of one form."""

    def loss(mla, x):
        rope, last = rope_of(PLACE.positions_BT), columns(S - T, S)
        q = [z[:, S - T :] for z in mla.queries(x, rope)]
        out = mla.attend(*q, mla.latents(x, rope), last, PLACE, absorbed=absorbed)
        return jnp.square(out).sum(), out

    grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(mla, x)
    return out, grads


@pytest.mark.parametrize(("q_rank", "interleaved"), [(None, True), (14, False)])
def test_naive_and_absorbed_forms_and_their_gradients_agree(q_rank, interleaved):
    mla, x = make(q_rank, interleaved=interleaved), draw()
    (absorbed, grads), (naive, expected) = [gradients(mla, x, form) for form in (True, False)]
    np.testing.assert_allclose(naive, absorbed, atol=1e-5)
    np.testing.assert_allclose(naive, run(mla, x)[:, S - T :], atol=1e-5)
    for found, wanted in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_over_a_cache_equal_the_whole(monkeypatch, absorbed):
    mla, x = make(), draw()
    whole = run(mla, x)
    monkeypatch.setattr(MLA, "absorbed_is_cheaper", lambda *_: absorbed)
    cache, found = KVCache.create(1, 2, S + 2, 1, (24,)), []  # 11 slots are no whole blocks of 4

    @jax.jit
    def step(mla, x, place, cache):
        cache = cache.begin(place.positions_BT, place.segments_BT)
        y, cache = mla(x, place, rope_of(place.positions_BT), cache)
        return y, cache.end()

    for start, stop in ((0, 4), (4, 5), (5, S)):
        y, cache = step(mla, x[:, start:stop], columns(start, stop), cache)
        found.append(y)
    np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=1e-5)


def test_of_a_cache_no_more_is_expanded_at_once_than_a_block_has_tokens(monkeypatch):
    monkeypatch.setattr(MLA, "absorbed_is_cheaper", lambda *_: False)
    mla, x = make(), np.ones((2, 64, D), np.float32)
    place = Tokens(np.tile(np.arange(64, dtype=np.int32), (2, 1)), np.ones((2, 64), np.int32))

    def temporaries(num_slots):
        leaves, structure = jax.tree.flatten(KVCache.create(1, 2, num_slots, 1, (24,)))

        def step(mla, leaves):
            cache = structure.unflatten(leaves).begin(place.positions_BT, place.segments_BT)
            y, cache = mla(x, place, rope_of(place.positions_BT), cache)
            return y, jax.tree.leaves(cache.end())

        program = jax.jit(step, donate_argnums=1).lower(mla, leaves).compile()
        return program.memory_analysis().temp_size_in_bytes

    each = 2 * N * (12 + 8 + 10) * 4  # bytes of a slot's keys and values, of both rows
    assert temporaries(2048) - temporaries(512) < 0.7 * (2048 - 512) * each


def test_at_release_sizes_up_to_170_queries_are_absorbed():
    cfg = registry.preset("deepseek-v3")
    sizes = {name: getattr(cfg, name) for name in ("nope_dim", "rope_dim", "value_dim", "kv_rank")}
    mla = jax.eval_shape(
        lambda: MLA(8, 1, **sizes, q_rank=None, compute=Compute(), rngs=nnx.Rngs(0))
    )
    assert mla.absorbed_is_cheaper(1, 4096)
    assert mla.absorbed_is_cheaper(160, 4096)
    assert not mla.absorbed_is_cheaper(180, 4096)
    assert not mla.absorbed_is_cheaper(4096, 4096)


@pytest.mark.parametrize(("mscale", "scale"), [(0.707, 0.11472139), (1.0, 0.13523378)])
def test_the_softmax_scale_has_yarns_temperature(mscale, scale):
    scaling = RopeScaling("yarn", 40.0, 4096, mscale=mscale, mscale_all_dim=mscale)
    sizes = dict(nope_dim=128, rope_dim=64, value_dim=128, kv_rank=16, q_rank=None)

    def make(**more):
        more |= sizes
        return jax.eval_shape(lambda: MLA(8, 1, **more, compute=Compute(), rngs=nnx.Rngs(0)))

    assert make(rope_scaling=scaling).scale == pytest.approx(scale, rel=1e-6)
    assert make(rope_scaling=None).scale == pytest.approx(0.07216878, rel=1e-6)
    assert rope_frequencies(64, 1e4, scaling)[1] == 1.0
    one = dataclasses.replace(scaling, mscale_all_dim=0.0)
    assert make(rope_scaling=one).scale == pytest.approx(0.07216878, rel=1e-6)
