"""Rewards and judges as they are called: what they return, what they do."""

import threading
import time

import numpy as np
import pytest
import toy

from bond_jax import scoring
from bond_jax.errors import UserError

PROMPTS = ['one', 'two', 'three']
COMPLETIONS = [['a', 'b'], ['c', 'd'], ['e', 'f']]
CONTEXT = toy.context(COMPLETIONS)


def test_call_returns_float32():
  def counted(prompts, completions, context):
    del prompts, context
    return [[len(c) + i for i, c in enumerate(row)] for row in completions]

  got = scoring.call(counted, PROMPTS, COMPLETIONS, CONTEXT)[0]
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, [[1, 2]] * 3)


def _with(value, at=(1, 1)):
  def reward(prompts, completions, context):
    del prompts, completions, context
    values = np.zeros((3, 2))
    values[at] = value
    return values

  return reward


@pytest.mark.parametrize(
  'reward, parts',
  [
    (_with(np.nan), ['nan', 'completion 1', "prompt 1: 'two'"]),
    (_with(-np.inf, (2, 0)), ['-inf', 'completion 0', "2: 'three'"]),
    (_with(1e300), ['1e+300', 'finite', "prompt 1: 'two'"]),
    (lambda p, c, x: np.zeros((3, 1)), ['[3, 1]', '[3, 2]', "0: 'one'"]),
    (lambda p, c, x: np.zeros((2, 2)), ['[2, 2]', '[3, 2]', "2: 'three'"]),
    (lambda p, c, x: np.zeros(6), ['[6]', '[3, 2]', "0: 'one'"]),
    (lambda p, c, x: [[0, 1], [2], [3, 4]], ['list', '[3, 2]', "1: 'two'"]),
    (lambda p, c, x: None, ['NoneType', '[3, 2]', "0: 'one'"]),
    (lambda p, c, x: 0.5, ['[]', '[3, 2]', "0: 'one'"]),
    (lambda p, c, x: [['x', 'y']] * 3, ['<U1', 'numbers', "0: 'one'"]),
    (lambda p, c, x: [[None, 1]] * 3, ['object', 'numbers', "0: 'one'"]),
    (lambda p, c, x: [[1j, 1]] * 3, ['complex', 'numbers', "0: 'one'"]),
  ],
)
def test_bad_rewards_are_one_line_with_the_prompt(reward, parts):
  reward.__name__ = 'mine'
  with pytest.raises(UserError) as e:
    scoring.call(reward, PROMPTS, COMPLETIONS, CONTEXT)
  line = str(e.value)
  assert line.startswith('reward mine returned ') and '\n' not in line
  for part in parts:
    assert part in line


def test_exception_is_one_line_with_the_prompt():
  def picky(prompts, completions, context):
    if 'two' in prompts:
      raise ValueError('no\nsecond line')
    return np.zeros((len(prompts), len(completions[0])))

  with pytest.raises(UserError) as e:
    scoring.call(picky, PROMPTS, COMPLETIONS, CONTEXT)
  assert str(e.value) == (
    "reward picky raised ValueError: no second line (prompt 1: 'two')."
  )


RULES = dict(
  missing_eos_penalty=0.0, length_penalty=0.0, failure='stop', retries=0,
  timeout=0.0,
)  # fmt: skip


def score(reward, context=CONTEXT, **rules):
  return scoring.score(
    reward, PROMPTS, COMPLETIONS, context, **{**RULES, **rules}
  )


def numbers(prompts, completions, context):
  """Worth 10 per prompt, 1 per completion."""
  del completions, context
  return [[10 * PROMPTS.index(p), 10 * PROMPTS.index(p) + 1] for p in prompts]


VALUES = np.array([[0, 1], [10, 11], [20, 21]], np.float32)


