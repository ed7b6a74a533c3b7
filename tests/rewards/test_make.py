"""How a reward is made: where its code runs, and what a factory may return."""

import asyncio
import decimal
import functools
import operator
import os
import re
import signal
import sqlite3
import sys
import threading
import time

from absl import flags
import ml_collections
from ml_collections import config_flags
import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards import calling, make
from bond_jax.runs.settings import defaults

COMPLETIONS = [['a', 'bbb'], ['cc', '']]
BATCH = ['p', 'q'], COMPLETIONS, toy.context(COMPLETIONS)
LENGTHS = [[1, 3], [2, 0]]


def made(function, timeout=0.0, **args):
  return make.reward({'': make.Part(f'test_make:{function}', args)}, timeout)


# -- one thread


def each(f):
  """The reward f(completion)."""
  return lambda prompts, completions, context: [
    [f(y) for y in ys] for ys in completions
  ]


def connection():
  db = sqlite3.connect(':memory:')  # refuses all other threads
  return each(lambda y: db.execute('select length(?)', [y]).fetchone()[0])


def event_loop():
  asyncio.set_event_loop(asyncio.new_event_loop())

  async def length(y):
    await asyncio.sleep(0)
    return len(y)

  return each(lambda y: asyncio.get_event_loop().run_until_complete(length(y)))


def own_loop():
  async def length(y):
    return len(y)

  return each(lambda y: asyncio.run(length(y)))


def local():
  """As torch keeps its modes."""
  mode = threading.local()
  mode.scale = 1
  return each(lambda y: len(y) * mode.scale)


def context():
  """As decimal and asyncio keep theirs."""
  decimal.getcontext().prec = 1
  return each(lambda y: float(len(y) + 0 * decimal.Decimal('1.5')) * exact())


def exact():
  return decimal.getcontext().prec


def ident():
  here = threading.get_ident()
  assert here != threading.main_thread().ident
  return each(lambda y: len(y) if threading.get_ident() == here else -1)


SURROUNDINGS = ['connection', 'event_loop', 'own_loop', 'local', 'context',
                'ident']  # fmt: skip


@pytest.mark.parametrize('name', SURROUNDINGS)
def test_a_reward_is_called_where_it_was_made(name):
  """From the main thread, as in the probe, and from one that overlaps."""
  reward = made(name)
  submit = calling.worker()
  for call in (
    calling.call,
    lambda *asked: submit(calling.call, *asked).result(),
  ):
    value, _ = call(reward, *BATCH)
    np.testing.assert_array_equal(value, LENGTHS)


@pytest.mark.parametrize('name', SURROUNDINGS)
def test_parts_share_the_thread(name):
  parts = {
    'one': make.Part(f'test_make:{name}', {}, 2.0),
    'other': make.Part('test_make:ident', {}, 1.0),
  }
  value, found = calling.call(make.reward(parts), *BATCH)
  np.testing.assert_array_equal(value, 3 * np.array(LENGTHS))
  np.testing.assert_array_equal(found['other'], LENGTHS)


def alarm(when, swallow=False):
  """A time limit that only the main thread can have."""

  def limited(y):
    try:
      signal.signal(signal.SIGALRM, signal.SIG_DFL)
    except ValueError:
      if not swallow:
        raise
      return 0.0
    return len(y)

  if when == 'made':
    limited('')
  return each(limited)


@pytest.mark.parametrize('when', ['made', 'called'])
def test_a_signal_is_refused_at_the_first_call_with_the_remedy(when):
  with pytest.raises(UserError) as e:
    calling.call(made('alarm', when=when), *BATCH)
  assert re.search(
    'reward test_make:alarm raised ValueError: signal only .*SIGALRM.*'
    'timeout_seconds=None.*reward.timeout', str(e.value)
  )  # fmt: skip


def test_a_signal_whose_refusal_is_swallowed_is_warned_of(capsys):
  texts = [[f'{p} {i}' for i in range(4)] for p in 'pq']
  ask = calling.asker(made('alarm', when='called', swallow=True))
  ask(['p', 'q'], texts, toy.context(texts))
  said = capsys.readouterr().out
  assert 'warning: reward test_make:alarm gave 0 to all completions' in said


# -- a time limit

factories = []  # a thread for each call of `slow`


def slow(seconds=60.0, error=None):
  """Hangs over a prompt 'q'; its connection is of the thread that made it."""
  reward, here = connection(), threading.get_ident()
  factories.append(here)

  def slow_reward(prompts, completions, context):
    assert threading.get_ident() == here
    if error:
      raise error('mine')
    if 'q' in prompts:
      time.sleep(seconds)
    return reward(prompts, completions, context)

  return slow_reward


def test_a_call_beyond_its_time_is_given_up_and_the_reward_made_anew():
  factories.clear()
  reward = made('slow', timeout=1.0)
  alone = ['p'], COMPLETIONS[:1], toy.context(COMPLETIONS[:1])
  says = r'test_make:slow took more than reward.timeout = 1 s for 2 .*0: .p'
  with pytest.raises(UserError, match=says):
    calling.call(reward, *BATCH)
  assert len(factories) == 1  # no reward is made that nobody asks
  for _ in range(2):
    np.testing.assert_array_equal(calling.call(reward, *alone)[0], LENGTHS[:1])
  assert len(set(factories)) == len(factories) == 2
  got = calling.score(reward, *BATCH, failure='skip')
  np.testing.assert_array_equal(got.weight, [1, 0])
  np.testing.assert_array_equal(got.value[0], LENGTHS[0])


