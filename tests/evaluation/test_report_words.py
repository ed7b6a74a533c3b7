"""What the report says in words: the outcome, its warnings and its gaps."""

import pytest
import report_page

from bond_jax.evaluation.report.cautions import cautions
from bond_jax.evaluation.report.words import (
  best_of,
  gold_name,
  opponent,
  sentence,
  shown,
)

GOOD = {
  'signal_fires': 0.33,
  'tie_rate': 0.01,
  'kl': 1.5,
  'anchor_drift': 0.01,
  'reward_policy': 2.0,
  'reward_reference': 1.0,
  'length_policy': 11.0,
  'length_reference': 10.0,
  'win_rate': 0.8,
  'win_rate_interval': [0.78, 0.82],
  'length_controlled_win_rate': 0.75,
  'gold_win_rate_interval': [0.6, 0.7],
  'distinct_2_policy': 0.5,
  'distinct_2_reference': 0.6,
  'distinct_completions_policy': 0.9,
  'distinct_completions_reference': 1.0,
  'entropy_policy': 30.0,
  'entropy_reference': 40.0,
  'truncated_policy': 0.15,
  'truncated_reference': 0.1,
  'compilations_after_first_step': 0,
}
ROWS = [{'step': s, 'loss': 0.1, 'sampler_gap': 1e-3} for s in (1, 2, 3)]


@pytest.mark.parametrize(
  'change, words, advice',
  [
    (
      {'signal_fires': 0.04},
      'a signal on only 4% of the prompts',
      'use a finer reward',
    ),
    ({'tie_rate': 0.38}, '38% of the pairs', 'finer reward'),
    ({'kl': 12.0}, '12.0 nats, above 10', 'earlier checkpoint'),
    ({'anchor_drift': 0.0}, 'anchor has not moved', 'bfloat16'),
    (
      {'length_policy': 20.0},
      'reward rises, but the length is 2.0 times that of the reference',
      'reward.length_penalty',
    ),
    ({'length_policy': 4.0}, 'the length is 0.4 times that', 'penalty'),
    (
      {'length_controlled_win_rate': 0.66},
      'only 66.0% instead of 80.0%',
      'reward.length_penalty',
    ),
    (
      {'gold_win_rate_interval': [0.3, 0.4]},
      'loses by gold (x)',
      'Stop earlier',
    ),
    ({'distinct_2_policy': 0.2}, 'repeats itself', 'Read the samples'),
    (
      {'distinct_completions_policy': 0.6},
      "60% of a prompt's completions differ (of the reference: 100%)",
      'earlier checkpoint',
    ),
    (
      {'entropy_policy': 15.0},
      'collapsed: 15 nats per completion, 40 of the reference',
      'learning rate',
    ),
    (
      {'truncated_policy': 0.25},
      '25% of the completions were cut',
      '(of the reference: 10%). Raise the length',
    ),
    (
      {'truncated_policy': 0.6, 'truncated_reference': 0.6},
      '60% of the completions were cut',
      '(of the reference: 60%)',
    ),
    (
      {'win_rate_interval': [0.49, 0.55]},
      '49.0% to 55.0%, contains 50%: this evaluation cannot tell the policy'
      ' from the reference',
      'evaluate.prompts',
    ),
    (
      {'win_rate_interval': [0.41, 0.45]},
      'loses against the reference: 45.0%',
      'another checkpoint',
    ),
    ({'compilations_after_first_step': 1}, 'compiled again', 'lengths fixed'),
  ],
)
def test_cautions(change, words, advice):
  said = lambda summary: cautions(summary, ROWS, gold='gold (x)')
  assert said(GOOD) == []
  (caution,) = said(GOOD | change)
  assert words in caution and advice in caution


def test_thresholds_are_not_met_by_less():
  for change in (
    {'signal_fires': 0.2},
    {'kl': 10.0},
    {'length_policy': 19.0},
    {'length_policy': 20.0, 'reward_policy': 1.0},
    {'length_controlled_win_rate': 0.72},
    {'entropy_policy': 20.0},
    {'distinct_completions_policy': 0.8},
    {'truncated_policy': 0.19},
    {'win_rate_interval': [0.501, 0.55]},
  ):
    assert cautions(GOOD | change, ROWS) == [], change


