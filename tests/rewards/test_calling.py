"""Rewards and judges as they are called: what they return, what they do."""

import threading
import weakref

import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards import calling

PROMPTS = ['one', 'two', 'three']
COMPLETIONS = [['a', 'b'], ['c', 'd'], ['e', 'f']]
CONTEXT = toy.context(COMPLETIONS)


def test_call_returns_float32():
  def counted(prompts, completions, context):
    del prompts, context
    return [[len(c) + i for i, c in enumerate(row)] for row in completions]

  got = calling.call(counted, PROMPTS, COMPLETIONS, CONTEXT)[0]
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
    (lambda p, c, x: np.zeros((2, 2)), ['[2, 2]', '[3, 2]', "0: 'one'"]),
    (lambda p, c, x: np.zeros(6), ['[6]', '[3, 2]', "0: 'one'"]),
    (lambda p, c, x: [[0, 1], [2], [3, 4]], ['list', '[3, 2]', "0: 'one'"]),
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
    calling.call(reward, PROMPTS, COMPLETIONS, CONTEXT)
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
    calling.call(picky, PROMPTS, COMPLETIONS, CONTEXT)
  assert str(e.value) == (
    "reward picky raised ValueError: no second line (prompt 1: 'two')."
  )


def score(reward, context=CONTEXT, **rules):
  return calling.score(reward, PROMPTS, COMPLETIONS, context, **rules)


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
  # Also where no completion is cut yet.
  for name in ('length_penalty', 'missing_eos_penalty'):
    with pytest.raises(UserError, match='missing_eos_penalty .* must be 0'):
      score(judge, **{name: 0.1})


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
  theirs = PROMPTS, opponents, toy.context(opponents)
  got = calling.against(calling.asker(longer), BATCH, theirs)
  expected = [[1 / 3] * 2, [1 / 2] * 2, [5 / 6] * 2]
  np.testing.assert_allclose(got.value, expected, rtol=1e-6)

  def picky(prompts, *rest):
    if 'two' in prompts:
      raise ConnectionError('gone')
    return longer(prompts, *rest)

  # A prompt on which it fails is left out alone.
  got = calling.against(calling.asker(picky, failure='skip'), BATCH, theirs)
  np.testing.assert_array_equal(got.weight, [1, 0, 1])
  np.testing.assert_allclose(got.value[::2], expected[::2], rtol=1e-6)
  with pytest.raises(UserError, match='reward.opponents is for judges'):
    calling.against(calling.asker(lambda *_: np.zeros((3, 5))), BATCH, theirs)


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
      value[bad, 0] = np.nan
    return value


@pytest.mark.parametrize('how', ['raise', 'nan'])
def test_prompts_on_which_a_reward_fails_are_left_out(how):
  reward = Flaky(('two',), 99, how)
  got = score(reward, failure='skip')
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
  found = score(Flaky(PROMPTS, 99), failure='skip')
  with pytest.raises(UserError, match='fails on every prompt .*gone'):
    calling.join([(np.arange(3), found)])


@pytest.mark.parametrize('reward', [numbers, judge])
def test_a_host_whose_prompts_all_fail_has_no_reward_and_stops_nobody(reward):
  def picky(prompts, *rest):
    if 'two' in prompts:
      raise ConnectionError('gone')
    return {'a': reward(prompts, *rest)}

  parts = []
  for rows in ([1], [0, 2]):
    found = calling.score(picky, *calling.some(rows, *BATCH), failure='skip')
    parts.append((np.array(rows), found))
  joined, whole = calling.join(parts), score(picky, failure='skip')
  np.testing.assert_array_equal(joined.weight, [1, 0, 1])
  np.testing.assert_array_equal(joined.value[::2], whole.value[::2])
  assert joined.value.shape == whole.value.shape
  assert joined.metrics == pytest.approx(whole.metrics)
  assert joined.metrics['reward/skipped'] == 1


