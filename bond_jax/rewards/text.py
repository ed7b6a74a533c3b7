"""Rewards that need no model: functions of the words.

What is judged is what a reader would read: the prompt and its completion in one
where the completion goes on from the prompt, the answer alone where the prompt
was a turn of a conversation.
"""

from collections.abc import Sequence
import re

import numpy as np

from bond_jax.errors import UserError
from bond_jax.types import Context, RewardFn

# '#### 42' as GSM8K writes it, '\boxed{42}', 'the answer is 42'.
_MARKED = r'(?:####|\\boxed\{|answer is:?)\s*\$?(-?[\d,]*\.?\d+)'
_NUMBER = re.compile(r'-?[\d,]*\.?\d+')


def judged(
  prompts: Sequence[str],
  completions: Sequence[Sequence[str]],
  context: Context,
) -> list[str]:
  """The B x K texts that are judged, a prompt's completions in a row."""
  return [
    completion if context.turns else prompt + completion
    for prompt, row in zip(prompts, completions, strict=True)
    for completion in row
  ]


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

  def vader_reward(prompts, completions, context):
    texts = judged(prompts, completions, context)
    scores = [analyzer.polarity_scores(t)['compound'] for t in texts]
    return np.array(scores, np.float64).reshape(len(prompts), -1)

  return vader_reward


def matches(pattern: str) -> RewardFn:
  """Returns 1 where a regular expression is found in a completion, else 0.

  Two values tie often: `signal/fires` says how seldom there is a signal.
  """
  compiled = _compile(pattern)

  def matches_reward(prompts, completions, context):
    del prompts, context
    found = [[bool(compiled.search(y)) for y in row] for row in completions]
    return np.array(found, np.float64)

  return matches_reward


def exact_answer(key: str = 'answer', pattern: str = _MARKED) -> RewardFn:
  """Returns 1 where a completion gives the right number, else 0.

  Args:
    key: of the data's rows, whose value is the answer: a number, or a text in
      which the last match of `pattern`, else the last number, is.
    pattern: marks the answer in a completion, its first group being the number;
      the last match counts, and without one the answer is wrong.
  """
  marked = _compile(pattern)
  if not marked.groups:
    raise UserError(f'pattern {pattern!r} needs a group, which is the number.')

  def given(text: str) -> float | None:
    found = [m[1] for m in marked.finditer(text)]
    return _float(found[-1]) if found else None

  def right(i: int, row) -> float:
    text = '' if row.get(key) is None else str(row[key])
    numbers = _NUMBER.findall(text)
    if not numbers:
      raise UserError(
        f'prompt {i} has no number under {key!r} ({text[:60]!r}); it has the'
        f' fields {", ".join(row)}; name the answer with reward.args.key.'
      )
    value = given(text)
    return _float(numbers[-1]) if value is None else value

  def exact_answer_reward(prompts, completions, context):
    del prompts
    answers = [right(i, row) for i, row in enumerate(context.rows)]
    hits = [
      [given(y) == answer for y in ys]
      for answer, ys in zip(answers, completions, strict=True)
    ]
    return np.array(hits, np.float64)

  return exact_answer_reward


def _float(digits: str) -> float:
  return float(digits.replace(',', ''))


def _compile(pattern: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except re.error as e:
    raise UserError(
      f'pattern {pattern!r} is no regular expression: {e}.'
    ) from e
