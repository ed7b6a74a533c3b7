"""online_dpo and ipo against enumeration of every batch, in float64.

The laws are those of test_jbond: sequences of at most two tokens over three,
the second of which is EOS, and over two where three prompts are enumerated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.algorithms import ipo, online_dpo
from bond_jax.algorithms.parts import ops
from bond_jax.types import Scores

LAW = oracle.sequences(3, 2, 1)
REWARDS = {
  'distinct': (0.1, 2.0, -1.0, 0.5, 3.0, 0.7, 1.1),
  'tied': (0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0),
}
C = 0.25  # the KL's weight
BOTH = {
  'online_dpo': online_dpo.make(kl_weight=C),
  'ipo': ipo.make(kl_weight=C),
}


def risk(name, h, win):
  """As published for a label of 1, and of 0, in shares of win : 1 - win."""
  if name == 'ipo':
    won, lost = (h - 1 / (2 * C)) ** 2, (h + 1 / (2 * C)) ** 2
  else:
    won, lost = jnp.log1p(jnp.exp(-C * h)), jnp.log1p(jnp.exp(C * h))
  return win * won + (1 - win) * lost


def tables(seed, prompts=1, vocab=3):
  """Logits of policy and reference: [X, T, V, V] each."""
  rng = np.random.default_rng(seed)
  return 0.7 * rng.standard_normal((2, prompts, 2, vocab, vocab))


def judge(seed, size):
  """P(a beats b) of a judge that is soft and not transitive: [1, Y, Y]."""
  x = np.random.default_rng(seed).standard_normal((1, size, size))
  return 1 / (1 + np.exp(x.swapaxes(1, 2) - x))


@functools.cache  # so that each algorithm is compiled once
def compiled(algorithm, vocab):
  law = oracle.sequences(vocab, 2, 1)
  return jax.jit(
    lambda theta, reference, reward, weight, win: oracle.expected_gradient(
      # The anchor is nothing's business here.
      algorithm, theta, jnp.full_like(theta, jnp.nan), reward, weight, law,
      reference=reference, win=win,
    )
  )  # fmt: skip


def expected_gradient(
  algorithm, theta, reference, reward=None, win=None, weight=None
):
  """Over the sequences of as many tokens as theta's."""
  if win is None:
    win = ops.win_matrix(jnp.asarray(reward))
  reward = jnp.zeros(win.shape[:2]) if reward is None else jnp.asarray(reward)
  weight = jnp.ones(len(reward)) if weight is None else jnp.asarray(weight)
  f = compiled(algorithm, theta.shape[-1])
  return f(theta, reference, reward, weight, win)


@functools.partial(jax.jit, static_argnums=0)
def objective_gradient(name, theta, reference, win):
  """Autodiff of sum_{y, y'} pi(y) pi(y') risk, the pairs' law held still."""

  def one(theta):
    log_p, log_r = (
      oracle.table_log_probs(t[0], *LAW).sum(-1) for t in (theta, reference)
    )
    p = jnp.exp(jax.lax.stop_gradient(log_p))
    g = log_p - log_r
    return (jnp.outer(p, p) * risk(name, g[:, None] - g[None], win)).sum()

  return jax.grad(one)(theta)


def same(mine, exact, atol=1e-12):
  np.testing.assert_allclose(mine, exact, rtol=0, atol=atol)


# -- the gradient -------------------------------------------------------------


@pytest.mark.parametrize('name', BOTH)
def test_expected_gradient_is_the_objective_s(x64, name):
  """Rewards with and without ties, and a judge that no reward agrees with."""
  theta, reference = tables(1)
  wins = [ops.win_matrix(jnp.array([r])) for r in REWARDS.values()]
  for win in (*wins, judge(0, 7)):
    exact = objective_gradient(name, theta, reference, win[0])
    assert jnp.abs(exact).max() > 0.005
    same(expected_gradient(BOTH[name], theta, reference, win=win), exact)


@pytest.mark.parametrize('name', BOTH)
def test_a_soft_label_is_the_mean_of_hard_ones(x64, name):
  """But for a constant of IPO, w (1 - w) / c^2."""
  algorithm = BOTH[name]
  log_policy, log_reference = np.random.default_rng(2).standard_normal(
    (2, 5, 2, 3)
  )
  loss = lambda win: algorithm.loss(
    log_policy, online_dpo.Rows(log_reference, win)
  )
  win = jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])
  hard = win * loss(jnp.ones(5)) + (1 - win) * loss(jnp.zeros(5))
  constant = win * (1 - win) / C**2 if name == 'ipo' else 0.0
  same(loss(win) + constant, hard)
  g = (log_policy - log_reference).sum(-1)
  same(hard, risk(name, g[:, 0] - g[:, 1], win))


@pytest.mark.parametrize('name', BOTH)
def test_the_order_of_a_pair_does_not_matter(x64, name):
  pair, win = np.random.default_rng(3).standard_normal((2, 4, 2, 3)), 0.8
  one, other = (
    BOTH[name].loss(log_p, online_dpo.Rows(log_r, jnp.full(4, w)))
    for (log_p, log_r), w in ((pair, win), (pair[:, :, ::-1], 1 - win))
  )
  same(one, other)


