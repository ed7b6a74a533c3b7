"""WIND from samples: the risks, their fits and the error that is left.

Tables are [X, A]: three prompts unless said otherwise.
"""

import numpy as np
import pytest
import scipy.optimize
from tables import law, preference, tied_reward

from benchmarks.papers import bandit_samples, wind_1
from bond_jax.measures import tables

RISKS = {
  'squared': lambda f, z: (f - z) ** 2,
  'kl': lambda f, z: -z * np.log(f) - (1 - z) * np.log(1 - f),
  'nce': lambda f, z: -z * np.log(f / (1 + f)) + np.log(1 + f),
}


@pytest.mark.parametrize('name', RISKS)
def test_the_curvature_is_the_risk_s(name):
  f, z = np.meshgrid(np.linspace(0.1, 0.9, 9), [0.0, 0.5, 1.0])
  h = 1e-5
  slope = (RISKS[name](f + h, z) - RISKS[name](f - h, z)) / (2 * h)
  exact = bandit_samples.CURVATURE[name](f) * (f - z)
  np.testing.assert_allclose(slope, exact, atol=1e-7)


@pytest.mark.parametrize('name', RISKS)
def test_each_risk_s_minimiser_on_a_table_is_the_wind_step(name):
  """Over the population of z, cell by cell, found without the curvature."""
  win = preference('tied', 30, arms=4)
  policy, reference = law(31, arms=4), law(32, arms=4)
  p = np.exp(policy)
  value = np.empty_like(p)
  for x, y in np.ndindex(*p.shape):
    f = scipy.optimize.minimize_scalar(
        lambda f, x=x, y=y: p[x] @ RISKS[name](f, win[x, y]),
        bounds=(1e-6, 1 - 1e-6), method='bounded', options={'xatol': 1e-10},
    )  # fmt: skip
    value[x, y] = f.x
  got = tables.mirror_step(policy, reference, value, 0.2, 1.0)
  exact = tables.wind_step(policy, reference, win, 0.2, 1.0)
  np.testing.assert_allclose(got, exact, atol=1e-7)
  # The same in closed form, from the population's visits and wins.
  fit = bandit_samples.fit_win_rate(
    p, p * tables.arm_win_rate(policy, win), None, name
  )
  got = tables.mirror_step(policy, reference, fit, 0.2, 1.0)
  np.testing.assert_allclose(got, exact, atol=1e-13)


def test_on_a_table_the_three_risks_are_one_algorithm():
  """One free value per cell, whether or not it is written as features."""
  rng = np.random.default_rng(33)
  visits = rng.integers(0, 9, (2, 4))
  visits[0, 0] = 0
  wins = rng.binomial(visits, 0.6)
  mean = np.where(visits > 0, wins / np.maximum(visits, 1), 0.5)
  cells = np.eye(8).reshape(2, 4, 8)
  for name in RISKS:
    for features in (None, cells):
      fit = bandit_samples.fit_win_rate(visits, wins, features, name)
      np.testing.assert_allclose(fit, mean, atol=1e-12)


def test_a_restricted_fit_minimises_its_own_risk():
  """Where features cannot hold the truth, the risks part."""
  rng = np.random.default_rng(34)
  features = 0.1 * rng.standard_normal((2, 6, 3))
  visits = rng.uniform(1, 2, (2, 6))
  mean = rng.uniform(0.2, 0.8, (2, 6))
  fits = {}
  for name, risk in RISKS.items():

    def total(w, risk=risk):
      return (visits * risk(0.5 + features @ w, mean)).sum()

    w = scipy.optimize.minimize(total, np.zeros(3), method='BFGS').x
    got = bandit_samples.fit_win_rate(visits, visits * mean, features, name)
    np.testing.assert_allclose(got, 0.5 + features @ w, atol=1e-4)
    fits[name] = got
  assert np.abs(fits['squared'] - fits['kl']).max() > 0.003
  assert np.abs(fits['squared'] - fits['nce']).max() > 0.003


@pytest.mark.parametrize('name', RISKS)
def test_a_realisable_linear_fit_is_exact(name):
  """The figure's last panel: P(y > pi) is linear in the features."""
  rng = np.random.default_rng(35)
  reference, win, features = wind_1.linear_instance(rng)
  p, rate = np.exp(reference), tables.arm_win_rate(reference, win)
  fit = bandit_samples.fit_win_rate(p, p * rate, features, name)
  np.testing.assert_allclose(fit, rate, atol=1e-10)


def test_comparisons_are_of_the_policy_with_itself():
  rng = np.random.default_rng(36)
  policy, win = law(37, arms=4), preference('soft', 37, arms=4)
  many = 2_000_000
  visits, wins = bandit_samples.sample_comparisons(rng, policy, win, many)
  assert visits.sum() == many
  p = np.exp(policy) / 3  # prompts evenly
  np.testing.assert_allclose(visits / many, p, atol=5 / np.sqrt(many))
  rate = tables.arm_win_rate(policy, win)
  error = (wins / visits - rate) * np.sqrt(visits)  # standard deviation <= 1/2
  assert np.abs(error).max() < 2.5


def test_a_tie_counts_one_half():
  rng = np.random.default_rng(38)
  tied = np.full((3, 5, 5), 0.5)
  visits, wins = bandit_samples.sample_comparisons(rng, law(38), tied, 1001)
  assert visits.sum() == 1001
  np.testing.assert_array_equal(wins, 0.5 * visits)


@pytest.mark.parametrize('linear', [False, True])
def test_the_error_of_sampled_wind_falls_as_one_over_m(linear):
  if linear:
    rng = np.random.default_rng(39)
    reference, win, features = wind_1.linear_instance(rng)
  else:
    reference, features = law(39, prompts=2), None
    win = preference('soft', 39, prompts=2, arms=5)
  target = tables.wind_equilibrium(reference, win, 0.3)
  error = {}
  for m in (1000, 16000):
    rng = np.random.default_rng(40)
    error[m] = 0.0
    for _ in range(10 if linear else 40):
      policy = reference
      for _ in range(15):
        policy = bandit_samples.sampled_wind_step(
          rng, policy, reference, win, 0.3, 2.0, m, features, 'kl'
        )
      error[m] += tables.kl(target, policy).mean()
  slope = np.log(error[16000] / error[1000]) / np.log(16)
  assert -1.2 < slope < -0.8


P, R, W = law(47), tied_reward(47), preference('tied', 47, arms=5)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: bandit_samples.fit_win_rate(R, R, None, 'l1'),
         r"\['squared', 'kl', 'nce'\], got 'l1'"),
        (lambda: bandit_samples.sample_comparisons(None, P, W, 0), 'got 0'),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
  with np.errstate(all='ignore'), pytest.raises(ValueError, match=message):
    call()
