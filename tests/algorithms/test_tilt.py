"""tilt against enumeration of every batch, in float64.

The laws are those of test_policy_gradient; the anchor is the reference.
"""

import functools

from conftest import core
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_policy_gradient import objective_gradient, REWARDS, tables

from bond_jax.algorithms import tilt
from bond_jax.algorithms.parts import ops, quantiles
from bond_jax.types import Scores

KL_WEIGHT = 0.3


@functools.cache
def compiled(num_policy, num_anchor, vocab):
  algorithm = tilt.make(
    num_policy=num_policy, num_anchor=num_anchor, kl_weight=KL_WEIGHT,
    quantile='own',
  )  # fmt: skip
  law = oracle.sequences(vocab, 2, 1)
  return jax.jit(
    lambda theta, drawn_from, reference, reward, weight: (
      oracle.expected_gradient(
        algorithm, theta, drawn_from, reward, weight, law, reference=reference
      )
    )
  )


def laws(theta):
  """The probability of every sequence, [X, Y]."""
  law = oracle.sequences(theta.shape[-1], 2, 1)
  one = lambda theta: jnp.exp(oracle.table_log_probs(theta, *law).sum(-1))
  return np.array(jax.vmap(one)(theta))


def quantiles_of(reference, reward):
  """P(y beats y') under the reference, ties one half: [X, Y]."""
  return np.array(
    [sum(oracle.quantiles(*x)) / 2 for x in zip(laws(reference), reward)]
  )


@pytest.mark.parametrize('name', REWARDS)
@pytest.mark.parametrize(
  'num_policy, num_anchor', core(2, [(2, 1), (2, 2), (3, 1)])
)
def test_expected_gradient_is_the_objective_s(
  x64, name, num_policy, num_anchor
):
  theta, reference = tables(num_policy)
  reward = np.array([REWARDS[name]])
  exact = objective_gradient(
    theta, reference, quantiles_of(reference, reward), KL_WEIGHT
  )
  mine = compiled(num_policy, num_anchor, 3)(
    theta, reference, reference, jnp.array(reward), jnp.ones(1)
  )
  assert jnp.abs(exact).max() > 0.05
  np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', REWARDS)
def test_its_optimum_is_the_tilt(x64, name):
  """ref exp(u / c) / Z, ties and all: no gradient is left there."""
  _, reference = tables(2)
  reward = np.array([REWARDS[name]])
  u = quantiles_of(reference, reward)
  law = laws(reference) * np.exp(u / KL_WEIGHT)
  law /= law.sum(-1, keepdims=True)
  tokens, _ = oracle.sequences(3, 2, 1)
  table = np.zeros(reference.shape)
  for first, second in np.ndindex(3, 3):
    begins = tokens[:, 0] == first
    ends = begins & (tokens[:, 1] == second)
    if begins.sum() > 1:
      table[0, 1, first, second] = np.log(law[0, ends].sum())
    table[0, 0, 0, first] = np.log(law[0, begins].sum())
  np.testing.assert_allclose(laws(table), law, rtol=1e-12)
  left = compiled(2, 1, 3)(
    table, reference, reference, jnp.array(reward), jnp.ones(1)
  )  # fmt: skip
  np.testing.assert_allclose(left, 0, rtol=0, atol=1e-12)


def test_a_filler_row_changes_nothing(x64):
  theta, reference = tables(8, prompts=3, vocab=2)
  reward = np.array([[0.0, 1, 2], [1, 0, 1]])
  u = quantiles_of(reference[:2], reward)
  exact = objective_gradient(theta[:2], reference[:2], u, KL_WEIGHT)
  scored = reference.copy()
  scored[2] = np.nan
  mine = compiled(2, 1, 2)(
    theta,
    reference,
    scored,
    jnp.concatenate([jnp.array(reward), jnp.full((1, 3), jnp.nan)]),
    jnp.array([1.0, 1, 0]),
  )
  np.testing.assert_allclose(mine[:2], exact / 2, rtol=0, atol=1e-12)
  np.testing.assert_array_equal(mine[2], 0)


@pytest.mark.parametrize(
  'wrong',
  [
    dict(num_policy=1),
    dict(num_anchor=0),
    dict(kl_weight=0.0),
    dict(quantile='all'),
  ],
)
def test_bad_arguments_are_named(wrong):
  with pytest.raises(ValueError, match=f'^{next(iter(wrong))} '):
    tilt.make(
      **{'num_policy': 2, 'num_anchor': 1, 'kl_weight': 0.1, 'quantile': 'own',
         **wrong}
    )  # fmt: skip


def test_pooled_rows_are_what_the_policy_gradient_gets(x64):
  """The reward of the policy's rows, and of no other."""
  rng = np.random.default_rng(0)
  algorithm = tilt.make(
    num_policy=3, num_anchor=2, kl_weight=0.1, quantile='pooled'
  )
  reward = jnp.array(rng.standard_normal((4, 5)))
  zeros = jnp.zeros((4, 3, 2))
  scores = Scores(
    reward=reward, win=ops.win_matrix(reward), index=None, log_sampled=zeros,
    log_anchor=zeros[:, :0], log_reference=zeros, log_quantile=zeros[:, :0, 0],
    weight=jnp.ones(4),
  )  # fmt: skip
  rows, _ = algorithm.weigh(scores)
  expected = quantiles.pooled(reward[:, :3], reward[:, 3:], jnp.ones(4))
  np.testing.assert_array_equal(rows.reward, expected)
  # The log-ratios are 0 here; the baseline is of the other prompts.
  mean = np.asarray(expected).mean(-1)
  others = (mean.sum() - mean) / 3
  np.testing.assert_allclose(
    rows.baseline, np.tile(others[:, None, None], (3, 1))
  )
