"""What BOND and J-BOND descend, in closed form, on laws that can be enumerated.

The expected gradient of `algorithms.bond` and `algorithms.jbond` is the
gradient of `bond`: proven in the tests, and used where a question is put to
the algorithm without the noise of sampling.

Axes: X prompts, Y all completions of a prompt. Laws are natural logarithms.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from bond_jax.measures import tables
from bond_jax.types import Array


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


def jbond_terms(
  log_anchor: np.ndarray, reward: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """`target` and `quantile_reward` of J-BOND with k draws of this anchor.

  f64[X, Y] each: Best-of-k's mass, and k - 1 times the mean of the floor,
  which is met where all k draws beat y.
  """
  at_most, _ = tables.quantiles(log_anchor, reward)
  floor = -(2.0**k) * math.log(2) * (1 - np.exp(at_most)) ** k
  return np.exp(tables.best_of_n(log_anchor, reward, k)), (k - 1) * floor
