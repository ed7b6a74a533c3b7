"""Measures against exact values: closed forms, and enumerated small laws."""

import itertools
import json
import math

import numpy as np
import pytest

from bond_jax import measures


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
  curve = measures.best_of_n_curve(
    reward[sample_of(p, 8)][None], np.array([n, 1.5])
  )
  rate, kl = plug_in(curve)
  exact = win_and_kl(best_of_n_law(reward, p, n), reward, p)
  np.testing.assert_allclose((rate[0], kl[0]), exact, rtol=1e-12, atol=1e-15)


def test_curve_with_a_large_sample_is_the_closed_form():
  curve = measures.best_of_n_curve(np.random.default_rng(0).random((2, 2048)))
  rate, kl = measures.closed_form(curve.ns)
  inside = curve.ns < 32
  np.testing.assert_allclose(curve.win_rate[inside], rate[inside], atol=1e-6)
  np.testing.assert_allclose(curve.kl[inside], kl[inside], atol=2e-5)


def test_curve_of_64_without_ties_is_the_closed_form():
  curve = measures.best_of_n_curve(np.random.default_rng(0).random((3, 64)))
  rate, kl = measures.closed_form(curve.ns)
  inside = curve.ns < 32
  np.testing.assert_allclose(curve.win_rate[inside], rate[inside], atol=1e-3)
  np.testing.assert_allclose(curve.kl[inside], kl[inside], atol=1.1e-2)
  assert np.all(np.diff(curve.win_rate) > 0)


def test_curve_is_lower_where_rewards_tie():
  rewards = np.random.default_rng(0).integers(4, size=(20, 64))
  curve = measures.best_of_n_curve(rewards)
  rate, kl = measures.closed_form(curve.ns)
  assert np.all(curve.win_rate[20:] < rate[20:] - 1e-3)
  assert np.all(curve.kl[20:] < kl[20:] - 1e-3)