def test_a_time_out_of_the_reward_s_own_is_its_own():
  factories.clear()
  for error in (TimeoutError, asyncio.TimeoutError):
    with pytest.raises(UserError, match='slow raised TimeoutError: mine'):
      calling.call(made('slow', timeout=30.0, error=error), *BATCH)
  assert len(factories) == 2


def test_a_section_s_rules_are_those_that_count():
  section = defaults.reward('test_make:slow') | {'timeout': 1.0}
  gold = dict(function='test_make:ident', args={})  # has none
  config = ml_collections.ConfigDict(
    dict(reference='', reward=section, gold=gold)
  )
  with pytest.raises(UserError, match='reward.timeout = 1 s'):
    make.make_ask(config, 'reward', '')(*BATCH)
  config.reward.update(function='test_make:ident', length_penalty=0.5)
  for name, share in (('reward', 0.5), ('gold', 1)):
    value = make.make_ask(config, name, '')(*BATCH).value
    np.testing.assert_array_equal(value, share * np.array(LENGTHS))


# -- what a factory makes


class Instance:
  def __call__(self, prompts, completions, context):
    return each(len)(prompts, completions, context)

  method = __call__


def made_as(kind):
  return {
    'lambda': lambda *asked: each(len)(*asked),
    'instance': Instance(),
    'method': Instance().method,
    'partial': functools.partial(lambda a, *asked: each(len)(*asked), 1),
    'nothing': None,
    'numbers': [0.0],
    'two': lambda prompts, completions: [[0.0]],
    'keywords': lambda prompts, completions, **columns: [0.0],
    'more': lambda prompts, completions, context, model: [[0.0]],
    'async': asynchronous,
    'native': operator.itemgetter(0),
  }[kind]


async def asynchronous(prompts, completions, context):
  return [[0.0]]


@pytest.mark.parametrize('kind', ['lambda', 'instance', 'method', 'partial'])
def test_whatever_can_be_called_is_a_reward(kind):
  reward = made('made_as', kind=kind)
  np.testing.assert_array_equal(calling.call(reward, *BATCH)[0], LENGTHS)
  assert calling.name_of(reward) == 'test_make:made_as'


@pytest.mark.parametrize(
  'kind, got',
  [
    ('nothing', 'returned None,'),
    ('numbers', r'returned \[0.0\],'),
    ('two', r'returned a function of \(prompts, completions\),'),
    ('keywords', r'a function of \(prompts, completions, \*\*columns\),'),
    ('more', "completions, context, model.*argument: 'model'"),
    ('async', 'returned an async function,'),
  ],
)
def test_what_is_none_is_said_when_it_is_made(kind, got):
  with pytest.raises(UserError, match=got) as e:
    made('made_as', kind=kind)
  assert str(e.value).startswith('reward test_make:made_as returned')
  assert '(prompts, completions, context)' in str(e.value)
  with pytest.raises(UserError, match=got):
    make.reward({'a': make.Part('test_make:made_as', {'kind': kind}, 1.0)})


def trl(prompts, completions, **columns):
  return [float(len(y)) for y in completions]


def bare(prompts, completions, context):
  return [[0.0]]


def leaves():
  raise SystemExit(0)


@pytest.mark.parametrize('name', ['trl', 'bare'])
@pytest.mark.parametrize('section', ['reward', 'gold'])
def test_a_reward_in_the_place_of_its_factory(name, section):
  named = ml_collections.ConfigDict(dict(function=f'test_make:{name}', args={}))
  with pytest.raises(UserError, match='is a reward itself') as e:
    make.check_reward(named, section)
  flag = re.search(rf'--config.{section}.args="(.*?)"', str(e.value))[1]
  assert flag == f"{{'function': 'test_make:{name}'}}"
  assert f'--config.{section}.function=bond_jax.rewards.trl:r' in str(e.value)


def test_a_factory_may_not_end_the_process():
  with pytest.raises(UserError, match='test_make:leaves raised SystemExit: 0'):
    made('leaves')


def test_what_is_not_written_in_python_is_tried():
  named = ml_collections.ConfigDict(dict(function='builtins:dict', args={}))
  make.check_reward(named)
  with pytest.raises(UserError, match=r'builtins:dict returned \{\},'):
    make.reward({'': make.Part('builtins:dict', {})})
  with pytest.raises(UserError, match='test_make:made_as raised TypeError'):
    calling.call(made('made_as', kind='native'), *BATCH)


# -- the line of the README


def given(monkeypatch, *lines):
  """The demo's config with these flags, as a command reads them."""
  values = flags.FlagValues()
  lines = ['x', f'--config={toy.ROOT}/configs/demo.py', *lines]
  monkeypatch.setattr(sys, 'argv', lines)
  config = config_flags.DEFINE_config_file(
    'config', lock_config=True, flag_values=values
  )
  values(lines)
  return config.value


def test_the_readme_s_line_for_a_reward_works_on_the_demo(
  tmp_path, monkeypatch
):
  with open(os.path.join(toy.ROOT, 'README.md')) as f:
    line = re.search(r'`(--config.reward.function=[^`]*)`', f.read())[1]
  (tmp_path / 'my_module.py').write_text(
    'def my_factory():\n'
    '  return lambda prompts, completions, context: [\n'
    '    [len(y) for y in ys] for ys in completions\n'
    '  ]\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  config = given(monkeypatch, *line.split())
  make.check_reward(config.reward)
  reward = make.make_reward(config, config.reward, '')
  np.testing.assert_array_equal(calling.call(reward, *BATCH)[0], LENGTHS)
  # Without it the demo's own argument is left over, and the remedy is said.
  config = given(monkeypatch, line.split()[0])
  with pytest.raises(UserError, match="'path'.* --config.reward.args={}"):
    make.check_reward(config.reward)
