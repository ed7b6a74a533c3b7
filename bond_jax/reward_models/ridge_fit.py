"""A ridge regression of ratings on n-grams: the reward model kind='ridge'.

Written to model.npz, for `rewards.ridge.ridge`.
"""

from collections.abc import Callable, Sequence
import os
from typing import Any

import numpy as np
import scipy.stats
from sklearn import linear_model

from bond_jax.data import examples, preferences, sources
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.rewards.ridge import features, ngrams, predict, read
from bond_jax.runs import files

Ids = Sequence[Sequence[int]]


def fit(
  train: tuple[Ids, np.ndarray],
  validation: tuple[Ids, np.ndarray],
  *,
  vocab_size: int,
  order: int,
  min_count: int,
  alphas: Sequence[float],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Fits ridge regressions and keeps the one that validates best.

  Args:
    train, validation: pieces of each text, and its rating f64[N].
    vocab_size: of the pieces.
    order: length of the longest n-grams.
    min_count: an n-gram needs to be in that many training texts.
    alphas: penalties; the one with the highest correlation on the validation
      texts is kept.

  Returns:
    The arrays of model.npz (without the tokenizer), and numbers to report.
  """
  base = vocab_size + 1
  ids, ratings = train
  row, key = ngrams(ids, order, base)
  pairs = np.unique(np.stack([key, row]), axis=1)
  keys, count = np.unique(pairs[0], return_counts=True)
  keys, count = keys[count >= min_count], count[count >= min_count]
  if not len(keys):
    raise UserError(
      f'reward_model.min_count is {min_count}: no n-gram is in that many of'
      f' the {len(ids)} training texts; use a smaller one.'
    )
  scale = np.log((1 + len(ids)) / (1 + count)) + 1
  x = features(ids, keys, scale, order, base)
  held_out = features(validation[0], keys, scale, order, base)
  best = (-np.inf, 0.0, None)
  for alpha in alphas:
    # Conjugate gradients are deterministic, and at home in sparse matrices.
    model = linear_model.Ridge(alpha=alpha, solver='sparse_cg', tol=1e-8)
    model.fit(x, ratings)
    pearson = _pearson(model.predict(held_out), validation[1])
    if pearson > best[0]:
      best = (pearson, alpha, model)
  pearson, alpha, model = best
  if model is None:
    raise UserError(
      'no reward model has a correlation with the validation ratings: are'
      ' all ratings the same?'
    )
  found = dict(
    keys=keys, scale=scale, weight=model.coef_,
    intercept=np.float64(model.intercept_), order=np.int64(order),
    base=np.int64(base),
  )  # fmt: skip
  report = dict(
    features=len(keys), alpha=float(alpha), validation_pearson=pearson
  )
  return found, report


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
  with np.errstate(invalid='ignore', divide='ignore'):
    return float(np.corrcoef(a, b)[0, 1])


def _rated(row: examples.Row) -> tuple[str, float]:
  text = examples.text_of(row, 'reward_model.kind "ridge" needs')
  return text, preferences.number_of(row, 'rating')


def build(
  splits: dict[str, examples.Source],
  *,
  tokenizer_of: Callable[[Sequence[str]], tokenizer_lib.Tokenizer],
  workdir: str,
  **settings: Any,
) -> dict[str, float]:
  """Fits, saves and measures the reward model of a run; returns the report.

  Args:
    splits: the rows of train, validation and test.
    tokenizer_of: the training texts -> the run's vocabulary.
    workdir: of the run.
    **settings: see `fit`.
  """
  texts, ratings, skipped = {}, {}, 0
  for split, rows in splits.items():
    what, bad = f'the {split} split', []
    rated = list(sources.each(rows, _rated, bad.append))
    if not rated:
      raise UserError(f'all rows of {what} are bad; the first: {bad[0]}')
    if bad:
      print(sources.skipped(bad, len(rows), what), flush=True)
    texts[split] = [text for text, _ in rated]
    ratings[split] = np.array([rating for _, rating in rated], np.float64)
    skipped += len(bad)
  tokenizer = tokenizer_of(texts['train'])
  data = [
    (tokenizer.processor.encode(texts[split]), ratings[split])
    for split in ('train', 'validation')
  ]
  found, report = fit(*data, vocab_size=tokenizer.vocab_size, **settings)
  model = np.frombuffer(tokenizer.processor.serialized_model_proto(), np.uint8)
  path = os.path.join(workdir, 'reward', 'model.npz')
  files.write(path, {**found, 'tokenizer': model})
  got = predict(read(path), texts['test'])  # of the file as others will use it
  return {
    **report,
    'bad_rows': skipped,
    'test_pearson': _pearson(got, ratings['test']),
    'test_spearman': float(
      scipy.stats.spearmanr(got, ratings['test']).statistic
    ),
    'tokenizer_sha256': tokenizer.sha256,
  }
