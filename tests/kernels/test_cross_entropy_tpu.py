"""The loss by TPU kernels against the reference, interpreted on a CPU, and as compiled for TPUs."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels.cross_entropy import linear_cross_entropy, pallas_tpu
from tests.grids import cases
from tests.kernels.ahead import TPUS, temporaries, tpu_devices

D, TERMS = 128, dict(label_smoothing=0.1, soft_cap=3.0, z_loss=1e-2)


def make_inputs(N, V, dtype=np.float32, is_table=False):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(N, D)), rng.normal(size=(V, D) if is_table else (D, V)) / 8
    targets = rng.integers(0, V, N)
    targets[[3, N - 2]] = -1
    weights = rng.normal(size=N).astype(np.float32)
    return x.astype(dtype), w.astype(dtype), targets, weights


def run(arrays, impl, **options):
    """Losses, and the gradients of their weighted sum."""

    def total(x, w, targets, weights):
        losses = linear_cross_entropy(x, w, targets, impl=impl, **options)
        return jnp.sum(losses * weights), losses

    gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, losses), gradients = gradient(*arrays)
    return losses, *gradients


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "N_BLOCK", 16)
    monkeypatch.setattr(pallas_tpu, "V_BLOCK", 128)


# tokens, words, whether the weights are a table, further terms: 1 to 3 blocks of tokens, 1 to 4 of
# words, of which an odd number is halved unevenly
GRID = list(itertools.product((40, 16, 30), (300, 384, 512, 100), (True, False), (True, False)))
FAST = [(40, 300, True, True), (16, 384, False, False)]


@pytest.mark.parametrize(("N", "V", "is_table", "has_terms"), cases(GRID, fast=FAST))
def test_losses_and_gradients_are_those_of_the_reference(N, V, is_table, has_terms):
    arrays, terms = make_inputs(N, V, is_table=is_table), TERMS if has_terms else {}
    expected = run(arrays, "reference", is_table=is_table, **terms)
    found = run(arrays, "pallas_tpu", is_table=is_table, **terms)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_table", cases([True, False]))
def test_bf16_sums_are_in_float32(is_table):
    x, w, targets, weights = make_inputs(24, 300, jnp.bfloat16, is_table)
    exact = run((x.astype("f4"), w.astype("f4"), targets, weights), "reference", is_table=is_table)
    many = [np.concatenate([a] * 256) for a in (x, targets, weights)]  # 6,144 tokens
    losses, dx, dw = run((many[0], w, *many[1:]), "pallas_tpu", is_table=is_table)
    for ours, theirs in zip((losses[:24], dx[:24], dw / 256), exact, strict=True):
        error = np.linalg.norm(ours.astype(np.float32) - theirs) / np.linalg.norm(theirs)
        assert error < 6e-3


def test_an_ignored_token_gives_nothing_even_with_infinite_logits():
    x, w, targets, weights = make_inputs(40, 300)
    w[:, 5], x[3] = np.abs(w[:, 5]), 1e38
    losses, dx, dw = run((x, w, targets, weights), "pallas_tpu")
    assert losses[3] == 0
    assert not dx[3].any()
    chex.assert_tree_all_finite((losses, dx, dw))


def test_devices_share_the_words():
    arrays = make_inputs(40, 8 * 150)  # two blocks of 128 words hang over each device's 150
    expected = run(arrays, "reference")
    mesh = jax.make_mesh((8,), ("a",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, w, *rest = arrays
        w = jax.device_put(w, jax.P(None, "a"))
        found = run((x, w, *rest), "pallas_tpu")
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=2e-5
    )


def test_what_the_kernels_cannot_do_chunks_do():
    x, w, targets, weights = make_inputs(24, 300)
    arrays = x[:, :100], w[:100], targets, weights
    with pytest.warns(UserWarning, match=r"cannot do this \(a width of 100: .*\); chunks do"):
        found = run(arrays, "pallas_tpu")
    chex.assert_trees_all_close(found, run(arrays, "reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # each step of the grid by itself, in Python: 10 s
@pytest.mark.parametrize("N", [40, 16])
def test_no_step_of_the_grid_races_with_another(N, capfd):
    arrays = make_inputs(N, 300)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(params):
        found = run(arrays, "pallas_tpu")
    assert "race" not in capfd.readouterr().out.lower()
    chex.assert_trees_all_close(found, run(arrays, "reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(  # 5 s each
    ("chip", "is_table", "width"),
    cases(
        list(itertools.product(TPUS, (True, False), (2560, 7168))),
        slow=[("v5p", True, 2560), ("v5e", False, 2560), ("tpu7x", True, 7168)],
    ),
)
def test_a_vocabulary_of_gemma_takes_no_more_than_sums_of_the_tokens(
    chip, is_table, width, monkeypatch
):
    monkeypatch.undo()
    mesh = jax.make_mesh(
        (1,), ("data",), (jax.sharding.AxisType.Explicit,), devices=tpu_devices(chip)[:1]
    )
    place, V = jax.NamedSharding(mesh, jax.P()), 262144
    x, w, targets = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in (
            ((4096, width), jnp.bfloat16),
            ((V, width) if is_table else (width, V), jnp.bfloat16),
            ((4096,), jnp.int32),
        )
    ]

    def total(x, w, targets):
        return jnp.sum(linear_cross_entropy(x, w, targets, is_table=is_table))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(x, w, targets).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2
    of_tokens = 4096 * width * 4 / 2**20  # MiB in float32
    assert temporaries(program) < 2.2 * of_tokens