@pytest.mark.parametrize('name', ['transitive', 'cyclic'])
def test_online_ipo_stops_at_the_regularised_equilibrium(x64, name):
  """pi(y) ~ ref(y) exp(P(y beats pi) / c), WIND's: no gradient there."""
  win = judge(4, 7)[0]
  if name == 'transitive':
    win = np.asarray(ops.win_matrix(jnp.array(REWARDS['tied'])))
  _, reference = tables(5)
  log_r = np.asarray(oracle.table_log_probs(reference[0], *LAW).sum(-1))
  c, p = 1.0, np.exp(log_r)
  for _ in range(200):
    p = np.exp(log_r + win @ p / c)
    p /= p.sum()
  # What follows token 0 or 2 is free in a table: any law can be written.
  theta = np.zeros_like(reference)
  theta[0, 0, 0] = np.log([p[:3].sum(), p[3], p[4:].sum()])
  theta[0, 1, 0], theta[0, 1, 2] = np.log(p[:3]), np.log(p[4:])
  algorithm = ipo.make(kl_weight=c)
  f = functools.partial(expected_gradient, algorithm, win=win[None])
  same(f(theta, reference), 0, 1e-12)
  assert jnp.abs(f(reference, reference)).max() > 0.01


@pytest.mark.parametrize('name', BOTH)
def test_only_the_order_of_rewards_matters(x64, name):
  theta, reference = tables(6)
  reward = np.array([REWARDS['tied']])
  one, other, reverse = (
    expected_gradient(BOTH[name], theta, reference, r)
    for r in (reward, np.exp(3 * reward), -reward)
  )
  np.testing.assert_array_equal(one, other)
  assert jnp.abs(one - reverse).max() > 0.01


@pytest.mark.parametrize('name', BOTH)
def test_a_tie_draws_the_log_ratios_together(x64, name):
  theta, reference = tables(7)
  tied = np.full((1, 7), 2.0)
  half = np.full((7, 7), 0.5)
  mine = expected_gradient(BOTH[name], theta, reference, tied)
  same(mine, objective_gradient(name, theta, reference, half))
  same(expected_gradient(BOTH[name], theta, theta, tied), 0)
  log_policy = jnp.array([[[0.0, 1.0], [0.0, 0.0]]])
  rows = online_dpo.Rows(jnp.zeros((1, 2, 2)), jnp.array([0.5]))
  slope = jax.grad(lambda x: BOTH[name].loss(x, rows).sum())(log_policy)
  assert slope[0, 0, 1] > 0 > slope[0, 1, 1]


@pytest.mark.parametrize('name', BOTH)
def test_a_filler_row_changes_nothing(x64, name):
  """Two prompts and a filler: every batch of the three is enumerated."""
  theta, reference = tables(8, prompts=3, vocab=2)
  reward = np.array([[0.0, 1, 2], [1, 0, 1], [0, 0, 0]])
  both = expected_gradient(BOTH[name], theta[:2], reference[:2], reward[:2])
  assert (jnp.abs(both).max((1, 2, 3)) > 0.01).all()
  for garbage in (np.nan, -np.inf):
    reference[2] = reward[2, ::2] = garbage
    mine = expected_gradient(
      BOTH[name], theta, reference, reward, weight=[1.0, 1, 0]
    )
    same(mine[:2], both)
    np.testing.assert_array_equal(mine[2], 0)


# -- the pieces ---------------------------------------------------------------


@pytest.mark.parametrize('name', BOTH)
def test_both_rows_are_trained_and_scored_by_the_reference(name):
  algorithm = BOTH[name]
  index = algorithm.select(jnp.array([[1.0, 0], [2, 3]]), None)
  np.testing.assert_array_equal(index, [[0, 1], [0, 1]])
  assert (algorithm.num_policy, algorithm.num_anchor) == (2, 0)
  assert algorithm.reference_rows == (0, 1)
  assert not algorithm.anchor.moves


@pytest.mark.parametrize('name', BOTH)
def test_metrics_leave_out_filler_rows(name):
  reward = jnp.array([[1.0, 1], [0, 1], [2, 1], [0, 3]])
  log_sampled = np.zeros((4, 2, 2), np.float32)
  log_sampled[:2, :, 0] = [[1, 3], [2, 4]]
  log_sampled[3] = np.nan
  scores = Scores(
    reward=reward,
    win=ops.win_matrix(reward),
    index=BOTH[name].select(reward, None),
    log_sampled=log_sampled,
    log_anchor=jnp.zeros((4, 0, 2)),
    log_reference=jnp.zeros((4, 2, 2)),
    log_quantile=jnp.zeros((4, 0)),
    weight=jnp.array([1.0, 1, 1, 0]),
  )
  rows, metrics = jax.jit(BOTH[name].weigh)(scores)
  same(metrics['signal/fires'], 2 / 3, 1e-6)
  same(metrics['kl/policy_reference'], (2 + 3 + 0) / 3, 1e-6)
  np.testing.assert_array_equal(rows.win, [0.5, 0, 1, 0])


@pytest.mark.parametrize('make', [online_dpo.make, ipo.make])
@pytest.mark.parametrize('kl_weight', [0.0, -0.1])
def test_bad_arguments_are_named(make, kl_weight):
  with pytest.raises(ValueError, match=f'^kl_weight .*{kl_weight}'):
    make(kl_weight=kl_weight)
