"""Preferences over a few completions, and the gradients that they expect.

Axes: Y completions of a law, K drawn. Where a policy is a vector [Y] it need
not be normalised.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from bond_jax.algorithms.parts import ops
from bond_jax.types import Scores


def wins(size):
  """P(a beats b): from distinct rewards, from tied ones, and cyclic."""
  rng = np.random.default_rng(0)
  soft = rng.uniform(size=(size, size))
  rewards = rng.permutation(size), rng.integers(0, 2, size)
  return [
    *(np.asarray(ops.win_matrix(jnp.asarray(r)), float) for r in rewards),
    (soft + 1 - soft.T) / 2,
  ]


def laws(seed, size):
  """Two log-laws over `size` completions: those of anchor and reference."""
  logits = np.random.default_rng(seed).standard_normal((2, size))
  return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def tables(seed, law):
  """Logits of policy, anchor and reference: [1, T, V, V] each."""
  tokens, _ = law
  size = tokens.shape[1], tokens.max() + 1, tokens.max() + 1
  return 0.7 * np.random.default_rng(seed).standard_normal((3, 1, *size))


def expected_gradient(algorithm, size):
  """A function log_p, log_q, log_r [Y], win -> [Y]: K draws of log_q.

  log_p need not be normalised.
  """
  k = algorithm.num_anchor
  draws = np.array(list(itertools.product(range(size), repeat=k)))

  def loss(log_p, log_q, log_r, win):
    beats = win[draws[:, :, None], draws[:, None, :]]
    index = algorithm.select(beats.sum(-1), beats)
    chosen = ops.take_rows(jnp.asarray(draws), index)
    rows, _ = algorithm.weigh(
      Scores(
        reward=beats.sum(-1),
        win=beats,
        index=index,
        log_sampled=log_q[chosen][..., None],
        log_anchor=log_q[chosen][..., None],
        log_reference=log_r[chosen][..., None],
        log_quantile=jnp.zeros((len(draws), 0)),
        weight=jnp.ones(len(draws)),
      )
    )
    mass = jnp.exp(log_q[draws].sum(-1))
    return (mass * algorithm.loss(log_p[chosen][..., None], rows)).sum()

  gradient = jax.jit(jax.grad(loss))
  return lambda *x: gradient(*map(jnp.asarray, x))


def check_gradient(algorithm, objective, law, seed):
  """Over every kind of preference, by one compiled program."""
  theta, anchor, reference = tables(seed, law)
  y = len(law[0])

  @jax.jit
  def both(win):
    mine = oracle.expected_gradient(
        algorithm, theta, anchor, jnp.zeros((1, y)), jnp.ones(1), law,
        reference=reference, win=win[None],
    )  # fmt: skip
    return mine, jax.grad(objective)(theta, anchor, reference, win, law)

  for win in wins(y):
    mine, exact = jax.device_get(both(win))
    assert np.abs(exact).max() > 0.01
    np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-12)


def random_scores(seed, algorithm, b=3, t=2):
  """Scores with the rows that `algorithm` selects, and log_policy for them."""
  rng = np.random.default_rng(seed)
  reward = jnp.asarray(rng.normal(size=(b, algorithm.num_anchor)).round(1))
  win = ops.win_matrix(reward).astype(float)
  index = algorithm.select(reward, win)
  log_policy, sampled, anchor, reference = rng.normal(
    size=(4, b, index.shape[1], t)
  )
  seen = len(algorithm.reference_rows)
  return log_policy, Scores(
    reward=reward,
    win=win,
    index=index,
    log_sampled=sampled,
    log_anchor=anchor,
    log_reference=reference[:, :seen],
    log_quantile=jnp.zeros((b, 0)),
    weight=jnp.ones(b),
  )
