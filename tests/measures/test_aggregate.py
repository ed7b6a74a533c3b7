"""The summary of completions, and its parts, against exact values."""

import json
import math

import numpy as np
import pytest

from bond_jax.measures import aggregate, curves


def test_standard_error_is_over_prompts():
  # Two identical columns are no more information than one.
  x = np.array([[1.0], [2.0], [6.0]])
  mean, error = aggregate.mean_and_stderr(np.repeat(x, 10, 1))
  assert mean == 3
  assert error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
  with pytest.raises(ValueError, match='2 prompts'):
    aggregate.mean_and_stderr(x[:1])


def test_distinct_n():
  assert aggregate.distinct_n(['a b a b', 'a'], 1) == pytest.approx(2 / 5)
  assert aggregate.distinct_n(['a b a b', 'a'], 2) == pytest.approx(2 / 3)
  assert aggregate.distinct_n(['a'], 2) == 0


def test_reward_by_length():
  length = np.array([1, 2, 3, 4])
  buckets = aggregate.reward_by_length(
    (np.array([1.0, 3.0]), np.array([4, 4])), (length * 1.0, length)
  )
  assert [b['up_to'] for b in buckets] == [1, 2, 3, None]
  assert [b['reward_policy'] for b in buckets] == [None, None, None, 2.0]
  assert [b['share_reference'] for b in buckets] == [0.25] * 4
  # Where most are cut at the limit, no bucket lies beyond it.
  cut = (np.ones(4), np.array([1, 4, 4, 4]))
  assert [b['up_to'] for b in aggregate.reward_by_length(cut, cut)] == [3, None]


def best_of_n_records(n, prompts=200, size=64, levels=None):
  """A policy that is Best-of-n itself, with its exact log-ratio."""
  rng = np.random.default_rng(n)
  draw = (
    rng.random if levels is None else lambda s: rng.integers(levels, size=s)
  )
  reference = draw((prompts, size))
  policy = draw((prompts, size, n)).max(-1)
  if levels is None:
    log_ratio = np.log(n * policy ** (n - 1))
  else:
    mass = ((policy + 1) / levels) ** n - (policy / levels) ** n
    log_ratio = np.log(mass * levels)
  rows = []
  for x in range(prompts):
    for who, rewards in (('policy', policy), ('reference', reference)):
      for a in range(size):
        ratio = log_ratio[x, a] if who == 'policy' else 0.0
        rows.append({
            'id': x, 'prompt': 'p', 'completion': 'a b', 'who': who,
            'reward': float(rewards[x, a]), 'gold': -float(rewards[x, a]),
            'log_policy': float(ratio) - 9.0, 'log_reference': -9.0,
            'length': 2 + a % 3, 'truncated': a == 0,
        })  # fmt: skip
  return rows


@pytest.mark.parametrize('levels', [None, 6])
def test_best_of_n_itself_is_on_the_frontier(levels):
  summary = aggregate.summarise(best_of_n_records(4, levels=levels))
  assert summary['effective_n'] == pytest.approx(4, rel=0.05)
  assert summary['frontier_efficiency'] == pytest.approx(1, abs=0.03)
  assert summary['frontier_reason'] is None
  low, high = summary['win_rate_interval']
  assert low < summary['win_rate'] < high
  assert summary['gold_win_rate'] == pytest.approx(1 - summary['win_rate'])
  assert summary['completions_policy'] == 200 * 64
  assert summary['truncated_policy'] == 1 / 64
  low, high = summary['effective_n_interval']
  assert low < 4 < high
  low, high = summary['frontier_efficiency_interval']
  assert low < 1 < high
  low, high = summary['win_rate_against_best_of']['4']['interval']
  assert low < 0.5 < high
  low, high = summary['length_controlled_win_rate_interval']
  assert low < summary['win_rate'] < high  # lengths are even here
  assert summary['quantiles']['n'] == summary['effective_n']
  assert summary['entropy_reference'] == 9
  assert summary['distinct_completions_policy'] == 1 / 64
  if levels is None:
    kl = curves.closed_form(4)[1]
    assert abs(summary['kl'] - kl) < 4 * summary['kl_stderr']
    assert summary['tie_rate'] == 0
  else:
    assert summary['tie_rate'] == pytest.approx(1 / 6, abs=0.01)
  json.dumps(summary, allow_nan=False)


def test_equal_policies_get_null_and_the_reason():
  summary = aggregate.summarise(best_of_n_records(1))
  assert summary['win_rate'] == pytest.approx(0.5, abs=0.02)
  assert summary['effective_n'] is summary['frontier_efficiency'] is None
  assert '0.5' in summary['frontier_reason']


def test_summary_refuses_rows_that_are_no_table():
  rows = best_of_n_records(1, prompts=3, size=4)
  with pytest.raises(ValueError, match='same number of policy'):
    aggregate.summarise(rows[1:])
  with pytest.raises(ValueError, match='none at all'):
    aggregate.summarise([r for r in rows if r['who'] == 'policy'])
  short = {k: v for k, v in rows[1].items() if k != 'reward'}
  with pytest.raises(ValueError, match='completion 2 lacks reward'):
    aggregate.summarise([rows[0], short, *rows[2:]])
  moved = [r | {'id': r['id'] + 1} if r['who'] == 'policy' else r for r in rows]
  with pytest.raises(ValueError, match='different prompts'):
    aggregate.summarise(moved)


@pytest.mark.parametrize(
  'key, values',
  [
    ('id', [None, 'x', 1.5, True, [1]]),
    ('completion', [None, 3, ['a']]),
    ('who', [None, 3, ['policy']]),
    ('reward', [None, 'x', [1.0], float('nan'), float('inf'), 10**400]),
    ('length', ['2', None]),
    ('truncated', ['no', None]),
  ],
)
def test_summary_refuses_values_that_are_none(key, values):
  rows = best_of_n_records(1, prompts=3, size=4)
  for value in values:
    with pytest.raises(ValueError, match=f'completion 3: {key} is .*expected'):
      aggregate.summarise([*rows[:2], rows[2] | {key: value}, *rows[3:]])
