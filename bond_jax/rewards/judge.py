"""Judges of pairs, made of whatever compares two completions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bond_jax.errors import UserError
from bond_jax.rewards import answers
from bond_jax.types import PreferenceFn


class Pair(NamedTuple):
  """One question: does a beat b?"""

  prompt: str
  a: str
  b: str
  row: Mapping[str, Any]  # of the data


def both_orders(
  compare: Callable[[str, str, str, Mapping[str, Any]], float],
) -> PreferenceFn:
  """Returns the judge that asks `compare` for each pair in both orders.

  `compare(prompt, a, b, row)` is the probability that a beats b. What the place
  is worth, first or second, cancels.
  """
  return all_at_once(lambda pairs: [compare(*pair) for pair in pairs])


def all_at_once(
  compare: Callable[[Sequence[Pair]], Sequence[float]],
) -> PreferenceFn:
  """The same of a function that answers many questions in one call.

  win[i, j] = (s(i, j) + 1 - s(j, i)) / 2 with s from `compare`, and
  win[j, i] = 1 - win[i, j] exactly. A UserError if s is no probability.
  """

  def judge(prompts, completions, context):
    k = len(completions[0])
    first, second = np.triu_indices(k, 1)
    i, j = np.append(first, second), np.append(second, first)
    pairs = [
      Pair(prompt, ys[a], ys[b], row)
      for prompt, ys, row in zip(prompts, completions, context.rows)
      for a, b in zip(i, j)
    ]
    wins = _probabilities(compare(pairs) if pairs else [], pairs)
    one, other = np.split(wins.reshape(len(prompts), -1), 2, axis=1)
    win = np.full((len(prompts), k, k), 0.5)
    win[:, first, second] = (one + 1 - other) / 2
    win[:, second, first] = 1 - win[:, first, second]
    return win

  return judge


def _probabilities(answer: Any, pairs: Sequence[Pair]) -> np.ndarray:
  """f64[X]; averaged, a logit or a score might look like one."""
  try:
    values = np.asarray(answers.plain(answer), np.float64)
    if values.shape != (len(pairs),):
      raise ValueError(f'the shape is {list(values.shape)}')
  except Exception as e:
    raise UserError(
      f'a judge answered {type(answer).__name__}, expected one probability for'
      f' each of {len(pairs)} pairs: {answers.reason(e)}.'
    ) from e
  bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
  if len(bad):
    pair = pairs[bad[0]]
    raise UserError(
      f'a judge answered {values[bad[0]]:g} to {pair.a[:40]!r} against'
      f' {pair.b[:40]!r}, expected a probability (prompt {pair.prompt[:60]!r}).'
    )
  return values
