"""How good a reward model is on texts it has not seen, for people to read."""

from __future__ import annotations

from typing import Any

import numpy as np

from bond_jax.data import preferences
from bond_jax.measures import curves
from bond_jax.measures import preferences as measures
from bond_jax.reward_models import bag_of_words


def leads(score: np.ndarray, judged: preferences.Judged) -> np.ndarray:
  """The score of the preferred text less that of the other, f64[M]."""
  return score[judged.pairs[:, 0]] - score[judged.pairs[:, 1]]


def report(
  scores: dict[str, np.ndarray], judged: dict[str, preferences.Judged]
) -> dict[str, Any]:
  """What the summary says of a trained model, all of the test split.

  `scores` are those of the texts of the validation and the test split.

  Scores are divided by the temperature at which the validation pairs have the
  smallest log-loss; the reward that others read is divided by it too.
  """
  train, held_out, test = (judged[split] for split in preferences.SPLITS)
  temperature = measures.temperature(leads(scores['validation'], held_out))
  lead = leads(scores['test'] / temperature, test)
  words, penalty = bag_of_words.fit(
    (train.texts, train.pairs), (held_out.texts, held_out.pairs)
  )
  lead_held_out = leads(words(held_out.texts), held_out)
  word_lead = leads(words(test.texts), test)
  word_lead /= measures.temperature(lead_held_out)
  both = np.stack([measures.right(lead), measures.right(word_lead)], 1)
  draws = measures.bootstrap(both, test.unit[test.pairs])
  error, table = measures.calibration(lead)
  found = {
    'texts': {split: len(judged[split].texts) for split in preferences.SPLITS},
    'pairs': {split: len(judged[split].pairs) for split in preferences.SPLITS},
    'left_out': {split: judged[split].left_out for split in preferences.SPLITS},
    'bad_rows': {split: len(judged[split].bad) for split in preferences.SPLITS},
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
