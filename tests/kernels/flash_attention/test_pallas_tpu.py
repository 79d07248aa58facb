"""The TPU kernels against the reference, interpreted on a CPU, and what of the keys they read."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels.flash_attention import attention, pallas_tpu, reference, tpu_tiles
from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from tests.grids import cases
from tests.kernels.flash_attention.problems import Problem, assert_close, run

FAST = [
    Problem(values="psi", window=9, soft_cap=3.0, bias="function"),
    Problem(T=37, S=61, H=24, U=8, values="r", sinks=True, bias="factors"),
    Problem(T=5, S=24, N=6, K=2, values="pe", bias="function"),  # heads folded into rows
    Problem(T=45, N=2, causal=False, window=5, dtype="bfloat16"),
]
REST = [
    Problem(),
    Problem(T=50, K=4, soft_cap=2.0),
    Problem(K=1, N=8, values="s", window=20, sinks=True),
    Problem(T=64, values="i"),
    Problem(T=64, values="ri", window=17, dtype="bfloat16"),
    Problem(T=41, causal=False, values="e", bias="function"),
    Problem(causal=False, values="psi", window=7, bias="factors"),
    Problem(S=96, values="pse", soft_cap=4.0, dtype="bfloat16"),
    Problem(T=1, S=70, N=8, K=1, H=36, U=32, values="p", sinks=True),
    Problem(T=1, S=70, N=4, K=4, values="p", window=11),
    Problem(T=2, S=70, N=6, K=2, window=30, bias="function", dtype="bfloat16"),
    Problem(T=65, S=33, H=12, U=8, window=40, bias="factors", sinks=True),
    Problem(T=16, S=16, N=2, H=8, U=24, soft_cap=1.0, bias="function"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of which short rows have several, and which divide few lengths."""
    monkeypatch.setattr(pallas_tpu, "Q_BLOCK", 16)
    monkeypatch.setattr(pallas_tpu, "K_BLOCK", 32)
    monkeypatch.setattr(pallas_tpu, "WIDE", 16)  # half the keys for wider heads
    monkeypatch.setattr(pallas_tpu, "FEW", 4)  # twice the keys for fewer rows


@pytest.mark.parametrize("problem", cases([*FAST, *REST], fast=FAST), ids=str)
def test_it_computes_what_the_reference_does(problem):
    tolerance = 2e-2 if problem.dtype == "bfloat16" else 1e-5
    assert_close(run(problem, "pallas_tpu"), run(problem, "reference"), tolerance)


@pytest.mark.slow  # each step of the grid by itself, in Python: 20 s
@pytest.mark.parametrize(
    "problem",
    [
        Problem(values="psi", window=20, soft_cap=3.0),
        Problem(T=37, S=61, K=1, H=24, U=8),
        Problem(T=5, S=24, N=6, K=2, values="pe", bias="function"),
    ],
    ids=str,
)
def test_no_step_of_the_grid_races_with_another(problem, capfd):
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(params):
        found = run(problem, "pallas_tpu")
    assert "race" not in capfd.readouterr().out.lower()
    assert_close(found, run(problem, "reference"), 1e-5)


def test_latents_are_read_for_keys_and_values():
    draw = np.random.default_rng(0).standard_normal
    q, z = [jnp.array(draw(shape), "float32") for shape in ((3, 4, 1, 36), (3, 1, 70, 36))]
    lengths, slots = np.array([[40], [5], [0]]), np.tile(np.arange(70), (3, 1))
    sides = Places(lengths, lengths > 0), Places(slots, slots <= lengths)  # the last row is empty
    sides = jax.tree.map(lambda x: jnp.array(x, "int32"), sides)
    rule = Rule(scale=0.2)
    found = pallas_tpu.latent_forward(q, z, 32, sides, rule)
    wanted = reference.forward(q, z, z[..., :32], sides, rule)
    names = "o", "lse"
    found, wanted = [dict(zip(names, x, strict=True)) for x in (found, wanted)]
    assert_close(found, wanted, 1e-5)