@pytest.mark.parametrize(
  'one, other',
  [
    (numbers, judge),
    (lambda *asked: {'a': numbers(*asked)}, lambda *x: {'b': numbers(*x)}),
    (lambda *asked: {'a': numbers(*asked)}, numbers),
  ],
)
def test_answers_of_two_kinds_are_one_line(one, other):
  """On one host, prompt by prompt, and on two."""

  def mixed(prompts, *rest):
    if len(prompts) > 1:
      raise ValueError('one at a time')
    return (one if prompts == ['one'] else other)(prompts, *rest)

  with pytest.raises(UserError, match='must return the same for all'):
    score(mixed, failure='skip')
  parts = [
    (np.array([i]), calling.score(mixed, *calling.some([i], *BATCH)))
    for i in range(3)
  ]
  with pytest.raises(UserError, match='must return the same for all'):
    calling.join(parts)


MANY = [[f'{p} {i}' for i in range(4)] for p in PROMPTS]


def constant(value, **others):
  return lambda prompts, completions, context: {
    'a': np.full((len(prompts), 4), value),
    **{k: [[len(y) for y in ys] for ys in completions] for k in others},
  }


@pytest.mark.parametrize(
  'reward, completions, says',
  [
    (constant(0.0), MANY, ["['a'] gave 0", ' gave 0']),
    (constant(2.5, b=1), MANY, ["['a'] gave 2.5"]),
    (lambda p, *_: np.zeros((len(p), 4)), MANY, [' gave 0']),
    (lambda p, *_: np.full((len(p), 4, 4), 0.5), MANY, [' gave 0.5']),
    # Equal numbers of few texts, or of one, are no surprise.
    (constant(0.0), [['a', 'b', 'c', 'd']] * 3, []),
    (lambda *_: np.arange(12.0).reshape(3, 4), MANY, []),
  ],
)
def test_one_number_for_all_is_said_once(reward, completions, says, capsys):
  reward.__name__ = 'mine'
  ask = calling.asker(reward)
  for _ in range(3):
    ask(PROMPTS, completions, toy.context(completions))
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(says)
  for say in says:
    assert any(f'warning: reward mine{say} to all' in line for line in lines)


def test_prompts_that_are_left_out_hide_no_constant(capsys):
  def zeros(prompts, *_):
    if 'three' in prompts:
      raise ConnectionError('gone')
    return np.zeros((len(prompts), 4))

  asked = PROMPTS, MANY, toy.context(MANY)
  calling.asker(zeros, failure='skip')(*asked)
  assert 'zeros gave 0 to all' in capsys.readouterr().out


def test_a_reward_may_not_end_the_process():
  def leaves(prompts, completions, context):
    raise SystemExit(0)

  with pytest.raises(UserError, match="leaves raised SystemExit: 0 .*'one'"):
    score(leaves)


def test_further_attempts(monkeypatch):
  waits = []
  monkeypatch.setattr(calling.time, 'sleep', waits.append)
  # A failure calls once for the batch, and prompt by prompt for the message.
  reward = Flaky(('one',), 2)
  np.testing.assert_array_equal(score(reward, retries=1).value, VALUES)
  assert waits == [1]
  with pytest.raises(UserError, match=r'ConnectionError: gone \(prompt 0'):
    score(Flaky(('one',), 99), retries=6)
  assert waits == [1] + [1, 2, 4, 8, 16, 30]


def test_a_worker_makes_calls_in_turn_and_hands_errors_on():
  submit = calling.worker()
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


def test_threads_end_with_their_worker():
  submit = calling.worker(2)
  thread = submit(threading.current_thread).result()
  kept = Flaky((), 0)
  there = weakref.ref(kept)
  submit(type, kept).result()
  del kept
  submit(int).result()
  submit(int).result()
  assert thread.is_alive()
  del submit
  thread.join(10)
  assert not thread.is_alive() and there() is None


@pytest.mark.parametrize(
  'values, says',
  [
    ([[1, [2]], [3, 4]], "prompt 0: 'p'"),
    ([[1, 2], [3, 4], [5]], "prompt 0: 'p'"),
    (
      {'a': [[1, 2], [3, 4]], 'b': np.full((2, 2, 2), 0.5)},
      'both kinds: a gives a number for each completion, b compares pairs',
    ),
  ],
)
def test_ragged_and_mixed_values_are_one_line(values, says):
  asked = ['p', 'q'], [['a', 'b']] * 2
  with pytest.raises(UserError, match=says) as e:
    calling.call(lambda *_: values, *asked, toy.context(asked[1]))
  assert 'raised' not in str(e.value)
