"""What a reward model is fitted by, and what is measured of it, by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bond_jax.measures import curves
from bond_jax.measures import preferences as measures
from bond_jax.reward_models import losses

CHOSEN = np.array([1.5, -0.3, 0.0, 4.0])
REJECTED = np.array([0.5, 1.1, 0.0, -3.0])
MARGIN = np.array([0.2, 0.0, 1.3, 2.0])
RATING = np.array([0.1, -1.0, 2.0, 0.0])


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


CLOSED = {  # value, and derivative by the first argument
  'bradley_terry': (
    losses.bradley_terry,
    (CHOSEN, REJECTED),
    -np.log(sigmoid(CHOSEN - REJECTED)),
    -sigmoid(REJECTED - CHOSEN),
  ),
  'margin': (
    losses.bradley_terry_margin,
    (CHOSEN, REJECTED, MARGIN),
    -np.log(sigmoid(CHOSEN - REJECTED - MARGIN)),
    -sigmoid(REJECTED - CHOSEN + MARGIN),
  ),
  'regression': (
    losses.squared_error,
    (CHOSEN, RATING),
    (CHOSEN - RATING) ** 2,
    2 * (CHOSEN - RATING),
  ),
}


@pytest.mark.parametrize('name', CLOSED)
def test_losses_are_their_formulas(name, x64):
  loss, args, value, slope = CLOSED[name]
  np.testing.assert_allclose(loss(*args), value, rtol=1e-12)
  total = lambda *a: loss(*a).sum()
  by_first, by_second = jax.grad(total, (0, 1))(*map(jnp.asarray, args))
  np.testing.assert_allclose(by_first, slope, rtol=1e-12)
  # Only the difference counts.
  np.testing.assert_allclose(by_second, -slope, rtol=1e-12)


@pytest.mark.parametrize('name', CLOSED)
def test_gradients_are_finite_differences(name, x64):
  loss, args, *_ = CLOSED[name]
  for k in range(len(args)):
    got = jax.grad(lambda *a: loss(*a).sum(), k)(*map(jnp.asarray, args))
    for i, h in itertools.product(range(4), (1e-5,)):
      moved = [[np.array(a) for a in args] for _ in range(2)]
      moved[0][k][i] += h
      moved[1][k][i] -= h
      up, down = (float(loss(*a).sum()) for a in moved)
      np.testing.assert_allclose(got[i], (up - down) / (2 * h), rtol=1e-6)


def test_scores_far_apart_neither_overflow_nor_vanish():
  far = jnp.array([30.0, -100.0], jnp.float32)
  got = losses.bradley_terry(far, jnp.zeros(2))
  np.testing.assert_allclose(got, [np.exp(-30.0), 100.0], rtol=1e-5)
  slope = jax.grad(lambda x: losses.bradley_terry(x, jnp.zeros(2)).sum())(far)
  np.testing.assert_allclose(slope, [0, -1], atol=1e-6)


def test_ties_are_half_right():
  np.testing.assert_array_equal(measures.right([2.0, 0.0, -1e-9]), [1, 0.5, 0])


def test_log_loss_by_hand():
  assert measures.log_loss([0.0, 0.0]) == pytest.approx(np.log(2), rel=1e-12)
  expected = -np.log([sigmoid(2.0), sigmoid(-1.0)]).mean()
  assert measures.log_loss([2.0, -1.0]) == pytest.approx(expected, rel=1e-12)
  assert measures.log_loss([-1e4]) == pytest.approx(1e4)


def test_the_temperature_is_the_maximum_likelihood():
  """Leads of one size a, a share p of them right: sigmoid(a / T) = p."""
  for size, p in ((3.0, 0.75), (0.1, 0.9), (5.0, 0.55)):
    lead = size * np.where(np.arange(100) < round(100 * p), 1, -1)
    expected = size / np.log(p / (1 - p))
    assert measures.temperature(lead) == pytest.approx(expected, rel=1e-9)
  assert measures.temperature([1.0, 2.0]) == pytest.approx(1e-3)  # all right
  assert measures.temperature([-1.0, 0.5]) == pytest.approx(1e3)


def test_calibration_by_hand():
  # Surely right twice, once surely wrong; two fair coins, one of them a tie.
  lead = np.array([9.0, 9.0, -9.0, 0.0, 0.1])
  error, table = measures.calibration(lead, bins=2)
  sure, coin = sigmoid(9.0), (0.5 + sigmoid(0.1)) / 2
  assert [row['pairs'] for row in table] == [2, 3]
  assert [(row['from'], row['to']) for row in table] == [(0.5, 0.75), (0.75, 1)]
  assert table[0]['confidence'] == pytest.approx(coin)
  assert table[0]['accuracy'] == 0.75
  assert table[1]['accuracy'] == pytest.approx(2 / 3)
  expected = (2 * abs(coin - 0.75) + 3 * abs(sure - 2 / 3)) / 5
  assert error == pytest.approx(expected, rel=1e-12)
  _, table = measures.calibration(np.array([1e9]), bins=10)  # p = 1
  assert table[-1]['pairs'] == 1
  assert table[0]['accuracy'] is None


def test_calibrated_leads_have_no_error():
  lead = np.log(3) * np.array([1, 1, 1, -1])  # 3 of 4 at p = 3/4
  error, _ = measures.calibration(lead)
  assert error == pytest.approx(0, abs=1e-12)


def test_the_bootstrap_draws_texts_not_pairs():
  """Exactly, against all draws of three texts: each as likely as another."""
  units = np.array([[0, 1], [1, 2], [0, 2]])
  right = np.array([1.0, 0.0, 0.5])
  exact = []
  for drawn in itertools.product(range(3), repeat=3):
    pairs = [(i, j) for i in drawn for j in drawn]
    found = [right[np.argwhere((units == p).all(1))[0, 0]]
             for p in pairs if (units == p).all(1).any()]  # fmt: skip
    exact += [np.mean(found)] if found else []
  got = measures.bootstrap(right, units)
  assert set(np.round(got, 9)) == set(np.round(exact, 9))
  error = np.std(exact) / np.sqrt(len(got))
  assert abs(got.mean() - np.mean(exact)) < 5 * error
  assert got.std() == pytest.approx(np.std(exact), rel=0.1)


def test_the_bootstrap_of_pairs_that_share_nothing_is_the_usual_one():
  units = np.repeat(np.arange(50)[:, None], 2, 1)  # a prompt's two answers
  right = (np.arange(50) < 40) * 1.0
  got = measures.bootstrap(right, units)
  assert got.std() == pytest.approx(np.sqrt(0.8 * 0.2 / 50), rel=0.1)
  low, high = curves.interval(got)
  assert 0.66 < low < 0.72 and 0.88 < high < 0.93
  both = measures.bootstrap(np.stack([right, 1 - right], 1), units)
  np.testing.assert_allclose(both.sum(1), 1)  # of the same draws
