"""WIND against enumeration of every K-tuple, in double precision.

Axes: Y completions of a law, K drawn. Where a policy is a vector [Y] it need
not be normalised: the paper's step is exact for free log-probabilities, and
what normalisation costs is a matter of the constant.
"""

import functools
import itertools
import math

from conftest import core
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from preferences import (
  check_gradient,
  expected_gradient,
  laws,
  random_scores,
  tables,
  wins,
)
import pytest

from bond_jax.algorithms import sppo, wind
from bond_jax.algorithms.parts import ops

ONE_TOKEN = oracle.sequences(4, 1, None)
TWO_TOKENS = oracle.sequences(3, 2, 1)
SMALL = oracle.sequences(2, 2, 1)
RISKS = ('squared', 'kl', 'nce')

make = functools.partial(
  wind.make, kl_weight=0.3, step_size=1.5, risk='squared', constant='half'
)


def exact_step(log_q, log_r, win, kl_weight, step_size):
  """One step of exact WIND: log-probabilities [Y] in and out."""
  free = log_q + step_size * (kl_weight * log_r + win @ np.exp(log_q))
  free = free / (1 + kl_weight * step_size)
  return free - np.logaddexp.reduce(free)


def equilibrium(log_r, win, kl_weight):
  log_q = log_r
  for _ in range(200):
    log_q = exact_step(log_q, log_r, win, kl_weight, 4 * kl_weight)
  return log_q


def on_simplex(gradient, log_p):
  """What is left of a gradient when log_p = log_softmax(logits)."""
  return gradient - jnp.exp(log_p) * gradient.sum()


# -- the gradient -------------------------------------------------------------

PHI = {
  'squared': (lambda f: f * f, -math.inf, math.inf),
  'kl': (lambda f: f * jnp.log(f) + (1 - f) * jnp.log(1 - f), 0.05, 0.95),
  'nce': (lambda f: f * jnp.log(f) - (1 + f) * jnp.log(1 + f), 0.05, 1.0),
}


def divergence(risk, f, z):
  """phi(z) - phi(f) - phi'(f) (z - f) without phi(z), from phi itself."""
  phi, low, high = PHI[risk]

  @jnp.vectorize
  def one(f, z):
    c = jnp.clip(f, low, high)
    first, second = jax.grad(phi)(c), jax.grad(jax.grad(phi))(c)
    value = phi(c) + first * (f - c) + second * (f - c) ** 2 / 2
    return -value - (first + second * (f - c)) * (z - f)

  return one(f, z)


def log_ratios(theta, anchor, reference, law, kl_weight, step_size):
  """g [Y], from sums over sequences."""
  log_p, log_q, log_r = (
    oracle.table_log_probs(t[0], *law).sum(-1)
    for t in (theta, anchor, reference)
  )
  b, e = kl_weight, step_size
  return ((1 + b * e) * log_p - log_q - b * e * log_r) / e, jnp.exp(log_q)


def risk_at_the_true_win_rate(theta, anchor, reference, win, law, risk, b, e):
  """E_{y ~ anchor} D(P(y), f(y)), f = 1/2 + g."""
  g, q = log_ratios(theta, anchor, reference, law, b, e)
  return (q * divergence(risk, 0.5 + g, win @ q)).sum()


def pairwise_risk(theta, anchor, reference, win, law, b, e):
  """E of ((g - g') - (P - P'))^2 / 2 over independent y, y'."""
  g, q = log_ratios(theta, anchor, reference, law, b, e)
  gap = (g - win @ q)[:, None] - (g - win @ q)[None, :]
  return (q[:, None] * q[None, :] * gap**2).sum() / 2


CASES = [
  (ONE_TOKEN, 3, 1, 0.0, 1.0),
  (ONE_TOKEN, 4, 4, 0.1, 3.0),
  (TWO_TOKENS, 3, 2, 0.3, 1.5),
  (ONE_TOKEN, 2, 2, 0.3, 1.5),
]
# Each case and each risk, then the other pairs.
PAIRS = [(RISKS[(i + j) % 3], *CASES[i]) for j in range(3) for i in range(4)]


@pytest.mark.parametrize(
  ('risk', 'law', 'k', 'rows', 'kl_weight', 'step_size'), core(4, PAIRS)
)
def test_expected_gradient_is_the_risk_s(
  x64, risk, law, k, rows, kl_weight, step_size
):
  """At policies whose f leaves (0, 1), as log-ratios do."""
  g, _ = log_ratios(*tables(k, law), law, kl_weight, step_size)
  _, low, high = PHI['kl']
  assert (0.5 + g > low).any() and ((0.5 + g < low) | (0.5 + g > high)).any()
  algorithm = make(
    kl_weight=kl_weight,
    step_size=step_size,
    risk=risk,
    num_anchor=k,
    rows=rows,
  )
  objective = functools.partial(
    risk_at_the_true_win_rate, risk=risk, b=kl_weight, e=step_size
  )
  check_gradient(algorithm, objective, law, seed=k)


