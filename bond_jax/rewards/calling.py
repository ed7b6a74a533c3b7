"""How rewards are called, checked and survived: they are other people's code.

A reward may raise, hang, return NaN or the wrong shape. Any of these ends in
one line that names it and the prompt, or, if the config says so, in a prompt
that is left out of the step and counted. `rewards.make` makes rewards.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import queue
import threading
import time
from typing import Any, NamedTuple
import weakref

import numpy as np

from bond_jax.devices import hosts, shares
from bond_jax.errors import UserError
from bond_jax.rewards import answers
from bond_jax.types import Context, PreferenceFn, RewardFn

_MANY = 8  # distinct completions that hardly all deserve one number


class Scored(NamedTuple):
  """The rewards of B prompts with K completions each."""

  value: np.ndarray  # f32[B, K]; of a judge f32[B, K, K], P(i beats j)
  weight: np.ndarray  # f32[B], 0: the reward failed on this prompt
  metrics: dict[str, float]
  # Parts with one number for all completions, and it; '' is the total.
  constant: tuple[tuple[str, float], ...] = ()
  error: str = ''  # of a batch without any reward; see `join`


def known(value: np.ndarray) -> Scored:
  """The rewards f32[B, K] of completions that were scored before."""
  return Scored(value, np.ones(len(value), np.float32), {})


def asker(
  reward: RewardFn | PreferenceFn, **rules: Any
) -> Callable[..., Scored]:
  """Returns `score` of this reward by these rules, for all of a stage.

  Warns once where a reward, or a part of it, has one number for everything.
  """
  told = set()

  def ask(*texts) -> Scored:
    found = score(reward, *texts, **rules)
    for part, value in found.constant:
      if part not in told:
        told.add(part)
        name = f'{name_of(reward)}[{part!r}]' if part else name_of(reward)
        hosts.say(
          f'warning: reward {name} gave {value:g} to all completions of a batch'
          ' of different ones: nothing is learnt from that. Does a library'
          ' swallow its errors? See docs/rewards.md, "One thread".'
        )
    return found

  return ask


def score(
  reward: RewardFn | PreferenceFn,
  prompts: Sequence[str],
  completions: Sequence[Sequence[str]],
  context: Context,
  *,
  missing_eos_penalty: float = 0.0,
  length_penalty: float = 0.0,
  failure: str = 'stop',
  retries: int = 0,
) -> Scored:
  """Calls a reward as the config says; the penalties are taken off scores.

  Args:
    reward, prompts, completions, context: any; B, K of each, see `Context`.
    missing_eos_penalty, length_penalty: of completions cut, and per token.
    failure: 'stop', a UserError; 'skip', the prompts on which the reward fails
      alone too have weight 0. If these are all, `join` raises.
    retries: further attempts before that, after 1, 2, 4 ... 30 seconds.
  """

  def attempt(*batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    for i in range(retries):
      try:
        return call(reward, *batch)
      except UserError:
        time.sleep(min(2**i, 30))
    return call(reward, *batch)

  weight, error = np.ones(len(prompts), np.float32), ''
  try:
    value, parts = attempt(prompts, completions, context)
  except UserError:
    if failure != 'skip':
      raise
    value, parts, weight, error = _one_by_one(
      attempt, prompts, completions, context
    )
  if value.ndim == 3 and (missing_eos_penalty or length_penalty):
    raise UserError(
      f'reward {name_of(reward)} compares pairs: missing_eos_penalty and'
      ' length_penalty, which are taken off a score, must be 0.'
    )
  constant = _constant({'': value, **parts}, weight > 0, completions)
  if value.ndim == 2:
    lengths = [[len(y) for y in row] for row in context.tokens]
    penalty = missing_eos_penalty * ~context.finished
    penalty = penalty + length_penalty * np.array(lengths, np.float32)
    value = (value - penalty).astype(np.float32)
  metrics = {
    f'score/{name}': float(part[weight > 0].mean())
    for name, part in parts.items()
  }
  if failure == 'skip':
    metrics['reward/skipped'] = float((weight == 0).sum())
  return Scored(value, weight, metrics, constant, error)


def _constant(
  values: Mapping[str, np.ndarray], rewarded: np.ndarray, completions
) -> tuple[tuple[str, float], ...]:
  """The names whose values are one number for many distinct completions."""
  texts = {y for ys, used in zip(completions, rewarded) if used for y in ys}
  if len(texts) < _MANY:
    return ()
  some = {name: value[rewarded] for name, value in values.items()}
  return tuple((k, float(v.flat[0])) for k, v in some.items() if not np.ptp(v))


def join(parts: Sequence[tuple[np.ndarray, Scored | None]]) -> Scored:
  """The rewards of a batch, of the rows and rewards of each host.

  The metrics are those of one host that has all rows, but for rounding. A
  UserError if no prompt was rewarded, or if the rewards are of two kinds.
  """
  found = [part for _, part in parts if part]
  good = [part for part in found if part.weight.any()]
  if not good:
    raise UserError(
      f'the reward fails on every prompt of a batch: {found[0].error}'
    )
  _check_alike((part.value, part.metrics) for part in good)

  def filled(part: Scored):  # what a host without a reward cannot know
    shape = len(part.value), *good[0].value.shape[1:]
    value = part.value if part.weight.any() else np.full(shape, np.float32(0.5))
    return value, part.weight

  value, weight = shares.join(
    [(rows, part and filled(part)) for rows, part in parts]
  )
  share = np.array([part.weight.sum() for part in good])
  share = share / share.sum()
  metrics = {
    name: sum(s * part.metrics[name] for s, part in zip(share, good))
    for name in good[0].metrics
  }
  if 'reward/skipped' in metrics:
    metrics['reward/skipped'] = float((weight == 0).sum())
  return Scored(value, weight, metrics)


def call(
  reward: RewardFn | PreferenceFn,
  prompts: Sequence[str],
  completions: Sequence[Sequence[str]],
  context: Context,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The value as in `Scored`, and its parts, f32[B, K], where it has any.

  A UserError if it is not that names the reward and the first such prompt.
  """
  name, shape = name_of(reward), (len(prompts), len(completions[0]))
  try:
    values = reward(prompts, completions, context)
  except UserError:
    raise  # complete as it is
  except (Exception, SystemExit) as e:
    where = _first_that_raises(reward, prompts, completions, context)
    raise UserError(
      f'reward {name} raised {answers.reason(e)} ({where}).'
    ) from e
  if not isinstance(values, Mapping):
    return answers.check(values, shape, prompts, name), {}
  parts = {
    k: answers.check(v, shape, prompts, f'{name}[{k!r}]')
    for k, v in values.items()
  }
  total, parts = answers.combine(parts, dict.fromkeys(parts, 1.0), name)
  if total.ndim == 3:
    total = answers.antisymmetric(total, prompts, name)
  return total, parts


