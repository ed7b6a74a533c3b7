"""Rewards on text."""

import itertools

import numpy as np
import pytest
import toy

from bond_jax.data import tokenizer
from bond_jax.errors import UserError
from bond_jax.reward_models import ridge_fit
from bond_jax.rewards import ridge, text

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
  arrays, _ = ridge_fit.fit(
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
  row, key = ridge.ngrams([[3, 9], [], [0], [9, 3, 0]], 3, base)
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
  x = ridge.features([[0, 0, 1, 5], [7], []], keys, scale, 2, 11)
  expected = np.array([[2, 2, 3], [0, 0, 0], [0, 0, 0]], float)
  expected[0] /= np.sqrt(17)
  np.testing.assert_allclose(x.toarray(), expected, rtol=1e-15)


def test_ridge_is_the_formula_on_the_whole_text(path, tok, model):
  reward = ridge.ridge(path)
  prompts = ['The film', 'The plot']
  completions = [[' was dull.', ' was great.'], ['', ' zzz']]
  got = reward(prompts, completions, toy.context(completions))
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
  reward = ridge.ridge(path)
  texts = [[' great great', ' great' * 30]]
  once, thrice = reward([''], texts, toy.context(texts))[0]
  assert thrice < once * 1.15


def test_text_without_known_pieces_gets_the_intercept(path, model):
  nothing = [['']]
  got = ridge.ridge(path)([''], nothing, toy.context(nothing))
  assert got[0, 0] == model['intercept']


def test_vader_judges_the_whole_text():
  reward = text.vader()
  texts = [[' it', ' it not'], [' hate it', ' walk']]
  got = reward(['I love', 'I'], texts, toy.context(texts))
  assert got.shape == (2, 2) and got.dtype == np.float64
  assert got[0, 0] > 0.5 and got[1, 0] < -0.5 and got[1, 1] == 0
  # An answer stands by itself.
  answers = reward(['I love', 'I'], texts, toy.context(texts, turns=True))
  assert answers[0, 0] == 0 and answers[1, 0] < -0.5


def test_missing_and_broken_models_are_one_line(path, tmp_path):
  with pytest.raises(UserError, match='run the reward_model stage first'):
    ridge.ridge(str(tmp_path / 'none.npz'))
  with open(path, 'rb') as f:
    content = f.read()
  for name, bad in (('cut', content[:-400]), ('text', b'abc'), ('none', b'')):
    broken = tmp_path / f'{name}.npz'
    broken.write_bytes(bad)
    with pytest.raises(UserError, match=f'{name}.npz is not a reward model'):
      ridge.ridge(str(broken))
  np.savez(tmp_path / 'lacks.npz', keys=np.arange(3))
  with pytest.raises(UserError, match='lacks.npz is not a reward model'):
    ridge.ridge(str(tmp_path / 'lacks.npz'))
  pickled = np.array([{'a': 1}], object)
  np.savez(tmp_path / 'pickle.npz', keys=pickled, scale=pickled, weight=pickled)
  with pytest.raises(UserError, match='pickle.npz is not a reward model'):
    ridge.ridge(str(tmp_path / 'pickle.npz'))


def test_a_pattern_is_searched_in_completions_alone():
  texts = [['a 7', 'seven'], ['', '77']]
  reward = text.matches(r'\d')
  got = reward(['1', '2'], texts, toy.context(texts))
  np.testing.assert_array_equal(got, [[1, 0], [0, 1]])
  with pytest.raises(UserError, match='no regular expression: unterminated'):
    text.matches('[a')


def test_answers_are_numbers_where_a_completion_marks_them():
  rows = [{'answer': 'So 3 + 4 makes\n#### 1,234'}, {'answer': 7}]
  texts = [
    ['#### 1234', 'the answer is: 1,234.', '\\boxed{12} or \\boxed{1234.0}'],
    ['7', '#### 7 #### 8', 'The answer is $7 for 3'],
  ]
  reward = text.exact_answer()
  got = reward(['a', 'b'], texts, toy.context(texts, rows=rows))
  # A bare 7 is not marked as the answer; of two, the last counts.
  np.testing.assert_array_equal(got, [[1, 1, 1], [0, 0, 1]])
  with pytest.raises(
    UserError, match="prompt 0 has no number under 'answer' .*fields text"
  ):
    reward(['a'], [['1']], toy.context([['1']], rows=[{'text': 'a'}]))
  with pytest.raises(UserError, match='needs a group'):
    text.exact_answer(pattern='a')