@pytest.mark.parametrize(
  ('law', 'k', 'rows'),
  core(
    2,
    [
      (ONE_TOKEN, 4, 2),
      (TWO_TOKENS, 3, 3),
      (ONE_TOKEN, 2, 2),
      (ONE_TOKEN, 4, 4),
    ],
  ),
)
def test_fitted_constant_gives_the_pairwise_risk_s_gradient(x64, law, k, rows):
  algorithm = make(constant='fitted', num_anchor=k, rows=rows)
  objective = functools.partial(pairwise_risk, b=0.3, e=1.5)
  check_gradient(algorithm, objective, law, seed=k)


@pytest.mark.parametrize(
  ('constant', 'risk'), [('half', 'kl'), ('fitted', 'nce')]
)
def test_a_filler_row_changes_nothing(x64, constant, risk):
  """A prompt alone, and with a filler that holds NaN wherever one may."""
  theta, anchor, reference = tables(5, SMALL)
  algorithm = make(constant=constant, risk=risk, num_anchor=2, rows=2)
  win = jnp.asarray(wins(3)[2])[None]
  both = lambda x, filler: jnp.concatenate([x, filler * jnp.ones_like(x)])

  @jax.jit
  def gradients():
    f = functools.partial(oracle.expected_gradient, algorithm, law=SMALL)
    alone = f(
        theta, anchor, jnp.zeros((1, 3)), jnp.ones(1),
        reference=reference, win=win,
    )  # fmt: skip
    return alone, f(
        both(theta, 0.1), both(anchor, 0.3), jnp.zeros((2, 3)),
        jnp.array([1.0, 0.0]), reference=both(reference, np.nan),
        win=both(win, np.nan),
    )  # fmt: skip

  alone, (first, filler) = gradients()
  np.testing.assert_allclose(first, alone[0], rtol=0, atol=1e-12)
  np.testing.assert_array_equal(filler, 0)


# -- where it leads -----------------------------------------------------------


@pytest.mark.parametrize('risk', RISKS)
def test_the_minimum_over_free_log_probs_is_the_exact_step(x64, risk):
  """The gradient has the sign of f - P, action by action: one minimum."""
  (log_q, log_r), (b, e) = laws(0, 4), (0.3, 1.5)
  gradient = expected_gradient(make(risk=risk, num_anchor=2, rows=2), 4)
  rng = np.random.default_rng(0)
  for win in wins(4):
    target = e * (win @ np.exp(log_q) - 0.5)
    step = (log_q + e * b * log_r + target) / (1 + b * e)
    np.testing.assert_allclose(
      step - np.logaddexp.reduce(step),
      exact_step(log_q, log_r, win, b, e),
      atol=1e-14,
    )
    np.testing.assert_allclose(gradient(step, log_q, log_r, win), 0, atol=1e-14)
    for off in rng.normal(size=(20, 4)):
      there = gradient(step + off, log_q, log_r, win)
      np.testing.assert_array_equal(np.sign(there), np.sign(off))


@pytest.mark.parametrize('k', [2, 3, 4])
def test_fitted_squared_leads_a_normalised_policy_to_the_exact_step(x64, k):
  """Its objective is a convex parabola in the logits: 0 is the minimum."""
  log_q, log_r = laws(1, 4)
  gradient = expected_gradient(make(constant='fitted', num_anchor=k, rows=k), 4)
  for win in wins(4):
    step = exact_step(log_q, log_r, win, 0.3, 1.5)
    np.testing.assert_allclose(gradient(step, log_q, log_r, win), 0, atol=1e-14)
    assert np.abs(gradient(log_q, log_q, log_r, win)).max() > 0.01


def test_half_leads_a_normalised_policy_near_the_exact_step(x64):
  """The smaller the step, the nearer: in total variation, of its length."""
  log_q, win = laws(1, 4)[0], wins(4)[0]

  def objective(logits, e):
    f = 0.5 + (jax.nn.log_softmax(logits) - log_q) / e
    return (np.exp(log_q) * (f - win @ np.exp(log_q)) ** 2).sum()

  slope, bend = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))
  miss = []
  for e in (0.1, 1.0, 4.0):
    t = log_q
    for _ in range(15):  # Newton; a shift of all logits changes nothing
      t = t - np.linalg.pinv(bend(t, e), rcond=1e-9) @ slope(t, e)
    np.testing.assert_allclose(slope(t, e), 0, atol=1e-12)
    end, exact = jax.nn.softmax(t), np.exp(exact_step(log_q, log_q, win, 0, e))
    miss.append(np.abs(end - exact).sum() / np.abs(np.exp(log_q) - exact).sum())
  print('missed by, of the step:', miss)
  assert miss[0] < 2e-3 < 0.01 < miss[1] < 0.1 < miss[2] < 0.3


