"""Rewards: functions from text to numbers, on the host.

A reward gets B prompts and K completions of each and returns [B, K]. What is
judged is the whole text, prompt + completion.
"""

from __future__ import annotations

from collections.abc import Sequence
import zipfile

import numpy as np
import scipy.sparse

from bond_jax import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
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

  Args:
    ids: pieces of each text.
    keys: i64[F], sorted, of the known n-grams.
    scale: f64[F], what a count is multiplied by (the inverse frequency).
    order: length of the longest n-grams.
    base: of the keys; see `ngrams`.

  Returns:
    f64[len(ids), F]; a row without any known n-gram is zero.
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


def ridge(path: str) -> RewardFn:
  """Returns the rating that `bond_jax.reward_model` has learnt, as a reward.

  Args:
    path: the model.npz that it wrote. A UserError if missing or broken.
  """
  try:
    with np.load(path, allow_pickle=False) as f:
      model = dict(f)
    keys, scale, weight = (model[k] for k in ('keys', 'scale', 'weight'))
    intercept, order, base = (
      model[k].item() for k in ('intercept', 'order', 'base')
    )
    content = model['tokenizer'].tobytes()
  except FileNotFoundError as e:
    raise UserError(
      f'there is no reward model at {path}; run the reward_model stage first.'
    ) from e
  except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise UserError(
      f'{path} is not a reward model ({e}); delete it and run the'
      ' reward_model stage again.'
    ) from e
  tokenizer = tokenizer_lib.parse(content, f'the tokenizer in {path}')

  def ridge_reward(prompts, completions):
    texts = _whole(prompts, completions)
    ids = tokenizer.processor.encode(texts)
    x = features(ids, keys, scale, order, base)
    return (x @ weight + intercept).reshape(len(prompts), -1)

  return ridge_reward


def vader() -> RewardFn:
  """Returns VADER's compound score, in [-1, 1] (Hutto & Gilbert, 2014)."""
  try:
    from vaderSentiment import vaderSentiment  # pylint: disable=import-outside-toplevel
  except ImportError as e:
    raise UserError(
      'the VADER reward needs the package vaderSentiment; run "make setup",'
      ' or "pip install vaderSentiment==3.3.2".'
    ) from e
  analyzer = vaderSentiment.SentimentIntensityAnalyzer()

  def vader_reward(prompts, completions):
    texts = _whole(prompts, completions)
    scores = [analyzer.polarity_scores(t)['compound'] for t in texts]
    return np.array(scores, np.float64).reshape(len(prompts), -1)

  return vader_reward


def _whole(
  prompts: Sequence[str], completions: Sequence[Sequence[str]]
) -> list[str]:
  return [
    prompt + completion
    for prompt, row in zip(prompts, completions, strict=True)
    for completion in row
  ]


def call(
  reward: RewardFn,
  prompts: Sequence[str],
  completions: Sequence[Sequence[str]],
) -> np.ndarray:
  """Returns the rewards as f32[B, K]; a UserError if they are not that.

  The line names the reward and the first prompt on which it went wrong.
  """
  name = getattr(reward, '__name__', repr(reward))
  try:
    values = reward(prompts, completions)
  except Exception as e:
    where = _first_that_raises(reward, prompts, completions)
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())
    raise UserError(f'reward {name} raised {reason} ({where}).') from e
  return check(values, (len(prompts), len(completions[0])), prompts, name)


def check(
  values, shape: tuple[int, int], prompts: Sequence[str], name: str
) -> np.ndarray:
  """Returns `values` as f32[B, K] if they are finite numbers of that shape."""
  try:
    array = np.asarray(values)
  except ValueError:  # ragged
    array = np.array(None)
  if array.shape != shape:
    rows = list(values) if np.iterable(values) else []
    bad = (i for i, r in enumerate(rows) if np.shape(r) != shape[1:])
    i = next(bad, min(len(rows), shape[0] - 1))
    got = list(array.shape) if array.dtype != object else type(values).__name__
    raise UserError(
      f'reward {name} returned {got}, expected one number per completion,'
      f' {list(shape)} ({_quote(i, prompts)}).'
    )
  if array.dtype.kind not in 'biuf':
    raise UserError(
      f'reward {name} returned {array.dtype}, expected numbers'
      f' ({_quote(0, prompts)}).'
    )
  with np.errstate(over='ignore'):
    result = array.astype(np.float32)
  bad = np.argwhere(~np.isfinite(result))
  if len(bad):
    i, k = bad[0]
    raise UserError(
      f'reward {name} returned {array[i, k]} for completion {k}, expected a'
      f' finite float32 ({_quote(i, prompts)}).'
    )
  return result


def _quote(i: int, prompts: Sequence[str]) -> str:
  return f'prompt {i}: {prompts[i][:60]!r}'


def _first_that_raises(reward, prompts, completions) -> str:
  """Asks for one prompt at a time, to find the one that is to blame."""
  for i, (prompt, row) in enumerate(zip(prompts, completions, strict=True)):
    try:
      reward([prompt], [row])
    except Exception:  # pylint: disable=broad-except
      return _quote(i, prompts)
  return 'on the batch only, on no prompt alone'
