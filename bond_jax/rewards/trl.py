"""Reward functions that were written for TRL, as they are."""

import asyncio
import inspect

from bond_jax.rewards import make
from bond_jax.types import RewardFn

# What TRL passes by these names is no column of the data.
_OWN = {'prompt', 'prompts', 'completion', 'completions', 'completion_ids'}


def reward(function: str) -> RewardFn:
  """Returns TRL's f(prompts, completions, **columns) as a reward.

  It is called with flat lists, an entry for each completion: texts, or lists
  of messages in a conversation; the tokens as `completion_ids`; and each field
  of the rows. None counts 0, as in TRL's sum.

  Args:
    function: module:function; it may be async.
  """
  scorer = make.load(function)

  def trl_reward(prompts, completions, context):
    size = len(completions[0])
    each = lambda values: [value for value in values for _ in range(size)]
    questions, texts = prompts, [y for ys in completions for y in ys]
    if context.turns:
      questions = [
        row.get('messages') or [{'role': 'user', 'content': prompt}]
        for prompt, row in zip(prompts, context.rows)
      ]
      texts = [[{'role': 'assistant', 'content': y}] for y in texts]
    names = {name for row in context.rows for name in row} - _OWN
    values = scorer(
      prompts=each(questions),
      completions=texts,
      completion_ids=[y for ys in context.tokens for y in ys],
      **{k: each([row.get(k) for row in context.rows]) for k in names},
    )
    if inspect.iscoroutine(values):
      values = asyncio.run(values)
    values = [0.0 if value is None else value for value in values]
    return [values[i : i + size] for i in range(0, len(values), size)]

  trl_reward.__name__ = function  # for errors
  return trl_reward
