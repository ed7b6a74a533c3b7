"""Warnings of a report: what to know before believing its numbers."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bond_jax.evaluation.report.words import opponent
from bond_jax.training.watch import ADVICE

Rows = Sequence[Mapping[str, Any]]


def cautions(
  summary: Mapping[str, Any], train: Rows, gold: str = 'gold'
) -> list[str]:
  """Warnings in plain words, each with advice.

  Args:
    summary: of the whole run; what is missing or None gives no warning.
    train: rows of training.
    gold: the name of the other judge.
  """
  # A comparison with NaN is False: an unknown number gives no warning.
  known = {k: x for k, x in summary.items() if x is not None}
  got = collections.defaultdict(lambda: np.nan, known)
  other = opponent(summary)
  return [
    *_of_outcome(got, other, gold),
    *_of_completions(got, other),
    *_of_training(got, train),
  ]


def _of_outcome(got, other: str, gold: str) -> Iterator[str]:
  low, high = np.min(got['win_rate_interval']), np.max(got['win_rate_interval'])
  rate, even = got['win_rate'], got['length_controlled_win_rate']
  if low <= 0.5 <= high:
    yield (
      f'The interval of the win rate, {low:.1%} to {high:.1%}, contains 50%:'
      f' this evaluation cannot tell the policy from {other}. Judge more'
      ' prompts (evaluate.prompts), or train longer.'
    )
  if high < 0.5:
    yield (
      f'The policy loses against {other}: {high:.1%} at most. Compare another'
      ' checkpoint, and look at the reward of training by step.'
    )
  if rate > 0.5 and np.max(got['gold_win_rate_interval']) < 0.5:
    yield (
      f'The policy wins by the reward that trained it and loses by {gold},'
      ' which never did: the reward is being exploited. Stop earlier, at a'
      ' smaller KL, or train a better reward.'
    )
  if rate - even > 0.1:
    yield (
      f'At equal length the policy wins only {even:.1%} instead of {rate:.1%}:'
      f' {ADVICE["length"]}.'
    )
  if got['kl'] > 10:
    yield (
      f'The KL to {other} is {got["kl"]:.1f} nats, above 10: {ADVICE["kl"]}.'
    )


def _of_completions(got, other: str) -> Iterator[str]:
  side = lambda key: (got[f'{key}_policy'], got[f'{key}_reference'])
  if got['tie_rate'] > 0.1:
    yield (
      f'{got["tie_rate"]:.0%} of the pairs of completions of {other} tie:'
      ' compare with the Best-of-N curve of this task, not with the one without'
      ' ties. A finer reward would separate them.'
    )
  reward, before = side('reward')
  times = got['length_policy'] / got['length_reference']
  if reward > before and (times >= 2 or times <= 0.5):
    yield (
      f'The reward rises, but the length is {times:.1f} times that of {other}:'
      f' {ADVICE["length"]}. Compare the rewards by length below.'
    )
  own, before = side('truncated')
  if own > 0.5 or own - before > 0.1:
    yield (
      f'{own:.0%} of the completions were cut at the length limit before they'
      f' ended (of {other}: {before:.0%}). Raise the length limit (length), or'
      ' set reward.missing_eos_penalty.'
    )
  own, before = side('entropy')
  if own < 0.5 * before:
    yield (
      f'The entropy has collapsed: {own:.3g} nats per completion, {before:.3g}'
      f' of {other}: {ADVICE["entropy"]}.'
    )
  own, before = side('distinct_completions')
  if own < 0.8 * before:
    yield (
      f"Only {own:.0%} of a prompt's completions differ (of {other}:"
      f' {before:.0%}): {ADVICE["entropy"]}.'
    )
  own, before = side('distinct_2')
  if own < 0.5 * before:
    yield (
      'The policy repeats itself: it has less than half of the distinct word'
      f' pairs of {other}. Does the reward like one phrase? Read the samples.'
    )


def _of_training(got, train: Rows) -> Iterator[str]:
  if got['signal_fires'] < 0.2:
    yield (
      f'The reward gave a signal on only {got["signal_fires"]:.0%} of the'
      f' prompts: {ADVICE["signal"]}.'
    )
  if got['anchor_drift'] < 1e-6:
    yield f'The anchor has not moved: {ADVICE["anchor"]}.'
  gaps = [r['sampler_gap'] for r in train if r.get('sampler_gap') is not None]
  if gaps and (gap := float(np.median(gaps))) > 0.5:
    yield (
      f'Sampler and trainer differ by {gap:.2g} nats on the same completion,'
      ' more than rounding does. Use one temperature and one dtype in both, and'
      ' fewer updates per rollout.'
    )
  if got['compilations_after_first_step'] > 0:
    yield (
      'The training step was compiled again after the first step; some shape'
      ' changes from step to step. Keep batch and lengths fixed.'
    )
  if bad := [r['step'] for r in train if 'loss' in r and r['loss'] is None]:
    yield (
      f'The loss was not finite on {len(bad)} rows, the first at step {bad[0]}:'
      f' {ADVICE["skipped"]}.'
    )
  for name, advice in ADVICE.items():
    if steps := [r['step'] for r in train if r.get(f'watch/{name}')]:
      yield (
        f'Training warned of {name} at {len(steps)} saves, steps {min(steps)}'
        f' to {max(steps)}: {advice}.'
      )
