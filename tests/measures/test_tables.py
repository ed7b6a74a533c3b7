"""The exact tables against enumeration, closed forms and their own equations.

Tables are [X, A]: three prompts unless said otherwise.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tables import distance, law, preference, ROCK_PAPER_SCISSORS, tied_reward

from bond_jax.algorithms.parts import ops
from bond_jax.measures import tables
from configs import ultrafeedback_wind

REWARDS = {
  'distinct': [[0.1, 2.0, -1.0, 0.5, 3.0]],
  'tied': [[1.0, 0.0, 1.0, 2.0, 2.0]],
  'all tied': [[0.5, 0.5, 0.5, 0.5, 0.5]],
}


def even(arms):
  """Many arms of one mass, in the order of their reward: a continuum."""
  return np.full((1, arms), -np.log(arms)), np.arange(arms, dtype=float)[None]


def log_arm_win_rate(log_p, win):
  with np.errstate(divide='ignore'):
    return np.log(tables.arm_win_rate(log_p, win))


# -- Best-of-N ----------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 3, 4])
@pytest.mark.parametrize('reward', REWARDS.values(), ids=REWARDS)
def test_best_of_n_is_the_enumeration(reward, n):
  log_p = law(0, prompts=1)
  exact = oracle.enumerate_best_of_n(np.exp(log_p[0]), np.array(reward[0]), n)
  got = np.exp(tables.best_of_n(log_p, reward, n))[0]
  np.testing.assert_allclose(got, exact, rtol=1e-12)


def test_best_of_a_real_n_is_the_closed_form():
  log_p, reward = law(1), tied_reward(1)
  for x in range(3):
    less, at_most = oracle.quantiles(np.exp(log_p[x]), reward[x])
    exact = np.exp(log_p[x]) * (at_most**2.5 - less**2.5) / (at_most - less)
    got = np.exp(tables.best_of_n(log_p, reward, 2.5))[x]
    np.testing.assert_allclose(got, exact, rtol=1e-12)


def test_best_of_n_of_masses_that_no_float_can_hold():
  """The worst arm wins only if it is drawn n times."""
  log_p = np.array([[-2000.0, -1000.0, 0.0]])
  got = tables.best_of_n(log_p, [[0.0, 1.0, 2.0]], 3)
  # p^3; then q^3 for the next, as what is below it adds nothing.
  np.testing.assert_allclose(got, [[-6000.0, -3000.0, 0.0]], rtol=1e-12)
  got = tables.best_of_n(log_p, [[1.0, 2.0, 0.0]], 3)  # rare, but the best
  np.testing.assert_allclose(
    got, [[np.log(3) - 2000, np.log(3) - 1000, 0]], rtol=1e-12
  )


def test_kl_and_win_rate_of_best_of_n_are_bounded():
  """Their well-known closed forms are bounds, which many arms reach."""
  for n in (1.5, 2, 4, 16):
    kl_bound, rate_bound = np.log(n) - (n - 1) / n, n / (n + 1)
    for reward in (tied_reward(2), law(3)):
      log_p = law(2)
      best = tables.best_of_n(log_p, reward, n)
      rate = tables.win_rate(best, log_p, tables.win_matrix(reward))
      assert (tables.kl(best, log_p) <= kl_bound).all()
      assert (rate > 0.5).all() and (rate <= rate_bound).all()
    log_p, reward = even(1000)
    best = tables.best_of_n(log_p, reward, n)
    rate = tables.win_rate(best, log_p, tables.win_matrix(reward))
    assert 0 < kl_bound - tables.kl(best, log_p)[0] < 1e-3
    assert 0 <= rate_bound - rate[0] < 1e-3


def test_best_of_n_of_best_of_m_is_best_of_n_m():
  log_p, reward = law(4), tied_reward(4)
  for n, m in ((2, 3), (4, 4), (1.5, 2.5)):
    twice = tables.best_of_n(tables.best_of_n(log_p, reward, m), reward, n)
    once = tables.best_of_n(log_p, reward, n * m)
    np.testing.assert_allclose(twice, once, rtol=0, atol=1e-12)


def test_best_of_2_is_twice_the_policy_times_its_win_rate():
  log_p, reward = law(5), tied_reward(5)
  rate = tables.arm_win_rate(log_p, tables.win_matrix(reward))
  best = np.exp(tables.best_of_n(log_p, reward, 2))
  np.testing.assert_allclose(best, 2 * np.exp(log_p) * rate, rtol=1e-12)


# -- iterative Best-of-n ------------------------------------------------------


def test_without_mixing_step_t_is_best_of_n_to_the_t():
  log_p, reward = law(6), tied_reward(6)
  for n in (2, 3):
    way = tables.iterate_best_of_n(log_p, law(7), reward, n, 5)
    assert way.shape == (6, 3, 5)
    for t, step in enumerate(way):
      exact = tables.best_of_n(log_p, reward, n**t)
      np.testing.assert_allclose(step, exact, rtol=1e-12, atol=1e-12)


def test_without_mixing_the_limit_is_the_start_on_the_best_arms():
  reference, reward = law(8), tied_reward(8)
  best = reward == reward.max(-1, keepdims=True)
  assert (best.sum(-1) > 1).any()  # ties keep their ratio
  limit = tables.normalise(np.where(best, reference, -np.inf))
  way = tables.iterate_best_of_n(reference, reference, reward, 2, 12)
  apart = [distance(step, limit) for step in way]
  assert apart[-1] < 1e-15
  # Doubly exponential: what is left is squared at each step.
  for now, then in itertools.pairwise(apart):
    assert then <= 2 * now**2 + 1e-15


@pytest.mark.parametrize(
  'alpha1, alpha2', [(0.2, 0.6), (0.4, 0.6), (0.3, 0.45), (0.5, 0.4)]
)
def test_mixing_leads_to_the_log_win_rate_equilibrium(alpha1, alpha2):
  """Exact for n = 2, ties included; the last pair has kl_weight < 1."""
  reference, reward = law(9), tied_reward(9)
  win = tables.win_matrix(reward)
  way = tables.iterate_best_of_n(
    reference, reference, reward, 2, 400, alpha1, alpha2
  )
  limit = tables.log_win_rate_equilibrium(reference, win, alpha2 / alpha1)
  assert distance(way[0], limit) > 0.01
  assert distance(way[-1], limit) < 1e-12


def test_one_step_of_mixing_is_the_weighted_product():
  log_p, reference, reward = law(10), law(11), tied_reward(10)
  step = tables.iterate_best_of_n(log_p, reference, reward, 3, 1, 0.2, 0.5)[1]
  best = np.exp(tables.best_of_n(log_p, reward, 3))
  p, q = np.exp(log_p), np.exp(reference)
  weight = best**0.2 * q**0.5 * p**0.3
  exact = weight / weight.sum(-1, keepdims=True)
  np.testing.assert_allclose(np.exp(step), exact, rtol=1e-12)


def test_with_many_arms_n_enters_the_kl_weight_as_n_less_one():
  """n = 4: alpha2 / (3 alpha1) = 2, whose limit is Best-of-2."""
  reference, reward = even(300)
  way = tables.iterate_best_of_n(reference, reference, reward, 4, 60, 0.1, 0.6)
  assert distance(way[-1], tables.best_of_n(reference, reward, 2)) < 0.006


@pytest.mark.parametrize('kl_weight', [1.25, 1.5, 2.0, 3.0, 10.0])
def test_in_a_continuum_the_log_game_is_solved_by_best_of_m(kl_weight):
  """m = kl_weight / (kl_weight - 1); the error falls as 1 / arms."""
  apart = []
  for arms in (300, 900):
    reference, reward = even(arms)
    win = tables.win_matrix(reward)
    got = tables.log_win_rate_equilibrium(reference, win, kl_weight)
    best = tables.best_of_n(reference, reward, kl_weight / (kl_weight - 1))
    apart.append(distance(got, best))
  assert apart[0] < 0.01
  assert apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize('kl_weight', [1.0, 0.9, 0.5, 0.1])
def test_in_a_continuum_the_log_game_collapses_at_1_and_below(kl_weight):
  reference, reward = even(300 if kl_weight < 1 else 60)  # slow at 1
  win = tables.win_matrix(reward)
  got = tables.log_win_rate_equilibrium(reference, win, kl_weight)
  np.testing.assert_allclose(np.exp(got[0, -1]), 1, rtol=1e-12)


@pytest.mark.parametrize('kl_weight', [5.0, 1.1, 1.0, 0.5, 0.2])
@pytest.mark.parametrize('kind', ['distinct', 'tied', 'cyclic', 'soft'])
def test_log_win_rate_equilibrium_solves_its_equation(kind, kl_weight):
  win, reference = preference(kind, 12), law(13, arms=6)
  got = tables.log_win_rate_equilibrium(reference, win, kl_weight)
  rate = log_arm_win_rate(got, win)
  exact = tables.normalise(reference + rate / kl_weight)
  assert distance(got, exact) < 1e-12


def test_log_win_rate_equilibrium_follows_a_cycle_or_says_that_it_cannot():
  """The plain iteration settles on none, one that mixes on the first two."""
  reference = law(14, arms=3, prompts=1)
  win = ROCK_PAPER_SCISSORS
  for kl_weight in (0.5, 0.2, 0.05):
    got = tables.log_win_rate_equilibrium(reference, win, kl_weight)
    rate = log_arm_win_rate(got, win)
    assert distance(got, tables.normalise(reference + rate / kl_weight)) < 1e-12
    assert np.exp(got).min() > 0.05
  with pytest.raises(ArithmeticError, match='kl_weight=0.01.* larger'):
    tables.log_win_rate_equilibrium(
      law(0, prompts=1), preference('cyclic', 0, prompts=1, arms=5), 0.01
    )


# -- WIND ---------------------------------------------------------------------


@pytest.mark.parametrize('kl_weight', [5.0, 0.5, 0.05, 0.005])
@pytest.mark.parametrize('kind', ['distinct', 'tied', 'cyclic', 'soft'])
def test_wind_equilibrium_is_the_fixed_point(kind, kl_weight):
  win, reference = preference(kind, 15), law(16, arms=6)
  got = tables.wind_equilibrium(reference, win, kl_weight)
  rate = tables.arm_win_rate(got, win)
  exact = tables.normalise(reference + rate / kl_weight)
  assert distance(got, exact) < 1e-12
  step = tables.wind_step(got, reference, win, kl_weight, 4 * kl_weight)
  assert distance(got, step) < 1e-12


def test_wind_equilibrium_where_newton_alone_goes_astray():
  """The tiny kl_weight, in units of P: b log(pi / ref) - P is one number."""
  win, reference = preference('cyclic', 0, 6, 8), law(0, 6, 8, sd=3)
  got = tables.wind_equilibrium(reference, win, 1e-4)
  spare = 1e-4 * (got - reference) - tables.arm_win_rate(got, win)
  np.testing.assert_allclose(np.ptp(spare, -1), 0, atol=1e-12)


def test_wind_equilibrium_of_rock_paper_scissors():
  """Even from an even reference; and in the game's own, as kl_weight falls."""
  even_law = np.full((1, 3), -np.log(3))
  got = tables.wind_equilibrium(even_law, ROCK_PAPER_SCISSORS, 0.1)
  np.testing.assert_allclose(got, even_law, atol=1e-14)
  got = tables.wind_equilibrium(
    law(17, prompts=1, arms=3), ROCK_PAPER_SCISSORS, 1e-4
  )
  assert 1e-6 < distance(got, even_law) < 1e-3


