"""Exact measures of a policy whose whole distribution is known.

Axes: X prompts, Y all completions of a prompt. Numpy, float64, laws in natural
logarithms.
"""

from typing import NamedTuple

import numpy as np

from bond_jax.measures import curves, tables


class Known(NamedTuple):
  """A task: the reference, the rewards, and what follows from them."""

  log_reference: np.ndarray  # [X, Y]
  reward: np.ndarray  # [X, Y]
  target: np.ndarray  # [X, Y], log of exact Best-of-N of the reference
  log_quantile: np.ndarray  # [X, Y], log p_<=
  win: np.ndarray  # [X, Y], P(y beats the reference), ties one half
  curve: curves.Curve  # of exact Best-of-N
  equilibrium: np.ndarray | None  # [X, Y], log of WIND's
  tilt: np.ndarray | None  # [X, Y], log of ref exp(win / kl_weight) / Z


def know(
  log_reference: np.ndarray, reward: np.ndarray, n: float, kl_weight: float
) -> Known:
  """The task of these; n is the target's, kl_weight equilibrium's and tilt's.

  With kl_weight = 0 there are none to compare with.
  """
  at_most, level = tables.quantiles(log_reference, reward)
  win = np.exp(at_most) - 0.5 * np.exp(level)
  equilibrium = tilt = None
  if kl_weight:
    free = log_reference + win / kl_weight
    tilt = free - np.logaddexp.reduce(free, -1, keepdims=True)
    equilibrium = tables.wind_equilibrium(
      log_reference, tables.win_matrix(reward), kl_weight
    )
  return Known(
    log_reference,
    reward,
    tables.best_of_n(log_reference, reward, n),
    at_most,
    win,
    best_of_n_curve(log_reference, reward, win),
    equilibrium,
    tilt,
  )


def measure(log_policy: np.ndarray, known: Known) -> dict[str, float]:
  """Means over prompts; nats where it is a KL.

  backward_kl and forward_kl are to and from the target; log_quantile is
  E[log p_<=]; effective_n the N whose Best-of-N wins as often, and
  frontier_efficiency its KL over the policy's, both only where such an N is.
  """
  policy = np.exp(log_policy)
  mean = lambda x: (policy * x).sum(-1).mean()
  row = {
    'backward_kl': tables.kl(log_policy, known.target).mean(),
    'forward_kl': tables.kl(known.target, log_policy).mean(),
    'log_quantile': mean(known.log_quantile),
    'reward/validation': mean(known.reward),
    'win_rate/reference': mean(known.win),
    'kl/reference': tables.kl(log_policy, known.log_reference).mean(),
    'entropy': -mean(log_policy),
  }
  if known.equilibrium is not None:
    row['equilibrium_kl'] = tables.kl(known.equilibrium, log_policy).mean()
    row['tilt_kl'] = tables.kl(known.tilt, log_policy).mean()
  curve = known.curve
  n = curves.effective_n(row['win_rate/reference'], curve)
  if n is not None and row['kl/reference'] > 0:
    best = curves.at_n(n, curve, curve.kl)
    row['effective_n'] = n
    row['frontier_efficiency'] = best / row['kl/reference']
  return {k: float(v) for k, v in row.items()}


def best_of_n_curve(log_reference, reward, win) -> curves.Curve:
  """The exact win rate and KL of Best-of-N, N from 1 to 1,000."""
  ns = np.geomspace(1, 1000, 120)
  laws = [tables.best_of_n(log_reference, reward, n) for n in ns]
  rates = [(np.exp(law) * win).sum(-1).mean() for law in laws]
  kls = [tables.kl(law, log_reference).mean() for law in laws]
  none = np.zeros(len(ns))
  return curves.Curve(ns, np.array(rates), np.array(kls), none, none)
