"""What goes wrong slowly in training, seen in its metrics, and what to do.

`look` compares the latest rows of metrics.jsonl with the first ones; what it
finds is a line of advice for each name in MEANING.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

Row = Mapping[str, Any]

WINDOW = 20  # rows at either end; the first row compiles, and counts in neither
# Phases of a step; saving and probing come now and then.
PHASES = 'seconds/sample', 'seconds/reward', 'seconds/update'


# What a name says of a run, as a report does afterwards.
MEANING = {
  'kl': 'the KL to the reference was above its limit',
  'entropy': 'the entropy had fallen far: the policy said ever the same',
  'length': 'completions were far longer, or shorter, than at first',
  'signal': 'the reward hardly gave a signal',
  'anchor': 'the anchor did not move',
  'speed': 'steps took far longer than at first',
  'skipped': 'steps were not finite, and changed nothing',
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
  """What is wrong at the last of the rows, by name; nothing, if nothing is.

  Args:
    rows: of metrics.jsonl, from the first step on.
    kl: nats to the reference above which it warns; 0 = never.
    entropy: per token, against that of the first rows: below this share.
    length: of completions, against the first rows': above this many times, or
      below one over it.
    signal: share of prompts with a signal, below which it warns.
    speed: seconds of a step, against the first rows': above this many times.
    moves: whether the anchor should.
  """
  rows = [row for row in rows if 'loss' in row]
  early, late = rows[1 : 1 + WINDOW], rows[-WINDOW:]
  found = {}
  paid = _last(rows, 'kl/reference')
  if kl and paid is not None and paid > kl:
    found['kl'] = (
      f'the KL to the reference is {paid:.1f} nats, above {kl:g}: look at the'
      ' completions; a smaller anchor rate or a KL weight holds it.'
    )
  if skipped := sum(row.get('skipped') or 0 for row in late):
    found['skipped'] = (
      f'{skipped:.0f} of the last {len(late)} steps were not finite and changed'
      ' nothing; a lower learning rate is the usual remedy.'
    )
  if len(rows) < 2 * WINDOW + 1:
    return found
  if (share := _mean(late, 'signal/fires')) is not None and share < signal:
    found['signal'] = (
      f'the reward gave a signal on {share:.1%} of the prompts: it ties; use a'
      ' finer reward, or more completions of a prompt.'
    )
  drift = _last(rows, 'anchor/drift')
  if moves and drift is not None and drift < 1e-6:
    found['anchor'] = (
      'the anchor has not moved: is its rate 0, or the policy standing still?'
    )
  return found | _changes(early, late, entropy, length, speed)


def _changes(early, late, entropy, length, speed) -> dict[str, str]:
  """What is far from what it was in the first rows."""
  found = {}
  ratio = _ratio(early, late, 'entropy/token')
  if ratio is not None and ratio < entropy:
    found['entropy'] = (
      f'the entropy per token is {ratio:.0%} of what it was: the policy says'
      ' ever the same; a smaller anchor rate, or an earlier checkpoint.'
    )
  ratio = _ratio(early, late, 'length/completion')
  if ratio is not None and not 1 / length <= ratio <= length:
    found['length'] = (
      f'completions are {ratio:.1f} times as long as at first: the reward may'
      ' be measuring length; see reward.length_penalty.'
    )
  seconds = [
    statistics.median(sum(row.get(k) or 0 for k in PHASES) for row in some)
    for some in (early, late)
  ]
  if seconds[0] and seconds[1] > speed * seconds[0]:
    found['speed'] = (
      f'a step takes {seconds[1] / seconds[0]:.1f} times as long as at first:'
      ' is the reward slow, the machine shared, or does something compile anew?'
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
