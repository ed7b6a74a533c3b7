"""What goes wrong slowly in training, seen in its metrics, and what to do.

`look` compares the latest rows of metrics.jsonl with the first ones, and finds
some of the names in ADVICE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

Row = Mapping[str, Any]

WINDOW = 20  # rows at either end; the first row compiles, and counts in neither
# Phases of a step; saving and probing come now and then.
PHASES = 'seconds/sample', 'seconds/reward', 'seconds/update'


# What each warning means for the run; said while training and by the report.
ADVICE = {
  'kl': 'look at the completions before trusting the reward; take an earlier'
  ' checkpoint, or a smaller anchor rate or a larger KL weight',
  'entropy': 'the policy repeats itself; take an earlier checkpoint, or a lower'
  ' learning rate or anchor rate',
  'length': 'the reward may be measuring length; set reward.length_penalty',
  'signal': 'rewards that tie teach nothing; use a finer reward, or more'
  ' completions of a prompt',
  'anchor': 'its rate may be 0, its dtype bfloat16, or the policy may not move',
  'speed': 'the reward may be slow, the machine shared, or a program compiled'
  ' anew',
  'skipped': 'a lower learning rate is the usual remedy',
}


def keep(seen: list[Row], row: Row) -> None:
  """Adds a row to those that `look` compares: the first ones and the last."""
  seen.append(row)
  if len(seen) > 2 * WINDOW + 1:
    del seen[WINDOW + 1]


def look(
  rows: Sequence[Row],
  *,
  kl: float,
  entropy: float,
  length: float,
  signal: float,
  speed: float,
  moves: bool,
) -> dict[str, str]:
  """Warnings at the last of the rows, by name.

  Args:
    rows: of metrics.jsonl, from the first step on.
    kl: nats to the reference above which it warns; 0 = never.
    entropy: per token, against that of the first rows: below this share.
    length: of completions, against the first rows': above this many times, or
      below one over it.
    signal: share of prompts with a signal, below which it warns.
    speed: seconds of a step, against the first rows': above this many times.
    moves: whether the anchor should move.
  """
  rows = [row for row in rows if 'loss' in row]
  early, late = rows[1 : 1 + WINDOW], rows[-WINDOW:]
  found = {}
  paid = _last(rows, 'kl/reference')
  if kl and paid is not None and paid > kl:
    found['kl'] = f'the KL to the reference is {paid:.1f} nats, above {kl:g}'
  if skipped := sum(row.get('skipped') or 0 for row in late):
    found['skipped'] = (
      f'{skipped:.0f} of the last {len(late)} steps were not finite and changed'
      ' nothing'
    )
  if len(rows) > 2 * WINDOW:
    share, drift = _mean(late, 'signal/fires'), _last(rows, 'anchor/drift')
    if share is not None and share < signal:
      found['signal'] = f'the reward gave a signal on {share:.1%} of prompts'
    if moves and drift is not None and drift < 1e-6:
      found['anchor'] = 'the anchor has not moved'
    found |= _changes(early, late, entropy, length, speed)
  return {name: f'{what}: {ADVICE[name]}.' for name, what in found.items()}


def _changes(early, late, entropy, length, speed) -> dict[str, str]:
  """Measures that are far from those of the first rows."""
  found = {}
  ratio = _ratio(early, late, 'entropy/token')
  if ratio is not None and ratio < entropy:
    found['entropy'] = f'the entropy per token is {ratio:.0%} of what it was'
  ratio = _ratio(early, late, 'length/completion')
  if ratio is not None and not 1 / length <= ratio <= length:
    found['length'] = f'completions are {ratio:.1f} times as long as at first'
  seconds = [
    statistics.median(sum(row.get(k) or 0 for k in PHASES) for row in some)
    for some in (early, late)
  ]
  if seconds[0] and seconds[1] > speed * seconds[0]:
    found['speed'] = (
      f'a step takes {seconds[1] / seconds[0]:.1f} times as long as at first'
    )
  return found


def _values(rows: Sequence[Row], key: str) -> list[float]:
  return [row[key] for row in rows if row.get(key) is not None]


def _last(rows: Sequence[Row], key: str) -> float | None:
  values = _values(rows, key)
  return values[-1] if values else None


def _mean(rows: Sequence[Row], key: str) -> float | None:
  values = _values(rows, key)
  return statistics.fmean(values) if values else None


def _ratio(early, late, key: str) -> float | None:
  """Mean of the late rows over that of the early ones, where both are known."""
  before, after = _mean(early, key), _mean(late, key)
  return after / before if before and after is not None else None
