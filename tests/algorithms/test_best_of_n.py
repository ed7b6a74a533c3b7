"""best_of_n, vbon and bonbon against enumeration of every batch, in float64.

The laws are those of test_jbond: sequences of at most two tokens over three,
the second of which is EOS, and over two where three prompts are enumerated.
"""

import functools
import math

from conftest import core
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import integrate

from bond_jax.algorithms import best_of_n, bonbon, bond, vbon
from bond_jax.algorithms.parts import ops
from bond_jax.types import Scores

LAW = oracle.sequences(3, 2, 1)
REWARDS = {
  'distinct': (0.1, 2.0, -1.0, 0.5, 3.0, 0.7, 1.1),
  'tied': (0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0),
}
SOME = {  # one of each
  'best_of_n': best_of_n.make(n=2, anchor='fixed'),
  'vbon': vbon.make(n=3, num_quantile=2),
  'bonbon': bonbon.make(n=2, sft_weight=0.25),
}


def tables(seed, prompts=1, vocab=3):
  """Logits of policy, anchor and reference: [X, T, V, V] each."""
  rng = np.random.default_rng(seed)
  return 0.7 * rng.standard_normal((3, prompts, 2, vocab, vocab))


@functools.cache  # so that each algorithm is compiled once
def compiled(algorithm, vocab):
  law = oracle.sequences(vocab, 2, 1)
  return jax.jit(
    lambda *tables_and_batch, reference: oracle.expected_gradient(
      algorithm, *tables_and_batch, law, reference=reference
    )
  )


def expected_gradient(
  algorithm, theta, anchor, reward, reference=None, weight=None
):
  """Over the sequences of as many tokens as theta's; by default one prompt."""
  reward = jnp.asarray(reward)
  return compiled(algorithm, theta.shape[-1])(
    theta,
    anchor,
    reward,
    jnp.ones(len(reward)) if weight is None else jnp.asarray(weight),
    reference=anchor if reference is None else reference,
  )


def log_probs(theta):
  """[Y], of one prompt."""
  return oracle.table_log_probs(theta[0], *LAW).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def objective_gradient(objective, theta, *known):
  """Autodiff of objective(log pi [Y], *known), for one prompt."""
  return jax.grad(lambda t: objective(log_probs(t), *known))(theta)


def laws(*logits):
  """The tables' laws [Y], as numpy."""
  return [np.exp(log_probs(t)) for t in logits]


def same(mine, exact, atol=1e-12):
  np.testing.assert_allclose(mine, exact, rtol=0, atol=atol)


# -- Best-of-n ----------------------------------------------------------------


def cross_entropy(log_p, target):
  return -(target * log_p).sum()


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_best_of_n_descends_the_cross_entropy(x64, n):
  theta, anchor, _ = tables(n)
  (q,) = laws(anchor)
  algorithm = best_of_n.make(n=n, anchor='periodic:1')
  for reward in map(np.array, REWARDS.values()):
    target = oracle.best_of_n(q, reward, n)
    exact = objective_gradient(cross_entropy, theta, target)
    assert jnp.abs(exact).max() > 0.01
    same(expected_gradient(algorithm, theta, anchor, [reward]), exact)


def test_best_of_1_is_supervised_training_on_the_anchor_s_samples(x64):
  """The same gradient whatever the reward, none where policy = anchor."""
  algorithm = best_of_n.make(n=1, anchor='ema:0.1')
  theta, anchor, _ = tables(5)
  (q,) = laws(anchor)
  exact = objective_gradient(cross_entropy, theta, q)
  for reward in REWARDS.values():
    same(expected_gradient(algorithm, theta, anchor, [reward]), exact)
    same(expected_gradient(algorithm, anchor, anchor, [reward]), 0)
  log_policy = jnp.array([[[-1.0, -2.0, 0.0]]])
  same(algorithm.loss(log_policy, ()), [3.0])


def test_best_of_n_is_bond_with_no_backward_part(x64):
  theta, anchor, _ = tables(6)
  forward = bond.make(
    n=3, backward_weight=0.0, drift_weight=0.0, num_policy=1,
    quantile='monte_carlo', num_quantile=1, zero='half', second_term=False,
    anchor='fixed',
  )  # fmt: skip
  mine, bonds = (
    expected_gradient(a, theta, anchor, [REWARDS['tied']])
    for a in (best_of_n.make(n=3, anchor='fixed'), forward)
  )
  same(mine, bonds)


