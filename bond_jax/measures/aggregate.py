"""The numbers of an evaluation, from the rows of completions.jsonl alone.

In numpy float64. Axes: X held-out prompts, A completions of each.
"""

from collections.abc import Iterable, Mapping
import itertools
from typing import Any

import numpy as np

from bond_jax.measures import comparisons, curves

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
  'truncated',  # True: cut at the length limit, so there is no end
)
_TEXTS = ('id', 'prompt', 'completion', 'who')
_LARGEST = 1e100  # sums and squares of numbers as large still are numbers


def mean_and_stderr(x: np.ndarray) -> tuple[float, float]:
  """Mean of f64[X, A] and its standard error, with prompts as clusters."""
  means = np.asarray(x, np.float64).mean(1)
  if len(means) < 2:
    raise ValueError('a standard error over prompts needs 2 prompts or more')
  return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


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
    ValueError: a key is missing, or no number or text as it must be, or prompts
      have different numbers of rows.
  """
  rows: dict[Any, list[Mapping[str, Any]]] = {}
  for i, record in enumerate(records):
    missing = [key for key in RECORD_KEYS if key not in record]
    if missing:
      raise ValueError(f'completion {i + 1} lacks {", ".join(missing)}')
    for key in RECORD_KEYS:
      if problem := _problem(key, record[key]):
        raise ValueError(f'completion {i + 1}: {key} is {problem}')
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


def _problem(key: str, value: Any) -> str:
  """What is wrong with a value of a row; '' if nothing."""
  if key in _TEXTS:
    kind = int if key == 'id' else str
    good = isinstance(value, kind) and not isinstance(value, bool)
    expected = 'a whole number' if kind is int else 'a text'
  else:
    good = isinstance(value, int | float) and abs(value) <= _LARGEST
    expected = 'a finite number'
  return '' if good else f'{value!r:.60}, expected {expected}'


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """The summary of `measure`."""
  return measure(records)[0]


def measure(
  records: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, Any], curves.Curve]:
  """Every number of a comparison, and the Best-of-N curve of its task.

  Args:
    records: rows with RECORD_KEYS, the same number of policy rows for each
      prompt, and the same number of reference rows for each prompt.

  Returns:
    A dict, ready for JSON: rates in [0, 1], KL and entropy in nats per
    completion, lengths in tokens; None where a `_reason` says why. The curve is
    that of the reference's rewards.

  Raises:
    ValueError: rows that do not form such a table.
  """
  records = list(records)
  policy, reference = grid(records, 'policy'), grid(records, 'reference')
  if policy['id'] != reference['id']:
    raise ValueError('policy and reference rows are of different prompts')
  rates = comparisons.win_rates(policy['reward'], reference['reward'])
  gold = comparisons.win_rates(policy['gold'], reference['gold'])
  weights = curves.resampled(len(rates))
  log_ratio = policy['log_policy'] - policy['log_reference']
  kl, kl_stderr = mean_and_stderr(log_ratio)
  curve = curves.best_of_n_curve(reference['reward'])
  row = {
    'win_rate': float(rates.mean()),
    'win_rate_interval': curves.interval(weights @ rates),
    'kl': kl,
    'kl_stderr': kl_stderr,
    **curves.frontier(rates, log_ratio.mean(1), curve),
    'win_rate_against_best_of': comparisons.over_best_of(
      policy['reward'], reference['reward']
    ),
    'tie_rate': comparisons.tie_rate(reference['reward']),
    **comparisons.length_controlled(
      (policy['reward'], reference['reward']),
      (policy['length'], reference['length']),
    ),
    'gold_win_rate': float(gold.mean()),
    'gold_win_rate_interval': curves.interval(weights @ gold),
    'gold_tie_rate': comparisons.tie_rate(reference['gold']),
    'mean_log_quantile': comparisons.mean_log_quantile(
      policy['reward'], reference['reward']
    ),
    'prompts': len(policy['id']),
    'reward_by_length': reward_by_length(
      (policy['reward'], policy['length']),
      (reference['reward'], reference['length']),
    ),
    **_sides(policy, reference),
  }
  row['quantiles'] = comparisons.quantile_histogram(
    policy['reward'], reference['reward'], row['effective_n']
  )
  return row, curve


def _sides(policy, reference) -> dict[str, Any]:
  """The measures of either side, as <measure>_<side>."""
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
      f'entropy_{who}': -float(side[f'log_{who}'].mean()),
      f'distinct_completions_{who}': float(
        np.mean([len(set(some[:same])) / same for some in side['completion']])
      ),
      f'distinct_1_{who}': distinct_n(texts, 1),
      f'distinct_2_{who}': distinct_n(texts, 2),
    }
  return row
