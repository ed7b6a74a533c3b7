"""SPPO against enumeration of every K-tuple, and against WIND.

What the two share, arguments that are refused included, is in `test_wind`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from preferences import (
  check_gradient,
  expected_gradient,
  laws,
  random_scores,
  wins,
)
import pytest

from bond_jax.algorithms import sppo, wind
from bond_jax.algorithms.parts import ops

ONE_TOKEN = oracle.sequences(4, 1, None)

wind_without_a_reference = functools.partial(
  wind.make, kl_weight=0.0, step_size=3.0, risk='squared', constant='half'
)


@pytest.mark.parametrize('k', [2, 3, 4])
def test_expected_gradient_of_unselected_sppo(x64, k):
  algorithm = sppo.make(step_size=2.0, num_anchor=k, rows='all')

  def published(theta, anchor, reference, win, law):
    del reference
    log_p, log_q = (
      oracle.table_log_probs(t[0], *law).sum(-1) for t in (theta, anchor)
    )
    q = jnp.exp(log_q)
    return (q * (log_p - log_q - 2.0 * (win @ q - 0.5)) ** 2).sum()

  check_gradient(algorithm, published, ONE_TOKEN, seed=k)


def test_rows_chosen_by_reward_miss_the_exact_step(x64):
  """SPPO's published rows; its unselected ones do not."""
  log_q, win = laws(4, 4)[0], wins(4)[0]
  step = log_q + 2.0 * (win @ np.exp(log_q) - 0.5)
  by_rows = {
    rows: expected_gradient(
      sppo.make(step_size=2.0, num_anchor=4, rows=rows), 4
    )(step, log_q, log_q, win)
    for rows in sppo.ROWS
  }
  np.testing.assert_allclose(by_rows['all'], 0, atol=1e-14)
  assert np.abs(by_rows['extremes']).max() > 0.05


@pytest.mark.parametrize('rows', sppo.ROWS)
def test_sppo_is_a_multiple_of_wind_without_a_reference(x64, rows):
  """Part for part: the targets, the loss and its gradient, and by hand."""
  algorithm = sppo.make(step_size=3.0, num_anchor=4, rows=rows)
  log_policy, scores = random_scores(0, algorithm)
  m = scores.index.shape[1]
  other = wind_without_a_reference(num_anchor=4, rows=m)
  assert algorithm.reference_rows == other.reference_rows == ()
  weighed, _ = jax.jit(algorithm.weigh)(scores)
  if rows == 'all':
    others, _ = jax.jit(other.weigh)(scores)
    jax.tree.map(np.testing.assert_array_equal, weighed, others)
  wins = np.asarray(scores.win)
  own = 0.0 if rows == 'extremes' else 0.5
  p = (wins.sum(-1) - own) / (4 if rows == 'extremes' else 3)
  p = np.take_along_axis(p, np.asarray(scores.index), 1)
  ratio = lambda log_p: (log_p - scores.log_anchor).sum(-1)

  def value_and_gradient(loss):
    values = lambda log_p: (loss(log_p).sum(), loss(log_p))
    return jax.jit(jax.grad(values, has_aux=True))(log_policy)

  mine = value_and_gradient(lambda log_p: algorithm.loss(log_p, weighed))
  for loss in (
    lambda log_p: 9.0 * other.loss(log_p, weighed),
    lambda log_p: ((ratio(log_p) - 3.0 * (p - 0.5)) ** 2).mean(-1),
  ):
    for x, y in zip(mine, value_and_gradient(loss), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-12)


def test_only_sppo_s_published_rows_look_at_the_rewards():
  reward = jnp.array([[0.0, 3, 1, 2], [2, 2, 0, 0], [1, 1, 1, 1]])
  win = ops.win_matrix(reward)
  algorithm = wind_without_a_reference(num_anchor=4, rows=2)
  np.testing.assert_array_equal(algorithm.select(reward, win), [[0, 1]] * 3)
  algorithm = sppo.make(step_size=1.0, num_anchor=4, rows='all')
  np.testing.assert_array_equal(
    algorithm.select(reward, win), [[0, 1, 2, 3]] * 3
  )
  algorithm = sppo.make(step_size=1.0, num_anchor=4, rows='extremes')
  np.testing.assert_array_equal(
    algorithm.select(reward, win), [[1, 0], [0, 2], [0, 0]]
  )
  weigh = jax.jit(algorithm.weigh)
  for seed in range(3):  # the best row's target, whatever its quantile
    _, scores = random_scores(seed, algorithm)
    target = weigh(scores)[0].target
    np.testing.assert_allclose(target, [[7 / 8, 1 / 8]] * 3)