def test_best_of_n_stops_at_the_best_of_n_law(x64):
  """A policy that can be any law: two tokens of which the first is all."""
  _, anchor, _ = tables(7)
  (q,) = laws(anchor)
  # What follows token 0 or 2 is free in a table: any law can be written.
  target = oracle.best_of_n(q, np.array(REWARDS['tied']), 3).reshape(-1)
  first = np.array([target[:3].sum(), target[3], target[4:].sum()])
  theta = np.zeros_like(anchor)
  theta[0, 0, 0] = np.log(first)
  theta[0, 1, 0], theta[0, 1, 2] = np.log(target[:3]), np.log(target[4:])
  same(laws(theta)[0], target)
  algorithm = best_of_n.make(n=3, anchor='fixed')
  same(expected_gradient(algorithm, theta, anchor, [REWARDS['tied']]), 0)


def test_which_rows_are_trained():
  """The first of the best; for bonbon, the last of the worst beside it."""
  reward = jnp.array([[1.0, 3, 0], [2, 2, 1], [0, 1, 0], [5, 5, 5]])
  best = best_of_n.make(n=3, anchor='fixed').select(reward, None)
  both = bonbon.make(n=3, sft_weight=0.5).select(reward, None)
  np.testing.assert_array_equal(best, [[1], [0], [1], [0]])
  np.testing.assert_array_equal(both, [[1, 2], [0, 2], [1, 2], [0, 2]])


def test_the_anchor_is_the_named_one():
  for name, moves in (
    ('fixed', False),
    ('periodic:1', True),
    ('ema:0.1', True),
  ):
    assert best_of_n.make(n=2, anchor=name).anchor.moves == moves
  assert not SOME['vbon'].anchor.moves
  assert not SOME['bonbon'].anchor.moves


# -- vBoN ---------------------------------------------------------------------


def log_quantile(q, reward, k):
  """E log((s + 1) / (k + 1)), s binomial of k and p_<=, for every y: [Y]."""
  _, at_most = oracle.quantiles(q, reward)
  return sum(
    math.comb(k, s)
    * at_most**s
    * (1 - at_most) ** (k - s)
    * math.log((s + 1) / (k + 1))
    for s in range(k + 1)
  )


def tilted_kl(log_p, log_q, reward):
  """KL(pi || q) - E_pi[reward]."""
  return (jnp.exp(log_p) * (log_p - log_q - reward)).sum()


@pytest.mark.parametrize(('n', 'k'), [(2, 1), (4, 2), (2, 3)])
def test_vbon_ascends_the_smoothed_log_quantile(x64, n, k):
  theta, anchor, _ = tables(10 + n)
  (q,) = laws(anchor)
  algorithm = vbon.make(n=n, num_quantile=k)
  assert (algorithm.num_policy, algorithm.num_anchor) == (1, k)
  for reward in map(np.array, REWARDS.values()):
    ascends = (n - 1) * log_quantile(q, reward, k)
    exact = objective_gradient(tilted_kl, theta, np.log(q), ascends)
    assert jnp.abs(exact).max() > 0.01
    same(expected_gradient(algorithm, theta, anchor, [reward]), exact, 1e-9)


def test_vbon_is_bond_with_no_forward_part(x64):
  theta, anchor, _ = tables(13)
  backward = bond.make(
    n=3, backward_weight=1.0, drift_weight=0.0, num_policy=1,
    quantile='monte_carlo', num_quantile=2, zero='smooth', second_term=False,
    anchor='fixed',
  )  # fmt: skip
  mine, bonds = (
    expected_gradient(a, theta, anchor, [REWARDS['tied']])
    for a in (SOME['vbon'], backward)
  )
  same(mine, bonds)


# -- BoNBoN -------------------------------------------------------------------