@pytest.mark.parametrize('kind', ['tied', 'cyclic'])
def test_wind_equilibrium_loses_to_nobody(kind):
  """P(pi > q) - b KL(pi || ref) + b KL(q || ref) >= 1/2 for every q."""
  win, reference = preference(kind, 18), law(19, arms=6)
  got = tables.wind_equilibrium(reference, win, 0.2)

  def value(q):
    return (
      tables.win_rate(got, q, win)
      - 0.2 * tables.kl(got, reference)
      + 0.2 * tables.kl(q, reference)
    )

  np.testing.assert_allclose(value(got), 0.5, rtol=1e-12)
  for seed in range(20):
    near = tables.normalise(got + 0.1 * law(seed, arms=6))
    assert (value(near) > 0.5).all()
    assert (value(law(seed, arms=6, sd=3)) > 0.5).all()


def test_wind_step_maximises_what_it_says():
  """e P(q > pi) - b e KL(q || ref) - KL(q || pi), over q."""
  win, policy, reference = (
    preference('tied', 20),
    law(21, arms=6),
    law(22, 3, 6),
  )
  step = tables.wind_step(policy, reference, win, 0.3, 2.0)

  def value(q):
    return (
      2.0 * tables.win_rate(q, policy, win)
      - 0.6 * tables.kl(q, reference)
      - tables.kl(q, policy)
    )

  for seed in range(20):
    near = tables.normalise(step + 0.1 * law(seed, arms=6))
    assert (value(near) < value(step)).all()


