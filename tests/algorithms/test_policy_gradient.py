"""rloo and reinforce against enumeration of every batch, in float64.

The laws are those of test_jbond: sequences of at most two tokens over three,
the second of which is EOS, and over two where more prompts are enumerated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.algorithms import reinforce, rloo
from bond_jax.algorithms.parts import ops
from bond_jax.types import Scores

REWARDS = {
  'distinct': (0.1, 2.0, -1.0, 0.5, 3.0, 0.7, 1.1),
  'tied': (0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0),
}
SMALL_REWARD = np.array([[0.0, 1, 2], [1, 0, 1]])
BOTH = {  # rloo on two completions
  'rloo': rloo.make(num_policy=2, kl_weight=0.3),
  'reinforce': reinforce.make(kl_weight=0.3),
}


def tables(seed, prompts=1, vocab=3):
  """Logits of policy and reference: [X, T, V, V] each."""
  rng = np.random.default_rng(seed)
  return 0.7 * rng.standard_normal((2, prompts, 2, vocab, vocab))


@functools.cache  # so that each algorithm is compiled once
def compiled(algorithm, vocab):
  law = oracle.sequences(vocab, 2, 1)
  return jax.jit(
    lambda theta, reference, reward, weight: oracle.expected_gradient(
      # The anchor is nothing's business here.
      algorithm, theta, jnp.full_like(theta, jnp.nan), reward, weight, law,
      reference=reference,
    )
  )  # fmt: skip


def expected_gradient(algorithm, theta, reference, reward, weight=None):
  """Over the sequences of as many tokens as theta's."""
  reward = jnp.asarray(reward)
  weight = jnp.ones(len(reward)) if weight is None else jnp.asarray(weight)
  return compiled(algorithm, theta.shape[-1])(theta, reference, reward, weight)


@jax.jit
def objective_gradient(theta, reference, reward, kl_weight):
  """Autodiff of sum_x kl_weight KL - E[r], the objective's negative."""
  law = oracle.sequences(theta.shape[-1], 2, 1)

  def one(theta, reference, reward):
    p = jnp.exp(oracle.table_log_probs(theta, *law).sum(-1))
    return kl_weight * oracle.kl(theta, reference, *law) - (p * reward).sum()

  return jax.grad(lambda t: jax.vmap(one)(t, reference, reward).sum())(theta)


def same(mine, exact, atol=1e-12):
  np.testing.assert_allclose(mine, exact, rtol=0, atol=atol)


# -- the gradient -------------------------------------------------------------


@pytest.mark.parametrize('kl_weight', [0.0, 0.3])
@pytest.mark.parametrize('k', [1, 2, 3])
def test_expected_gradient_is_the_objective_s(x64, k, kl_weight):
  theta, reference = tables(k)
  if k == 1:
    algorithm = reinforce.make(kl_weight=kl_weight)
  else:
    algorithm = rloo.make(num_policy=k, kl_weight=kl_weight)
  for reward in REWARDS.values():
    reward = np.array([reward])
    exact = objective_gradient(theta, reference, reward, kl_weight)
    assert jnp.abs(exact).max() > 0.05
    same(expected_gradient(algorithm, theta, reference, reward), exact)


@pytest.mark.parametrize('name', BOTH)
def test_of_two_prompts_it_is_the_mean(x64, name):
  theta, reference = tables(4, prompts=2, vocab=2)
  exact = objective_gradient(theta, reference, SMALL_REWARD, 0.3)
  mine = expected_gradient(BOTH[name], theta, reference, SMALL_REWARD)
  same(mine, exact / 2)


@pytest.mark.parametrize('name', BOTH)
def test_the_baseline_leaves_the_expectation_alone(x64, name):
  """So does any other; and the sampler's log-probs go nowhere else."""
  algorithm = BOTH[name]

  def without(scores):
    rows, metrics = algorithm.weigh(scores)
    assert rows.baseline.shape == (*scores.reward.shape, 1)
    return rows._replace(baseline=jnp.zeros_like(rows.baseline)), metrics

  def another_sampler(scores):
    off = 1.5 * scores.log_sampled - 1
    return algorithm.weigh(scores._replace(log_sampled=off))

  theta, reference = tables(5, prompts=2, vocab=2)
  args = (theta, reference, SMALL_REWARD)
  mine = expected_gradient(algorithm, *args)
  for weigh in (without, another_sampler):
    same(expected_gradient(algorithm._replace(weigh=weigh), *args), mine)