def best_and_worst(p, reward, n):
  """P(best = a, worst = b) of n draws: [Y, Y], first and last among tied.

  By the levels of the reward: all n lie within [low, high], less those that
  miss one of the two. Given its level a row has the law p within the level;
  best and worst are different draws.
  """
  levels = np.unique(reward)
  at = [np.where(reward == v, p, 0.0) for v in levels]
  within = lambda i, j: sum(a.sum() for a in at[i:j]) ** n  # levels i ... j-1
  joint = np.zeros((len(p), len(p)))
  for i in range(len(levels)):
    joint += within(i, i + 1) * np.outer(at[i], at[i]) / at[i].sum() ** 2
    for j in range(i + 1, len(levels)):
      chance = within(i, j + 1) - within(i + 1, j + 1) - within(i, j)
      chance += within(i + 1, j)
      joint += chance * np.outer(at[j], at[i]) / (at[j].sum() * at[i].sum())
  return joint


def bonbon_objective(log_p, log_r, joint, margin):
  """Of sft_weight = 0.3; joint [Y, Y] as above."""
  g = log_p - log_r
  apart = (g[:, None] - g[None] - margin) ** 2
  return -0.3 * (joint.sum(1) * log_p).sum() + 0.7 * (joint * apart).sum()


@pytest.mark.parametrize('n', [2, 3, 4])
def test_bonbon_descends_its_objective(x64, n):
  """Anchor and reference apart: which of them is in g can be told."""
  theta, anchor, reference = tables(20 + n)
  q, r = laws(anchor, reference)
  algorithm = bonbon.make(n=n, sft_weight=0.3)
  for reward in map(np.array, REWARDS.values()):
    joint = best_and_worst(q, reward, n)
    same(joint.sum(), 1)
    margin = (n - 1) * sum(1 / k for k in range(1, n))
    margin = margin * (reward[:, None] > reward[None])
    known = np.log(r), joint, margin
    exact = objective_gradient(bonbon_objective, theta, *known)
    assert jnp.abs(exact).max() > 0.1
    mine = expected_gradient(algorithm, theta, anchor, [reward], reference)
    same(mine, exact, 1e-9)


def test_bonbon_of_sft_weight_1_is_best_of_n(x64):
  theta, anchor, reference = tables(25)
  mine, best = (
    expected_gradient(a, theta, anchor, [REWARDS['tied']], reference)
    for a in (bonbon.make(n=2, sft_weight=1.0), SOME['best_of_n'])
  )
  same(mine, best)


@pytest.mark.parametrize('n', [2, 3, 8])
def test_the_margin_is_the_mean_gap_of_best_of_n(n):
  """E of log(n u^(n - 1)) at the largest u of n uniform, less the smallest."""
  ratio = lambda u: math.log(n) + (n - 1) * math.log(u)
  best, _ = integrate.quad(lambda u: n * u ** (n - 1) * ratio(u), 0, 1)
  worst, _ = integrate.quad(lambda u: n * (1 - u) ** (n - 1) * ratio(u), 0, 1)
  np.testing.assert_allclose(bonbon.margin(n), best - worst, rtol=1e-8)


def test_the_margin_as_published():
  same(bonbon.margin(8), 18.15, atol=5e-4)
  same(1 / (2 * bonbon.margin(8)), 0.02755, atol=5e-6)


def test_many_arms_come_to_the_margin():
  """At the exact Best-of-n law of arms without ties, as one over arms.

  Arms tie with themselves, which narrows the gap.
  """
  n, off = 3, []
  for arms in (10, 60):
    p, reward = np.full(arms, 1 / arms), np.arange(arms)
    g = np.log(oracle.best_of_n(p, reward, n) / p)
    joint = best_and_worst(p, reward, n)
    gap = (joint * (g[:, None] - g[None])).sum()
    off.append(bonbon.margin(n) - gap)
  np.testing.assert_allclose(off[0] / off[1], 60 / 10, rtol=0.02)
  assert 0 < off[1] < 0.02 * bonbon.margin(n)


# -- all three ----------------------------------------------------------------


@pytest.mark.parametrize('name', SOME)
def test_only_the_order_of_rewards_matters(x64, name):
  theta, anchor, reference = tables(30)
  reward = np.array([REWARDS['tied']])
  one, other, reverse = (
    expected_gradient(SOME[name], theta, anchor, r, reference)
    for r in (reward, np.exp(3 * reward), -reward)
  )
  np.testing.assert_array_equal(one, other)
  assert jnp.abs(one - reverse).max() > 0.01