@pytest.mark.parametrize('kind', ['distinct', 'tied', 'cyclic', 'soft'])
def test_each_wind_step_divides_the_divergence(kind):
  """KL(pi* || pi_t) falls by 1 / (1 + b e) or more while e <= 4 b."""
  win, reference = preference(kind, 23), law(24, arms=6)
  for kl_weight in (0.1, 0.5):
    for step_size in (kl_weight, 4 * kl_weight):
      target = tables.wind_equilibrium(reference, win, kl_weight)
      policy, last = reference, np.full(3, np.inf)
      for _ in range(30):
        now = tables.kl(target, policy)
        if now.max() < 1e-10:  # what follows is rounding
          break
        assert (now <= last / (1 + kl_weight * step_size) + 1e-14).all()
        last = now
        policy = tables.wind_step(policy, reference, win, kl_weight, step_size)
      assert (
        np.isfinite(last).all()
        and last.max() < tables.kl(target, reference).max()
      )


@pytest.mark.parametrize('factor', [0.5, 0.9, 1.0, 1.1, 2.0])
def test_rock_paper_scissors_diverges_above_its_step_size(factor):
  """A step multiplies a squared deviation by (1 + e^2 / 12) / (1 + b e)^2."""
  kl_weight = 0.1
  step_size = factor * 2 * kl_weight / (1 / 12 - kl_weight**2)
  reference = np.full((1, 3), -np.log(3))
  policy = tables.normalise(reference + [[1e-4, 0.0, -1e-4]])
  start = tables.kl(reference, policy)
  for _ in range(10):
    policy = tables.wind_step(
      policy, reference, ROCK_PAPER_SCISSORS, kl_weight, step_size
    )
  growth = (tables.kl(reference, policy) / start) ** 0.1
  exact = (1 + step_size**2 / 12) / (1 + kl_weight * step_size) ** 2
  np.testing.assert_allclose(growth, exact, rtol=1e-4)
  assert np.sign(round(exact - 1, 9)) == np.sign(factor - 1)


