"""What a reward returns: any framework's numbers, or one line."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards import calling, judge, make

PROMPTS = ['p', 'q']
COMPLETIONS = [['a', 'bbb', 'cc'], ['d', 'd', '']]
BATCH = PROMPTS, COMPLETIONS, toy.context(COMPLETIONS)
VALUES = np.array([[0.5, 3, -2], [1, 1.5, 0]])  # exact in bfloat16


class Tensor:
  """As torch's: NumPy reads it once it is detached, on the CPU and float64."""

  def __init__(self, values, todo=('detach', 'cpu', 'double'), floats=True):
    self.values, self.todo, self.floats = np.array(values), todo, floats
    self.dtype = 'torch.bfloat16'

  def _done(self, step):
    todo = tuple(x for x in self.todo if x != step)
    return Tensor(self.values, todo, self.floats)

  def detach(self):
    return self._done('detach')

  def cpu(self):
    if 'meta' in self.todo:
      raise NotImplementedError('Cannot copy out of meta tensor; no data!')
    return self._done('cpu')

  def double(self):
    assert self.floats  # of complex numbers torch drops a half
    return self._done('double')

  def is_floating_point(self):
    return self.floats

  def __array__(self, dtype=None, copy=None):
    if self.todo:
      raise TypeError(f"can't convert a tensor that needs {self.todo[0]}")
    return self.values


def rows(make_row):
  return [make_row(row) for row in VALUES]


ARRAYS = {
  'float64': VALUES,
  'float16': VALUES.astype(np.float16),
  'bfloat16 of ml_dtypes': VALUES.astype(ml_dtypes.bfloat16),
  'jax': jnp.asarray(VALUES),
  'jax bfloat16': jnp.asarray(VALUES, jnp.bfloat16),
  'rows of jax': rows(jnp.asarray),
  'numbers of jax': [[jnp.bfloat16(x) for x in row] for row in VALUES],
  'numbers of ml_dtypes': [
    tuple(map(ml_dtypes.bfloat16, row)) for row in VALUES
  ],
  'tensor': Tensor(VALUES),
  'tensor on a CPU': Tensor(VALUES, ()),
  'rows of tensors': tuple(rows(Tensor)),
  'numbers of tensors': [[Tensor(x) for x in row] for row in VALUES],
  'tensors and numbers': [[Tensor(row[0]), *row[1:]] for row in VALUES],
}


@pytest.mark.parametrize('name', ARRAYS)
def test_arrays_of_any_kind_are_numbers(name):
  value, _ = calling.call(lambda *_: ARRAYS[name], *BATCH)
  assert value.dtype == np.float32
  np.testing.assert_array_equal(value, VALUES)
  value, parts = calling.call(lambda *_: {'a': ARRAYS[name]}, *BATCH)
  np.testing.assert_array_equal(parts['a'], VALUES)


def test_whole_numbers_and_truths_are_numbers():
  for dtype in (bool, np.int8, np.uint64, ml_dtypes.int4):
    value, _ = calling.call(lambda *_, d=dtype: VALUES.astype(d), *BATCH)
    np.testing.assert_array_equal(value, VALUES.astype(dtype).astype(float))
  whole = Tensor(VALUES.astype(int), ('detach', 'cpu'), floats=False)
  value, _ = calling.call(lambda *_: whole, *BATCH)
  np.testing.assert_array_equal(value, VALUES.astype(int))


class Odd:
  """Nothing about it works."""

  def __getattr__(self, name):
    if name.startswith('__'):  # pytest asks for these
      raise AttributeError(name)
    raise RuntimeError(f'no {name}')

  def __iter__(self):
    raise RuntimeError('no iter')

  def __len__(self):
    raise RuntimeError('no len')


@pytest.mark.parametrize(
  'values, says',
  [
    (Tensor(VALUES, ('meta',)), 'returned Tensor, .*Cannot copy out of meta'),
    (Tensor(VALUES, ('sparse',)), "returned Tensor, .*can't convert"),
    (
      Tensor(VALUES * 1j, ('detach', 'cpu'), floats=False),
      'returned complex128, expected numbers',
    ),
    ([[Tensor(x, ('meta',)) for x in row] for row in VALUES], 'returned list'),
    (Odd(), 'returned Odd, which cannot be read .RuntimeError: no '),
    ([[Odd()] * 3] * 2, 'returned list, which cannot be read'),
    ((x for x in VALUES), 'returned generator, expected one number'),
    (VALUES.astype('M8[s]'), r'returned datetime64\[s\], expected numbers'),
    (VALUES.astype([('a', float)]), r"returned .*'a'.*, expected numbers"),
    ([[[]]] * 2, r'returned \[2, 1, 0\], expected one number'),
  ],
)
def test_what_is_no_number_is_one_line(values, says):
  def mine(*_):
    return values

  with pytest.raises(UserError, match=says) as e:
    calling.score(mine, *BATCH)
  line = str(e.value)
  assert line.startswith('reward mine returned') and '\n' not in line
  assert "prompt 0: 'p'" in line
  found = calling.score(mine, *BATCH, failure='skip')
  assert not found.weight.any() and 'reward mine returned' in found.error


