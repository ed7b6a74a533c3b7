"""What counting words makes of preferences: the least a reward model must beat.

Logistic regression of a preference on the difference of the word counts of the
two texts. It knows no order of words, no part of a word and no other text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bond_jax.errors import UserError

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # C, the inverse of it


def fit(
  train: tuple[Sequence[str], np.ndarray],
  validation: tuple[Sequence[str], np.ndarray],
) -> tuple[Callable[[Sequence[str]], np.ndarray], float]:
  """Fits one per penalty, and keeps the best one on the validation pairs.

  Args:
    train, validation: texts, and pairs i64[M, 2] of their indices, the
      preferred one first.

  Returns:
    A function from texts to their scores f64[N], and the C that was kept.
  """
  # Here, because importing it takes a second, and few stages need it.
  import scipy.sparse
  from sklearn.feature_extraction.text import CountVectorizer
  from sklearn.linear_model import LogisticRegression

  texts, pairs = train
  counter = CountVectorizer(dtype=np.float64)
  try:
    counts = counter.fit_transform(texts)
  except ValueError as e:  # an empty vocabulary
    raise UserError(f'the texts hold no words to count: {e}') from e
  # Both classes have to be there: every other difference is turned around,
  # which, without an intercept, changes nothing.
  sign = np.where(np.arange(len(pairs)) % 2, -1.0, 1.0)
  x = scipy.sparse.diags(sign) @ (counts[pairs[:, 0]] - counts[pairs[:, 1]])
  texts, held_out = validation
  counts = counter.transform(texts)
  held_out = counts[held_out[:, 0]] - counts[held_out[:, 1]]
  best = (-np.inf, 0.0, None)
  for c in PENALTIES:
    model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000)
    weight = model.fit(x, sign).coef_[0]
    right = np.sign(held_out @ weight).sum()  # less those that are wrong
    if right > best[0]:
      best = (right, c, weight)
  _, c, weight = best
  return lambda texts: counter.transform(texts) @ weight, c