@pytest.mark.long
def test_three_iterations_of_the_paper_s_comparison_come_near_equilibrium():
  """configs/ultrafeedback_wind.py, with exact steps on arms without ties."""
  args = ultrafeedback_wind.ALGORITHMS['wind'][2]
  b, e = args['kl_weight'], args['step_size']
  arms = np.arange(1000)
  reference = np.full((1, 1000), -math.log(1000))
  win = (1 + np.sign(arms[:, None] - arms))[None] / 2
  kl = lambda p, q: (np.exp(p) * (p - q)).sum()
  target = tables.wind_equilibrium(reference, win, b)
  a = 1 - math.exp(-1 / b)
  rate = (np.exp(target) * (arms + 0.5)).sum() / 1000
  assert rate == pytest.approx(1 / a - b, abs=1e-3)
  assert kl(target, reference) == pytest.approx(
    1 / (2 * b) + math.log(a * b), abs=1e-2
  )
  policy, other = reference, reference
  for _ in range(ultrafeedback_wind.ITERATIONS):
    policy = tables.wind_step(policy, reference, win, b, e)
    other = tables.wind_step(other, reference, win, 0.0, e)
  assert kl(target, policy) < 0.1 * kl(target, reference)
  assert kl(target, other) > kl(target, policy) + 0.5  # SPPO goes elsewhere


