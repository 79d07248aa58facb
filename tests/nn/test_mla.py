"""Latent attention: its forms are one function, and its scale is the released one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.nn.attention import Tokens, visible
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


@functools.partial(jax.jit, static_argnums=2)
def attend(mla: MLA, args: tuple, absorbed: bool) -> jax.Array:
    return mla.attend(*args, absorbed=absorbed)


@pytest.mark.parametrize(("q_rank", "interleaved"), [(None, True), (14, False)])
def test_naive_and_absorbed_forms_agree(q_rank, interleaved):
    mla = make(q_rank, interleaved=interleaved)
    x = jax.random.normal(jax.random.key(1), (2, S, D))
    place = Tokens(jnp.tile(jnp.arange(S), (2, 1)), jnp.ones((2, S), jnp.int32))
    rope = rope_of(place.positions_BT)
    last = place.block(S - T, S)
    q = [z[:, S - T :] for z in mla.queries(x, rope)]
    args = (*q, mla.latents(x, rope), visible(last, place))
    naive, absorbed = [attend(mla, args, form) for form in (False, True)]
    np.testing.assert_allclose(naive, absorbed, atol=1e-5)
    whole, _ = jax.jit(lambda mla, x: mla(x, place, rope))(mla, x)
    np.testing.assert_allclose(naive, whole[:, S - T :], atol=1e-5)


@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_over_a_cache_equal_the_whole(monkeypatch, absorbed):
    monkeypatch.setattr(MLA, "absorbed_is_cheaper", lambda *_: absorbed)
    mla, x = make(), jax.random.normal(jax.random.key(1), (2, S, D))
    positions = jnp.tile(jnp.arange(S), (2, 1))
    whole, _ = mla(x, Tokens(positions), rope_of(positions))
    cache, found = KVCache.create(1, 2, S + 3, 1, 24, value_dim=0), []

    @jax.jit
    def step(mla, x, place, rope, cache):
        y, cache = mla(x, place, rope, cache)
        return y, cache.end()

    for part in (slice(0, 4), slice(4, 5), slice(5, S)):
        place = Tokens(positions[:, part], jnp.ones_like(positions[:, part]))
        cache = cache.begin(place.positions_BT, place.segments_BT)
        y, cache = step(mla, x[:, part], place, rope_of(positions[:, part]), cache)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-5)


def test_gradients_of_the_forms_agree():
    mla, x = make(), jax.random.normal(jax.random.key(1), (1, S, D))
    place = Tokens(jnp.arange(S)[None])
    rope, seen = rope_of(place.positions_BT), visible(place, place)

    def loss(mla, x, absorbed):
        out = mla.attend(*mla.queries(x, rope), mla.latents(x, rope), seen, absorbed=absorbed)
        return jnp.square(out).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    grads = [grad(mla, x, form) for form in (True, False)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


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
    make = lambda **more: MLA(8, 1, **sizes, **more, compute=Compute(), rngs=nnx.Rngs(0))  # noqa: E731
    assert make(rope_scaling=scaling).scale == pytest.approx(scale, rel=1e-6)
    assert make(rope_scaling=None).scale == pytest.approx(0.07216878, rel=1e-6)
    assert rope_frequencies(64, 1e4, scaling)[1] == 1.0
    one = dataclasses.replace(scaling, mscale_all_dim=0.0)
    assert make(rope_scaling=one).scale == pytest.approx(0.07216878, rel=1e-6)
