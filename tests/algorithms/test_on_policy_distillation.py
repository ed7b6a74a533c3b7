"""On-policy distillation against enumeration of every batch, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.algorithms import on_policy_distillation
from bond_jax.algorithms.parts import ops
from bond_jax.types import Scores


def tables(seed, prompts=1, vocab=3):
  """Logits of policy and teacher: [X, T, V, V] each."""
  rng = np.random.default_rng(seed)
  return 0.7 * rng.standard_normal((2, prompts, 2, vocab, vocab))


def expected_gradient(k, theta, teacher, reward):
  return oracle.expected_gradient(
    on_policy_distillation.make(num_policy=k), theta,
    jnp.full_like(theta, jnp.nan),  # the anchor is nothing's business here
    jnp.asarray(reward), jnp.ones(len(theta)),
    oracle.sequences(theta.shape[-1], 2, 1), reference=teacher,
  )  # fmt: skip


def exact(theta, teacher):
  """The gradient of the mean KL(pi || teacher) over prompts."""
  law = oracle.sequences(theta.shape[-1], 2, 1)
  mean = lambda theta: jnp.mean(
    jnp.array(
      [oracle.kl(*pair, *law) for pair in zip(theta, teacher, strict=True)]
    )
  )
  return jax.grad(mean)(jnp.asarray(theta))


@pytest.mark.parametrize('k', [1, 2, 3])
def test_expected_gradient_is_that_of_the_kl(x64, k):
  theta, teacher = tables(k)
  for reward in (np.zeros((1, 7)), np.arange(7.0)[None] ** 2):
    mine = expected_gradient(k, theta, teacher, reward)
    assert jnp.abs(mine).max() > 0.05
    np.testing.assert_allclose(mine, exact(theta, teacher), rtol=0, atol=1e-9)


@pytest.mark.parametrize('k', [1, 2])
def test_of_two_prompts_it_is_the_mean(x64, k):
  theta, teacher = tables(5, prompts=2, vocab=2)
  mine = expected_gradient(k, theta, teacher, [[0.0, 1, 2], [1, 0, 1]])
  np.testing.assert_allclose(mine, exact(theta, teacher), rtol=0, atol=1e-9)


def test_a_policy_that_is_its_teacher_has_no_gradient(x64):
  theta, _ = tables(6)
  assert not expected_gradient(2, theta, theta, np.arange(7.0)[None]).any()


def test_a_signal_is_a_difference_to_the_teacher():
  log_sampled = jnp.array([[[-1.0, -2], [-1, 0]], [[-3.0, -1], [-2, -2]]])
  reward = jnp.zeros((2, 2))
  scores = Scores(
    reward=reward,
    win=ops.win_matrix(reward),
    index=jnp.array([[0, 1]] * 2),
    log_sampled=log_sampled,
    log_anchor=jnp.zeros((2, 0, 2)),
    log_reference=log_sampled.at[0, 1, 0].add(0.5),
    log_quantile=jnp.zeros((2, 0)),
    weight=jnp.ones(2),
  )
  _, metrics = on_policy_distillation.make(num_policy=2).weigh(scores)
  assert metrics['signal/fires'] == 0.5
  assert metrics['kl/policy_reference'] == pytest.approx(-0.5 / 4)


def test_what_came_before_is_no_part_of_a_token_s_signal():
  rng = np.random.default_rng(0)
  log_policy, log_teacher = rng.standard_normal((2, 2, 3, 2))
  algorithm = on_policy_distillation.make(num_policy=3)
  scores = Scores(
    reward=jnp.zeros((2, 3)), win=None, index=None, log_sampled=log_policy,
    log_anchor=None, log_reference=log_teacher, log_quantile=None,
    weight=jnp.ones(2),
  )  # fmt: skip
  rows, _ = algorithm.weigh(scores)
  gradient = jax.grad(lambda x: algorithm.loss(x, rows).sum())(log_policy)
  ratio = log_policy - log_teacher
  to_go = np.stack([ratio.sum(-1), ratio[..., 1]], -1)
  others = (to_go.sum(1, keepdims=True) - to_go) / 2
  np.testing.assert_allclose(gradient, (to_go - others) / 3, rtol=1e-5)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match='^num_policy must be 1 or more, got 0'):
    on_policy_distillation.make(num_policy=0)