@pytest.mark.parametrize('name', BOTH)
def test_the_scale_of_rewards_matters(x64, name):
  """Unlike in the rank-based algorithms; with the KL's weight it cancels."""
  theta, reference = tables(6, prompts=2, vocab=2)
  f = lambda algorithm, reward: expected_gradient(
    algorithm, theta, reference, reward
  )
  one = f(BOTH[name], SMALL_REWARD)
  more = f(BOTH[name], 3 * SMALL_REWARD)
  assert jnp.abs(more - one).max() > 0.05
  algorithm = (
    rloo.make(num_policy=2, kl_weight=0.9)
    if name == 'rloo'
    else reinforce.make(kl_weight=0.9)
  )
  same(f(algorithm, 3 * SMALL_REWARD), 3 * one)
  same(f(BOTH[name], SMALL_REWARD + 7), one)


@pytest.mark.parametrize('name', BOTH)
def test_where_all_is_tied_the_pull_to_the_reference_is_left(x64, name):
  theta, reference = tables(7, prompts=2, vocab=2)
  tied = np.full((2, 3), 5.0)
  exact = objective_gradient(theta, reference, np.zeros((2, 3)), 0.3)
  same(expected_gradient(BOTH[name], theta, reference, tied), exact / 2)
  same(expected_gradient(BOTH[name], theta, theta, tied), 0)


@pytest.mark.parametrize('name', BOTH)
def test_a_filler_row_changes_nothing(x64, name):
  """Two prompts and a filler: every batch of the three is enumerated."""
  theta, reference = tables(8, prompts=3, vocab=2)
  exact = objective_gradient(theta[:2], reference[:2], SMALL_REWARD, 0.3)
  for garbage in (np.nan, -np.inf):
    reference[2] = garbage
    reward = np.concatenate([SMALL_REWARD, [[garbage, 5, garbage]]])
    mine = expected_gradient(BOTH[name], theta, reference, reward, [1.0, 1, 0])
    same(mine[:2], exact / 2)
    np.testing.assert_array_equal(mine[2], 0)


# -- the pieces ---------------------------------------------------------------


def weigh(algorithm, reward, *, log_sampled=0.0, log_reference=0.0, weight=1.0):
  """Rows and metrics of a batch with T = 2."""
  shape = (*np.shape(reward), 2)
  array = lambda x, shape: jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)
  reward = array(reward, shape[:2])
  scores = Scores(
    reward=reward,
    win=ops.win_matrix(reward),
    index=algorithm.select(reward, None),
    log_sampled=array(log_sampled, shape),
    log_anchor=jnp.zeros((shape[0], 0, 2)),
    log_reference=array(log_reference, shape),
    log_quantile=jnp.zeros((shape[0], 0)),
    weight=array(weight, shape[:1]),
  )
  return jax.jit(algorithm.weigh)(scores)


def signal(reward, log_ratio, kl_weight):
  return np.asarray(reward)[..., None] - kl_weight * log_ratio.sum(
    -1, keepdims=True
  )


def test_rloo_s_baseline_is_the_prompt_s_other_signals():
  """The KL's part included; no other prompt's. And it is taken off: the
  gradient at each position is the advantage, of K a mean."""
  rng = np.random.default_rng(0)
  log_policy, log_reference = rng.standard_normal((2, 2, 3, 2))
  reward = np.array([[0.0, 1, 5], [2, -1, 1]])
  algorithm = rloo.make(num_policy=3, kl_weight=0.5)
  rows, _ = weigh(
    algorithm, reward, log_sampled=log_policy, log_reference=log_reference
  )
  whole = signal(reward, log_policy - log_reference, 0.5)
  others = (whole.sum(1, keepdims=True) - whole) / 2
  same(rows.baseline, others, 1e-5)
  gradient = jax.grad(lambda x: algorithm.loss(x, rows).sum())(log_policy)
  advantage = np.broadcast_to(whole - others, gradient.shape)
  same(gradient, -advantage / 3, 1e-5)


