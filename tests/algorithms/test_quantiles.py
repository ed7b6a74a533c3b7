"""Estimates of the log-quantile against every draw of the comparisons."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.algorithms.parts import quantiles

P = np.array([0.1, 0.4, 0.2, 0.3])
REWARDS = [(0.1, 2.0, -1.0, 0.5), (1.0, 0.0, 1.0, 0.0), (2.0, 2.0, 2.0, 2.0)]


def expectation(estimate, reward, k):
  """E over k draws from P of estimate(own [B, Y], anchor [B, k]): [Y]."""
  draws = np.array(list(itertools.product(range(4), repeat=k)))
  own = jnp.broadcast_to(reward[None], (len(draws), 4))
  return P[draws].prod(-1) @ np.array(estimate(own, jnp.asarray(reward[draws])))


def same(mine, other, atol=1e-14):
  np.testing.assert_allclose(mine, other, rtol=0, atol=atol)


# -- Monte Carlo --------------------------------------------------------------


@pytest.mark.parametrize('zero', quantiles.ZEROS)
def test_monte_carlo_is_binomial(x64, zero):
  for reward, k in itertools.product(np.array(REWARDS), (1, 2, 3)):
    _, at_most = oracle.quantiles(P, reward)
    mine = expectation(
      lambda *r: quantiles.monte_carlo(*r, zero=zero), reward, k
    )
    same(mine, oracle.mean_monte_carlo(at_most, k, zero))


def test_monte_carlo_by_hand():
  own = np.float32([[0, 1, 2, 3], [-np.inf, 2, 2, np.inf]])
  anchor = np.float32([[1, 1, 2, 3], [-np.inf, 2, 2, 2]])
  for zero, first in (('half', 1 / 8), ('one', 1 / 4)):
    mine = quantiles.monte_carlo(own, anchor, zero=zero)
    expected = [[first, 2 / 4, 3 / 4, 1], [1 / 4, 1, 1, 1]]
    same(np.exp(mine), expected, 1e-6)
  mine = quantiles.monte_carlo(own, anchor, zero='smooth')
  same(np.exp(mine), [[1 / 5, 3 / 5, 4 / 5, 1], [2 / 5, 1, 1, 1]], 1e-6)


def test_the_mean_errors_that_the_docstring_states(x64):
  k = 16
  won = np.arange(k + 1)
  stated = {
    'half': (0.07, -0.14, -0.03),
    'one': (0.37, -0.12, -0.03),
    'smooth': (0.64, 0.13, 0.03),
  }
  assert set(stated) == set(quantiles.ZEROS)
  text = ' '.join(quantiles.monte_carlo.__doc__.split())
  for zero, errors in stated.items():
    # Row s is compared with s completions that it beats and k - s that it
    # does not.
    log_p = quantiles.monte_carlo(
      jnp.zeros((k + 1, 1)),
      jnp.where(np.arange(k)[None] < won[:, None], -1.0, 1.0),
      zero=zero,
    )[:, 0]
    for p, error in zip((0.05, 0.2, 0.5), errors, strict=True):
      chance = [math.comb(k, s) * p**s * (1 - p) ** (k - s) for s in won]
      same(np.dot(chance, log_p) - math.log(p), error, 0.005)
    assert '{:+.2f}, {:+.2f}, {:+.2f}'.format(*errors) in text


# -- the floor ----------------------------------------------------------------


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_the_floor_is_the_chance_that_all_are_better(x64, k):
  for reward in np.array(REWARDS):
    _, at_most = oracle.quantiles(P, reward)
    mine = expectation(quantiles.floor, reward, k)
    same(mine, oracle.mean_floor(at_most, k), 1e-13)


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_the_floor_is_calibrated_at_the_median(x64, k):
  """There, p = 1/2: its mean is the log-quantile, log(1/2)."""
  anchor = np.array(list(itertools.product([-1.0, 1], repeat=k)))
  values = quantiles.floor(np.zeros((2**k, 1)), anchor)
  same(values.mean(), math.log(0.5))


def test_the_floor_is_strict():
  """A completion as good as the worst of the anchor's is not punished."""
  own = np.float32([[1], [1], [0], [0], [1], [-np.inf], [-np.inf]])
  anchor = np.float32(
    [[1, 1], [2, 1], [1, 2], [1, 1], [0, 2], [-np.inf, 0], [0, 0]]
  )
  expected = -math.log(16) * np.array([0, 0, 1, 1, 0, 0, 1])
  same(quantiles.floor(own, anchor)[:, 0], expected, 1e-6)


