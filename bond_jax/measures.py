"""What every report says about a policy, computed once, in numpy float64.

Axes: X held-out prompts, A policy completions of each, S reference completions
of each, G points of a curve. Rewards are compared within a prompt only.
`summarise` recomputes every number from the rows of completions.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import itertools
from typing import Any, NamedTuple

import numpy as np

RECORD_KEYS = (
  'id',  # the prompt's index in the data source
  'prompt',
  'completion',
  'reward',
  'gold',
  'log_policy',  # nats, summed over the completion, EOS included
  'log_reference',
  'who',  # 'policy' or 'reference'
  'length',  # tokens, EOS included
  'truncated',  # True: cut at the length limit, so there is no EOS
)
_TEXTS = ('id', 'prompt', 'completion', 'who')


class Curve(NamedTuple):
  """Best-of-N of the reference: what it wins and what it costs.

  The corrections are what the finite-sample bias took away: the corrected
  value less the one that compares the sample with itself.
  """

  ns: np.ndarray  # [G], real, increasing, from 1
  win_rate: np.ndarray  # [G], against one fresh reference completion
  kl: np.ndarray  # [G], nats per completion, to the reference
  win_rate_correction: np.ndarray  # [G]
  kl_correction: np.ndarray  # [G]


def best_of_n_curve(
  reference_rewards: np.ndarray, ns: np.ndarray | None = None
) -> Curve:
  """Returns the Best-of-N curve of a task, ties and all.

  On a reward level with p_<, p_<= the law of the best of N has the mass
  p_<=^N - p_<^N, spread within the level as the reference is; N >= 1 is real.

  The levels' own probabilities are estimated from the same S samples, which
  biases both numbers by O(1 / S) (an atom the sample missed, N powers of a
  noisy p). The jackknife takes that order out: S * all - (S - 1) * the mean
  over leave-one-out samples. What is left is O(1 / S^2): at S = 64 below
  0.001 in win rate and 0.01 nats up to N = 32.

  Args:
    reference_rewards: f64[X, S], S >= 2; 64 or more is advised.
    ns: f64[G]; by default 200 points from 1 to S, evenly spaced in log N.

  Raises:
    ValueError: rewards that are not finite, or not [X, S >= 2]; N below 1.
  """
  rewards = _rewards(reference_rewards)
  size = rewards.shape[1]
  if size < 2:
    raise ValueError('the Best-of-N curve needs 2 or more samples per prompt')
  ns = np.geomspace(1, size, 200) if ns is None else np.asarray(ns, np.float64)
  if ns.min() < 1:
    raise ValueError(f'N must be 1 or more, got {ns.min()}')
  low, high, first = _levels(rewards)
  whole = np.empty((2, len(ns)))
  left_out = np.empty((2, len(ns)))
  for g, n in enumerate(ns):
    whole[:, g] = np.sum(_best_of_n(low, high, size, n) * first, -1).mean(-1)
    left_out[:, g] = _leave_one_out(low, high, first, size, n).mean(-1)
  correction = (size - 1) * (whole - left_out)
  win_rate, kl = whole + correction
  return Curve(ns, win_rate, kl, *correction)


def _rewards(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or not x.size:
    raise ValueError(f'rewards must be [prompts, samples], got {x.shape}')
  if not np.isfinite(x).all():
    raise ValueError('rewards must be finite')
  return x


def _levels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Counts below, and up to, the level of each sorted sample; its first one."""
  x = np.sort(x, -1)
  place = np.arange(x.shape[1])
  step = x[:, 1:] != x[:, :-1]
  edge = np.ones((x.shape[0], 1), bool)
  first = np.concatenate([edge, step], 1)
  last = np.concatenate([step, edge], 1)
  low = np.maximum.accumulate(np.where(first, place, 0), 1)
  high = np.where(last, place + 1, x.shape[1])
  high = np.minimum.accumulate(high[:, ::-1], 1)[:, ::-1]
  return low, high, first


