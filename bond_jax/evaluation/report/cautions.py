"""Warnings of a report: what to know before believing its numbers."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bond_jax.evaluation.report.words import opponent
from bond_jax.training.watch import ADVICE

Rows = Sequence[Mapping[str, Any]]
Checks = Iterator[tuple[bool, str]]  # whether a warning holds, and its text


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
  got = {k: np.nan if v is None else v for k, v in summary.items()}
  got = collections.defaultdict(lambda: np.nan, got)
  other = opponent(summary)
  checks = (
    *_of_outcome(got, other, gold),
    *_of_reward(got, other),
    *_of_text(got, other),
    *_of_training(got, train),
  )
  return [line for holds, line in checks if holds]


def _of_outcome(got, other: str, gold: str) -> Checks:
  low, high = np.min(got['win_rate_interval']), np.max(got['win_rate_interval'])
  yield (
    low <= 0.5 <= high,
    f'The interval of the win rate, {low:.1%} to {high:.1%}, contains 50%:'
    f' this evaluation cannot tell the policy from {other}. Judge more'
    ' prompts (evaluate.prompts), or train longer.',
  )
  yield (
    high < 0.5,
    f'The policy loses against {other}: {high:.1%} at most. Compare another'
    ' checkpoint, and look at the reward of training by step.',
  )
  yield (
    got['win_rate'] > 0.5 and np.max(got['gold_win_rate_interval']) < 0.5,
    f'The policy wins by the reward that trained it and loses by {gold},'
    ' which never did: the reward is being exploited. Stop earlier, at a'
    ' smaller KL, or train a better reward.',
  )
  rate, controlled = got['win_rate'], got['length_controlled_win_rate']
  yield (
    rate - controlled > 0.1,
    f'At equal length the policy wins only {controlled:.1%} instead of'
    f' {rate:.1%}: {ADVICE["length"]}.',
  )
  yield (
    got['kl'] > 10,
    f'The KL to {other} is {got["kl"]:.1f} nats, above 10: {ADVICE["kl"]}.',
  )


def _of_reward(got, other: str) -> Checks:
  yield (
    got['signal_fires'] < 0.2,
    'The reward gave a signal on only'
    f' {got["signal_fires"]:.0%} of the prompts: {ADVICE["signal"]}.',
  )
  yield (
    got['tie_rate'] > 0.1,
    f'{got["tie_rate"]:.0%} of the pairs of completions of {other} tie: compare'
    ' with the Best-of-N curve of this task, not with the one without ties. A'
    ' finer reward would separate them.',
  )
  times = got['length_policy'] / got['length_reference']
  gained = got['reward_policy'] > got['reward_reference']
  yield (
    gained and (times >= 2 or times <= 0.5),
    f'The reward rises, but the length is {times:.1f} times that of {other}:'
    f' {ADVICE["length"]}. Compare the rewards by length below.',
  )


def _of_text(got, name: str) -> Checks:
  side = lambda key: (got[f'{key}_policy'], got[f'{key}_reference'])
  own, other = side('truncated')
  yield (
    own > 0.5 or own - other > 0.1,
    f'{own:.0%} of the completions were cut at the length limit before they'
    f' ended (of {name}: {other:.0%}). Raise the length limit (length),'
    ' or set reward.missing_eos_penalty.',
  )
  own, other = side('entropy')
  yield (
    own < 0.5 * other,
    f'The entropy has collapsed: {own:.3g} nats per completion, {other:.3g} of'
    f' {name}: {ADVICE["entropy"]}.',
  )
  own, other = side('distinct_completions')
  yield (
    own < 0.8 * other,
    f"Only {own:.0%} of a prompt's completions differ (of"
    f' {name}: {other:.0%}): {ADVICE["entropy"]}.',
  )
  own, other = side('distinct_2')
  yield (
    own < 0.5 * other,
    'The policy repeats itself: it has less than half of the distinct word'
    f' pairs of {name}. Does the reward like one phrase? Read the samples.',
  )


def _of_training(got, train: Rows) -> Checks:
  yield (
    got['anchor_drift'] < 1e-6,
    f'The anchor has not moved: {ADVICE["anchor"]}.',
  )
  gaps = [r['sampler_gap'] for r in train if r.get('sampler_gap') is not None]
  gap = float(np.median(gaps)) if gaps else np.nan
  yield (
    gap > 0.5,
    f'Sampler and trainer differ by {gap:.2g} nats on the same completion,'
    ' more than rounding does. Use one temperature and one dtype in both,'
    ' and fewer updates per rollout.',
  )
  yield (
    got['compilations_after_first_step'] > 0,
    'The training step was compiled again after the first step; some shape'
    ' changes from step to step. Keep batch and lengths fixed.',
  )
  broken = [r['step'] for r in train if 'loss' in r and r['loss'] is None]
  yield (
    bool(broken),
    f'The loss was not finite on {len(broken)} rows, the first at step'
    f' {broken[0] if broken else None}: {ADVICE["skipped"]}.',
  )
  for name, advice in ADVICE.items():
    steps = [r['step'] for r in train if r.get(f'watch/{name}')]
    yield (
      bool(steps),
      f'Training warned of {name} at {len(steps)} saves, steps'
      f' {min(steps, default=0)} to {max(steps, default=0)}: {advice}.',
    )