@pytest.mark.parametrize('risk', ['kl', 'nce'])
def test_the_other_risks_are_nearly_right_with_a_fitted_constant(x64, risk):
  """The gradient at the exact step, of that at its start, falls with K."""
  (log_q, log_r), win = laws(1, 4), wins(4)[0]
  step = exact_step(log_q, log_r, win, 0.3, 1.5)
  miss = []
  for k in (2, 3, 4):
    algorithm = make(risk=risk, constant='fitted', num_anchor=k, rows=k)
    gradient = expected_gradient(algorithm, 4)
    end, start = (
      np.abs(on_simplex(gradient(log_p, log_q, log_r, win), log_p)).max()
      for log_p in (step, log_q)
    )
    miss.append(end / start)
  print('missed by, of the step:', risk, miss)
  assert sorted(miss, reverse=True) == miss and miss[0] < 0.1


@pytest.mark.parametrize('constant', ['half', 'fitted'])
def test_the_equilibrium_is_a_fixed_point_of_squared_risk(x64, constant):
  log_r = laws(2, 4)[1]
  algorithm = make(constant=constant, num_anchor=3, rows=3)
  gradient = expected_gradient(algorithm, 4)
  for win in wins(4):
    end = equilibrium(log_r, win, 0.3)
    law = log_r + win @ np.exp(end) / 0.3
    np.testing.assert_allclose(end, law - np.logaddexp.reduce(law), atol=1e-14)
    there = on_simplex(gradient(end, end, log_r, win), end)
    np.testing.assert_allclose(there, 0, atol=1e-14)


@pytest.mark.parametrize('risk', core(1, ['kl', 'nce']))
def test_fixed_points_of_the_other_risks(x64, risk):
  """Within 0.005 nats of the equilibrium, if the constant is fitted."""
  log_r, win = laws(2, 4)[1], wins(4)[0]
  exact = equilibrium(log_r, win, 0.3)

  def apart(constant):
    algorithm = make(risk=risk, constant=constant, num_anchor=3, rows=3)
    gradient = expected_gradient(algorithm, 4)

    def down(log_p):
      return on_simplex(gradient(log_p, log_p, log_r, win), log_p)

    def move(_, log_p):
      return jax.nn.log_softmax(log_p - 0.1 * down(log_p) / jnp.exp(log_p))

    end = jax.jit(lambda: jax.lax.fori_loop(0, 3000, move, exact))()
    np.testing.assert_allclose(down(end), 0, atol=1e-9)
    return (np.exp(exact) * (exact - end)).sum()

  fitted, half = apart('fitted'), apart('half')
  print('nats from the equilibrium:', risk, fitted, half)
  assert fitted < 0.005 and half > 3 * fitted


@pytest.mark.parametrize('risk', RISKS)
@pytest.mark.parametrize('constant', ['half', 'fitted'])
def test_where_all_are_tied_only_the_reference_pulls(x64, risk, constant):
  (log_q, log_r), tied = laws(3, 4), np.full((4, 4), 0.5)
  algorithm = make(risk=risk, constant=constant, num_anchor=2, rows=2)
  gradient = expected_gradient(algorithm, 4)
  np.testing.assert_allclose(gradient(log_q, log_q, log_q, tied), 0, atol=1e-14)
  # f = z = 1/2 at the geometric mean, which 'half' would not normalise.
  mean = (log_q + 0.45 * log_r) / 1.45
  np.testing.assert_allclose(gradient(mean, log_q, log_r, tied), 0, atol=1e-14)
  away = on_simplex(gradient(log_q, log_q, log_r, tied), log_q)
  assert (away * (log_r - log_q)).sum() < -1e-3  # descending goes there


# -- the pieces ---------------------------------------------------------------


@pytest.mark.parametrize('risk', RISKS)
def test_risks_are_the_divergences_everywhere(x64, risk):
  """But for what depends on z alone; also at z = 0 and 1."""
  f, z = np.meshgrid(np.linspace(-2, 3, 41) + 0.003, np.linspace(0, 1, 5))
  mine, exact = jax.jit(
    lambda: (wind.RISKS[risk](f, z), divergence(risk, f, z))
  )()
  gap = mine - exact
  np.testing.assert_allclose(gap, gap[:, :1] + 0 * gap, atol=1e-12)
  np.testing.assert_array_equal(f[0, np.argmin(mine, 1)], [
      f[0, np.abs(f[0] - z).argmin()] for z in z[:, 0]
  ])  # fmt: skip


