"""The Best-of-N curve against exact values: closed forms, enumerated laws."""

import functools
import itertools
import math

from conftest import core
import numpy as np
import pytest
from scipy.special import gammaln

from bond_jax.measures import curves


def best_of_n_law(reward, p, n):
  """Law of the best of n draws by enumeration; ties broken uniformly."""
  law = np.zeros(len(p))
  for draws in itertools.product(range(len(p)), repeat=n):
    best = max(reward[i] for i in draws)
    winners = [i for i in draws if reward[i] == best]
    for i in winners:
      law[i] += math.prod(p[i] for i in draws) / len(winners)
  return law


def win_and_kl(law, reward, p):
  reward = np.asarray(reward)
  beats = (reward[:, None] > reward) + 0.5 * (reward[:, None] == reward)
  on = law > 0
  return law @ beats @ p, np.sum(law[on] * np.log(law[on] / p[on]))


def sample_of(p, size):
  """Completions whose empirical law is exactly p."""
  counts = np.round(np.asarray(p) * size).astype(int)
  assert counts.sum() == size
  return np.repeat(np.arange(len(p)), counts)


def plug_in(curve):
  return (
    curve.win_rate - curve.win_rate_correction,
    curve.kl - curve.kl_correction,
  )


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_curve_before_correction_is_best_of_n_by_enumeration(n):
  p = np.array([0.25, 0.125, 0.375, 0.25])
  reward = np.array([1.0, 0.0, 1.0, 2.0])  # two completions share a level
  curve = curves.best_of_n_curve(
    reward[sample_of(p, 8)][None], np.array([n, 1.5])
  )
  rate, kl = plug_in(curve)
  exact = win_and_kl(best_of_n_law(reward, p, n), reward, p)
  np.testing.assert_allclose((rate[0], kl[0]), exact, rtol=1e-12, atol=1e-15)


def test_curve_with_a_large_sample_is_the_closed_form():
  curve = curves.best_of_n_curve(np.random.default_rng(0).random((2, 2048)))
  rate, kl = curves.closed_form(curve.ns)
  inside = curve.ns < 32
  np.testing.assert_allclose(curve.win_rate[inside], rate[inside], atol=1e-6)
  np.testing.assert_allclose(curve.kl[inside], kl[inside], atol=2e-5)


def test_curve_of_64_without_ties_is_the_closed_form():
  curve = curves.best_of_n_curve(np.random.default_rng(0).random((3, 64)))
  rate, kl = curves.closed_form(curve.ns)
  inside = curve.ns < 32
  np.testing.assert_allclose(curve.win_rate[inside], rate[inside], atol=1e-3)
  np.testing.assert_allclose(curve.kl[inside], kl[inside], atol=1.1e-2)
  assert np.all(np.diff(curve.win_rate) > 0)


def test_curve_is_lower_where_rewards_tie():
  rewards = np.random.default_rng(0).integers(4, size=(20, 64))
  curve = curves.best_of_n_curve(rewards)
  rate, kl = curves.closed_form(curve.ns)
  assert np.all(curve.win_rate[20:] < rate[20:] - 1e-3)
  assert np.all(curve.kl[20:] < kl[20:] - 1e-3)


def test_jackknife_is_the_one_that_leaves_each_sample_out():
  rewards = np.array([[3, 1, 1, 2, 3, 3, 0], [0, 0, 0, 0, 1, 0, 5]])
  ns = np.array([1, 1.7, 2, 5])
  curve = curves.best_of_n_curve(rewards, ns)
  size = rewards.shape[1]
  left_out = np.mean(
    [
      plug_in(curves.best_of_n_curve(np.delete(rewards, i, 1), ns))
      for i in range(size)
    ],
    0,
  )
  whole = np.stack(plug_in(curve))
  np.testing.assert_allclose(
    np.stack([curve.win_rate, curve.kl]),
    size * whole - (size - 1) * left_out,
    atol=1e-13,
  )


def test_correction_takes_the_bias_out():
  # The exact expectation over every sample of 8 from a law with two atoms.
  p, size, ns = np.array([0.6, 0.4]), 8, np.array([2.0, 3.0])
  raw, corrected = np.zeros((2, 2)), np.zeros((2, 2))
  for k in range(size + 1):
    weight = math.comb(size, k) * p[1] ** k * p[0] ** (size - k)
    rewards = np.repeat([0, 1], [size - k, k])[None]
    curve = curves.best_of_n_curve(rewards, ns)
    raw += weight * np.stack(plug_in(curve))
    corrected += weight * np.stack([curve.win_rate, curve.kl])
  reward = np.array([0.0, 1.0])
  exact = np.stack(
    [win_and_kl(best_of_n_law(reward, p, int(n)), reward, p) for n in ns], 1
  )
  # Best-of-2's win rate is cubic in p: the jackknife leaves its 1 / S^2.
  assert np.all(raw < exact - 1e-3)
  assert np.all(abs(corrected - exact) < 0.15 * abs(raw - exact))