def test_at_the_optimum_no_batch_has_a_gradient():
  """log pi = log ref + r / c - log Z: not on average, but in every draw."""
  rng = np.random.default_rng(2)
  log_reference = rng.standard_normal((2, 3, 2))
  reward, log_z = rng.standard_normal((2, 3)), np.array([[0.3], [-1.0]])
  log_policy = log_reference.copy()
  # However the ratio is spread over the two tokens.
  share = rng.standard_normal((2, 3))
  log_policy += np.stack([share, reward / 0.5 - log_z - share], -1)
  algorithm = rloo.make(num_policy=3, kl_weight=0.5)
  rows, _ = weigh(
    algorithm, reward, log_sampled=log_policy, log_reference=log_reference
  )
  gradient = jax.grad(lambda x: algorithm.loss(x, rows).sum())(log_policy)
  same(gradient, 0, 1e-6)


def test_reinforce_s_baseline_is_the_other_prompts_signals():
  """Those with weight; 0 where there is none."""
  rng = np.random.default_rng(1)
  log_sampled, log_reference = rng.standard_normal((2, 4, 1, 2))
  reward = np.array([[0.0], [2], [np.nan], [5]])
  algorithm = reinforce.make(kl_weight=0.5)
  given = dict(log_sampled=log_sampled, log_reference=log_reference)
  rows, _ = weigh(algorithm, reward, weight=[1, 1, 0, 1], **given)
  whole = signal(reward, log_sampled - log_reference, 0.5)
  real = [0, 1, 3]
  others = (whole[real].sum(0, keepdims=True) - whole[real]) / 2
  same(np.asarray(rows.baseline)[real], others, 1e-5)
  rows, _ = weigh(algorithm, reward, weight=[0, 1, 0, 0], **given)
  np.testing.assert_array_equal(rows.baseline[1], 0)


def test_all_rows_are_trained_and_scored_by_the_reference():
  for name, k in (('rloo', 2), ('reinforce', 1)):
    algorithm = BOTH[name]
    index = algorithm.select(jnp.array([[1.0, 0], [2, 3]])[:, :k], None)
    np.testing.assert_array_equal(index, [list(range(k))] * 2)
    assert (algorithm.num_policy, algorithm.num_anchor) == (k, 0)
    assert algorithm.reference_rows == tuple(range(k))
    assert not algorithm.anchor.moves


def test_metrics_leave_out_filler_rows():
  """A group of peers, a prompt or for reinforce the batch, fires or not."""
  reward = np.array([[1.0, 1], [0, 1], [0, 1], [3, 3]])
  log_sampled = np.zeros((4, 2, 2))
  log_sampled[:2, :, 0] = [[1, 3], [2, 4]]
  log_sampled[3] = np.nan
  given = dict(log_sampled=log_sampled, weight=[1, 1, 1, 0])
  _, metrics = weigh(BOTH['rloo'], reward, **given)
  same(metrics['signal/fires'], 2 / 3, 1e-6)
  same(metrics['kl/policy_reference'], (2 + 3 + 0) / 3, 1e-6)
  given['log_sampled'] = log_sampled[:, :1]
  _, metrics = weigh(BOTH['reinforce'], reward[:, :1], **given)
  same(metrics['signal/fires'], 1)
  same(metrics['kl/policy_reference'], (1 + 2 + 0) / 3, 1e-6)
  reward[:, 0] = [0.1, 0.1, 0.1, np.nan]  # tied, but for the filler
  _, metrics = weigh(BOTH['reinforce'], reward[:, :1], **given)
  same(metrics['signal/fires'], 0)


def test_bad_arguments_are_named():
  for wrong, said in (
      (dict(num_policy=1), '^num_policy .* 1: .*use reinforce'),
      (dict(num_policy=0), '^num_policy .* 0'),
      (dict(kl_weight=-0.1), '^kl_weight .*-0.1'),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=said):
      rloo.make(**{'num_policy': 2, 'kl_weight': 0.1, **wrong})
  with pytest.raises(ValueError, match='^kl_weight .*-0.1'):
    reinforce.make(kl_weight=-0.1)
