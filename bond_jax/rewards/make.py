"""How a reward is made: in one thread of its own, in which it is called too.

A connection of sqlite3, an event loop or a mode of torch belongs to a thread.
What a factory makes of them is there in all calls, and in all stages alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent import futures
import inspect
from typing import Any, NamedTuple

from bond_jax import command, paths, scoring
from bond_jax.errors import UserError
from bond_jax.rewards import answers
from bond_jax.types import PreferenceFn, RewardFn

_CALLED = 'prompts', 'completions', 'context'


class Part(NamedTuple):
  """A reward that is made by function(**args), and its weight among others."""

  function: str  # module:function
  args: Mapping[str, Any]
  weight: float = 1.0


def check_arguments(
  name: str, function: Callable[..., Any], args, remedy: str = ''
) -> None:
  """A UserError if a function cannot be called with the args of a config."""
  signature = _signature(function)
  try:
    signature.bind(**args)
  except TypeError as e:
    raise UserError(
      f'{name}: {e}; args in the config are {", ".join(args) or "empty"},'
      f' allowed are {", ".join(signature.parameters) or "none"}.{remedy}'
    ) from e


def check(part: Part, section: str) -> None:
  """A UserError if a part's function makes no reward; it is not called.

  Args:
    part: of a reward.
    section: of the config, 'reward' or 'gold'.
  """
  factory, flag = command.load(part.function), f'--config.{section}'
  if 'completions' in _signature(factory).parameters:
    raise UserError(
      f'reward {part.function} is a reward itself: it takes completions, and'
      f' {section}.function names what makes one. One of TRL is taken as it is:'
      f' {flag}.function=bond_jax.rewards.trl:reward'
      f" {flag}.args=\"{{'function': '{part.function}'}}\". Let another be"
      ' returned by a function without arguments.'
    )
  remedy = f' {flag}.args={{}} takes all away that the config has.'
  check_arguments(f'reward {part.function}', factory, part.args, remedy)


def reward(
  parts: Mapping[str, Part], timeout: float = 0.0
) -> RewardFn | PreferenceFn:
  """The reward of one part, named '', or of several by their weights.

  A call that takes more than `timeout` seconds (0 = none) is a UserError. Its
  thread is given up, and the next call makes the reward anew in another one.
  """

  def begin():
    submit = scoring.worker()
    return submit, submit(_made, parts).result()

  thread = begin()

  def alone(prompts, completions, context):
    nonlocal thread
    submit, made = thread = thread or begin()
    future = submit(made, prompts, completions, context)
    if not futures.wait([future], timeout or None).done:
      thread = None
      raise UserError(
        f'reward {alone.__name__} took more than reward.timeout = {timeout:g} s'
        f' for {len(prompts)} prompt(s) ({answers.quote(0, prompts)}).'
      )
    return future.result()

  alone.__name__ = scoring.name_of(thread[1])
  return alone


def _made(parts: Mapping[str, Part]) -> RewardFn | PreferenceFn:
  rewards = {name: _made_of(part) for name, part in parts.items()}
  if '' in rewards:
    return rewards['']

  def weighted(*asked):
    values = {k: scoring.call(f, *asked)[0] for k, f in rewards.items()}
    weights = {k: part.weight for k, part in parts.items()}
    total, scores = answers.combine(values, weights, weighted.__name__)
    return scores or total

  weighted.__name__ = ' + '.join(rewards)
  return weighted


def _made_of(part: Part) -> RewardFn | PreferenceFn:
  """Calls a factory; a UserError unless it returns what can be called."""
  name = f'reward {part.function}'
  try:
    made = command.load(part.function)(**_paths(part.args))
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
  try:
    _signature(made).bind(*_CALLED)
  except TypeError as e:
    raise UserError(
      f'{name} returned a function of {_signature(made)}, {expected} ({e}).'
    ) from e

  def named(*asked):
    return made(*asked)

  # In errors; "reward", as many call it, or "<lambda>" would tell nobody which.
  name = scoring.name_of(made)
  named.__name__ = name if ':' in name else part.function
  return named


def _paths(args: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments, those that begin with ~/ as the paths that they mean."""
  return {
    k: paths.expanded(v) if isinstance(v, str) and v.startswith('~/') else v
    for k, v in args.items()
  }


def _signature(function: Callable[..., Any]) -> inspect.Signature:
  """Of what is not written in Python, one that takes everything."""
  try:
    return inspect.signature(function)
  except ValueError:
    return inspect.signature(lambda *args, **kwargs: None)