@pytest.mark.parametrize('name', SOME)
def test_a_prompt_that_is_all_tied(x64, name):
  """Best-of-n is then the anchor: a pull to it, and none from it."""
  theta, anchor, _ = tables(31)
  (q,) = laws(anchor)

  def objective(log_p):
    g = log_p - np.log(q)
    imitate, variance = (
      -(q * log_p).sum(),
      (q * g**2).sum() - (q * g).sum() ** 2,
    )
    return {
      'best_of_n': imitate,
      'vbon': (jnp.exp(log_p) * g).sum(),
      'bonbon': 0.25 * imitate + 0.75 * 2 * variance,
    }[name]

  tied = np.full((1, 7), 2.0)
  mine = expected_gradient(SOME[name], theta, anchor, tied)
  same(mine, objective_gradient(objective, theta))
  same(expected_gradient(SOME[name], anchor, anchor, tied), 0)


@pytest.mark.parametrize('name', core(2, SOME))
def test_a_filler_row_changes_nothing(x64, name):
  """Two prompts and a filler: every batch of the three is enumerated."""
  theta, anchor, reference = tables(32, prompts=3, vocab=2)
  reward = np.array([[0.0, 1, 2], [1, 0, 1], [np.nan, 5, np.nan]])
  rest = (reward[:2], reference[:2])
  both = expected_gradient(SOME[name], theta[:2], anchor[:2], *rest)
  assert (jnp.abs(both).max((1, 2, 3)) > 0.01).all()
  for garbage in (np.nan, -np.inf):
    reference[2] = reward[2, 0] = garbage
    mine = expected_gradient(
      SOME[name], theta, anchor, reward, reference, [1.0, 1, 0]
    )
    same(mine[:2], both)
    np.testing.assert_array_equal(mine[2], 0)


def scores(reward, algorithm, weight):
  reward = jnp.asarray(reward, jnp.float32)
  index = algorithm.select(reward, None)
  b, m = index.shape
  zeros = lambda rows: jnp.zeros((b, rows, 2))
  return Scores(
    reward=reward,
    win=ops.win_matrix(reward),
    index=index,
    log_sampled=zeros(m),
    log_anchor=zeros(len(algorithm.anchor_rows)),
    log_reference=zeros(len(algorithm.reference_rows)),
    log_quantile=jnp.zeros((b, 0)),
    weight=jnp.asarray(weight, jnp.float32),
  )


@pytest.mark.parametrize('name', SOME)
def test_fires_counts_the_prompts_with_a_signal(name):
  algorithm = SOME[name]
  reward = np.zeros((5, algorithm.num_policy + algorithm.num_anchor))
  reward[0, -1] = reward[3, -1] = 1  # the last drawn is better
  reward[4] = np.nan
  weigh = jax.jit(lambda r, w: algorithm.weigh(scores(r, algorithm, w))[1])
  same(weigh(reward, np.array([1, 1, 1, 1, 0]))['signal/fires'], 0.5)
  same(weigh(reward, np.zeros(5))['signal/fires'], 0)


def test_the_margin_holds_where_best_and_worst_differ():
  algorithm = bonbon.make(n=3, sft_weight=0.0)
  reward = [[0.0, 1, 1], [2, 2, 2], [3, 1, 2]]
  weigh = jax.jit(algorithm.weigh)
  rows, _ = weigh(scores(reward, algorithm, np.ones(3)))
  np.testing.assert_array_equal(rows.margin, [3, 0, 3])


def test_bad_arguments_are_named():
  good = {
    best_of_n.make: dict(n=2, anchor='fixed'),
    vbon.make: dict(n=2, num_quantile=2),
    bonbon.make: dict(n=2, sft_weight=0.5),
  }
  for make, argument, value in (
      (best_of_n.make, 'n', 0), (best_of_n.make, 'anchor', 'hourly'),
      (vbon.make, 'n', 1), (vbon.make, 'num_quantile', 0),
      (bonbon.make, 'n', 1), (bonbon.make, 'sft_weight', -0.1),
      (bonbon.make, 'sft_weight', 1.1),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f'^{argument} .*{value}'):
      make(**{**good[make], argument: value})
