"""Rewards on text, and what happens when one misbehaves."""

import itertools
import time

import numpy as np
import pytest

from bond_jax import reward_model, rewards, tokenizer
from bond_jax.errors import UserError

GOOD = ('great', 'lovely', 'superb', 'moving')
BAD = ('awful', 'dull', 'silly', 'boring')
TEXTS = [
  f'The {what} was {how}, {more}.'
  for what in ('film', 'music', 'ending', 'plot')
  for how in GOOD + BAD
  for more in ('truly', 'as ever', 'they say')
]
RATINGS = np.array([2.0 if any(g in t for g in GOOD) else -2.0 for t in TEXTS])


@pytest.fixture(scope='module')
def tok(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  return tokenizer.train(TEXTS, str(path), 90)


@pytest.fixture(scope='module')
def model(tok):
  ids = [tok.encode(t) for t in TEXTS]
  arrays, _ = reward_model.fit(
      (ids, RATINGS), (ids, RATINGS),
      vocab_size=tok.vocab_size, order=2, min_count=1, alphas=(0.5,),
  )  # fmt: skip
  return arrays


@pytest.fixture(scope='module')
def path(tok, model, tmp_path_factory):
  path = tmp_path_factory.mktemp('reward') / 'model.npz'
  proto = tok.processor.serialized_model_proto()
  np.savez(path, **model, tokenizer=np.frombuffer(proto, np.uint8))
  return str(path)


def test_ngrams_are_distinct_and_stay_within_their_text():
  base = 11
  row, key = rewards.ngrams([[3, 9], [], [0], [9, 3, 0]], 3, base)
  got = sorted(zip(row.tolist(), key.tolist()))

  def spell(*ids):
    value = 0
    for i in ids:
      value = value * base + i + 1
    return value

  expected = [
      (0, (3,)), (0, (9,)), (0, (3, 9)), (2, (0,)),
      (3, (9,)), (3, (3,)), (3, (0,)), (3, (9, 3)), (3, (3, 0)),
      (3, (9, 3, 0)),
  ]  # fmt: skip
  assert got == sorted((r, spell(*ids)) for r, ids in expected)
  everything = [(a,) for a in range(10)]
  everything += [(a, b) for a in range(10) for b in range(10)]
  assert len({spell(*ids) for ids in everything}) == 110


def test_features_are_unit_rows_and_ignore_the_unknown():
  keys, scale = np.array([1, 2, 13]), np.array([1.0, 2.0, 3.0])
  # 13 = 1 * 11 + 2, the pair (0, 1).
  x = rewards.features([[0, 0, 1, 5], [7], []], keys, scale, 2, 11)
  expected = np.array([[2, 2, 3], [0, 0, 0], [0, 0, 0]], float)
  expected[0] /= np.sqrt(17)
  np.testing.assert_allclose(x.toarray(), expected, rtol=1e-15)


def test_ridge_is_the_formula_on_the_whole_text(path, tok, model):
  reward = rewards.ridge(path)
  prompts = ['The film', 'The plot']
  completions = [[' was dull.', ' was great.'], ['', ' zzz']]
  got = reward(prompts, completions)
  assert got.shape == (2, 2) and got.dtype == np.float64
  index = {k: i for i, k in enumerate(model['keys'].tolist())}
  base = model['base']
  for b in range(2):
    for k in range(2):
      ids = [i + 1 for i in tok.encode(prompts[b] + completions[b][k])]
      grams = ids + [i * base + j for i, j in itertools.pairwise(ids)]
      x = np.zeros(len(index))
      for g in grams:
        if g in index:
          x[index[g]] += model['scale'][index[g]]
      expected = x @ model['weight'] / np.linalg.norm(x) + model['intercept']
      np.testing.assert_allclose(got[b, k], expected, rtol=1e-12)
  assert got[0, 1] > got[0, 0] + 0.5


def test_repetition_and_length_do_not_pay(path):
  reward = rewards.ridge(path)
  once, thrice = reward([''], [[' great great', ' great' * 30]])[0]
  assert thrice < once * 1.15


def test_text_without_known_pieces_gets_the_intercept(path, model):
  assert rewards.ridge(path)([''], [['']])[0, 0] == model['intercept']


def test_ridge_scores_a_batch_in_60_ms(path):
  reward = rewards.ridge(path)
  prompts = [t[:9] for t in TEXTS] * 3
  prompts = prompts[:256]
  completions = [[t[9:] * 3] * 3 for t in TEXTS * 3][:256]
  reward(prompts, completions)
  times = []
  for _ in range(5):
    start = time.perf_counter()
    rewards.call(reward, prompts, completions)
    times.append(time.perf_counter() - start)
  assert min(times) < 0.06


def test_vader_judges_the_whole_text():
  reward = rewards.vader()
  got = reward(['I love', 'I'], [[' it', ' it not'], [' hate it', ' walk']])
  assert got.shape == (2, 2) and got.dtype == np.float64
  assert got[0, 0] > 0.5 and got[1, 0] < -0.5 and got[1, 1] == 0


def test_missing_and_broken_models_are_one_line(path, tmp_path):
  with pytest.raises(UserError, match='run the reward_model stage first'):
    rewards.ridge(str(tmp_path / 'none.npz'))
  with open(path, 'rb') as f:
    content = f.read()
  for name, bad in (('cut', content[:-400]), ('text', b'abc'), ('none', b'')):
    broken = tmp_path / f'{name}.npz'
    broken.write_bytes(bad)
    with pytest.raises(UserError, match=f'{name}.npz is not a reward model'):
      rewards.ridge(str(broken))
  np.savez(tmp_path / 'lacks.npz', keys=np.arange(3))
  with pytest.raises(UserError, match='lacks.npz is not a reward model'):
    rewards.ridge(str(tmp_path / 'lacks.npz'))
  pickled = np.array([{'a': 1}], object)
  np.savez(tmp_path / 'pickle.npz', keys=pickled, scale=pickled, weight=pickled)
  with pytest.raises(UserError, match='pickle.npz is not a reward model'):
    rewards.ridge(str(tmp_path / 'pickle.npz'))


PROMPTS = ['one', 'two', 'three']
COMPLETIONS = [['a', 'b'], ['c', 'd'], ['e', 'f']]


def test_call_returns_float32():
  def counted(prompts, completions):
    del prompts
    return [[len(c) + i for i, c in enumerate(row)] for row in completions]

  got = rewards.call(counted, PROMPTS, COMPLETIONS)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, [[1, 2]] * 3)