@pytest.mark.parametrize('risk', ['kl', 'nce'])
def test_risks_in_the_middle_are_the_printed_ones(risk):
  f, z = np.meshgrid([0.06, 0.3, 0.9], [0.0, 0.25, 1.0])
  formula = {
    'kl': -z * np.log(f) - (1 - z) * np.log(1 - f),
    'nce': -z * np.log(f / (1 + f)) + np.log(1 + f),
  }[risk]
  np.testing.assert_allclose(wind.RISKS[risk](f, z), formula, rtol=1e-5)


@pytest.mark.parametrize('risk', RISKS)
def test_fitted_constants_minimise(x64, risk):
  rng = np.random.default_rng(0)
  g, z = rng.normal(size=(6, 5)), rng.uniform(size=(6, 5)).round(1)
  g[0], z[0] = 0.2, 0.5  # tied
  c = jax.jit(lambda: wind.fit_constant(wind.RISKS[risk], g, z))()
  near = c + np.linspace(-0.01, 0.01, 21)[None]
  values = wind.RISKS[risk](near[..., None] + g[:, None], z[:, None]).sum(-1)
  np.testing.assert_array_equal(values.argmin(-1), 10)
  np.testing.assert_allclose(c[0], 0.3, atol=1e-14)
  if risk == 'squared':
    np.testing.assert_allclose(c[:, 0], (z - g).mean(-1), atol=1e-13)


def test_completions_come_from_the_policy_before_the_iteration():
  for algorithm in (
    make(num_anchor=4, rows=2),
    sppo.make(step_size=1.0, num_anchor=4, rows='extremes'),
  ):
    assert (algorithm.num_policy, algorithm.num_anchor) == (0, 4)
    assert algorithm.anchor_rows == (0, 1) and algorithm.quantile_rows == ()
    assert algorithm.anchor.moves
    for iteration in (1, 2):
      assert algorithm.anchor.update(np.float32(0), np.float32(1), iteration)


def test_fitted_squared_is_the_mean_over_pairs(x64):
  algorithm = make(constant='fitted', num_anchor=4, rows=3)
  log_policy, scores = random_scores(1, algorithm)
  loss = jax.jit(lambda x, s: algorithm.loss(x, algorithm.weigh(s)[0]))
  g = (
    (log_policy - scores.log_anchor) / 1.5
    + 0.3 * (log_policy - scores.log_reference)
  ).sum(-1)
  z = np.asarray(scores.win).sum(-1)[:, :3] / 4
  pairs = [
    ((g[:, i] - g[:, j]) - (z[:, i] - z[:, j])) ** 2 / 2
    for i, j in itertools.combinations(range(3), 2)
  ]
  np.testing.assert_allclose(
    loss(log_policy, scores), np.mean(pairs, 0), rtol=1e-12
  )


@pytest.mark.parametrize(
  'algorithm',
  [
    make(num_anchor=4, rows=3),
    make(num_anchor=4, rows=3, constant='fitted', risk='kl'),
    sppo.make(step_size=1.0, num_anchor=4, rows='all'),
    sppo.make(step_size=1.0, num_anchor=4, rows='extremes'),
  ],
)
def test_monotone_maps_of_the_reward_change_nothing(algorithm):
  _, scores = random_scores(2, algorithm)
  reward = jnp.exp(3 * scores.reward) - 7
  win = ops.win_matrix(reward)
  index = algorithm.select(reward, win)
  weigh = jax.jit(algorithm.weigh)
  mapped, _ = weigh(scores._replace(reward=reward, win=win, index=index))
  jax.tree.map(np.testing.assert_array_equal, mapped, weigh(scores)[0])


def test_metrics_leave_out_filler_rows_and_tell_ties():
  algorithm = make(num_anchor=3, rows=2)
  _, scores = random_scores(3, algorithm)
  reward = jnp.array([[0.0, 1, 2], [1, 1, 1], [np.nan] * 3])
  scores = scores._replace(
    win=ops.win_matrix(reward), weight=jnp.array([1.0, 1, 0])
  )
  _, metrics = jax.jit(algorithm.weigh)(scores)
  np.testing.assert_allclose(metrics['signal/fires'], 0.5)
  np.testing.assert_allclose(metrics['signal/mean'], (0.5 + 0) / 2 / 2)


def test_make_refuses_what_it_cannot_do():
  good = dict(num_anchor=3, rows=3)
  for wrong in (
      dict(kl_weight=-0.1), dict(kl_weight=math.nan), dict(step_size=0.0),
      dict(step_size=math.inf), dict(risk='hinge'), dict(constant='third'),
      dict(num_anchor=1), dict(rows=0), dict(rows=4), dict(rows='argmax'),
      dict(rows=1, constant='fitted'),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=next(iter(wrong))):
      make(**(good | wrong))
  good = dict(step_size=1.0, num_anchor=3, rows='all')
  for wrong in (dict(step_size=-1.0), dict(num_anchor=1), dict(rows='best')):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      sppo.make(**(good | wrong))