def test_wind_without_kl_weight_is_sppo():
  """pi exp(e P) : the best arm for rewards, no last iterate for a cycle."""
  win, policy = preference('distinct', 25), law(26, arms=6)
  reference = np.where(np.arange(6) > 0, law(27, arms=6), -np.inf)
  reference = tables.normalise(reference)  # which is not looked at
  step = tables.wind_step(policy, reference, win, 0.0, 3.0)
  weight = np.exp(policy) * np.exp(3 * tables.arm_win_rate(policy, win))
  exact = weight / weight.sum(-1, keepdims=True)
  np.testing.assert_allclose(np.exp(step), exact, rtol=1e-12)
  for _ in range(80):
    policy = tables.wind_step(policy, reference, win, 0.0, 3.0)
  best = win.sum(-1).argmax(-1)
  np.testing.assert_allclose(np.exp(policy)[np.arange(3), best], 1, rtol=1e-12)

  policy = law(28, prompts=1, arms=3)
  even_law = np.full((1, 3), -np.log(3))
  start = tables.kl(even_law, policy)
  for _ in range(50):
    policy = tables.wind_step(policy, policy, ROCK_PAPER_SCISSORS, 0.0, 0.5)
  assert tables.kl(even_law, policy) > start


def test_the_two_games_agree_for_a_small_kl_weight_only():
  reference = law(29, prompts=5, arms=8)
  win = preference('distinct', 29, prompts=5, arms=8)
  apart = {}
  for kl_weight in (2.0, 0.5, 0.2, 0.1, 0.05, 0.02):
    wind = tables.wind_equilibrium(reference, win, kl_weight)
    log_win = tables.log_win_rate_equilibrium(reference, win, kl_weight)
    apart[kl_weight] = distance(wind, log_win)
  assert apart[2.0] > 0.05 and apart[0.5] > 0.5
  assert apart[0.5] > apart[0.2] > apart[0.1] > apart[0.05] > apart[0.02]
  assert apart[0.02] < 1e-9
  best = win.sum(-1).argmax(-1)  # and there is where they meet
  np.testing.assert_allclose(np.exp(wind)[np.arange(5), best], 1, rtol=1e-9)


# -- the corners --------------------------------------------------------------


def test_the_measures():
  log_p, log_q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
  exact = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
  np.testing.assert_allclose(tables.kl(log_p, log_q), [exact], rtol=1e-12)
  win = tables.win_matrix(np.array([[0.0, 1.0]]))
  np.testing.assert_array_equal(win, [[[0.5, 0.0], [1.0, 0.5]]])
  # A half ties; else 0.5 * 0.25 against 0.5 * 0.75.
  got = tables.win_rate(log_p, log_q, win)
  np.testing.assert_allclose(got, [0.25 + 0.125], rtol=1e-12)
  reward = tied_reward(41)
  np.testing.assert_array_equal(
    tables.win_matrix(reward), ops.win_matrix(jnp.asarray(reward))
  )


def test_tied_rewards_teach_nothing():
  reference, reward = law(42), np.zeros((3, 5))
  win = tables.win_matrix(reward)
  for got in (
    tables.best_of_n(reference, reward, 7.5),
    tables.iterate_best_of_n(reference, reference, reward, 2, 9, 0.3, 0.3)[-1],
    tables.wind_step(reference, reference, win, 0.1, 2.0),
    tables.wind_equilibrium(reference, win, 0.1),
    tables.log_win_rate_equilibrium(reference, win, 0.1),
  ):
    np.testing.assert_allclose(got, reference, atol=1e-12)


def test_arms_without_mass_are_as_if_they_were_not_there():
  live = [0, 2, 3]
  small, reward = law(43, arms=3), tied_reward(43)
  log_p = np.full((3, 5), -np.inf)
  log_p[:, live] = small
  win = tables.win_matrix(reward)
  small_win = win[:, live][:, :, live]
  small_reward = reward[:, live]
  for got, exact in (
      (tables.best_of_n(log_p, reward, 1),
       small),
      (tables.best_of_n(log_p, reward, 3),
       tables.best_of_n(small, small_reward, 3)),
      # The weights leave nothing to the policy, but for rounding.
      (tables.iterate_best_of_n(log_p, log_p, reward, 2, 5, 0.8, 0.2)[-1],
       tables.iterate_best_of_n(small, small, small_reward, 2, 5, .8, .2)[-1]),
      (tables.wind_step(log_p, log_p, win, 0.1, 2.0),
       tables.wind_step(small, small, small_win, 0.1, 2.0)),
      (tables.wind_equilibrium(log_p, win, 0.1),
       tables.wind_equilibrium(small, small_win, 0.1)),
      (tables.log_win_rate_equilibrium(log_p, win, 1.5),
       tables.log_win_rate_equilibrium(small, small_win, 1.5)),
  ):  # fmt: skip
    np.testing.assert_allclose(got[:, live], exact, rtol=1e-12, atol=1e-12)
    assert np.isneginf(got[:, [1, 4]]).all()
  assert np.isfinite(tables.kl(log_p, law(44))).all()
  assert np.isposinf(tables.kl(law(44), log_p)).all()
  cycle = np.full((1, 5), -np.inf)
  cycle[:, live] = law(45, prompts=1, arms=3)
  win = np.empty((1, 5, 5))  # and they would lose to all others
  win[:, [1, 4]], win[:, :, [1, 4]] = 0.0, 1.0
  win[np.ix_([0], [1, 4], [1, 4])] = 0.5
  win[np.ix_([0], live, live)] = ROCK_PAPER_SCISSORS
  got = tables.log_win_rate_equilibrium(cycle, win, 0.05)  # by Newton
  exact = tables.log_win_rate_equilibrium(
    cycle[:, live], ROCK_PAPER_SCISSORS, 0.05
  )
  np.testing.assert_allclose(got[:, live], exact, atol=1e-12)
  assert np.isneginf(got[:, [1, 4]]).all()