def every_sample(levels, size):
  """The counts of the levels in every sample of a size."""
  if levels == 1:
    return np.array([[size]])
  return np.array([
    [k, *rest]
    for k in range(size + 1)
    for rest in every_sample(levels - 1, size - k)
  ])  # fmt: skip


@pytest.fixture(scope='module')
def curves_of_64():
  """levels -> (counts, log multinomials, curves of every sample of 64)."""
  ns = np.array([2.0, 4, 8, 16, 32])
  found = {}
  for levels in (2, 3):
    counts = every_sample(levels, 64)
    samples = np.array([np.repeat(np.arange(levels), k) for k in counts])
    ways = gammaln(65) - gammaln(counts + 1).sum(1)
    curve = curves.best_of_n_curve(samples, ns)
    found[levels] = counts, ways, curve.per_prompt
  return ns, found


@pytest.mark.parametrize(
  'p',
  [
    (0.5, 0.5), (0.9, 0.1), (0.97, 0.03), (0.9825, 0.0175), (0.999, 0.001),
    (0.01, 0.99), (0.5, 0.45, 0.05), (0.98, 0.01, 0.01), (0.01, 0.93, 0.06),
  ],
)  # fmt: skip
def test_what_is_left_of_the_bias_at_64(curves_of_64, p):
  """The expectation over all samples, less the curve of the law itself."""
  ns, found = curves_of_64
  counts, ways, per_sample = found[len(p)]
  weight = np.exp(ways + counts @ np.log(p))
  assert weight.sum() == pytest.approx(1)
  high = np.cumsum(p)
  mass = high ** ns[:, None] - (high - p) ** ns[:, None]
  exact = mass @ (high - np.array(p) / 2), (mass * np.log(mass / p)).sum(1)
  rate, kl = abs(np.einsum('x,kxg->kg', weight, per_sample) - exact)
  promised = ns <= 16
  assert np.all(rate[promised] < 1e-3) and np.all(kl[promised] < 4e-3)
  assert rate[~promised] < 4e-3 and kl[~promised] < 0.02
  if p == (0.9825, 0.0175):  # more is not promised
    assert rate[~promised] > 3e-3 and kl[~promised] > 0.015


def test_one_is_the_reference_itself():
  rewards = np.random.default_rng(0).integers(5, size=(10, 12))
  curve = curves.best_of_n_curve(rewards)
  np.testing.assert_allclose(
    (curve.ns[0], curve.win_rate[0], curve.kl[0]), (1, 0.5, 0), atol=1e-13
  )


@pytest.mark.parametrize(
  'rewards, ns, match',
  [
    (np.array([[0.0, np.nan]]), None, 'finite'),
    (np.zeros(5), None, r'\(5,\)'),
    (np.zeros((5, 1)), None, '2 or more'),
    (np.zeros((5, 4)), np.array([0.5]), '0.5'),
  ],
)
def test_curve_refuses(rewards, ns, match):
  with pytest.raises(ValueError, match=match):
    curves.best_of_n_curve(rewards, ns)


@pytest.mark.parametrize('strength', [0.0, 1e-3, 0.02, 1.0, 8.0, 60.0])
def test_tilt_is_the_integral(strength):
  nodes, weights = np.polynomial.legendre.leggauss(200)
  u, weights = (nodes + 1) / 2, weights / 2
  density = np.exp(strength * u)
  density /= weights @ density
  exact = weights @ (density * u), weights @ (density * np.log(density))
  np.testing.assert_allclose(
    curves.tilt_frontier(strength), exact, rtol=1e-6, atol=1e-12
  )


def test_tilt_costs_no_more_than_best_of_n():
  rate, kl = curves.closed_form(np.geomspace(1.1, 64, 50))
  tilt_rate, tilt_kl = curves.tilt_frontier(np.linspace(0, 200, 200_001))
  at_same_rate = np.interp(rate, tilt_rate, tilt_kl)
  assert np.all(at_same_rate < kl)
  assert np.all(at_same_rate[rate > 0.8] > 0.97 * kl[rate > 0.8])


