"""Judges of pairs, and what is said where torch is not installed."""

import sys

import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards import calling, hf, judge

PROMPTS = ['p', 'q']
COMPLETIONS = [['a', 'bb', 'cccc'], ['dd', 'd', 'dd']]
ROWS = [{'lean': 0.0}, {'lean': 0.25}]
CONTEXT = toy.context(COMPLETIONS, rows=ROWS)
BATCH = PROMPTS, COMPLETIONS, CONTEXT


def fair(a, b):
  """In eighths, so that sums are exact."""
  return (4 + len(a) - len(b)) / 8


def test_what_the_place_is_worth_cancels():
  asked = []

  def biased(prompt, a, b, row):
    asked.append((prompt, a, b))
    return fair(a, b) + 1 / 8 - row['lean']  # first is better, then worse

  got, _ = calling.call(judge.both_orders(biased), *BATCH)
  expected = [[[fair(a, b) for b in ys] for a in ys] for ys in COMPLETIONS]
  np.testing.assert_array_equal(got, expected)
  assert got[0, 0, 2] == 1 / 8 and got[1, 0, 2] == 1 / 2
  pairs = {
    (p, a, b)
    for p, ys in zip(PROMPTS, COMPLETIONS)
    for i, a in enumerate(ys)
    for j, b in enumerate(ys)
    if i != j
  }
  assert set(asked) == pairs and len(asked) == 12


def test_wins_and_losses_sum_to_one_exactly():
  rng = np.random.default_rng(0)
  texts = [[str(i) for i in range(20)]] * 5
  asked = ['p'] * 5, texts, toy.context(texts)
  win = judge.both_orders(lambda *x: rng.random())(*asked)
  assert win.shape == (5, 20, 20) and len(np.unique(win)) > 1000
  assert (win + win.swapaxes(1, 2) == 1).all()


def test_all_pairs_of_a_batch_in_one_call():
  calls = []

  def compare(pairs):
    calls.append(len(pairs))
    return np.array([fair(pair.a, pair.b) for pair in pairs])

  one = judge.both_orders(lambda p, a, b, row: fair(a, b))
  np.testing.assert_array_equal(judge.all_at_once(compare)(*BATCH), one(*BATCH))
  assert calls == [12]
  alone = [['a'], ['b']]
  win = judge.all_at_once(compare)(PROMPTS, alone, toy.context(alone))
  assert win.tolist() == [[[0.5]], [[0.5]]] and calls == [12]


@pytest.mark.parametrize('value', [1.5, -0.25, float('nan')])
def test_what_is_no_probability(value):
  """Averaged with its other order it might pass for one."""
  odd = lambda prompt, a, b, row: value if (a, b) == ('bb', 'a') else 0.5
  with pytest.raises(UserError, match="'bb' against 'a', .*prompt 'p'") as e:
    judge.both_orders(odd)(*BATCH)
  assert f'answered {value:g} to' in str(e.value)
  with pytest.raises(
    UserError, match=r'expected one .* of 12 pairs: .* \[11\]'
  ):
    judge.all_at_once(lambda pairs: [0.5] * 11)(*BATCH)


@pytest.mark.parametrize('name', ['torch', 'transformers'])
@pytest.mark.parametrize('make', [hf.classifier, hf.entailment, hf.pair_judge])
def test_a_missing_package_is_one_line(monkeypatch, name, make):
  for package in ('torch', 'transformers'):
    monkeypatch.setitem(sys.modules, package, sys)  # there, as it were
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match=f'{name} is missing.*requirements-hf'):
    make('somewhere')
