"""S2-Attn is a mask, sees nothing ahead or across the ends, and costs less than attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.kernels.flash_attention import attention
from llmprep_jax.nn.attention import Tokens, attend
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft import LongLoRA, LoRA
from llmprep_jax.peft.longlora import ShiftedAttention
from llmprep_jax.peft.tuned import tuned
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.models.tiny import CONFIGS, make_tokens, random_model
from tests.peft.test_methods import assert_near, base, scattered, small
from tests.random_modules import random_module

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make(T: int, N: int, K: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (2, T, N, 8), (2, T, K, 8), (2, T, K, 8)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_segments(q_BTNH, k_BTKH, v_BTKH, tokens, groups, window=None):
    """The same one head at a time, with a segment for each group of each document."""
    T, N = q_BTNH.shape[1:3]
    half = -(-T // (2 * groups))
    heads = []
    for n in range(N):
        group = (np.arange(T) + (half if n >= N // 2 else 0)) // (2 * half)
        documents = 1 if tokens.segments_BT is None else tokens.segments_BT
        segments = jnp.where(documents > 0, documents * 100 + group, 0) * jnp.ones((2, 1), int)
        k = n // (N // k_BTKH.shape[2])
        one = q_BTNH[:, :, n : n + 1], k_BTKH[:, :, k : k + 1], v_BTKH[:, :, k : k + 1]
        places = tokens.positions_BT, tokens.positions_BT, segments, segments
        names = ("q_positions", "k_positions", "q_segments", "k_segments")
        places = dict(zip(names, places, strict=True))
        heads.append(attention(*one, **places, window=window, scale=0.3, impl="reference"))
    return jnp.concatenate(heads, axis=2)


@pytest.mark.parametrize(
    ("T", "N", "K", "groups", "window", "packed"),
    [(16, 4, 2, 4, 5, True), (16, 2, 1, 2, None, False), (24, 3, 3, 4, None, True),
     (21, 2, 2, 4, None, False), (3, 2, 1, 4, None, True)],
    ids=["gqa-window", "mqa", "odd", "padded", "short"],
)  # fmt: skip
def test_shifted_attention_is_attention_with_a_segment_for_each_group(
    T, N, K, groups, window, packed
):
    q, k, v = make(T, N, K)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    tokens = Tokens(places)
    if packed:  # documents of 7 tokens, and padding at the end
        segments = places // 7 + 1
        tokens = Tokens(places % 7, np.where(places < T - 2, segments, 0))
    found, expected = jax.jit(
        lambda *at: (
            ShiftedAttention(groups)(*at, window=window, scale=0.3),
            by_segments(*at, groups, window),
        ),
        compiler_options=QUICK,
    )(q, k, v, tokens)
    real = slice(None, T - 2) if packed else slice(None)
    np.testing.assert_allclose(found[:, real], expected[:, real], atol=1e-5)


def test_no_token_sees_ahead_across_the_ends_or_out_of_its_group():
    T, groups = 16, 4
    q, k, v = make(T, 2, 2)
    tokens = Tokens(np.broadcast_to(np.arange(T, dtype=np.int32), (2, T)))

    def outputs(v):
        return ShiftedAttention(groups)(q, k, v, tokens, scale=0.3)[0].sum(-1)

    jacobian = jax.jit(jax.jacobian(outputs), compiler_options=QUICK)
    reach = np.abs(jacobian(v)[:, :, 0]).sum(-1)  # [T, N, S, K]
    sees = [(reach[:, head, :, head] > 0).astype(int) for head in (0, 1)]
    straight, shifted = [np.arange(T) // 4, (np.arange(T) + 2) // 4]
    for found, group in zip(sees, (straight, shifted), strict=True):
        expected = np.tril(group[:, None] == group[None, :])
        np.testing.assert_array_equal(found, expected)
    assert sees[1][:2].sum() == 3  # the first two tokens see themselves and none of the last two
    assert sees[1][-2:, :2].sum() == 0


def test_it_costs_less_than_full_attention():
    T = 2048
    tokens = Tokens(np.broadcast_to(np.arange(T, dtype=np.int32), (1, T)), in_order=True)
    qkv = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, 4, 64), (1, T, 2, 64), (1, T, 2, 64))
    ]

    def flops(attention):
        run = jax.jit(lambda q, k, v: attention(q, k, v, tokens, scale=0.1))
        return run.lower(*qkv).cost_analysis()["flops"]

    # of T^2 / 2 pairs 1/4, and what blocks of queries compute beyond the diagonal
    assert flops(ShiftedAttention(4)) < 0.4 * flops(attend)
    assert flops(ShiftedAttention(8)) < 0.25 * flops(attend)


@functools.cache
def adapted() -> nnx.Module:
    return scattered(lp.peft.inject(base(), LongLoRA(rank=4)))


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def logits_of(model: nnx.Module, training: bool) -> jax.Array:
    return (lp.peft.train_mode(model) if training else model)(make_tokens(8)).logits


def test_embeddings_and_norms_are_trained_beside_attention_and_the_head_is_not():
    assert tuned(adapted()).keys() == {"embed", "norm", "layers.attn_norm", "layers.mlp_norm"}
    assert lp.peft.adapter.methods(adapted()).keys() == {f"layers.attn.{name}" for name in "qkvo"}


def test_it_starts_as_identity_and_training_alone_attends_in_groups():
    fresh = lp.peft.inject(base(), LongLoRA(rank=4))
    np.testing.assert_array_equal(logits_of(fresh, False), logits_of(base(), False))
    plain, training = logits_of(adapted(), False), logits_of(adapted(), True)
    assert np.abs(plain - training).max() > 0.01
    np.testing.assert_allclose(plain[:, :2], training[:, :2], atol=1e-5)  # of the first group
    assert_near(logits_of(lp.peft.merge(adapted()), False), plain)
    assert lp.peft.train_mode(base()) is base()


def test_the_switch_leaves_the_model_alone_and_a_cache_is_never_grouped():
    model, tokens = adapted(), make_tokens()
    switched = lp.peft.train_mode(model)
    assert model.layers.attn.within is attend
    assert switched.layers.attn.within == ShiftedAttention(4)
    assert switched.layers.attn.q.lora_a is model.layers.attn.q.lora_a
    run = jax.jit(lambda model: model(tokens, cache=model.init_cache(2, 14)).logits)
    np.testing.assert_array_equal(run(switched), run(model))


def test_a_folder_is_that_of_a_lora_with_modules_trained_whole(tmp_path):
    folder = lp.peft.save(adapted(), tmp_path / "adapter")
    found = lp.peft.load(base(), folder)
    assert type(found.layers.attn.q.method) is LoRA
    np.testing.assert_array_equal(logits_of(found, False), logits_of(adapted(), False))


def test_causality_by_gradient_of_a_whole_model_with_packed_rows():
    two_layers = random_model(dataclasses.replace(CONFIGS["gemma3"], num_layers=2))
    model = lp.peft.train_mode(scattered(lp.peft.inject(two_layers, LongLoRA(rank=4))))
    tokens, segments = make_tokens(1, 16), np.repeat([[1, 2]], 8, axis=1).astype(np.int32)
    places = np.tile(np.arange(8, dtype=np.int32), (1, 2))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def reach(query):
        def out(shift):
            embed = model.embed

            class Moved(nnx.Module):
                table_dtype = embed.table_dtype

                def __call__(self, ids):
                    return embed(ids) + shift

                def unembed(self, x):
                    return embed.unembed(x)

            graph, state = nnx.split(model)
            moved = nnx.merge(graph, state)
            moved.embed = Moved()
            logits = moved(tokens, segment_ids=segments, positions=places).logits
            return jnp.sum(logits[0] * query)

        return jnp.abs(jax.grad(out)(jnp.zeros((1, 16, 48)))).sum((0, 2))

    for at in (3, 7, 11):
        found = reach(np.eye(16, dtype=np.float32)[at][:, None] * np.ones(96, np.float32)) > 0
        assert not found[at + 1 :].any()
        assert found[at]
        assert not found[: at // 8 * 8].any()


@pytest.mark.slow  # compiles for eight devices
def test_scanned_layers_remat_and_a_mesh_change_nothing():
    method = LongLoRA(rank=4)

    def make_small(remat="none"):
        return random_module(lambda: lp.peft.inject(small(remat), method))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model):
        graph, trained, frozen = nnx.split(model, AdapterParam, ...)

        def loss(trained):
            model = lp.peft.train_mode(nnx.merge(graph, trained, frozen))
            logits = model(make_tokens(8)).logits
            return jnp.square(logits).mean(), logits

        return jax.grad(loss, has_aux=True)(trained)

    grads, logits = run(make_small())
    assert_near(run(make_small("full")), (grads, logits))
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        assert_near(run(make_small()), (grads, logits), 2e-5)


@pytest.mark.parametrize("groups", [1, 0])
def test_fewer_than_two_groups_are_refused(groups):
    with pytest.raises(ValueError, match=r"groups is .*; it must be at least 2"):
        LongLoRA(groups=groups)
