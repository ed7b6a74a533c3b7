"""Policy against reference, completion against completion.

All in numpy float64. Axes: X held-out prompts, A policy completions of each, S
reference completions of each, K bins of a histogram. Rewards are compared
within a prompt only; ties count one half.
"""

from typing import Any

import numpy as np
from scipy.special import binom, expit

from bond_jax.measures.curves import checked, interval, levels, resampled

BEST_OF = (2, 4, 8, 16)


def win_rates(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """P(policy > reference) + half the ties of each prompt, over all pairs.

  Args:
    policy: f64[X, A], rewards of the policy's completions.
    reference: f64[X, S], rewards of fresh reference completions.

  Returns:
    f64[X].
  """
  below, at_most = _counts(policy, reference)
  return (below + at_most).mean(1) / (2 * reference.shape[1])


def win_rate(policy: np.ndarray, reference: np.ndarray) -> float:
  """P(policy > reference) + half the ties, the mean over prompts."""
  return float(win_rates(policy, reference).mean())


def _counts(policy, reference) -> tuple[np.ndarray, np.ndarray]:
  """How many reference completions are below, and up to, each: f64[X, A]."""
  a, b = checked(policy)[:, :, None], checked(reference)[:, None, :]
  return (b < a).sum(-1).astype(float), (b <= a).sum(-1).astype(float)


def win_rates_over_best_of(
  n: int, policy: np.ndarray, reference: np.ndarray
) -> np.ndarray:
  """How often one policy completion beats the best of n of the reference.

  The mean over all choices of n of the S reference completions: of these,
  C(below, n) / C(S, n) are beaten, where `below` of the S are. Unbiased.

  Args:
    n: 1 to S.
    policy: f64[X, A], rewards.
    reference: f64[X, S], rewards.

  Returns:
    f64[X]; 1/2 if the policy is Best-of-n itself.

  Raises:
    ValueError: n is larger than S.
  """
  size = reference.shape[1]
  if not 1 <= n <= size:
    raise ValueError(f'the best of {n} cannot be taken from {size} completions')
  below, at_most = _counts(policy, reference)
  beaten = binom(below, n) + binom(at_most, n)
  return beaten.mean(1) / (2 * binom(size, n))


def over_best_of(
  policy: np.ndarray, reference: np.ndarray
) -> dict[str, dict[str, Any]]:
  """Win rates over Best-of-N for the N of BEST_OF that S allows, by N."""
  weights = resampled(len(policy))
  found = {}
  for n in BEST_OF:
    if n <= reference.shape[1]:
      rates = win_rates_over_best_of(n, policy, reference)
      found[str(n)] = {
        'win_rate': float(rates.mean()),
        'interval': interval(weights @ rates),
      }
  return found


def tie_rate(rewards: np.ndarray) -> float:
  """Share of pairs of distinct draws of one prompt that tie, f64[X, S]."""
  low, high, _ = levels(checked(rewards))
  size = rewards.shape[1]
  return float(np.mean((high - low - 1) / (size - 1)))


def mean_log_quantile(policy: np.ndarray, reference: np.ndarray) -> float:
  """Mean of log p_<= of the policy's completions under the reference.

  The reference itself has about -1. A completion counts as one more reference
  draw, so the best of all has 0 and none has minus infinity.
  """
  _, at_most = _counts(policy, reference)
  return float(np.log((at_most + 1) / (reference.shape[1] + 1)).mean())


def quantile_histogram(
  policy: np.ndarray, reference: np.ndarray, n: float | None, bins: int = 10
) -> dict[str, Any]:
  """Densities of the quantile of a completion among the reference's.

  A completion counts as one more reference draw, spread evenly over its
  possible places among its ties: the reference itself has density 1, Best-of-N
  N u^(N - 1) without ties, and with ties its mean over each level.

  Args:
    policy: f64[X, A], rewards.
    reference: f64[X, S], rewards.
    n: of the Best-of-N to compare with, real; None for none.
    bins: K.

  Returns:
    edges [K + 1]; policy and best_of_n, densities [K]; n.
  """
  edges, size = np.linspace(0, 1, bins + 1), reference.shape[1]
  below, at_most = _counts(policy, reference)
  share = _spread(below / (size + 1), (at_most + 1) / (size + 1), edges)
  row = {
    'edges': edges.tolist(),
    'policy': (bins * np.diff(share.mean((0, 1)))).tolist(),
    'n': n,
    'best_of_n': None,
  }
  if n is not None:
    low, high, first = levels(checked(reference))
    low, high = low / size, high / size
    mass = (high**n - low**n) * first
    under = (mass[..., None] * _spread(low, high, edges)).sum(1).mean(0)
    row['best_of_n'] = (bins * np.diff(under)).tolist()
  return row


def _spread(low, high, edges) -> np.ndarray:
  """The share of the uniform distribution on [low, high] below each edge."""
  low, high = low[..., None], high[..., None]
  return np.clip((edges - low) / (high - low), 0, 1)


def length_controlled(
  rewards: tuple[np.ndarray, np.ndarray],
  lengths: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
  """The win rate at equal length.

  As AlpacaEval 2 (Dubois et al., arXiv 2404.04475) without its difficulty of a
  prompt: a logistic regression of the outcome of every pair, ties 1/2, on a
  constant and on tanh of the difference of lengths over its standard deviation;
  the win rate is its prediction at difference 0. The error counts prompts as
  clusters.

  Args:
    rewards: of the policy f64[X, A] and of the reference f64[X, S].
    lengths: likewise, in tokens.

  Returns:
    length_controlled_win_rate and its interval, None where the regression has
    no solution, and length_controlled_reason says why.
  """
  a, b = (x[:, :, None] for x in map(np.asarray, rewards))
  b = np.swapaxes(b, 1, 2)
  won = ((a > b) + 0.5 * (a == b)).reshape(len(a), -1)
  c, d = (np.asarray(x, np.float64) for x in lengths)
  longer = (c[:, :, None] - d[:, None, :]).reshape(len(c), -1)
  longer = np.tanh(longer / (longer.std() or 1.0))
  fitted, error, reason = _logistic(won, longer)
  name = 'length_controlled_win_rate'
  if reason:
    return {name: None, f'{name}_interval': None,
            'length_controlled_reason': reason}  # fmt: skip
  bounds = fitted - 1.96 * error, fitted + 1.96 * error
  return {
    name: float(expit(fitted)),
    f'{name}_interval': [float(expit(x)) for x in bounds],
    'length_controlled_reason': None,
  }


def _logistic(y: np.ndarray, x: np.ndarray, steps: int = 30):
  """The c of y ~ sigmoid(c + w x), its clustered error, or why there is none.

  y, x: f64[X, P], P pairs of each prompt.
  """
  if y.min() == y.max() and y.min() != 0.5:
    return 0, 0, 'one side won every comparison'
  with_x = x.std() > 0
  design = np.stack([np.ones_like(x), x] if with_x else [np.ones_like(x)])
  w = np.zeros(len(design))
  for _ in range(steps):  # Newton's; the loss is convex
    p = expit(np.tensordot(w, design, 1))
    curvature = np.einsum('axp,bxp,xp->ab', design, design, p * (1 - p))
    step = np.linalg.solve(curvature, np.einsum('axp,xp->a', design, y - p))
    w = w + step
    if abs(w).max() > 20:
      return 0, 0, 'the lengths alone tell who wins'
    if abs(step).max() < 1e-10:
      break
  else:
    return 0, 0, f'the regression on length did not settle in {steps} steps'
  p = expit(np.tensordot(w, design, 1))
  score = np.einsum('axp,xp->ax', design, y - p)
  inverse = np.linalg.inv(curvature)
  spread = inverse @ score @ score.T @ inverse * len(y) / max(len(y) - 1, 1)
  return w[0], np.sqrt(spread[0, 0]), None