def test_values_that_are_the_first_of_keys_are_so_by_every_way(monkeypatch):
    draw = np.random.default_rng(0).standard_normal
    q, z = [jnp.array(draw(shape), "float32") for shape in ((2, 3, 4, 136), (2, 40, 1, 136))]
    places = dict(q_positions=np.array([[7, 8, 9]] * 2), k_positions=np.tile(np.arange(40), (2, 1)))
    called = []
    latent_forward = pallas_tpu.latent_forward
    monkeypatch.setattr(
        pallas_tpu, "latent_forward", lambda *x: called.append(x[2]) or latent_forward(*x)
    )

    def loss(q, z, impl, width):
        v = None if width else z[..., :128]
        o = attention(q, z, v, value_width=width, impl=impl, **places)
        return jnp.sum(jnp.sin(o)), o

    gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=(2, 3))
    wanted = gradients(q, z, "reference", None)
    for impl in ("chunked", "pallas_tpu"):
        chex.assert_trees_all_close(gradients(q, z, impl, 128), wanted, atol=1e-5)
    assert called == [128]


def ranges_of(q_positions, k_positions, window=None, segments=(None, None)):
    """(first, after the last) block of keys, of 32, by block of 16 queries, and the table."""
    q, k = [
        Places(jnp.array(x), None if s is None else jnp.array(s))
        for x, s in zip((q_positions, k_positions), segments, strict=True)
    ]
    T, S = len(q_positions[0]), len(k_positions[0])
    names = ("positions", "segments")[: 1 + (segments[0] is not None)]
    spec = tpu_tiles.Spec(Rule(window=window), T, S, min(T, 16), 32, 1, 1, names, True)
    table = tpu_tiles.table_of(q, k, spec)
    steps = tpu_tiles.num_steps(table.q_low, table.q_high)
    return list(zip(*map(np.asarray, (table.q_low, table.q_high)), strict=True)), int(steps), table


def test_only_blocks_that_may_be_seen_are_fetched():
    columns = np.arange(128)[None]
    assert ranges_of(columns, columns)[:2] == (
        [(0, 1), (0, 1), (0, 2), (0, 2), (0, 3), (0, 3), (0, 4), (0, 4)],
        4,
    )
    assert ranges_of(columns, columns, window=20)[:2] == (
        [(0, 1), (0, 1), (0, 2), (0, 2), (1, 3), (1, 3), (2, 4), (2, 4)],
        2,
    )
    # a row of decoding reads its own length, however long the cache
    lengths = [[40], [5], [0]]
    segments = np.array([[1], [1], [0]]), (np.arange(128) <= np.array(lengths)).astype(int)
    found, steps, _ = ranges_of(lengths, columns.repeat(3, 0), segments=segments)
    assert (found, steps) == ([(0, 2), (0, 1), (0, 0)], 2)


def test_tiles_that_are_seen_whole_need_no_mask():
    columns = np.arange(64)[None]
    words = np.asarray(ranges_of(columns, columns)[2].kinds)
    assert words.tolist() == [1, 1, 2 + 4, 2 + 4]  # 1: partly, 2: wholly, 4: the next one partly
    words = np.asarray(ranges_of(columns, columns, window=40)[2].kinds)
    assert words.tolist() == [1, 1, 1 + 4, 1 + 4]
    segments = np.where(columns < 40, 1, 0), np.where(columns < 40, 1, 0)
    words = np.asarray(ranges_of(columns, columns, segments=segments)[2].kinds)
    assert words.tolist() == [1, 1, 1 + 12, 0]  # 12: the next one partly, with padding


def test_what_it_cannot_do_it_says():
    def reason(width=16, dtype="float32", tokens=4):
        x = jnp.zeros((1, 2, tokens, width), dtype)
        return pallas_tpu.refusal(x, x, x, Rule(), False)

    assert reason() is None
    assert reason(dtype="bfloat16") is None
    assert reason(dtype="float16") == "it multiplies float32 and bfloat16, not float16"
    assert reason(width=1100) == "a head may be 1024 wide, not 1100"
    assert reason(tokens=0) == "an array is empty"