def test_tables_are_float64_whatever_comes_in():
  log_p = law(46).astype(np.float32)
  win = ops.win_matrix(jnp.asarray(tied_reward(46), jnp.float32))
  assert win.dtype == jnp.float32  # x64 is off
  for got in (
    tables.best_of_n(log_p, tied_reward(46).astype(int), 2),
    tables.wind_step(log_p, jnp.asarray(log_p), win, 0.1, 1.0),
    tables.wind_equilibrium(log_p, win, 0.1),
  ):
    assert got.dtype == np.float64
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-14)


P, R, W = law(47), tied_reward(47), preference('tied', 47, arms=5)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: tables.best_of_n(P, R, 0.5), 'n must be .*>= 1, got 0.5'),
        (lambda: tables.best_of_n(P, R, np.nan), 'got nan'),
        (lambda: tables.best_of_n(P, R, np.inf), 'got inf'),
        (lambda: tables.best_of_n(P[0], R[0], 2), r'\[prompts, arms\].* \[5\]'),
        (lambda: tables.best_of_n(P, R[:2], 2), r'\[3, 5\].* got \[2, 5\]'),
        (lambda: tables.best_of_n(P, R / 0, 2), 'reward must be finite'),
        (lambda: tables.best_of_n(P + 1, R, 2), 'sum to 1, got'),
        (lambda: tables.best_of_n(P * np.nan, R, 2), 'sum to 1, got'),
        *((lambda a=a, b=b: tables.iterate_best_of_n(P, P, R, 2, 1, a, b),
           f'alpha1 must lie in .* got alpha1={a}, alpha2={b}')
          for a, b in ((0, 0.5), (1.1, 0), (0.5, -0.1), (0.5, 0.6))),
        (lambda: tables.iterate_best_of_n(P, P, R, 2, -1), 'steps .* got -1'),
        (lambda: tables.iterate_best_of_n(P, P[:, :4], R, 2, 1), 'reference'),
        (lambda: tables.wind_step(P, P, W, -0.1, 1), 'kl_weight .*>= 0'),
        (lambda: tables.wind_step(P, P, W, 0.1, 0), 'step_size .*> 0, got 0'),
        (lambda: tables.wind_step(P, P[:1], W, 1, 1), r'log_reference must be'),
        (lambda: tables.wind_step(P, P, W[0], 1, 1), r'\[3, 5, 5\], got'),
        (lambda: tables.wind_step(P, P, W + 0.1, 1, 1), 'sums from 1.2'),
        (lambda: tables.wind_step(P, P, 3 * W - 1, 1, 1), r'lie in \[0, 1\]'),
        (lambda: tables.wind_equilibrium(P, W, 0), 'kl_weight .*> 0, got 0'),
        (lambda: tables.log_win_rate_equilibrium(P, W, -1), '> 0, got -1'),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
  with np.errstate(all='ignore'), pytest.raises(ValueError, match=message):
    call()


def test_policy_and_reference_must_share_an_arm():
  with np.errstate(divide='ignore'):
    one, other = np.log([[1.0, 0.0]]), np.log([[0.0, 1.0]])
  with pytest.raises(ValueError, match='share arms'):
    tables.wind_step(one, other, np.full((1, 2, 2), 0.5), 0.1, 1.0)