def test_parts_are_summed_and_reported():
  parts = lambda *asked: {
    'a': np.array(numbers(*asked)), 'b': 0.5 * np.ones((len(asked[0]), 2))
  }  # fmt: skip
  got = score(parts)
  np.testing.assert_array_equal(got.value, VALUES + 0.5)
  assert got.metrics == {'score/a': 10.5, 'score/b': 0.5}
  assert got.value.dtype == np.float32 and (got.weight == 1).all()
  with pytest.raises(UserError, match='without any part'):
    score(lambda *asked: {})
  bad = lambda *asked: {'a': np.array(numbers(*asked)), 'b': [[0]] * 3}
  bad.__name__ = 'mine'
  with pytest.raises(UserError, match=r"mine\['b'\] returned \[3, 1\]"):
    score(bad)


def test_cut_and_long_completions_cost():
  finished = np.array([[True, False], [True, True], [False, False]])
  tokens = [[[5] * 3, [5] * 4], [[5], []], [[5], [5, 5]]]
  context = CONTEXT._replace(finished=finished, tokens=tokens)
  got = score(numbers, context, missing_eos_penalty=2.0, length_penalty=0.25)
  lengths = np.array([[3, 4], [1, 0], [1, 2]])
  np.testing.assert_array_equal(got.value, VALUES - 2 * ~finished - lengths / 4)


def judge(prompts, completions, context):
  """The first beats the second with 0.9; on prompt 'two', with 0.2."""
  del completions, context
  p = np.array([0.2 if prompt == 'two' else 0.9 for prompt in prompts])
  win = np.full((len(prompts), 2, 2), 0.5)
  win[:, 0, 1], win[:, 1, 0] = p, 1 - p
  return win


def test_a_judge_gives_probabilities_of_pairs():
  got = score(judge).value
  assert got.shape == (3, 2, 2) and got.dtype == np.float32
  np.testing.assert_allclose(got[:, 0, 1], [0.9, 0.2, 0.9], rtol=1e-6)
  np.testing.assert_array_equal(got + got.swapaxes(1, 2), np.ones((3, 2, 2)))
  nearly = lambda *asked: judge(*asked) + 4e-4
  got = score(nearly).value
  np.testing.assert_allclose(got, judge(*BATCH), atol=1e-6)
  with pytest.raises(UserError, match='missing_eos_penalty .* must be 0'):
    score(judge, length_penalty=0.1)


@pytest.mark.parametrize(
  'change, says',
  [
    (((1, 0, 1), 0.3), "beats 1 with probability 0.3, and 1 .* 0.8.*1: 'two'"),
    (((2, 1, 1), 0.4), "completion 1 beats 1 with probability 0.4.*2: 'three'"),
    (((0, 0, 1), np.nan), "nan for completion 0 against 1.*0: 'one'"),
  ],
)
def test_a_judge_that_contradicts_itself(change, says):
  def contradictory(*asked):
    win = judge(*asked)
    win[change[0]] = change[1]
    return win

  with pytest.raises(UserError, match=says):
    score(contradictory)


def test_probabilities_lie_between_0_and_1():
  beyond = lambda *asked: 3 * (judge(*asked) - 0.5) + 0.5
  with pytest.raises(UserError, match=r'with probability 1\.7'):
    score(beyond)


BATCH = PROMPTS, COMPLETIONS, CONTEXT


def test_a_judge_against_fixed_opponents():
  """A score is how often it beats them; the longer beats the shorter here."""

  def longer(prompts, completions, context):
    n = np.array([[len(y) for y in ys] for ys in completions])
    assert [[len(y) for y in ys] for ys in context.tokens] == n.tolist()
    assert context.finished.shape == n.shape
    return (np.sign(n[:, :, None] - n[:, None, :]) + 1) / 2

  opponents = [['', 'aa', 'aaa'], ['a', 'a', 'a'], ['', '', 'a']]
  reward = scoring.against(longer, opponents, toy.context(opponents))
  got = scoring.call(reward, *BATCH)[0]
  expected = [[1 / 3] * 2, [1 / 2] * 2, [5 / 6] * 2]
  np.testing.assert_allclose(got, expected, rtol=1e-6)