def _with(value, at=(1, 1)):
  def reward(prompts, completions):
    del prompts, completions
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
    (lambda p, c: np.zeros((3, 1)), ['[3, 1]', '[3, 2]', "0: 'one'"]),
    (lambda p, c: np.zeros((2, 2)), ['[2, 2]', '[3, 2]', "2: 'three'"]),
    (lambda p, c: np.zeros(6), ['[6]', '[3, 2]', "0: 'one'"]),
    (lambda p, c: [[0, 1], [2], [3, 4]], ['list', '[3, 2]', "1: 'two'"]),
    (lambda p, c: None, ['NoneType', '[3, 2]', "0: 'one'"]),
    (lambda p, c: 0.5, ['[]', '[3, 2]', "0: 'one'"]),
    (lambda p, c: [['x', 'y']] * 3, ['<U1', 'numbers', "0: 'one'"]),
    (lambda p, c: [[None, 1]] * 3, ['object', 'numbers', "0: 'one'"]),
    (lambda p, c: [[1j, 1]] * 3, ['complex', 'numbers', "0: 'one'"]),
  ],
)
def test_bad_rewards_are_one_line_with_the_prompt(reward, parts):
  reward.__name__ = 'mine'
  with pytest.raises(UserError) as e:
    rewards.call(reward, PROMPTS, COMPLETIONS)
  line = str(e.value)
  assert line.startswith('reward mine returned ') and '\n' not in line
  for part in parts:
    assert part in line


def test_exception_is_one_line_with_the_prompt():
  def picky(prompts, completions):
    if 'two' in prompts:
      raise ValueError('no\nsecond line')
    return np.zeros((len(prompts), len(completions[0])))

  with pytest.raises(UserError) as e:
    rewards.call(picky, PROMPTS, COMPLETIONS)
  assert str(e.value) == (
    "reward picky raised ValueError: no second line (prompt 1: 'two')."
  )
