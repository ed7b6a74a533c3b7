"""A linear rating of n-grams, learnt by `bond_jax.reward_model`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.rewards.text import judged
from bond_jax.runs import files
from bond_jax.types import RewardFn


def ngrams(
  ids: Sequence[Sequence[int]], order: int, base: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns all n-grams up to `order`, as (row i64[X], key i64[X]).

  A key is the number that the n-gram's ids + 1 spell in the given base, one
  more than the vocabulary: keys of different n-grams differ.
  """
  lengths = np.array([len(x) for x in ids], np.int64)
  flat = np.array([i for x in ids for i in x], np.int64) + 1
  row = np.repeat(np.arange(len(ids)), lengths)
  rows, keys, key = [row], [flat], flat
  for n in range(2, order + 1):
    key = key[:-1] * base + flat[n - 1 :]
    within = row[n - 1 :] == row[: len(row) - n + 1]
    rows.append(row[n - 1 :][within])
    keys.append(key[within])
  return np.concatenate(rows), np.concatenate(keys)


def features(
  ids: Sequence[Sequence[int]],
  keys: np.ndarray,
  scale: np.ndarray,
  order: int,
  base: int,
) -> scipy.sparse.csr_matrix:
  """Returns counts of the known n-grams, scaled, each row of unit length.

  Unit length means that neither a long text nor a repeated word is worth more.
  `keys` i64[F] are of `ngrams`, sorted, and `scale` f64[F] what a count is
  multiplied by (the inverse frequency). A row without any of them is zero.
  """
  row, key = ngrams(ids, order, base)
  column = np.searchsorted(keys, key).clip(max=len(keys) - 1)
  known = keys[column] == key
  row, column = row[known], column[known]
  x = scipy.sparse.csr_matrix(
    (scale[column], (row, column)), shape=(len(ids), len(keys))
  )
  norm = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
  return scipy.sparse.diags(1 / np.where(norm > 0, norm, 1)) @ x


class Model(NamedTuple):
  """What `bond_jax.reward_model` has learnt."""

  tokenizer: tokenizer_lib.Tokenizer
  keys: np.ndarray
  scale: np.ndarray
  weight: np.ndarray
  intercept: float
  order: int
  base: int


def read(path: str) -> Model:
  """Reads the model.npz that it wrote; a UserError if missing or broken."""
  try:
    content, *fields = files.read(
      path,
      lambda found: (
        found['tokenizer'].tobytes(),
        *(found[k] for k in ('keys', 'scale', 'weight')),
        *(found[k].item() for k in ('intercept', 'order', 'base')),
      ),
      'a reward model',
      'delete it and run the reward_model stage again',
    )
  except FileNotFoundError as e:
    raise UserError(
      f'there is no reward model at {path}; run the reward_model stage first.'
    ) from e
  tokenizer = tokenizer_lib.parse(
    content, f'the tokenizer in {path}', 'run the reward_model stage again'
  )
  return Model(tokenizer, *fields)


def predict(model: Model, texts: Sequence[str]) -> np.ndarray:
  """The ratings f64[len(texts)]."""
  ids = model.tokenizer.processor.encode(list(texts))
  x = features(ids, model.keys, model.scale, model.order, model.base)
  return x @ model.weight + model.intercept


def ridge(path: str) -> RewardFn:
  """Returns the rating of `path` as a reward; see `read`."""
  model = read(path)

  def ridge_reward(prompts, completions, context):
    texts = judged(prompts, completions, context)
    return predict(model, texts).reshape(len(prompts), -1)

  return ridge_reward
