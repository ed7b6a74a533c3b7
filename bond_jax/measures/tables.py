"""Exact tables: Best-of-N, iterative Best-of-N and WIND on a bandit, float64.

Everything is a table of X prompts by A completions ("arms"): log_policy[x, y]
= log pi(y | x), normalised, -inf where an arm has no mass; win[x, a, b] =
P(a beats b), with win[x, a, b] + win[x, b, a] = 1, so 1/2 on ties. With
P(y > pi) = sum_b win[y, b] pi(b):

    Best-of-n(pi)(y) = pi(y) (p_<=^n - p_<^n) / (p_<= - p_<)             (BON)
    Best-of-2(pi)(y) = 2 pi(y) P(y > pi), ties included
    iterative BoN:  pi' ∝ Best-of-n(pi)^a1 ref^a2 pi^(1 - a1 - a2)      (MIX)
    its limit, n = 2:  pi ∝ ref P(. > pi)^(1/b),  b = a2 / a1           (LOG)
    WIND step:  pi' ∝ (pi ref^(b e) exp(e P(. > pi)))^(1 / (1 + b e))  (WIND)
    its limit:  pi ∝ ref exp(P(. > pi) / b)                            (NASH)

where p_<(y), p_<=(y) are the probabilities that a draw of pi has a reward
below, or not above, that of y; b is `kl_weight` (the papers' beta) and e
`step_size` (eta). (BON) is theorem 1 of Sessa et al., "BOND" (arXiv
2407.14622), in closed form, from raw rewards: exact for ties that the first
draw wins. The others are of Yang et al., "Faster WIND" (arXiv 2410.20727).

`bandit_samples` replaces the exact P(y > pi) by a fit to comparisons.
`python -m benchmarks.papers.wind_1 --out=DIR` draws figure 1 of that paper.
"""

import numpy as np
from scipy.special import log_softmax

_MAX_STEPS = 3000  # of one fixed-point iteration; ours
_MAX_GAP = 1e-11  # in the win rates of an equilibrium; ours


# -- tables -------------------------------------------------------------------


def win_matrix(reward: np.ndarray) -> np.ndarray:
  """P(a beats b) where the larger reward wins: [X, A] -> [X, A, A]."""
  mine, other = reward[..., :, None], reward[..., None, :]
  return 0.5 * (mine > other) + 0.5 * (mine >= other)


def normalise(log_weight: np.ndarray) -> np.ndarray:
  """log of weight / sum of weights, over the last axis; -inf is weight 0."""
  top = log_weight.max(-1, keepdims=True)
  if not np.isfinite(top).all():
    raise ValueError(
      'a distribution needs an arm with positive weight, and no infinite one;'
      ' policy and reference must share arms. Largest log weights:'
      f' {top.ravel()}'
    )
  return log_softmax(log_weight, axis=-1)


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
  """KL(p || q), nats: two laws [X, A] -> [X]; inf where q lacks an arm of p."""
  p = np.exp(log_p)
  with np.errstate(invalid='ignore'):
    return np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def win_rate(
  log_policy: np.ndarray, log_opponent: np.ndarray, win: np.ndarray
) -> np.ndarray:
  """P(policy > opponent): laws [X, A], win [X, A, A] -> [X]."""
  return (np.exp(log_policy) * arm_win_rate(log_opponent, win)).sum(-1)


def arm_win_rate(log_opponent: np.ndarray, win: np.ndarray) -> np.ndarray:
  """P(y > opponent) of every arm: law [X, A], win [X, A, A] -> [X, A]."""
  return np.matmul(win, np.exp(log_opponent)[..., None])[..., 0]


# -- Best-of-N ----------------------------------------------------------------


