"""qrpo against enumeration of every batch, and the laws it regresses on."""

import itertools
import math

from conftest import core
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_best_of_n import (
  compiled,
  expected_gradient,
  laws,
  log_probs,
  REWARDS,
  tables,
)

from bond_jax.algorithms import qrpo
from bond_jax.algorithms.parts import ops
from bond_jax.types import Scores


def log_density(less, at_most, transform, kl_weight, least):
  """log of the mean of exp(T / c) / Z over [less, at_most], by its integral."""
  if transform == 'identity':
    whole = lambda t: math.expm1(t / kl_weight) / math.expm1(1 / kl_weight)
    at = lambda t: math.exp(t / kl_weight) / math.expm1(1 / kl_weight)
    top = at(at_most) / kl_weight
  else:
    n = 1 + 1 / kl_weight
    whole = lambda t: t**n
    top = n * max(at_most, least) ** (n - 1)
  if at_most == less:
    return math.log(top)
  return math.log((whole(at_most) - whole(less)) / (at_most - less))


def mean_target(less, at_most, k, transform, kl_weight):
  """E of the target given y, [Y]: the k comparisons have a multinomial law."""
  mean = 0.0
  for beaten, tied in itertools.product(range(k + 1), repeat=2):
    if (lost := k - beaten - tied) >= 0:
      ways = math.comb(k, beaten) * math.comb(k - beaten, tied)
      chance = less**beaten * (at_most - less) ** tied * (1 - at_most) ** lost
      found = log_density(
        beaten / k, (beaten + tied) / k, transform, kl_weight, 0.5 / k
      )
      mean = mean + ways * chance * found
  return mean


@pytest.mark.parametrize('name', REWARDS)
@pytest.mark.parametrize(
  'num_policy, num_anchor, rows, transform, kl_weight',
  core(
    3,
    [
      (0, 3, 3, 'log', 1 / 3),
      (1, 2, 1, 'identity', 0.2),
      (2, 2, 2, 'log', 1.0),
      (0, 2, 2, 'identity', 0.5),
    ],
  ),
)
def test_expected_gradient_is_the_regression_s(
  x64, name, num_policy, num_anchor, rows, transform, kl_weight
):
  """On-policy and off it; the sampling law is held fixed."""
  theta, reference, _ = tables(3)
  (p, q), reward = laws(theta, reference), np.array(REWARDS[name])
  compared = num_anchor - (not num_policy)
  target = mean_target(
    *oracle.quantiles(q, reward), compared, transform, kl_weight
  )
  drawn = p if num_policy else q

  def objective(theta):
    log_ratio = log_probs(theta) - np.log(q)
    # What the spread of the target adds has no gradient.
    return (drawn * (kl_weight * (target - log_ratio)) ** 2).sum()

  exact = jax.grad(objective)(theta)
  algorithm = qrpo.make(
    num_policy=num_policy, num_anchor=num_anchor, rows=rows,
    transform=transform, kl_weight=kl_weight,
  )  # fmt: skip
  mine = expected_gradient(algorithm, theta, reference, [reward])
  assert jnp.abs(exact).max() > 0.02
  np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize('levels', [1, 2, 5, 40])
@pytest.mark.parametrize('kl_weight', [1 / 7, 1 / 3, 0.7, 1.0])
def test_targets_are_laws_whatever_ties(x64, levels, kl_weight):
  rng = np.random.default_rng(levels)
  p = rng.dirichlet(np.ones(40))
  reward = rng.permutation(40) % levels
  less, at_most = oracle.quantiles(p, reward)
  n = 1 + 1 / kl_weight
  best = p * np.exp(qrpo.best_of_n_density(less, at_most, n, 1e-9))
  assert best.sum() == pytest.approx(1, abs=1e-12)
  if n == round(n):
    np.testing.assert_allclose(best, oracle.best_of_n(p, reward, round(n)))
  tilt = p * np.exp(qrpo.tilt_density(less, at_most, kl_weight))
  assert tilt.sum() == pytest.approx(1, abs=1e-12)
  # The mean of the exponential over what ties, in fine steps.
  t = less[:, None] + (at_most - less)[:, None] * (np.arange(999) + 0.5) / 999
  fine = np.exp(t / kl_weight).mean(-1) / (kl_weight * np.expm1(1 / kl_weight))
  np.testing.assert_allclose(tilt, p * fine, rtol=1e-5)


def test_a_small_weight_does_not_overflow():
  """The paper's chat runs take 3e-4."""
  less = at_most = jnp.array([0.0, 0.25, 1])
  found = qrpo.tilt_density(less, at_most, 3e-4)
  np.testing.assert_allclose(
    found, (at_most - 1) / 3e-4 + math.log(1 / 3e-4), rtol=1e-6
  )


