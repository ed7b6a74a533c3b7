"""How well scores agree with pairs of which the better text is known.

Axes: N texts, M pairs of them, D draws. All in float64 numpy. A `lead` is the
score of the preferred text less that of the other; sigmoid(lead) is what the
model says is the probability of the preference.
"""

from typing import Any

import numpy as np
from scipy.special import expit

from bond_jax.measures.curves import DRAWS


def right(lead: np.ndarray) -> np.ndarray:
  """1 where the preferred text leads, 1/2 on ties, else 0: f64[M]."""
  return (np.sign(np.asarray(lead, np.float64)) + 1) / 2


def log_loss(lead: np.ndarray) -> float:
  """The mean of -log sigmoid(lead), in nats; log 2 = chance."""
  return float(np.logaddexp(0, -np.asarray(lead, np.float64)).mean())


def temperature(lead: np.ndarray) -> float:
  """The T from 0.001 to 1000 for which lead / T has the smallest log-loss."""
  from scipy.optimize import brentq  # importing it takes a while

  lead = np.asarray(lead, np.float64)
  # The loss is convex in 1 / T; this is its slope there, up to a factor < 0.
  slope = lambda log_t: (lead * expit(-lead / np.exp(log_t))).mean()
  low, high = -np.log(1000), np.log(1000)
  if slope(low) >= 0:  # all pairs are right: the smallest T
    return float(np.exp(low))
  if slope(high) <= 0:
    return float(np.exp(high))
  return float(np.exp(brentq(slope, low, high, xtol=1e-14)))


def bootstrap(
  right: np.ndarray, units: np.ndarray, seed: int = 0
) -> np.ndarray:
  """Accuracies f64[D] on resampled units.

  Pairs that share a text are not independent, so the texts are resampled: a
  pair counts as often as both of its texts were drawn (the product of the two
  counts). Where both belong to one unit, say a prompt, it counts as often as
  that was.

  Args:
    right: f64[M], or f64[M, X] of X models on the same pairs; see `right`.
    units: i64[M, 2], the unit of either text.
    seed: of the draws.

  Returns:
    f64[D], or f64[D, X], of the same resampled units.
  """
  names, index = np.unique(units, return_inverse=True)
  index = index.reshape(units.shape)
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(DRAWS):
    count = np.bincount(rng.integers(len(names), size=len(names)),
                        minlength=len(names))  # fmt: skip
    a, b = count[index[:, 0]], count[index[:, 1]]
    weight = np.where(index[:, 0] == index[:, 1], a, a * b)
    if weight.any():  # else a draw without any pair: says nothing
      found.append(weight @ right / weight.sum())
  return np.array(found)


def calibration(
  lead: np.ndarray, bins: int = 10
) -> tuple[float, list[dict[str, Any]]]:
  """The expected calibration error, and the table it is made of.

  A pair is binned by the probability p >= 1/2 that the model gives the text it
  prefers itself; with p the bins divide [1/2, 1] evenly. In each, the mean p
  should be the share of pairs in which that text is preferred.

  Returns:
    sum over bins of pairs / M |mean p - share right| (Guo et al., 2017), and a
    dict per bin: from, to, pairs, confidence (mean p) and accuracy, None where
    there are no pairs.
  """
  lead = np.asarray(lead, np.float64)
  p = expit(np.abs(lead))
  index = np.minimum(((p - 0.5) * 2 * bins).astype(int), bins - 1)
  error, table = 0.0, []
  for i in range(bins):
    here = index == i
    row = {'from': 0.5 + i / 2 / bins, 'to': 0.5 + (i + 1) / 2 / bins}
    row |= {'pairs': int(here.sum()), 'confidence': None, 'accuracy': None}
    if here.any():
      row['confidence'] = float(p[here].mean())
      row['accuracy'] = float(right(lead[here]).mean())
      error += here.mean() * abs(row['confidence'] - row['accuracy'])
    table.append(row)
  return float(error), table