def best_of_n(
  log_policy: np.ndarray, reward: np.ndarray, n: float
) -> np.ndarray:
  """The distribution of the best of n draws; the first of ties wins: (BON).

  Args:
    log_policy: f64[X, A].
    reward: f64[X, A]; only its order within a prompt matters.
    n: real, at least 1; a whole number is a number of draws.

  Returns:
    f64[X, A]. Tied arms keep the ratio that they have in the policy.

  Raises:
    ValueError: n below 1, other shapes, rewards that are not finite.
  """
  log_policy = _law('log_policy', log_policy)
  reward = np.asarray(reward, np.float64)
  if reward.shape != log_policy.shape or not np.isfinite(reward).all():
    raise ValueError(
      f'reward must be finite and {list(log_policy.shape)} as log_policy is,'
      f' got {list(reward.shape)}'
    )
  if not 1 <= n < np.inf:
    raise ValueError(f'n must be a finite number >= 1, got {n}')
  at_most, level = quantiles(log_policy, reward)
  with np.errstate(divide='ignore', invalid='ignore'):
    # p_<=^n - p_<^n over p_<= - p_<, in terms of share = 1 - p_< / p_<=.
    share = np.exp(level - at_most)
    spread = np.log(-np.expm1(n * np.log1p(-share)) / share)
    spread = np.where(share > 0, spread, np.log(n))  # the limit of small ones
    law = log_policy + (n - 1) * at_most + spread
  return normalise(np.where(np.isfinite(log_policy), law, -np.inf))


def quantiles(log_policy, reward):
  """log p_<= of each arm, and the log mass of its ties, itself included."""
  at_most, level = np.empty_like(log_policy), np.empty_like(log_policy)
  for x, (log_p, r) in enumerate(zip(log_policy, reward)):
    levels, index = np.unique(r, return_inverse=True)
    mass = np.full(len(levels), -np.inf)
    np.logaddexp.at(mass, index, log_p)
    at_most[x] = np.logaddexp.accumulate(mass)[index]
    level[x] = mass[index]
  return at_most, level


def iterate_best_of_n(
  log_policy: np.ndarray,
  log_reference: np.ndarray,
  reward: np.ndarray,
  n: float,
  steps: int,
  alpha1: float = 1.0,
  alpha2: float = 0.0,
) -> np.ndarray:
  """Iterative Best-of-n, `steps` times (MIX); by default without mixing.

  Without mixing step t is Best-of-n^t of the start, and the limit is the
  start restricted to the best arms. With mixing and n = 2 the limit is
  `log_win_rate_equilibrium` at kl_weight alpha2 / alpha1; for other n it is
  close to the one at alpha2 / ((n - 1) alpha1) if there are many arms.

  Args:
    log_policy: f64[X, A], the start; the paper starts at the reference.
    log_reference: f64[X, A].
    reward: f64[X, A].
    n: real, at least 1.
    steps: at least 0.
    alpha1: the weight of Best-of-n, in (0, 1].
    alpha2: that of the reference, in [0, 1 - alpha1]; the policy has the rest.

  Returns:
    f64[steps + 1, X, A]: the start, and the policy after each step.
  """
  if not (0 < alpha1 <= 1 and 0 <= alpha2 <= 1 - alpha1 + 1e-12):
    raise ValueError(
      'alpha1 must lie in (0, 1] and alpha2 in [0, 1 - alpha1], got'
      f' alpha1={alpha1}, alpha2={alpha2}'
    )
  if steps < 0:
    raise ValueError(f'steps must be >= 0, got {steps}')
  way = [_law('log_policy', log_policy)]
  reference = _law('log_reference', log_reference, way[0].shape)
  rest = 1 - alpha1 - alpha2
  rest = rest if rest > 1e-12 else 0.0  # what rounding leaves is not a weight
  for _ in range(steps):
    best = best_of_n(way[-1], reward, n)
    mixed = _times(alpha1, best) + _times(alpha2, reference)
    way.append(normalise(mixed + _times(rest, way[-1])))
  return np.stack(way)


# -- WIND ---------------------------------------------------------------------


def wind_step(
  log_policy: np.ndarray,
  log_reference: np.ndarray,
  win: np.ndarray,
  kl_weight: float,
  step_size: float,
) -> np.ndarray:
  """One exact step of WIND, a magnetic mirror descent: (WIND).

  kl_weight 0 is SPPO's exponential weights. Step sizes up to 4 kl_weight
  converge for every preference, and far larger ones where rewards decide; on
  rock, paper, scissors those above 2 kl_weight / (1/12 - kl_weight^2) diverge.

  log_policy, log_reference f64[X, A], win f64[X, A, A] -> f64[X, A].
  """
  win = _win(win, np.shape(log_policy))
  value = arm_win_rate(log_policy, win)
  return mirror_step(log_policy, log_reference, value, kl_weight, step_size)