def test_jackknife_is_the_one_that_leaves_each_sample_out():
  rewards = np.array([[3, 1, 1, 2, 3, 3, 0], [0, 0, 0, 0, 1, 0, 5]])
  ns = np.array([1, 1.7, 2, 5])
  curve = measures.best_of_n_curve(rewards, ns)
  size = rewards.shape[1]
  left_out = np.mean(
    [
      plug_in(measures.best_of_n_curve(np.delete(rewards, i, 1), ns))
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
    curve = measures.best_of_n_curve(rewards, ns)
    raw += weight * np.stack(plug_in(curve))
    corrected += weight * np.stack([curve.win_rate, curve.kl])
  reward = np.array([0.0, 1.0])
  exact = np.stack(
    [win_and_kl(best_of_n_law(reward, p, int(n)), reward, p) for n in ns], 1
  )
  # Best-of-2's win rate is cubic in p: the jackknife leaves its 1 / S^2.
  assert np.all(raw < exact - 1e-3)
  assert np.all(abs(corrected - exact) < 0.15 * abs(raw - exact))


def test_one_is_the_reference_itself():
  rewards = np.random.default_rng(0).integers(5, size=(10, 12))
  curve = measures.best_of_n_curve(rewards)
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
    measures.best_of_n_curve(rewards, ns)


@pytest.mark.parametrize('strength', [0.0, 1e-3, 0.02, 1.0, 8.0, 60.0])
def test_tilt_is_the_integral(strength):
  nodes, weights = np.polynomial.legendre.leggauss(200)
  u, weights = (nodes + 1) / 2, weights / 2
  density = np.exp(strength * u)
  density /= weights @ density
  exact = weights @ (density * u), weights @ (density * np.log(density))
  np.testing.assert_allclose(
    measures.tilt_frontier(strength), exact, rtol=1e-6, atol=1e-12
  )


def test_tilt_costs_no_more_than_best_of_n():
  rate, kl = measures.closed_form(np.geomspace(1.1, 64, 50))
  tilt_rate, tilt_kl = measures.tilt_frontier(np.linspace(0, 200, 200_001))
  at_same_rate = np.interp(rate, tilt_rate, tilt_kl)
  assert np.all(at_same_rate < kl)
  assert np.all(at_same_rate[rate > 0.8] > 0.97 * kl[rate > 0.8])


def test_win_rate_counts_ties_half():
  policy = np.array([[1.0, 2.0], [0.0, 0.0]])
  reference = np.array([[1.0, 0.0, 3.0], [0.0, -1.0, -1.0]])
  # Prompt 1: (1/2 + 1 + 0 + 1 + 1 + 0) / 6; prompt 2: (1/2 + 1 + 1) / 3.
  np.testing.assert_allclose(
    measures.win_rates(policy, reference), [3.5 / 6, 2.5 / 3]
  )
  assert measures.win_rate(policy, reference) == pytest.approx(
    (3.5 / 6 + 2.5 / 3) / 2
  )


def test_bootstrap_covers_as_often_as_it_says():
  # Prompts are clusters: within one all completions share most of the noise.
  rng = np.random.default_rng(0)
  hits = 0
  for i in range(1000):
    x = rng.normal(size=60) * 0.2 + 0.6
    low, high = measures.bootstrap_interval(x, seed=i, draws=500)
    hits += low < 0.6 < high
  assert 0.915 < hits / 1000 < 0.965


def test_bootstrap_is_seeded():
  x = np.random.default_rng(0).random(30)
  assert measures.bootstrap_interval(x) == measures.bootstrap_interval(x)


def test_standard_error_is_over_prompts():
  # Two identical columns are no more information than one.
  x = np.array([[1.0], [2.0], [6.0]])
  mean, error = measures.mean_and_stderr(np.repeat(x, 10, 1))
  assert mean == 3
  assert error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
  with pytest.raises(ValueError, match='2 prompts'):
    measures.mean_and_stderr(x[:1])


def test_tie_rate_is_over_distinct_draws():
  assert measures.tie_rate(np.array([[1, 1, 2, 3]])) == pytest.approx(1 / 6)
  assert measures.tie_rate(np.array([[1, 1], [1, 2]])) == pytest.approx(1 / 2)
  assert measures.tie_rate(np.array([[1, 2, 3]])) == 0


def test_mean_log_quantile_of_the_reference_is_minus_one():
  x = np.random.default_rng(0).random((4, 1200))
  value = measures.mean_log_quantile(x[:, :600], x[:, 600:])
  assert value == pytest.approx(-1, abs=0.06)
  assert measures.mean_log_quantile(x[:, :5] + 2, x) == 0
  worst = measures.mean_log_quantile(x[:, :5] - 2, x)
  assert worst == pytest.approx(-math.log(1201))


def test_distinct_n():
  assert measures.distinct_n(['a b a b', 'a'], 1) == pytest.approx(2 / 5)
  assert measures.distinct_n(['a b a b', 'a'], 2) == pytest.approx(2 / 3)
  assert measures.distinct_n(['a'], 2) == 0


def test_reward_by_length():
  length = np.array([1, 2, 3, 4])
  buckets = measures.reward_by_length(
    (np.array([1.0, 3.0]), np.array([4, 4])), (length * 1.0, length)
  )
  assert [b['up_to'] for b in buckets] == [1, 2, 3, None]
  assert [b['reward_policy'] for b in buckets] == [None, None, None, 2.0]
  assert [b['share_reference'] for b in buckets] == [0.25] * 4
  # Where most are cut at the limit, no bucket lies beyond it.
  cut = (np.ones(4), np.array([1, 4, 4, 4]))
  assert [b['up_to'] for b in measures.reward_by_length(cut, cut)] == [3, None]


def best_of_n_records(n, prompts=200, size=64, levels=None):
  """A policy that is Best-of-n itself, with its exact log-ratio."""
  rng = np.random.default_rng(n)
  draw = (
    rng.random if levels is None else lambda s: rng.integers(levels, size=s)
  )
  reference = draw((prompts, size))
  policy = draw((prompts, size, n)).max(-1)
  if levels is None:
    log_ratio = np.log(n * policy ** (n - 1))
  else:
    mass = ((policy + 1) / levels) ** n - (policy / levels) ** n
    log_ratio = np.log(mass * levels)
  rows = []
  for x in range(prompts):
    for who, rewards in (('policy', policy), ('reference', reference)):
      for a in range(size):
        ratio = log_ratio[x, a] if who == 'policy' else 0.0
        rows.append({
            'id': x, 'prompt': 'p', 'completion': 'a b', 'who': who,
            'reward': float(rewards[x, a]), 'gold': -float(rewards[x, a]),
            'log_policy': float(ratio) - 9.0, 'log_reference': -9.0,
            'length': 2 + a % 3, 'truncated': a == 0,
        })  # fmt: skip
  return rows


@pytest.mark.parametrize('levels', [None, 6])
def test_best_of_n_itself_is_on_the_frontier(levels):
  summary = measures.summarise(best_of_n_records(4, levels=levels))
  assert summary['effective_n'] == pytest.approx(4, rel=0.05)
  assert summary['frontier_efficiency'] == pytest.approx(1, abs=0.03)
  assert summary['frontier_reason'] is None
  low, high = summary['win_rate_interval']
  assert low < summary['win_rate'] < high
  assert summary['gold_win_rate'] == pytest.approx(1 - summary['win_rate'])
  assert summary['completions_policy'] == 200 * 64
  assert summary['truncated_policy'] == 1 / 64
  if levels is None:
    kl = measures.closed_form(4)[1]
    assert abs(summary['kl'] - kl) < 4 * summary['kl_stderr']
    assert summary['tie_rate'] == 0
  else:
    assert summary['tie_rate'] == pytest.approx(1 / 6, abs=0.01)
  json.dumps(summary, allow_nan=False)


def test_equal_policies_get_null_and_the_reason():
  summary = measures.summarise(best_of_n_records(1))
  assert summary['win_rate'] == pytest.approx(0.5, abs=0.02)
  assert summary['effective_n'] is summary['frontier_efficiency'] is None
  assert '0.5' in summary['frontier_reason']


def test_frontier_reasons():
  curve = measures.best_of_n_curve(np.random.default_rng(0).random((9, 16)))
  cases = [
    ((1.0, (1.0, 1.0), 3.0, 0.1), 'every'),
    ((0.97, (0.96, 0.98), 3.0, 0.1), 'Best-of-16'),
    ((0.4, (0.3, 0.45), 1.0, 0.1), 'above 0.5'),
    ((0.8, (0.7, 0.9), -0.1, 0.01), 'does not lie above 0'),
    ((0.8, (0.7, 0.9), 0.1, 0.06), 'does not lie above 0'),
  ]
  for arguments, words in cases:
    row = measures.frontier(*arguments, curve)
    assert words in row['frontier_reason']
    assert row['effective_n'] is row['frontier_efficiency'] is None
  row = measures.frontier(0.75, (0.7, 0.8), 1.0, 0.1, curve)
  assert row['effective_n'] == pytest.approx(3, abs=0.05)
  assert row['frontier_efficiency'] == pytest.approx(
    math.log(3) - 2 / 3, abs=0.02
  )


def test_summary_refuses_rows_that_are_no_table():
  rows = best_of_n_records(1, prompts=3, size=4)
  with pytest.raises(ValueError, match='same number of policy'):
    measures.summarise(rows[1:])
  with pytest.raises(ValueError, match='none at all'):
    measures.summarise([r for r in rows if r['who'] == 'policy'])
  short = {k: v for k, v in rows[1].items() if k != 'reward'}
  with pytest.raises(ValueError, match='completion 2 lacks reward'):
    measures.summarise([rows[0], short, *rows[2:]])
  moved = [r | {'id': r['id'] + 1} if r['who'] == 'policy' else r for r in rows]
  with pytest.raises(ValueError, match='different prompts'):
    measures.summarise(moved)