def test_cautions_of_the_rows_of_training():
  gap = lambda value: [{'step': 1, 'loss': 0.1, 'sampler_gap': value}]
  assert cautions({}, gap(0.4)) == []
  (caution,) = cautions({}, gap(0.7))
  assert 'differ by 0.7 nats' in caution and 'temperature' in caution
  rows = [{'step': 3, 'loss': 0.1}, {'step': 4, 'loss': None}]
  (caution,) = cautions({}, rows)
  assert 'not finite on 1 rows, the first at step 4' in caution


def test_cautions_repeat_what_training_warned_of():
  rows = [{'step': s, 'loss': 0.1} for s in range(1, 9)]
  rows[3]['watch/entropy'] = rows[5]['watch/entropy'] = 1.0
  (line,) = cautions({}, rows)
  assert 'Training warned of entropy at 2 saves, steps 4 to 6: the pol' in line


def test_cautions_of_what_is_unknown():
  assert cautions({}, []) == []
  assert cautions(dict.fromkeys(GOOD), []) == []
  assert cautions(GOOD | dict.fromkeys(GOOD), ROWS) == []


def test_cautions_name_what_the_policy_was_compared_with():
  summary = {'against': 'runs/a', 'win_rate_interval': [0.4, 0.6], 'kl': 11.0}
  first, second = cautions(summary, [])
  assert 'tell the policy from the run runs/a' in first
  assert 'KL to the run runs/a' in second


def test_names():
  assert opponent({}) == opponent({'against': None}) == 'the reference'
  assert opponent({'against': 'reference'}) == 'the reference'
  assert opponent({'against': 'runs/b'}) == 'the run runs/b'
  assert gold_name({}) == gold_name({'gold': {'function': ''}}) == 'gold'
  function = 'bond_jax.rewards.text:vader'
  assert gold_name({'gold': {'function': function}}) == 'gold (vader)'


def test_frontier_reason_is_given():
  summary = {
    'win_rate': 0.5,
    'win_rate_interval': [0.48, 0.52],
    'kl': 0.1,
    'effective_n': None,
    'frontier_efficiency': None,
    'frontier_reason': 'the interval reaches 0.5',
  }
  because = 'because the interval reaches 0.5'
  assert shown('effective_n', summary) == f'n/a, {because}'
  assert because in sentence(summary)
  assert shown('kl', summary) == '0.1'
  assert shown('tie_rate', summary) == 'n/a, because this run did not report it'


def test_the_sentence_tells_the_outcome():
  summary = report_page.MORE | {
    'win_rate': 0.8,
    'win_rate_interval': [0.78, 0.82],
    'kl': 1.5,
    'effective_n': 4.5,
    'frontier_kl': 0.7,
    'frontier_efficiency': 0.47,
  }
  assert sentence(summary) == (
    'The policy beats the reference in 80.0% of the comparisons on held-out'
    ' prompts (95% interval 78.0% to 82.0%) and pays 1.50 nats of KL for it.'
    ' Best-of-4.5 of the reference wins as often for 0.70 nats, so the'
    ' frontier efficiency is 0.47 (1 is as good as Best-of-N). One sample'
    ' against true Best-of-N of the reference wins 68.0% against N = 2, 52.0%'
    ' against N = 4, 36.0% against N = 8, 21.0% against N = 16.'
  )
  assert sentence(summary | {'prompts': 64}) == sentence(summary)
  few = sentence(summary | {'prompts': 16})
  assert 'With 16 prompts' in few and 'evaluate.prompts to 64' in few
  other = sentence(summary | {'against': 'runs/a'})
  assert other.startswith('Compared with the run runs/a, not with the ref')
  assert 'beats the run runs/a in' in other
  assert 'beats the reference' not in other
  assert 'Best-of-4.5 of the run runs/a' in other


def test_best_of_is_in_the_order_of_n_and_leaves_out_what_is_none():
  rows = report_page.MORE['win_rate_against_best_of'] | {'4': None}
  found = best_of({'win_rate_against_best_of': rows})
  assert [n for n, _, _ in found] == [2, 8, 16]
  assert best_of({}) == best_of({'win_rate_against_best_of': None}) == []