def mirror_step(
  log_policy: np.ndarray,
  log_reference: np.ndarray,
  value: np.ndarray,
  kl_weight: float,
  step_size: float,
) -> np.ndarray:
  """`wind_step` with any f64[X, A] in place of P(y > pi)."""
  log_policy = _law('log_policy', log_policy)
  reference = _law('log_reference', log_reference, log_policy.shape)
  if not 0 <= kl_weight < np.inf:
    raise ValueError(f'kl_weight must be finite and >= 0, got {kl_weight}')
  _check_positive('step_size', step_size)
  pull = _times(kl_weight * step_size, reference)
  total = 1 + kl_weight * step_size
  return normalise((log_policy + pull + step_size * value) / total)


def wind_equilibrium(
  log_reference: np.ndarray, win: np.ndarray, kl_weight: float
) -> np.ndarray:
  """The unique fixed point of WIND: (NASH).

  Newton's method on v = P(. > pi): with win - 1/2 skew-symmetric and the
  derivative of softmax symmetric, the eigenvalues of the Jacobian have real
  part 1, so it is never singular. Halving kl_weight down to its value keeps
  the steps short.

  log_reference f64[X, A], win f64[X, A, A], kl_weight above 0 -> f64[X, A].
  An ArithmeticError if it does not converge, seen only for cyclic preferences
  with a kl_weight of 1e-4 or less.
  """
  reference = _law('log_reference', log_reference)
  win = _win(win, reference.shape)
  _check_positive('kl_weight', kl_weight)
  rows = [_wind_row(*row, kl_weight) for row in zip(reference, win)]
  return np.stack(rows)


def _wind_row(reference, win, kl_weight):
  payoff = win - 0.5  # the constant goes into the normaliser; less rounding
  arms = np.eye(len(reference))

  def gap(value, weight):
    p = np.exp(normalise(reference + value / weight))
    mean = payoff @ p
    return value - mean, arms - (payoff * p - np.outer(mean, p)) / weight

  value = payoff @ np.exp(reference)
  for weight in _down_to(kl_weight, 1.0, 2.0):
    value = _newton(lambda v, w=weight: gap(v, w), value)
  _check_gap(gap(value, kl_weight)[0], kl_weight)
  return normalise(reference + value / kl_weight)


def log_win_rate_equilibrium(
  log_reference: np.ndarray, win: np.ndarray, kl_weight: float
) -> np.ndarray:
  """The limit of iterative Best-of-2 with mixing, from the reference: (LOG).

  For kl_weight > 1 the iteration of (LOG) contracts by 1 / kl_weight, and the
  solution with the reference's support is unique. For kl_weight <= 1 there may
  be several; the iteration goes from the reference to the nearest. If it does
  not converge, more of the last policy is mixed in, and if that fails too,
  Newton's method follows the solution down from a large kl_weight.

  log_reference f64[X, A], win f64[X, A, A], kl_weight above 0 -> f64[X, A].
  The masses of arms that die out are near 0 and not converged.
  An ArithmeticError if nothing converges, seen only for cyclic preferences
  with a small kl_weight.
  """
  reference = _law('log_reference', log_reference)
  win = _win(win, reference.shape)
  _check_positive('kl_weight', kl_weight)
  rows = [_log_win_rate_row(*row, kl_weight) for row in zip(reference, win)]
  return np.stack(rows)


def _log_win_rate_row(reference, win, kl_weight):
  for inertia in (0.0, max(1.0, 0.5 / kl_weight)):
    log_p = _mix_until_settled(reference, win, kl_weight, inertia)
    if log_p is not None:
      return log_p

  live = np.isfinite(reference)
  reference, win = reference[live], win[np.ix_(live, live)]
  with np.errstate(divide='ignore'):
    log_win = np.log(win)

  def gap(value, weight):
    log_q = normalise(reference + value / weight)
    terms = log_win + log_q  # exp(log_q) may be 0 to machine precision
    rate = np.logaddexp.reduce(terms, -1)
    slope = np.exp(terms - rate[:, None]) - np.exp(log_q)
    return value - rate, np.eye(len(value)) - slope / weight

  value = np.zeros(live.sum())
  for weight in _down_to(kl_weight, 2.0, 2**0.5):
    value = _newton(lambda v, w=weight: gap(v, w), value)
  _check_gap(np.exp(value) * gap(value, kl_weight)[0], kl_weight)
  log_p = np.full(len(live), -np.inf)
  log_p[live] = normalise(reference + value / kl_weight)
  return log_p


