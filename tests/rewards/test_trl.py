"""Rewards that were written for TRL."""

import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards import calling, make
from bond_jax.runs.settings import defaults, fields

PROMPTS = ['two and two', 'one']
COMPLETIONS = [['4', 'four'], ['1', '4']]
ROWS = [
  {'solution': '4', 'prompt': 'hidden', 'completion': 'hidden'},
  {'solution': '1', 'level': 3},
]
seen = []


def exact(prompts, completions, solution, **kwargs):
  seen.append(dict(prompts=prompts, solution=solution, **kwargs))
  return [float(y == right) for y, right in zip(completions, solution)]


def said(completions, **kwargs):
  """As TRL's own rewards read a conversation."""
  seen.append(kwargs)
  return [float(len(message[0]['content'])) for message in completions]


async def later(completions, **kwargs):
  return [float(len(y)) for y in completions]


def silent(completions, solution, **kwargs):
  return [1.0 if s == '4' else None for s in solution]


def short(completions, **kwargs):
  return [1.0] * (len(completions) - 1)


def ask(name, turns=False, rows=ROWS):
  seen.clear()
  args = {'function': f'test_trl:{name}'}
  reward = make.reward({'': make.Part('bond_jax.rewards.trl:reward', args)})
  context = toy.context(COMPLETIONS, rows=rows, turns=turns)
  return calling.call(reward, PROMPTS, COMPLETIONS, context)[0].tolist()


def test_flat_lists_and_a_list_for_each_field():
  assert ask('exact') == [[1, 0], [1, 0]]
  assert seen == [dict(
    prompts=['two and two'] * 2 + ['one'] * 2,
    solution=['4', '4', '1', '1'],
    level=[None, None, 3, 3],
    completion_ids=[[52], [*b'four'], [49], [52]],
  )]  # fmt: skip


def test_a_conversation_is_of_messages():
  messages = [{'role': 'system', 'content': 'Be brief.'},
              {'role': 'user', 'content': 'one'}]  # fmt: skip
  rows = [{'text': 'two and two'}, {'messages': messages}]
  assert ask('said', turns=True, rows=rows) == [[1, 4], [1, 1]]
  user = [{'role': 'user', 'content': 'two and two'}]
  assert seen[0]['prompts'] == [user, user, messages, messages]


def test_an_async_function_is_waited_for():
  assert ask('later') == [[1, 4], [1, 1]]


def test_none_counts_nothing():
  assert ask('silent') == [[1, 1], [0, 0]]


def test_the_function_is_named_among_the_code_that_a_config_runs():
  section = defaults.reward('bond_jax.rewards.trl:reward', function='mine:f')
  assert 'mine:f' in fields.functions({'reward': section})


def test_errors_name_the_function():
  with pytest.raises(UserError, match=r'reward test_trl:short returned list'):
    ask('short')
  with pytest.raises(UserError, match="test_trl:exact raised .*'solution'"):
    ask('exact', rows=[{}, {}])
  with pytest.raises(UserError, match="'test_trl' has no function 'none'"):
    ask('none')


def test_its_numbers_are_any_array_s():
  assert ask('arrays') == [[1, 4], [1, 1]]


def arrays(completions, **kwargs):
  return np.array([len(y) for y in completions], np.int32)