# -- the second term ----------------------------------------------------------


@pytest.mark.parametrize('n', [2, 3, 4])
def test_the_second_term_is_multinomial(x64, n):
  """Over strict wins, ties and losses."""
  for reward, k in itertools.product(np.array(REWARDS), (1, 2, 3)):
    less, at_most = oracle.quantiles(P, reward)
    mine = expectation(lambda *r: quantiles.second_term(*r, n), reward, k)
    same(mine, oracle.mean_second_term(less, at_most, k, n))
    assert (mine > -1e-15).all() and (mine < math.log(n) + 1e-12).all()


def test_the_second_term_by_hand():
  own = np.float32([[0, 1, 2, 3]])
  anchor = np.float32([[1, 1, 2, 2]])
  mine = np.exp(quantiles.second_term(own, anchor, 3))
  # No win; two ties; two wins and two ties; no tie.
  same(mine, [[3, 1, 1 + 1 / 2 + 1 / 4, 3]], 1e-6)


def test_the_second_term_without_ties_is_log_n(x64):
  rewards = np.random.default_rng(0).permuted(
    np.tile(np.arange(9), (50, 1)), axis=1
  )
  own, anchor = rewards[:, :4], rewards[:, 4:]
  same(quantiles.second_term(own, anchor, 5), math.log(5))


def test_both_terms_are_the_log_of_best_of_n(x64):
  """With as many draws as it takes: (n - 1) log p + log sum = log of the ratio
  of Best-of-n to the law it is drawn from, equation (8)."""
  n, share = 4, np.array([1, 4, 2, 3])  # of ten draws, P itself
  for reward in np.array(REWARDS):
    own, anchor = reward[None], np.repeat(reward, share)[None]
    log_p = quantiles.monte_carlo(own, anchor, zero='half')
    mine = (n - 1) * log_p + quantiles.second_term(own, anchor, n)
    same(mine[0], np.log(oracle.best_of_n(P, reward, n) / P))


# -- the learned one ----------------------------------------------------------


def test_the_learned_loss_is_least_at_the_quantile(x64):
  """Over all comparisons, k at a time: flat at logit(p), and convex."""
  k = 2
  draws = np.array(list(itertools.product(range(4), repeat=k)))
  chance = P[draws].prod(-1)

  def mean(logit, target):
    logit = jnp.broadcast_to(logit[None], target.shape)
    return chance @ quantiles.learned_loss(logit, target)

  slope_and_curvature = jax.jit(
    lambda *x: (jax.grad(mean)(*x), jax.hessian(mean)(*x))
  )
  for reward in np.array(REWARDS):
    own = np.tile(reward, (len(draws), 1))
    target = quantiles.at_most(own, reward[draws]).mean(-1)
    _, at_most = oracle.quantiles(P, reward)
    same(chance @ target, at_most)
    inner = at_most < 1 - 1e-9  # the best has p = 1, at no finite logit
    p = np.where(inner, at_most, 0.5)
    slope, curvature = slope_and_curvature(np.log(p / (1 - p)), target)
    same(slope[inner], 0)
    assert (slope[~inner] < -0.1).all()
    same(curvature, np.diag(p * (1 - p)))


def test_the_learned_loss_is_finite_at_any_logit():
  logit, target = np.float32([[-1e4, 1e4]]), np.float32([[0, 1]])
  same(quantiles.learned_loss(logit, target), 0)
  same(quantiles.learned_loss(logit, 1 - target), 2e4)


