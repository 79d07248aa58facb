"""Balance: losses by their formulas on small numbers, the bias rule, and the measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.nn.balance import Balance, load_metrics, measure, rebalanced

EXPERTS = jnp.array([[[0, 1], [0, 2], [0, 3]]])  # one row of three tokens, two of four experts each
SCORES = jnp.array([[[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]]])


def test_the_expert_loss_is_alpha_sum_f_p():
    load = measure(EXPERTS, SCORES, None, Balance(expert=0.5))
    f = np.array([3, 1, 1, 1]) * 4 / (2 * 3)
    p = np.array([1.5, 0.5, 0.7, 0.3]) / 3
    np.testing.assert_allclose(load.loss, 0.5 * (f * p).sum(), rtol=1e-6)
    np.testing.assert_array_equal(load.counts_E, [3, 1, 1, 1])


def test_the_device_loss_takes_mean_loads_and_summed_scores_of_groups():
    load = measure(EXPERTS, SCORES, None, Balance(device=1.0), num_groups=2, num_active_groups=2)
    f = np.array([4, 2]) / 2 * 4 / (2 * 3)
    p = np.array([2.0, 1.0]) / 3
    np.testing.assert_allclose(load.loss, (f * p).sum(), rtol=1e-6)


@pytest.mark.parametrize("num_active", [1, 2])
def test_the_communication_loss_counts_a_token_once_a_device(num_active):
    load = measure(EXPERTS, SCORES, None, Balance(communication=1.0), 2, num_active)
    # the first token's two experts are on one device
    f, p = np.array([3, 2]) * 2 / (num_active * 3), np.array([2.0, 1.0]) / 3
    np.testing.assert_allclose(load.loss, (f * p).sum(), rtol=1e-6)


def test_sigmoid_scores_enter_as_shares():
    balance = Balance(expert=1.0)
    found = measure(EXPERTS, 3.0 * SCORES, None, balance).loss
    np.testing.assert_allclose(found, measure(EXPERTS, SCORES, None, balance).loss, rtol=1e-6)


def test_each_row_is_balanced_by_itself_and_weighs_by_its_tokens():
    experts = jnp.concatenate([EXPERTS, EXPERTS[:, ::-1]])
    scores = jnp.concatenate([SCORES, SCORES[:, ::-1]])
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    balance = Balance(expert=1.0, device=0.5, communication=0.25)
    groups = (2, 1)
    whole = measure(experts, scores, mask, balance, *groups).loss
    first = measure(experts[:1], scores[:1], None, balance, *groups).loss
    second = measure(experts[1:, :1], scores[1:, :1], None, balance, *groups).loss
    np.testing.assert_allclose(whole, (3 * first + second) / 4, rtol=1e-6)


def test_the_loss_has_a_gradient_by_scores_that_falls_with_the_load():
    grad = jax.grad(lambda s: measure(EXPERTS, s, None, Balance(expert=1.0)).loss)(SCORES)
    assert np.all(grad[..., 0] > grad[..., 1])


def test_the_bias_moves_by_the_rate_towards_the_mean():
    counts = jnp.array([[3.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    found = rebalanced(jnp.ones((2, 4)), counts, 0.01)
    np.testing.assert_allclose(found, [[0.99, 1.01, 1.01, 0.99], [1, 1, 1, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "max_vio", "entropy"),
    [([[2, 2, 2, 2]], 0.0, 1.0), ([[8, 0, 0, 0]], 3.0, 0.0), ([[4, 4, 0, 0]], 1.0, 0.5)],
)
def test_measures_of_the_load(counts, max_vio, entropy):
    found = load_metrics(jnp.array(counts, jnp.float32))
    assert found["max_vio"] == pytest.approx(max_vio)
    assert found["load_entropy"] == pytest.approx(entropy, abs=1e-6)