def against(ask: Callable[..., Scored], texts, opponents) -> Scored:
  """Of a judge: how often completions beat fixed opponents, f32[B, K].

  `texts` and `opponents`, m completions of the same prompts, are each prompts,
  completions and context; `ask` is of `asker`.
  """
  prompts, completions, context = texts
  _, others, other = opponents
  m = len(others[0])
  both = [[*a, *b] for a, b in zip(completions, others, strict=True)]
  tokens = [[*a, *b] for a, b in zip(context.tokens, other.tokens)]
  finished = np.concatenate([context.finished, other.finished], 1)
  found = ask(prompts, both, context._replace(tokens=tokens, finished=finished))
  if not found.weight.any():
    return found
  if found.value.ndim != 3:
    raise UserError(
      'reward.opponents is for judges of pairs, and this reward gives a number'
      ' for each completion; set it to 0.'
    )
  return found._replace(value=found.value[:, :-m, -m:].mean(-1))


def worker(threads: int = 1) -> Callable[..., futures.Future]:
  """Returns submit(f, *args): so many threads make the calls, in turn.

  They do not keep the process alive as an executor's would: a call may hang.
  They end with `submit`.
  """
  calls: queue.SimpleQueue = queue.SimpleQueue()

  def run():
    while call := calls.get():
      future, f, args = call
      try:
        future.set_result(f(*args))
      except BaseException as e:  # pylint: disable=broad-except
        future.set_exception(e)
      del call, future, f, args  # a thread that waits holds no reward

  def submit(f, *args) -> futures.Future:
    future = futures.Future()
    calls.put((future, f, args))
    return future

  for _ in range(threads):
    threading.Thread(target=run, daemon=True).start()
    weakref.finalize(submit, calls.put, None)
  return submit


def _one_by_one(attempt, prompts, completions, context: Context):
  """Asks for each prompt alone; those that fail have weight 0.

  Returns the value, its parts, the weights, and the last error.
  """
  found, error = [], ''
  for i in range(len(prompts)):
    try:
      found.append(attempt(*some([i], prompts, completions, context)))
    except UserError as e:
      found.append(None)
      error = str(e)
  weight = np.array([x is not None for x in found], np.float32)
  good = [x for x in found if x]
  if not good:
    return np.zeros(context.finished.shape, np.float32), {}, weight, error
  _check_alike(good)
  value, parts = good[0]
  filled = [x or (0.5 + 0 * value, {k: 0 * v for k, v in parts.items()})
            for x in found]  # fmt: skip
  parts = {k: np.concatenate([x[1][k] for x in filled]) for k in parts}
  return np.concatenate([x[0] for x in filled]), parts, weight, error


def _check_alike(found: Iterable[tuple[np.ndarray, Mapping]]) -> None:
  """A UserError for scores beside probabilities, or for other parts."""
  (a, *some), *kinds = [(value.ndim, *parts) for value, parts in found]
  for b, *others in kinds:
    if (a, some) != (b, others):
      raise UserError(
        f'the reward returned {a} axes and the parts {some} for some prompts of'
        f' a batch, {b} axes and {others} for others; it must return the same'
        ' for all.'
      )


def _first_that_raises(reward, prompts, completions, context: Context) -> str:
  """The first prompt on which the reward raises alone, for an error."""
  for i in range(len(prompts)):
    try:
      reward(*some([i], prompts, completions, context))
    except (Exception, SystemExit):  # pylint: disable=broad-except
      return answers.quote(i, prompts)
  return 'on the batch only, on no prompt alone'


def some(index: Sequence[int], prompts, completions, context: Context):
  """The arguments of a reward for some of the prompts."""
  rows, tokens, finished, turns = context
  pick = lambda xs: [xs[i] for i in index]
  part = Context(pick(rows), pick(tokens), finished[np.array(index)], turns)
  return pick(prompts), pick(completions), part


def name_of(reward) -> str:
  return getattr(reward, '__name__', type(reward).__name__)