@pytest.mark.long
def test_bootstrap_covers_as_often_as_it_says():
  # Prompts are clusters: within one all completions share most of the noise.
  rng = np.random.default_rng(0)
  hits = 0
  for i in range(1000):
    x = rng.normal(size=60) * 0.2 + 0.6
    low, high = curves.interval(curves.resampled(60, seed=i, draws=500) @ x)
    hits += low < 0.6 < high
  assert 0.915 < hits / 1000 < 0.965


def test_bootstrap_is_seeded():
  weights = curves.resampled(30)
  np.testing.assert_array_equal(weights, curves.resampled(30))
  np.testing.assert_allclose(weights.sum(1), 1)
  assert np.all(weights.std(0) > 0)


def policy(rate, kl, spread=0.05, kl_spread=0.01, prompts=9):
  """Win rates and log-ratios of prompts, with these means."""
  around = np.linspace(-1, 1, prompts)
  return rate + spread * around, kl + kl_spread * around


def test_frontier_reasons():
  curve = curves.best_of_n_curve(np.random.default_rng(0).random((9, 16)))
  cases = [
    (policy(1.0, 3.0, spread=0), 'every'),
    (policy(0.97, 3.0), 'Best-of-16'),
    (policy(0.4, 1.0), 'above 0.5'),
    (policy(0.51, 1.0, spread=0.2), 'above 0.5'),
    (policy(0.8, -0.1), 'does not lie above 0'),
    (policy(0.8, 0.1, kl_spread=0.4), 'does not lie above 0'),
  ]
  for arguments, words in cases:
    row = curves.frontier(*arguments, curve)
    assert words in row.pop('frontier_reason')
    assert set(row.values()) == {None}
  row = curves.frontier(*policy(0.75, 1.0), curve)
  assert row['effective_n'] == pytest.approx(3, abs=0.05)
  efficiency = math.log(3) - 2 / 3
  assert row['frontier_efficiency'] == pytest.approx(efficiency, abs=0.02)
  low, high = row['frontier_efficiency_interval']
  assert low < efficiency < high


@pytest.mark.parametrize('n, levels', core(1, [(4, 5), (2, None), (4, None)]))
def test_intervals_of_best_of_n_cover_as_often_as_they_say(
  n, levels, monkeypatch
):
  """A policy that is Best-of-n: n, and an efficiency of 1, lie inside."""
  few = functools.partial(curves.resampled, draws=400)
  monkeypatch.setattr(curves, 'resampled', few)
  rng = np.random.default_rng(n)
  draw = (
    rng.random if levels is None else lambda s: rng.integers(levels, size=s)
  )
  hits, ends = np.zeros(2), []
  for _ in range(150):
    reference, best = draw((80, 24)), draw((80, 6, n)).max(-1)
    rates = (
      (best[:, :, None] > reference[:, None]).mean((1, 2))
      + (best[:, :, None] >= reference[:, None]).mean((1, 2))
    ) / 2
    if levels is None:
      log_ratio = np.log(n * best ** (n - 1))
    else:
      mass = ((best + 1) / levels) ** n - (best / levels) ** n
      log_ratio = np.log(mass * levels)
    curve = curves.best_of_n_curve(reference, np.geomspace(1, 24, 40))
    row = curves.frontier(rates, log_ratio.mean(1), curve)
    for i, (key, truth) in enumerate(
      [('effective_n', n), ('frontier_efficiency', 1)]
    ):
      low, high = row[f'{key}_interval']
      hits[i] += low <= truth <= high
    ends.append(row['effective_n_interval'])
  # 95 % of 150, give or take three standard errors.
  assert np.all(hits >= 134), hits
  assert np.all(np.ptp(ends, 1) < n)  # and they are not endless


def test_each_resample_has_its_own_curve():
  """Here each is of one prompt; that with ties pays more for a win rate."""
  rng = np.random.default_rng(0)
  plain, tied = rng.standard_normal(64), rng.integers(0, 2, 64) * 1.0
  both = curves.best_of_n_curve(np.stack([plain, tied]))
  found = curves._on_resampled(np.eye(2), np.array([0.6, 0.6]), both)
  for i, values in enumerate((plain, tied)):
    alone = curves.best_of_n_curve(values[None])
    n = np.interp(0.6, np.maximum.accumulate(alone.win_rate), alone.ns)
    np.testing.assert_allclose(found[0, i], n, rtol=0.02)
    kl = np.interp(np.log(found[0, i]), np.log(alone.ns), alone.kl)
    np.testing.assert_allclose(found[1, i], kl, rtol=0.02)
  assert found[1, 1] > 1.1 * found[1, 0]
