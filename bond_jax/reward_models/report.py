"""The quality of a reward model on held-out texts, for people to read.

Beside it stands a bag of words, the least that a reward model must beat.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bond_jax.data import preferences
from bond_jax.errors import UserError
from bond_jax.measures import curves
from bond_jax.measures import preferences as measures

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # C, the inverse of it


def leads(score: np.ndarray, judged: preferences.Judged) -> np.ndarray:
  """The score of the preferred text less that of the other, f64[M]."""
  return score[judged.pairs[:, 0]] - score[judged.pairs[:, 1]]


def bag_of_words(
  train: preferences.Judged, validation: preferences.Judged
) -> tuple[Callable[[Sequence[str]], np.ndarray], float]:
  """Logistic regression of preferences on differences of word counts.

  Returns a function from texts to their scores f64[N], and the C that was best
  on the validation pairs.
  """
  # Here, because importing it takes a second, and few stages need it.
  import scipy.sparse
  from sklearn.feature_extraction.text import CountVectorizer
  from sklearn.linear_model import LogisticRegression

  counter = CountVectorizer(dtype=np.float64)
  try:
    counts = counter.fit_transform(train.texts)
  except ValueError as e:  # an empty vocabulary
    raise UserError(f'the texts hold no words to count: {e}') from e
  # Both classes are needed: every other difference is turned around, which
  # changes nothing without an intercept.
  sign = np.where(np.arange(len(train.pairs)) % 2, -1.0, 1.0)
  x = scipy.sparse.diags(sign) @ leads(counts, train)
  held_out = leads(counter.transform(validation.texts), validation)
  best = (-np.inf, 0.0, None)
  for c in PENALTIES:
    model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000)
    weight = model.fit(x, sign).coef_[0]
    right = np.sign(held_out @ weight).sum()  # less those that are wrong
    if right > best[0]:
      best = (right, c, weight)
  _, c, weight = best
  return lambda texts: counter.transform(texts) @ weight, c


def report(
  scores: dict[str, np.ndarray], judged: dict[str, preferences.Judged]
) -> dict[str, Any]:
  """The summary of a trained model, of its scores of validation and test texts.

  Scores are divided by the temperature at which the validation pairs have the
  smallest log-loss; the reward that others read is divided by it too.
  """
  train, held_out, test = (judged[split] for split in preferences.SPLITS)
  temperature = measures.temperature(leads(scores['validation'], held_out))
  lead = leads(scores['test'] / temperature, test)
  words, penalty = bag_of_words(train, held_out)
  word_lead = leads(words(test.texts), test)
  word_lead /= measures.temperature(leads(words(held_out.texts), held_out))
  both = np.stack([measures.right(lead), measures.right(word_lead)], 1)
  draws = measures.bootstrap(both, test.unit[test.pairs])
  error, table = measures.calibration(lead)
  each = lambda count: {k: count(judged[k]) for k in preferences.SPLITS}
  found = {
    'texts': each(lambda part: len(part.texts)),
    'pairs': each(lambda part: len(part.pairs)),
    'left_out': each(lambda part: part.left_out),
    'bad_rows': each(lambda part: len(part.bad)),
    'accuracy': float(both[:, 0].mean()),
    'accuracy_interval': curves.interval(draws[:, 0]),
    'log_loss': measures.log_loss(lead),
    'temperature': temperature,
    'calibration_error': error,
    'calibration': table,
    'bag_of_words': {
      'accuracy': float(both[:, 1].mean()),
      'accuracy_interval': curves.interval(draws[:, 1]),
      'log_loss': measures.log_loss(word_lead),
      'c': penalty,
    },
    'lead': float((both[:, 0] - both[:, 1]).mean()),
    'lead_interval': curves.interval(draws[:, 0] - draws[:, 1]),
  }
  if test.rating is not None:
    from scipy import stats  # importing it takes a second

    rank = stats.spearmanr(scores['test'], test.rating).statistic
    found['test_pearson'] = float(
      np.corrcoef(scores['test'], test.rating)[0, 1]
    )
    found['test_spearman'] = float(rank)
  return found


def headlines(summary: dict[str, Any]) -> list[tuple]:
  """A table of the summary, for the terminal."""
  words = summary['bag_of_words']
  rows = [
    ('', 'value'),
    ('loss', summary['loss']),
    ('members', summary['members']),
    ('parameters, of all', summary['parameters']),
    ('best of the steps by validation', summary['best_step']),
    ('training pairs', summary['pairs']['train']),
    ('test pairs', summary['pairs']['test']),
    ('of texts', summary['texts']['test']),
    ('accuracy on test pairs', summary['accuracy']),
    ('  95 % interval over texts', summary['accuracy_interval']),
    ('accuracy of a bag of words', words['accuracy']),
    ('  95 % interval over texts', words['accuracy_interval']),
    ('ahead of the bag of words by', summary['lead']),
    ('  95 % interval over texts', summary['lead_interval']),
    ('log-loss, nats', summary['log_loss']),
    ('  of the bag of words', words['log_loss']),
    ('expected calibration error', summary['calibration_error']),
  ]
  rows += [
    (
      f'  says {b["from"]:.2f} to {b["to"]:.2f}: {b["pairs"]} pairs, is right',
      b['accuracy'],
    )
    for b in summary['calibration']
  ]
  return [*rows, ('seconds', summary['seconds'])]