class Flaky:
  """Fails on the prompts it is told to, the first so many times."""

  __name__ = 'flaky'

  def __init__(self, on, times, how='raise'):
    self.on, self.left, self.how, self.calls = on, times, how, []

  def __call__(self, prompts, completions, context):
    assert len(prompts) == len(completions) == len(context.rows)
    self.calls.append(list(prompts))
    value = np.array(numbers(prompts, completions, context), float)
    bad = [p in self.on for p in prompts]
    if any(bad) and self.left:
      self.left -= 1
      if self.how == 'raise':
        raise ConnectionError('gone')
      if self.how == 'hang':
        time.sleep(60)
      value[bad, 0] = np.nan
    return value


@pytest.mark.parametrize('how', ['raise', 'nan', 'hang'])
def test_prompts_on_which_a_reward_fails_are_left_out(how):
  reward = Flaky(('two',), 99, how)
  got = score(reward, failure='skip', timeout=0.2 if how == 'hang' else 0.0)
  np.testing.assert_array_equal(got.weight, [1, 0, 1])
  np.testing.assert_array_equal(got.value[[0, 2]], VALUES[[0, 2]])
  assert np.isfinite(got.value).all()
  assert got.metrics == {'reward/skipped': 1.0}


def test_a_judge_s_prompts_are_left_out_too():
  def picky(prompts, completions, context):
    if 'two' in prompts:
      raise ValueError('no')
    return judge(prompts, completions, context)

  got = score(picky, failure='skip')
  np.testing.assert_array_equal(got.weight, [1, 0, 1])
  np.testing.assert_allclose(
    got.value[[0, 2]], judge(*BATCH)[[0, 2]], rtol=1e-6
  )
  assert (got.value[1] == 0.5).all()


def test_nothing_skipped_is_reported_as_well():
  assert score(numbers, failure='skip').metrics == {'reward/skipped': 0.0}
  assert score(numbers).metrics == {}


def test_a_reward_that_fails_everywhere_stops_the_run():
  with pytest.raises(UserError, match='fails on every prompt .*gone'):
    score(Flaky(PROMPTS, 99), failure='skip')


def test_further_attempts(monkeypatch):
  waits = []
  monkeypatch.setattr(scoring.time, 'sleep', waits.append)
  # A failure calls once for the batch, and prompt by prompt for the message.
  reward = Flaky(('one',), 2)
  np.testing.assert_array_equal(score(reward, retries=1).value, VALUES)
  assert waits == [1]
  with pytest.raises(UserError, match=r'ConnectionError: gone \(prompt 0'):
    score(Flaky(('one',), 99), retries=6)
  assert waits == [1] + [1, 2, 4, 8, 16, 30]


def test_a_reward_that_hangs_is_one_line():
  with pytest.raises(UserError, match='more than reward.timeout = 0.1 s for 3'):
    score(Flaky(PROMPTS, 99, 'hang'), timeout=0.1)


def test_a_worker_makes_calls_in_turn_and_hands_errors_on():
  submit = scoring.worker()
  order, gate = [], threading.Event()

  def first():
    gate.wait()
    order.append(1)
    return threading.current_thread()

  a = submit(first)
  b = submit(order.append, 2)
  c = submit(int, 'x')
  assert not a.done() and not b.done()
  gate.set()
  b.result()
  assert order == [1, 2] and a.result() is not threading.current_thread()
  assert a.result().daemon
  with pytest.raises(ValueError, match='invalid literal'):
    c.result()


@pytest.mark.parametrize(
  'values, says',
  [
    ([[1, [2]], [3, 4]], "prompt 0: 'p'"),
    ([[1, 2], [3, [4]]], "prompt 1: 'q'"),
    ([[1, 2], [3, 4], [5]], "prompt 1: 'q'"),
    ({'a': [[1, 2], [3, 4]], 'b': np.full((2, 2, 2), 0.5)}, 'of both kinds'),
  ],
)
def test_ragged_and_mixed_values_are_one_line(values, says):
  asked = ['p', 'q'], [['a', 'b']] * 2
  with pytest.raises(UserError, match=says) as e:
    scoring.call(lambda *_: values, *asked, toy.context(asked[1]))
  assert 'raised' not in str(e.value)