def _mix_until_settled(reference, win, kl_weight, inertia):
  """(MIX) with a1, a2, rest ∝ 1, kl_weight, inertia - 1; None if it cannot."""
  log_p, rounding = reference, 1e-15 * (1 + 1 / kl_weight)
  for _ in range(_MAX_STEPS):
    with np.errstate(divide='ignore'):
      pull = kl_weight * reference + np.log(win @ np.exp(log_p))
    mixed = pull + _times(inertia, log_p)
    log_p, last = normalise(mixed / (kl_weight + inertia)), log_p
    if np.abs(np.exp(log_p) - np.exp(last)).max() < rounding:
      moved = np.exp(normalise(pull / kl_weight)) - np.exp(last)
      return log_p if np.abs(moved).max() <= _MAX_GAP else None
  return None


# -- helpers ------------------------------------------------------------------


def _times(weight, log_p):
  """weight * log_p, and 0 for weight 0, also where log_p is -inf."""
  return weight * log_p if weight else np.zeros_like(log_p)


def _down_to(weight, start, ratio):
  """Weights that fall from about `start` to `weight`, each by `ratio`."""
  steps = max(0, int(np.ceil(np.log(start / weight) / np.log(ratio))))
  return weight * ratio ** np.arange(steps, -1, -1.0)


def _newton(function, x, steps=200):
  """Solves function(x) = (gap, jacobian) = 0, with backtracking.

  Stops where no step reduces the gap: at rounding, or a singular point.
  """
  with np.errstate(all='ignore'):  # a step to values not finite is undone
    gap, jacobian = function(x)
    for _ in range(steps):
      try:
        move = np.linalg.solve(jacobian, -gap)
      except np.linalg.LinAlgError:
        break
      size, length = np.linalg.norm(gap), 1.0
      while length > 1e-8 and np.isfinite(move).all():
        new, new_jacobian = function(x + length * move)
        if np.linalg.norm(new) < (1 - 0.25 * length) * size:
          break
        length /= 2
      else:
        break
      x, gap, jacobian = x + length * move, new, new_jacobian
  return x


def _check_gap(gap, kl_weight):
  if not np.abs(gap).max() <= _MAX_GAP:
    raise ArithmeticError(
      f'no equilibrium found at kl_weight={kl_weight}: P(. > pi) is off by'
      f' {np.abs(gap).max()}, allowed is {_MAX_GAP}; take a larger kl_weight'
    )


def _law(name, log_p, shape=None):
  """A checked table of log-probabilities, float64, normalised anew."""
  log_p = np.asarray(log_p, np.float64)
  if log_p.ndim != 2 or shape not in (None, log_p.shape):
    wanted = '[prompts, arms]' if shape is None else list(shape)
    raise ValueError(f'{name} must be {wanted}, got {list(log_p.shape)}')
  mass = np.exp(log_p).sum(-1)
  if not np.allclose(mass, 1, rtol=0, atol=1e-5):
    raise ValueError(
      f'{name} must hold log-probabilities whose masses sum to 1, got {mass}'
    )
  return normalise(log_p)


def _win(win, shape):
  win, wanted = np.asarray(win, np.float64), (*shape, shape[-1])
  if win.shape != wanted:
    raise ValueError(f'win must be {list(wanted)}, got {list(win.shape)}')
  total = win + win.swapaxes(-1, -2)
  if not (np.allclose(total, 1, rtol=0, atol=1e-6) and (win >= 0).all()):
    raise ValueError(
      'win must lie in [0, 1] with win[a, b] + win[b, a] = 1, got values from'
      f' {win.min()} to {win.max()} and sums from {total.min()} to'
      f' {total.max()}'
    )
  return win


def _check_positive(name, value):
  if not 0 < value < np.inf:
    raise ValueError(f'{name} must be finite and > 0, got {value}')