@pytest.mark.parametrize('say', [
  lambda n: Tensor(np.full(n, 0.5)), lambda n: jnp.full(n, 0.5, jnp.bfloat16),
  lambda n: [Tensor(0.5)] * n,
])  # fmt: skip
def test_a_judge_s_probabilities_are_read_likewise(say):
  win = judge.all_at_once(lambda pairs: say(len(pairs)))(*BATCH)
  assert (win == 0.5).all()


@pytest.mark.parametrize('said', [
  Odd(), Tensor(0.5, ('meta',)), [[0.5], []], ['much'], [0.5j] * 12,
])  # fmt: skip
def test_what_is_no_probability_at_all_is_one_line(said):
  with pytest.raises(UserError, match='a judge answered .* of 12 pairs'):
    judge.all_at_once(lambda pairs: said)(*BATCH)


# -- several judges


def win(p):
  """Completion i beats j > i with probability p."""
  upper = np.triu(np.full((3, 3), p), 1)
  return upper + np.tril(1 - np.full((3, 3), p), -1) + np.eye(3) / 2


def surely(p):
  """A factory of judges."""
  return lambda prompts, completions, context: [win(p)] * len(prompts)


def worth(value):
  return lambda prompts, completions, context: [[value] * 3] * len(prompts)


def of_parts(**weights):
  """The judges of P = 0.25 and 1, and a score, by weight."""
  made = {
    'soft': make.Part('test_answers:surely', {'p': 0.25}),
    'hard': make.Part('test_answers:surely', {'p': 1.0}),
    'score': make.Part('test_answers:worth', {'value': 2.0}),
  }
  return make.reward(
    {name: made[name]._replace(weight=w) for name, w in weights.items()}
  )


@pytest.mark.parametrize(
  'weights, p',
  [
    ({'soft': 1.0, 'hard': 1.0}, 0.625),
    ({'soft': 0.5, 'hard': 0.5}, 0.625),
    ({'soft': 3.0, 'hard': 1.0}, 0.4375),
    ({'soft': 0.1, 'hard': 0.2}, 0.75),
    ({'soft': 0.0, 'hard': 2.0}, 1.0),
    ({'soft': 0.3}, 0.25),
  ],
)
def test_judges_are_averaged_by_weight(weights, p):
  value, parts = calling.call(of_parts(**weights), *BATCH)
  np.testing.assert_allclose(value, [win(p)] * 2, rtol=1e-6)
  np.testing.assert_array_equal(value + value.swapaxes(1, 2), 1)
  assert parts == {} and value.dtype == np.float32


def test_a_dict_of_judges_is_their_mean():
  both = lambda *asked: {'a': surely(0.1)(*asked), 'b': surely(0.8)(*asked)}
  value, parts = calling.call(both, *BATCH)
  np.testing.assert_allclose(value, [win(0.45)] * 2, rtol=1e-6)
  np.testing.assert_array_equal(value + value.swapaxes(1, 2), 1)
  assert parts == {}


@pytest.mark.parametrize(
  'weights', [{'soft': 0, 'hard': 0}, {'soft': -1.0, 'hard': 2.0}]
)
def test_weights_that_make_no_mean_are_refused(weights):
  with pytest.raises(UserError, match='soft, hard, .* 0 or more'):
    calling.call(of_parts(**weights), *BATCH)


def test_a_judge_and_a_score_have_no_sum():
  says = 'score gives a number .*, soft, hard compares pairs'
  with pytest.raises(UserError, match=says):
    calling.call(of_parts(soft=1.0, score=0.5, hard=1.0), *BATCH)


def test_scores_keep_their_weights_of_any_sign():
  value, parts = calling.call(of_parts(score=-0.5), *BATCH)
  np.testing.assert_array_equal(value, np.full((2, 3), -1))
  np.testing.assert_array_equal(parts['score'], value)
