"""WIND from sampled comparisons, on the tables of `bandit`.

A comparison draws a prompt x, evenly, two arms y, y' from the policy, and z in
{0, 1/2, 1}, whether y beats y'. E[z | y] = P(y > pi), so that the minimiser f
of any Bregman risk of z may stand for it in the WIND step. Three of them:

    squared  (f - z)^2                           curvature 2
    kl       -z log f - (1 - z) log(1 - f)       curvature 1 / (f (1 - f))
    nce      -z log(f / (1 + f)) + log(1 + f)    curvature 1 / (f (1 + f))

The gradient of each in f is curvature(f) (f - z). Yang et al., "Faster WIND"
(arXiv 2410.20727), name the three; we have not seen how they print them, and
hold to what makes a risk sound, that E[z] minimises it.

With one free value per prompt and arm the minimiser is the mean of z whatever
the curvature: on a table the three risks are one and the same algorithm. They
differ where f is restricted, here to be linear in features. Then all policies
of a run are log-linear: log(policy / reference) stays linear in the features,
up to the normaliser.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bond_jax.measures import tables

CURVATURE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'squared': lambda f: np.full_like(f, 2.0),
  'kl': lambda f: 1 / (f * (1 - f)),
  'nce': lambda f: 1 / (f * (1 + f)),
}


def sample_comparisons(
  rng: np.random.Generator,
  log_policy: np.ndarray,
  win: np.ndarray,
  num_samples: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws `num_samples` comparisons over all prompts together.

  Args:
    rng: what draws.
    log_policy: f64[X, A].
    win: f64[X, A, A]; where it is 1/2, z is, as on a tie; elsewhere z is 1
      with that probability, else 0.
    num_samples: at least 1.

  Returns:
    visits i64[X, A], how often y was the first arm, and wins f64[X, A], the
    sum of its z.
  """
  if num_samples < 1:
    raise ValueError(f'num_samples must be >= 1, got {num_samples}')
  p = np.exp(log_policy)
  pairs = p[:, :, None] * p[:, None, :]
  count = rng.multinomial(num_samples, (pairs / pairs.sum()).ravel())
  count = count.reshape(pairs.shape)
  won = np.where(win == 0.5, 0.5 * count, rng.binomial(count, win))
  return count.sum(-1), won.sum(-1)


def fit_win_rate(
  visits: np.ndarray,
  wins: np.ndarray,
  features: np.ndarray | None = None,
  risk: str = 'squared',
) -> np.ndarray:
  """The f that minimises a risk over comparisons: an estimate of P(y > pi).

  Args:
    visits: [X, A], comparisons, or weights, of each arm.
    wins: [X, A], the sum of their z.
    features: f64[X, A, D] for f = 1/2 + features @ w; None leaves f free. What
      no comparison tells of is 1/2, which is our choice.
    risk: a key of `CURVATURE`. With features it is taken at f clipped to
      [0.01, 0.99], since a linear f may leave (0, 1); our choice too.

  Returns:
    f64[X, A].
  """
  if risk not in CURVATURE:
    raise ValueError(f'risk must be one of {list(CURVATURE)}, got {risk!r}')
  mean = np.where(visits > 0, wins / np.where(visits > 0, visits, 1), 0.5)
  if features is None:
    return mean
  rows, target = features.reshape(mean.size, -1), mean.ravel() - 0.5
  fit = np.zeros(mean.size)  # f - 1/2
  for _ in range(100):  # least squares, weighed anew, until it stays
    curvature = CURVATURE[risk](np.clip(0.5 + fit, 0.01, 0.99))
    weight = np.sqrt(visits.ravel() * curvature)
    w, *_ = np.linalg.lstsq(weight[:, None] * rows, weight * target)
    last, fit = fit, rows @ w
    if np.abs(fit - last).max() < 1e-12:
      break
  return 0.5 + fit.reshape(mean.shape)


def sampled_wind_step(
  rng: np.random.Generator,
  log_policy: np.ndarray,
  log_reference: np.ndarray,
  win: np.ndarray,
  kl_weight: float,
  step_size: float,
  num_samples: int,
  features: np.ndarray | None = None,
  risk: str = 'squared',
) -> np.ndarray:
  """`tables.wind_step` with P(y > pi) fitted to comparisons: f64[X, A]."""
  visits, wins = sample_comparisons(rng, log_policy, win, num_samples)
  value = fit_win_rate(visits, wins, features, risk)
  return tables.mirror_step(
    log_policy, log_reference, value, kl_weight, step_size
  )