def _best_of_n(
  low: np.ndarray, high: np.ndarray, size: int, n: float
) -> np.ndarray:
  """Win rate and KL that each level adds, [2, X, S]; counts out of `size`."""
  power = (np.arange(size + 1) / size) ** n
  mass = power[high] - power[low]
  share = np.maximum(high - low, 1) / size
  log_ratio = np.log(np.where(mass > 0, mass, share) / share)
  return np.stack([mass * (low + high) / (2 * size), mass * log_ratio])


def _leave_one_out(low, high, first, size, n):
  """Mean over the samples of both sums without that sample, [2, X]."""
  # Removing one sample of a level lowers the counts of all higher levels.
  below = _best_of_n(
    np.minimum(low, size - 1), np.minimum(high, size - 1), size - 1, n
  )
  same = _best_of_n(np.minimum(low, high - 1), high - 1, size - 1, n)
  above = _best_of_n(np.maximum(low - 1, 0), high - 1, size - 1, n)
  below, same, above = below * first, same * first, above * first
  up_to = np.cumsum(below, -1) - below
  beyond = above.sum(-1, keepdims=True) - np.cumsum(above, -1)
  share = (high - low) * first / size
  return np.sum((up_to + same + beyond) * share, -1)


def closed_form(ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Win rate and KL of Best-of-N where rewards never tie."""
  ns = np.asarray(ns, np.float64)
  return ns / (ns + 1), np.log(ns) - (ns - 1) / ns


def tilt_frontier(strength: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Win rate and KL of the best trade-off there is, without ties.

  At a given KL no law wins more than reference(y) * exp(strength * u(y)), u
  the quantile of the reward, which is uniform under the reference.

  Args:
    strength: f64[G], >= 0.
  """
  s = np.asarray(strength, np.float64)
  big = np.maximum(s, 1e-2)
  win_rate = -1 / np.expm1(-big) - 1 / big
  log_mean = big + np.log(-np.expm1(-big)) - np.log(big)
  kl = big * win_rate - log_mean
  # Both cancel near 0; the series is exact to 1e-8 below 0.01.
  small = s < 1e-2
  return (
    np.where(small, 0.5 + s / 12, win_rate),
    np.where(small, s**2 / 24, kl),
  )


def win_rates(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """P(policy > reference) + half the ties of each prompt, over all pairs.

  Args:
    policy: f64[X, A], rewards of the policy's completions.
    reference: f64[X, S], rewards of fresh reference completions.

  Returns:
    f64[X].
  """
  a, b = _rewards(policy)[:, :, None], _rewards(reference)[:, None, :]
  return ((a > b).mean((1, 2)) + (a >= b).mean((1, 2))) / 2


def win_rate(policy: np.ndarray, reference: np.ndarray) -> float:
  """P(policy > reference) + half the ties, the mean over prompts."""
  return float(win_rates(policy, reference).mean())


def bootstrap_interval(
  per_prompt: np.ndarray, seed: int = 0, draws: int = 4000
) -> tuple[float, float]:
  """95 % percentile interval of a mean over prompts, which are resampled.

  Completions of one prompt are not independent, so the prompt is the unit.
  """
  x = np.asarray(per_prompt, np.float64)
  rng = np.random.default_rng(seed)
  counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=draws)
  low, high = np.percentile(counts @ x / len(x), [2.5, 97.5])
  return float(low), float(high)


def mean_and_stderr(x: np.ndarray) -> tuple[float, float]:
  """Mean of f64[X, A] and its standard error, with prompts as clusters."""
  means = np.asarray(x, np.float64).mean(1)
  if len(means) < 2:
    raise ValueError('a standard error over prompts needs 2 prompts or more')
  return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def effective_n(rate: float, curve: Curve) -> float | None:
  """The N at which Best-of-N has this win rate; None off the curve."""
  rising = np.maximum.accumulate(curve.win_rate)
  if not rising[0] <= rate <= rising[-1]:
    return None
  return float(np.exp(np.interp(rate, rising, np.log(curve.ns))))


def frontier(
  rate: float, interval: tuple, kl: float, kl_stderr: float, curve: Curve
) -> dict[str, Any]:
  """How the policy's KL compares with Best-of-N's at the same win rate.

  Returns:
    effective_n; frontier_kl, in nats, of Best-of-effective_n; what the two
    bias corrections added there; frontier_efficiency = frontier_kl / kl, 1 =
    as good as Best-of-N itself. All None where they mean nothing, and
    frontier_reason says why (else it is None).
  """
  n = effective_n(rate, curve)
  reason = None
  if rate >= 1:
    reason = 'every policy completion beat every reference completion'
  elif interval[0] <= 0.5:
    reason = (
      f'the interval of the win rate, {interval[0]:.3f} to {interval[1]:.3f},'
      ' does not lie above 0.5'
    )
  elif n is None:
    reason = (
      f'the win rate {rate:.3f} is beyond Best-of-{curve.ns[-1]:.0f} of this'
      f' task ({curve.win_rate.max():.3f}), where the curve ends; more'
      ' reference completions per prompt would reach further'
    )
  elif kl <= 2 * kl_stderr:
    reason = f'the KL, {kl:.3g} +- {kl_stderr:.2g} nats, does not lie above 0'

  def at_n(values):
    if reason:
      return None
    return float(np.interp(np.log(n), np.log(curve.ns), values))

  return {
    'effective_n': None if reason else n,
    'frontier_kl': at_n(curve.kl),
    'frontier_kl_correction': at_n(curve.kl_correction),
    'frontier_win_rate_correction': at_n(curve.win_rate_correction),
    'frontier_efficiency': at_n(curve.kl / kl) if kl else None,
    'frontier_reason': reason,
  }


def tie_rate(rewards: np.ndarray) -> float:
  """Share of pairs of distinct draws of one prompt that tie, f64[X, S]."""
  low, high, _ = _levels(_rewards(rewards))
  size = rewards.shape[1]
  return float(np.mean((high - low - 1) / (size - 1)))


def mean_log_quantile(policy: np.ndarray, reference: np.ndarray) -> float:
  """Mean of log p_<= of the policy's completions under the reference.

  The reference itself has about -1. A completion counts as one more reference
  draw, so the best of all has 0 and none has minus infinity.
  """
  a, b = _rewards(policy)[:, :, None], _rewards(reference)[:, None, :]
  at_most = (a >= b).sum(-1)
  return float(np.log((at_most + 1) / (b.shape[-1] + 1)).mean())


def distinct_n(texts: Iterable[str], n: int) -> float:
  """Distinct n-grams of words over all n-grams; 0 where there are none."""
  grams = []
  for text in texts:
    words = text.split()
    grams += zip(*(words[i:] for i in range(n)), strict=False)
  return len(set(grams)) / max(len(grams), 1)


def reward_by_length(
  policy: tuple[np.ndarray, np.ndarray],
  reference: tuple[np.ndarray, np.ndarray],
) -> list[dict[str, Any]]:
  """Mean reward per bucket of length; the reference's quartiles cut them.

  Args:
    policy, reference: (reward, length), each of any shape.

  Returns:
    Per bucket: its lengths, and each side's share and mean reward there.
  """
  cuts = np.unique(np.percentile(reference[1], [25, 50, 75]).astype(int))
  edges = [0, *cuts[cuts < max(policy[1].max(), reference[1].max())], None]
  buckets = []
  for low, high in itertools.pairwise(edges):
    bucket = {'longer_than': int(low), 'up_to': high and int(high)}
    for who, (reward, length) in (('policy', policy), ('reference', reference)):
      inside = (length > low) & (high is None or length <= high)
      bucket[f'share_{who}'] = float(inside.mean())
      bucket[f'reward_{who}'] = (
        float(reward[inside].mean()) if inside.any() else None
      )
    buckets.append(bucket)
  return buckets


def grid(records: Iterable[Mapping[str, Any]], who: str) -> dict[str, Any]:
  """Gathers the rows of one side into arrays [X, completions], by prompt id.

  Raises:
    ValueError: a key is missing, or prompts have different numbers of rows.
  """
  rows: dict[Any, list[Mapping[str, Any]]] = {}
  for i, record in enumerate(records):
    missing = [key for key in RECORD_KEYS if key not in record]
    if missing:
      raise ValueError(f'completion {i + 1} lacks {", ".join(missing)}')
    if record['who'] == who:
      rows.setdefault(record['id'], []).append(record)
  counts = sorted({len(group) for group in rows.values()})
  if len(counts) != 1:
    raise ValueError(
      f'each prompt needs the same number of {who} completions, 1 or more;'
      f' got {counts or "none at all"}'
    )
  ids = sorted(rows)
  columns = {
    key: np.array([[r[key] for r in rows[i]] for i in ids])
    for key in RECORD_KEYS
    if key not in _TEXTS
  }
  text = [[r['completion'] for r in rows[i]] for i in ids]
  return columns | {'id': ids, 'completion': text}


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """Computes every number of a comparison from its completions alone.

  Args:
    records: rows with RECORD_KEYS, the same number of policy rows for each
      prompt, and the same number of reference rows for each prompt.

  Returns:
    A flat dict, ready for JSON: rates in [0, 1], KL in nats per completion,
    lengths in tokens; None where `frontier_reason` says why.

  Raises:
    ValueError: rows that do not form such a table.
  """
  records = list(records)
  policy, reference = grid(records, 'policy'), grid(records, 'reference')
  if policy['id'] != reference['id']:
    raise ValueError('policy and reference rows are of different prompts')
  per_prompt = win_rates(policy['reward'], reference['reward'])
  rate, interval = float(per_prompt.mean()), bootstrap_interval(per_prompt)
  gold = win_rates(policy['gold'], reference['gold'])
  kl, kl_stderr = mean_and_stderr(
    policy['log_policy'] - policy['log_reference']
  )
  curve = best_of_n_curve(reference['reward'])
  return {
    'win_rate': rate,
    'win_rate_interval': list(interval),
    'kl': kl,
    'kl_stderr': kl_stderr,
    **frontier(rate, interval, kl, kl_stderr, curve),
    'tie_rate': tie_rate(reference['reward']),
    'gold_win_rate': float(gold.mean()),
    'gold_win_rate_interval': list(bootstrap_interval(gold)),
    'gold_tie_rate': tie_rate(reference['gold']),
    'mean_log_quantile': mean_log_quantile(
      policy['reward'], reference['reward']
    ),
    'prompts': len(policy['id']),
    'reward_by_length': reward_by_length(
      (policy['reward'], policy['length']),
      (reference['reward'], reference['length']),
    ),
    **_sides(policy, reference),
  }


def _sides(policy, reference) -> dict[str, Any]:
  """What is said of both sides alike, as <measure>_<side>."""
  # Distinct-n falls with the amount of text, so both sides get as much.
  same = min(policy['reward'].shape[1], reference['reward'].shape[1])
  row = {}
  for who, side in (('policy', policy), ('reference', reference)):
    texts = [text for texts in side['completion'] for text in texts[:same]]
    row |= {
      f'completions_{who}': side['reward'].size,
      f'reward_{who}': float(side['reward'].mean()),
      f'gold_{who}': float(side['gold'].mean()),
      f'length_{who}': float(side['length'].mean()),
      f'truncated_{who}': float(side['truncated'].mean()),
      f'distinct_1_{who}': distinct_n(texts, 1),
      f'distinct_2_{who}': distinct_n(texts, 2),
    }
  return row
