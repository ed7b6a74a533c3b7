"""What BOND and J-BOND descend, in closed form, on laws that can be enumerated.

The expected gradient of `algorithms.bond` and `algorithms.jbond` is the
gradient of these: proven in the tests, and used where a question is put to
the algorithm without the noise of sampling.

Axes: X prompts, Y all completions of a prompt. Laws are natural logarithms.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from bond_jax.types import Array


def quantiles(mass: Array, reward: Array) -> tuple[Array, Array]:
  """P(r(y') < r(y)) and P(r(y') <= r(y)) for y' from mass: f[X, Y] each."""
  mine, other = reward[:, :, None], reward[:, None, :]
  share = lambda beaten: (beaten * mass[:, None, :]).sum(-1)
  return share(other < mine), share(other <= mine)


def best_of_n(mass: Array, reward: Array, n: int) -> Array:
  """The law of the best of n draws, BOND's theorem 1: f[X, Y]."""
  less, at_most = quantiles(mass, reward)
  terms = [at_most ** (n - i) * less ** (i - 1) for i in range(1, n + 1)]
  return mass * sum(terms)


def bond(
  log_policy: Array,
  log_anchor: Array,
  target: Array,
  quantile_reward: Array,
  *,
  backward_weight: float,
  drift_weight: float,
) -> Array:
  """(1 - b) KL(target || pi) + b (KL(pi || anchor) - E_pi[R]) + g KL.

  Up to a constant: Best-of-n's entropy, and, where R = (n - 1) r_BOND is
  exact, the normaliser of Best-of-n.

  Args:
    log_policy, log_anchor: f[X, Y].
    target: f[X, Y], the mass of Best-of-n of the anchor.
    quantile_reward: f[X, Y], the mean of (n - 1) r_BOND over the anchor's
      draws.
    backward_weight, drift_weight: as in `algorithms.bond`.

  Returns:
    f[], the mean over prompts.
  """
  mass = jnp.exp(log_policy)
  apart = (mass * (log_policy - log_anchor)).sum(-1)
  forward = -(target * log_policy).sum(-1)
  backward = apart - (mass * quantile_reward).sum(-1)
  return (
    (1 - backward_weight) * forward
    + backward_weight * backward
    + drift_weight * apart
  ).mean()


def jbond(
  log_policy: Array,
  log_anchor: Array,
  reward: Array,
  *,
  num_anchor: int,
  backward_weight: float,
  drift_weight: float,
) -> Array:
  """J-BOND's objective at a given anchor; f[X, Y] -> f[]."""
  k, mass = num_anchor, jnp.exp(log_anchor)
  _, at_most = quantiles(mass, reward)
  floor = -(2.0**k) * math.log(2) * (1 - at_most) ** k
  return bond(
    log_policy,
    log_anchor,
    best_of_n(mass, reward, k),
    (k - 1) * floor,
    backward_weight=backward_weight,
    drift_weight=drift_weight,
  )
