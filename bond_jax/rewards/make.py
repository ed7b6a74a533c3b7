"""How a reward is made from a config, in one thread in which it is called too.

A connection of sqlite3, an event loop or a mode of torch belongs to a thread:
what a factory makes of them is there in all calls, and in all stages alike.
"""

from collections.abc import Callable, Mapping
from concurrent import futures
import importlib
import inspect
import math
import time
from typing import Any, NamedTuple

import ml_collections

from bond_jax.errors import one_line, UserError
from bond_jax.rewards import answers, calling
from bond_jax.runs import paths
from bond_jax.runs.settings import configs, fields
from bond_jax.types import PreferenceFn, RewardFn

_CALLED = 'prompts', 'completions', 'context'
_SLICE = 0.5  # seconds of a wait


class Part(NamedTuple):
  """A reward that is made by function(**args), and its weight among others."""

  function: str  # module:function
  args: Mapping[str, Any]
  weight: float = 1.0


def check_reward(
  section: ml_collections.ConfigDict, name: str = 'reward'
) -> None:
  """A UserError for a section 'reward' or 'gold' that cannot be made.

  No factory is called.
  """
  flag = f'--config.{name}'
  for part in _parts(section).values():
    factory = load(part.function)
    if 'completions' in fields.signature_of(factory).parameters:
      raise UserError(
        f'reward {part.function} is a reward itself: it takes completions, and'
        f' {name}.function names what makes one. One of TRL is taken as it is:'
        f' {flag}.function=bond_jax.rewards.trl:reward'
        f" {flag}.args=\"{{'function': '{part.function}'}}\". Let another be"
        ' returned by a function without arguments.'
      )
    fields.check_arguments(
      f'reward {part.function}', factory, part.args,
      f' {flag}.args={{}} takes all away that the config has.',
    )  # fmt: skip


def make_reward(
  config: ml_collections.ConfigDict, section, workdir: str
) -> RewardFn | PreferenceFn:
  """The reward of a section: `function` called with `args`, or many `parts`.

  Of parts, each with a function, args and a weight, it is the weighted sum, of
  judges the weighted mean. In a string argument '{workdir}' stands for this
  run's folder, '{reference}' for that of the run it starts from.
  """
  reference = configs.reference_dir(config, workdir)

  def filled(value):
    if not isinstance(value, str):
      return value
    value = value.replace('{reference}', reference)
    return value.replace('{workdir}', workdir)

  parts = {
    name: part._replace(args={k: filled(v) for k, v in part.args.items()})
    for name, part in _parts(section).items()
  }
  return reward(parts, section.timeout if 'timeout' in section else 0.0)


def _parts(section) -> dict[str, Part]:
  """The parts of a section; without any, the section itself, named ''."""
  if section.get('parts'):
    return {
      k: Part(v.function, v.args, v.weight) for k, v in section.parts.items()
    }
  return {'': Part(section.function, section.args)}


def make_ask(
  config: ml_collections.ConfigDict, name: str, workdir: str, **rules: Any
) -> Callable[..., calling.Scored]:
  """The section `name`, made and asked as it says; see `calling.asker`."""
  section = config[name]
  names = ('missing_eos_penalty', 'length_penalty', 'failure', 'retries')
  rules = {k: section[k] for k in names if k in section} | rules
  return calling.asker(make_reward(config, section, workdir), **rules)


def reward(
  parts: Mapping[str, Part], timeout: float = 0.0
) -> RewardFn | PreferenceFn:
  """The reward of one part, named '', or of several by their weights.

  A call that takes more than `timeout` seconds (0 = none) is a UserError. Its
  thread is given up, and the next call makes the reward anew in another one.
  """

  def begin():
    submit = calling.worker()
    made = submit(_made, parts)
    _wait(made, None)
    return submit, made.result()

  thread = begin()

  def alone(prompts, completions, context):
    nonlocal thread
    submit, made = thread = thread or begin()
    future = submit(made, prompts, completions, context)
    if not _wait(future, timeout or None):
      thread = None
      raise UserError(
        f'reward {alone.__name__} took more than reward.timeout = {timeout:g} s'
        f' for {len(prompts)} prompt(s) ({answers.quote(0, prompts)}).'
      )
    return future.result()

  alone.__name__ = calling.name_of(thread[1])
  return alone


def _wait(future: futures.Future, timeout: float | None) -> bool:
  """Whether the future is done within so many seconds.

  Waits in slices: the handler of a signal that another thread got, or that
  came just before the wait, runs only when this thread wakes.
  """
  until = time.monotonic() + (math.inf if timeout is None else timeout)
  while not future.done() and (left := until - time.monotonic()) > 0:
    futures.wait([future], min(left, _SLICE))
  return future.done()


def _made(parts: Mapping[str, Part]) -> RewardFn | PreferenceFn:
  rewards = {name: _made_of(part) for name, part in parts.items()}
  if '' in rewards:
    return rewards['']
  weights = {name: part.weight for name, part in parts.items()}

  def weighted(*texts):
    values = {k: calling.call(f, *texts)[0] for k, f in rewards.items()}
    total, scores = answers.combine(values, weights, weighted.__name__)
    return scores or total

  weighted.__name__ = ' + '.join(rewards)
  return weighted


def _made_of(part: Part) -> RewardFn | PreferenceFn:
  """Calls a factory; a UserError unless it returns a reward."""
  name = f'reward {part.function}'
  args = {
    k: paths.expanded(v) if isinstance(v, str) and v.startswith('~/') else v
    for k, v in part.args.items()
  }
  try:
    made = load(part.function)(**args)
  except UserError:
    raise
  except (Exception, SystemExit) as e:
    raise UserError(
      f'{name} raised {answers.reason(e)}; --debug shows where.'
    ) from e
  expected = f'expected a function of ({", ".join(_CALLED)})'
  if not callable(made) or inspect.iscoroutinefunction(made):
    got = 'an async function' if callable(made) else f'{made!r:.60}'
    raise UserError(f'{name} returned {got}, {expected}.')
  signature = fields.signature_of(made)
  try:
    signature.bind(*_CALLED)
  except TypeError as e:
    raise UserError(
      f'{name} returned a function of {signature}, {expected} ({e}).'
    ) from e

  named = lambda *texts: made(*texts)  # whose name can be set
  # For errors: 'reward' or '<lambda>', as many are called, tells nobody which.
  name = calling.name_of(made)
  named.__name__ = name if ':' in name else part.function
  return named


def load(reference: str) -> Callable[..., Any]:
  """Returns the function `module:function`; a UserError if it is not there."""
  module, _, name = reference.partition(':')
  if not module or not name:
    raise UserError(
      f'{reference!r} names no function; write it as "module:function", for'
      ' instance "bond_jax.rewards.ridge:ridge".'
    )
  try:
    loaded = importlib.import_module(module)
  except ModuleNotFoundError as e:
    raise UserError(
      f'{reference!r}: cannot import {e.name!r}; is it installed, and is the'
      ' folder that holds it on PYTHONPATH?'
    ) from e
  except Exception as e:
    raise UserError(
      f'{reference!r}: importing it raised {type(e).__name__}: {one_line(e)};'
      ' --debug shows where.'
    ) from e
  if not callable(getattr(loaded, name, None)):
    raise UserError(f'{reference!r}: {module!r} has no function {name!r}.')
  return getattr(loaded, name)