@pytest.mark.parametrize('name', REWARDS)
@pytest.mark.parametrize('num_policy, num_anchor', [(0, 3), (2, 1)])
def test_fewer_rows_are_those_far_from_the_middle(
  x64, name, num_policy, num_anchor
):
  """Over every batch: the rows whose quantile is farthest from 1/2."""
  theta, reference, _ = tables(3)
  (p, q), reward = laws(theta, reference), np.array(REWARDS[name])
  c, num = 0.4, num_policy + num_anchor
  drawn = num_policy or num_anchor
  weight = np.zeros((2, len(q)))  # of each row's loss, and of its target
  for batch in itertools.product(range(len(q)), repeat=num):
    chance = np.prod(p[list(batch[:num_policy])])
    chance = chance * np.prod(q[list(batch[num_policy:])])
    found = []
    for i in range(drawn):
      others = [reward[batch[j]] for j in range(num_policy, num) if j != i]
      less = np.mean([r < reward[batch[i]] for r in others])
      at_most = np.mean([r <= reward[batch[i]] for r in others])
      found.append((-abs((less + at_most) / 2 - 0.5), i, less, at_most))
    for _, i, less, at_most in sorted(found)[: drawn - 1]:
      target = log_density(less, at_most, 'identity', c, 0)
      weight[:, batch[i]] += chance / (drawn - 1) * np.array([1, target])

  def objective(theta):
    log_ratio = log_probs(theta) - np.log(q)
    return (c**2 * (weight[0] * log_ratio**2 - 2 * weight[1] * log_ratio)).sum()

  exact = jax.grad(objective)(theta)
  algorithm = qrpo.make(
    num_policy=num_policy, num_anchor=num_anchor, rows=drawn - 1,
    transform='identity', kl_weight=c,
  )  # fmt: skip
  mine = expected_gradient(algorithm, theta, reference, [reward])
  np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-9)


def one_batch(win, reward, weight, **args):
  algorithm = qrpo.make(**args)
  index = algorithm.select(reward, win)
  zeros = jnp.zeros((*reward.shape, 2))
  seen = len(algorithm.reference_rows)
  return algorithm.weigh(
    Scores(
      reward=reward, win=win, index=index, log_sampled=zeros[:, :seen],
      log_anchor=zeros[:, :0], log_reference=zeros[:, :seen],
      log_quantile=zeros[:, :0, 0], weight=weight,
    )
  )  # fmt: skip


def test_a_judge_that_is_not_sure_is_half_a_tie(x64):
  """Of 'identity' its probability is the middle of what y spans."""
  win = jnp.array([[[0.5, 0.75], [0.25, 0.5]]])
  args = dict(
    num_policy=1, num_anchor=1, rows=1, kl_weight=0.5, transform='identity'
  )
  rows, _ = one_batch(win, jnp.zeros((1, 2)), jnp.ones(1), **args)
  expected = log_density(0.5, 1.0, 'identity', 0.5, 0)
  np.testing.assert_allclose(rows.log_density, [[expected]], atol=1e-12)


def test_prompts_that_tie_in_full_fire_not():
  reward = jnp.array([[1.0, 1, 1], [0, 1, 2], [0, 5, 9]])
  args = dict(
    num_policy=0, num_anchor=3, rows=3, kl_weight=0.5, transform='log'
  )
  rows, metrics = one_batch(
    ops.win_matrix(reward), reward, jnp.array([1.0, 1, 0]), **args
  )
  assert metrics['signal/fires'] == 0.5
  # Its target is the reference itself.
  np.testing.assert_array_equal(rows.log_density[0], 0)
  # One of the policy that beats all says as much as one that loses.
  args = dict(
    num_policy=1, num_anchor=2, rows=1, kl_weight=0.5, transform='log'
  )
  reward = jnp.array([[3.0, 1, 1]])
  _, metrics = one_batch(ops.win_matrix(reward), reward, jnp.ones(1), **args)
  assert metrics['signal/fires'] == 1


def test_a_filler_row_changes_nothing(x64):
  theta, reference, _ = tables(9, prompts=3, vocab=2)
  reward = np.array([[0.0, 1, 2], [1, 0, 1]])
  algorithm = qrpo.make(
    num_policy=0, num_anchor=2, rows=2, transform='identity', kl_weight=0.4
  )
  run = compiled(algorithm, 2)
  without = run(
    theta[:2], reference[:2], reward, jnp.ones(2), reference=reference[:2]
  )
  scored = reference.copy()
  scored[2] = np.nan
  filled = jnp.concatenate([jnp.array(reward), jnp.full((1, 3), jnp.nan)])
  mine = run(theta, reference, filled, jnp.array([1.0, 1, 0]), reference=scored)
  np.testing.assert_allclose(mine[:2], without, rtol=0, atol=1e-12)
  np.testing.assert_array_equal(mine[2], 0)


@pytest.mark.parametrize(
  'wrong',
  [
    dict(num_policy=-1),
    dict(num_anchor=0),
    dict(num_anchor=1, num_policy=0),
    dict(rows=0),
    dict(rows=2),
    dict(rows=1, num_policy=2),
    dict(transform='square'),
    dict(kl_weight=0.0),
  ],
)
def test_bad_arguments_are_named(wrong):
  args = dict(
    num_policy=1, num_anchor=2, rows=1, transform='log', kl_weight=0.5
  )
  with pytest.raises(ValueError, match=f'^{next(iter(wrong))} '):
    qrpo.make(**{**args, **wrong})