# -- pooled -------------------------------------------------------------------


def pooled_by_loops(own, anchor, weight):
  """The docstring's words, prompt by prompt and row by row."""
  b, m, k = len(own), own.shape[1], anchor.shape[1]
  real = [x for x in range(b) if weight[x] > 0]
  total = sum(weight[x] for x in real)
  mean = lambda f: sum(weight[x] * f(x) for x in real) / total
  of_own, of_anchor = (
    mean(lambda x: own[x].mean()),
    mean(lambda x: anchor[x].mean()),
  )
  above = {x: [*(own[x] - of_own), *(anchor[x] - of_anchor)] for x in real}
  n = m + k
  within = mean(lambda x: own[x].var(ddof=1))
  between = max(mean(lambda x: np.mean(above[x]) ** 2) - within / n, 0)
  shrink = between / (between + within / (n - 1))

  def place(x, row):
    others = [v for i, v in enumerate(above[x]) if i != row]
    return of_anchor + shrink * np.mean(others)

  out = np.full((b, m), 0.5)
  for x in real:
    others = [y for y in real if y != x]
    for i in range(m):
      mine, won = own[x, i] - place(x, i), 0.0
      for y in others:
        for j in range(k):
          theirs = anchor[y, j] - place(y, m + j)
          won += weight[y] * (float(mine > theirs) + float(mine == theirs) / 2)
      if others:
        out[x, i] = won / (k * sum(weight[y] for y in others))
  return out[real]


@pytest.mark.parametrize('m, k', [(2, 1), (3, 2)])
def test_pooled_by_loops(x64, m, k):
  rng = np.random.default_rng(m)
  own = rng.standard_normal((5, m)) + 2 * rng.standard_normal((5, 1))
  anchor = own[:, :1] + rng.standard_normal((5, k))
  weight = np.array([1.0, 1, 0, 2, 1])
  expected = pooled_by_loops(own, anchor, weight)
  for garbage in (0.0, np.nan, np.inf):
    own[2] = anchor[2] = garbage
    mine = np.asarray(quantiles.pooled(own, anchor, weight))
    np.testing.assert_allclose(mine[[0, 1, 3, 4]], expected, atol=1e-12)
  assert np.ptp(expected) > 0.3


def test_pooled_ties_count_one_half(x64):
  """All rewards one; and two prompts whose residuals are known."""
  same(quantiles.pooled(np.ones((3, 2)), np.ones((3, 1)), np.ones(3)), 0.5)
  own, anchor = np.array([[1.0, 3], [1, 3]]), np.array([[1.0], [3]])
  # No variance between the prompts: places are the mean, 2.
  mine = quantiles.pooled(own, anchor, np.ones(2))
  same(mine, [[0, 0.5], [0.5, 1]])


def test_pooled_of_one_prompt_says_nothing(x64):
  own, anchor = np.array([[1.0, 3], [9, 9]]), np.array([[1.0], [3]])
  same(quantiles.pooled(own, anchor, np.array([1.0, 0]))[0], 0.5)


def test_pooled_is_the_quantile_where_rewards_are_place_and_residual(x64):
  """Residuals of a skewed law, a policy that has moved, one y' a prompt."""
  rng = np.random.default_rng(0)
  prompts, rows = 500, 60
  place = 3 * rng.standard_normal((prompts, 1))
  own = place + 0.7 + rng.exponential(size=(prompts, rows))
  anchor = place + rng.exponential(size=(prompts, 1))
  mine = np.asarray(quantiles.pooled(own, anchor, np.ones(prompts)))
  exact = 1 - np.exp(-(own - place))
  assert np.abs(mine - exact).mean() < 0.035
  alone = (own > anchor) * 1.0  # by the one y' of its own prompt
  assert np.abs(alone - exact).mean() > 0.2
  again = quantiles.pooled(5 * own + 9, 5 * anchor + 9, np.ones(prompts))
  np.testing.assert_allclose(again, mine, atol=1e-3)
