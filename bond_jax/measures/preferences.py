"""How good scores are, on pairs of which the better one is known.

Axes: N texts, M pairs of them, D draws. All in float64 numpy. A `lead` is the
score of the preferred text less that of the other; sigmoid(lead) is what the
model says is the probability of the preference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DRAWS = 2000  # of the bootstrap


def right(lead: np.ndarray) -> np.ndarray:
  """1 where the preferred text leads, 1/2 on ties, else 0: f64[M]."""
  return (np.sign(np.asarray(lead, np.float64)) + 1) / 2


def log_loss(lead: np.ndarray) -> float:
  """The mean of -log sigmoid(lead), in nats; log 2 = it knows nothing."""
  return float(np.logaddexp(0, -np.asarray(lead, np.float64)).mean())


def temperature(lead: np.ndarray) -> float:
  """The T > 0 for which lead / T has the smallest log-loss.

  Within a thousandth and a thousand: pairs that are all right ask for 0.
  """
  lead = np.asarray(lead, np.float64)

  def rises(x: float) -> bool:  # the loss at 1 / T = x, which it is convex in
    p = (1 - np.tanh(x * lead / 2)) / 2  # sigmoid(-x lead)
    return (lead * p).sum() < 0

  low, high = -np.log(1000), np.log(1000)
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (low, middle) if rises(np.exp(middle)) else (middle, high)
  return float(np.exp(-low))


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


def interval(draws: np.ndarray) -> list[float]:
  """95 % percentile interval."""
  return [float(x) for x in np.percentile(draws, [2.5, 97.5])]


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
  p = 1 / (1 + np.exp(-np.abs(lead)))
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
