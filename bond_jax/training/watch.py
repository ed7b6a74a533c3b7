"""What goes wrong slowly in training, seen in its metrics, and what to do.

`look` compares the latest rows of metrics.jsonl with the first ones, and finds
some of the names in ADVICE.
"""

from collections.abc import Mapping, Sequence
import math
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
  """Warnings at the last of the rows of metrics.jsonl, by name.

  The limits are `train.watch`'s: nats to the reference (0 = none), times or
  share of what it was at first, share of prompts. `moves`: the anchor should.
  """
  rows = [row for row in rows if 'loss' in row]
  early, late = rows[1 : 1 + WINDOW], rows[-WINDOW:]
  found = {}
  paid = _known(rows, 'kl/reference')[-1]
  if kl and paid > kl:
    found['kl'] = f'the KL to the reference is {paid:.1f} nats, above {kl:g}'
  if skipped := sum(row.get('skipped') or 0 for row in late):
    found['skipped'] = (
      f'{skipped:.0f} of the last {len(late)} steps were not finite and changed'
      ' nothing'
    )
  if len(rows) > 2 * WINDOW:
    share = statistics.fmean(_known(late, 'signal/fires'))
    if share < signal:
      found['signal'] = f'the reward gave a signal on {share:.1%} of prompts'
    if moves and _known(rows, 'anchor/drift')[-1] < 1e-6:
      found['anchor'] = 'the anchor has not moved'
    ratio = _ratio(early, late, 'entropy/token')
    if ratio < entropy:
      found['entropy'] = f'the entropy per token is {ratio:.0%} of what it was'
    ratio = _ratio(early, late, 'length/completion')
    if ratio < 1 / length or ratio > length:
      found['length'] = f'completions are {ratio:.1f} times as long as at first'
    before, after = (
      statistics.median(sum(row.get(k) or 0 for k in PHASES) for row in some)
      for some in (early, late)
    )
    if before and after > speed * before:
      ratio = after / before
      found['speed'] = f'a step takes {ratio:.1f} times as long as at first'
  return {name: f'{what}: {ADVICE[name]}.' for name, what in found.items()}


def _known(rows: Sequence[Row], key: str) -> list[float]:
  """The values that are known; without any NaN, which is beyond no limit."""
  return [row[key] for row in rows if row.get(key) is not None] or [math.nan]


def _ratio(early, late, key: str) -> float:
  """Mean of the late rows over that of the early ones; NaN if unknown."""
  before, after = (
    statistics.fmean(_known(rows, key)) for rows in (early, late)
  )
  return after / (before or math.nan)
