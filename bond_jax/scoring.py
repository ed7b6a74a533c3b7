"""Rewards are other people's code: how they are called, checked and survived.

A reward may raise, hang, return NaN or the wrong shape. Whatever it does ends
in one line that names it and the prompt, or, if the config says so, in a prompt
that is left out of the step and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import queue
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from bond_jax import shares
from bond_jax.errors import UserError
from bond_jax.types import Context, PreferenceFn, RewardFn

FAILURES = ('stop', 'skip')  # what a reward's failure ends in


class Scored(NamedTuple):
  """What a step gets to know of B prompts with K completions each."""

  value: np.ndarray  # f32[B, K]; of a judge f32[B, K, K], P(i beats j)
  weight: np.ndarray  # f32[B], 0: the reward failed on this prompt
  metrics: dict[str, float]


def score(
  reward: RewardFn | PreferenceFn,
  prompts: Sequence[str],
  completions: Sequence[Sequence[str]],
  context: Context,
  *,
  missing_eos_penalty: float,
  length_penalty: float,
  failure: str,
  retries: int,
  timeout: float,
) -> Scored:
  """Calls a reward as the config says.

  Args:
    reward: any.
    prompts: B of them.
    completions: K of each.
    context: see `Context`.
    missing_eos_penalty: taken off completions that were cut.
    length_penalty: taken off per token.
    failure: 'stop', a UserError; 'skip', the prompts on which the reward fails
      alone too have weight 0. A UserError all the same if these are all, of
      several hosts all those of one.
    retries: further attempts before that, after 1, 2, 4 ... 30 seconds.
    timeout: of a call, in seconds; 0 = none.
  """

  def attempt(*batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    for i in range(retries + 1):
      try:
        return _in_time(lambda: call(reward, *batch), timeout, batch[0])
      except UserError:
        if i == retries:
          raise
        time.sleep(min(2**i, 30))
    raise AssertionError('no attempt was made')

  weight = np.ones(len(prompts), np.float32)
  try:
    value, parts = attempt(prompts, completions, context)
  except UserError:
    if failure != 'skip':
      raise
    value, parts, weight = _one_by_one(attempt, prompts, completions, context)
  penalty = missing_eos_penalty * ~context.finished
  penalty = penalty + length_penalty * _lengths(context)
  if penalty.any() and value.ndim == 3:
    raise UserError(
      f'reward {_name(reward)} compares pairs: missing_eos_penalty and'
      ' length_penalty, which are taken off a score, must be 0.'
    )
  if value.ndim == 2:
    value = (value - penalty).astype(np.float32)
  metrics = {
    f'score/{name}': float(part[weight > 0].mean())
    for name, part in parts.items()
  }
  if failure == 'skip':
    metrics['reward/skipped'] = float((weight == 0).sum())
  return Scored(value, weight, metrics)


def join(parts: Sequence[tuple[np.ndarray, Scored | None]]) -> Scored:
  """What all hosts found, of what each found of its rows of the batch.

  The metrics are those of one host that has all rows: means over the prompts
  that were rewarded, and a count. They differ by rounding alone.
  """
  value, weight = shares.join(
    [(rows, part and (part.value, part.weight)) for rows, part in parts]
  )
  found = [part for _, part in parts if part]
  share = np.array([part.weight.sum() for part in found])
  share = share / max(share.sum(), 1)
  metrics = {
    name: sum(s * part.metrics[name] for s, part in zip(share, found))
    for name in found[0].metrics
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

  A UserError if it is not that: the line names the reward and the first prompt
  on which it went wrong.
  """
  name, shape = _name(reward), (len(prompts), len(completions[0]))
  try:
    values = reward(prompts, completions, context)
  except UserError:
    raise  # it says all there is to say
  except Exception as e:
    where = _first_that_raises(reward, prompts, completions, context)
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())
    raise UserError(f'reward {name} raised {reason} ({where}).') from e
  if not isinstance(values, Mapping):
    return check(values, shape, prompts, name), {}
  if not values:
    raise UserError(f'reward {name} returned a dict without any part.')
  parts = {
    k: check(v, shape, prompts, f'{name}[{k!r}]') for k, v in values.items()
  }
  if len({v.ndim for v in parts.values()}) > 1:
    kinds = ', '.join(f'{k} {list(v.shape)}' for k, v in parts.items())
    raise UserError(
      f'reward {name} has parts of both kinds ({kinds}): a sum is of scores,'
      ' or of judges of pairs.'
    )
  total = sum(parts.values())
  return total, {k: v for k, v in parts.items() if v.ndim == 2}


def check(
  values: Any, shape: tuple[int, int], prompts: Sequence[str], name: str
) -> np.ndarray:
  """Returns `values` as f32 if they are finite numbers of the right shape.

  That is [B, K], or [B, K, K] if they are probabilities that i beats j: with
  their transpose they are 1, to a thousandth, and made so exactly.
  """
  try:
    array = np.asarray(values)
  except ValueError:  # ragged
    array = np.array(None)
  pairs = array.ndim == 3
  if array.shape != shape + shape[1:] * pairs:
    rows = list(values) if np.iterable(values) else []
    bad = (i for i, r in enumerate(rows) if _shape(r) != shape[1:])
    i = min(next(bad, len(rows)), shape[0] - 1)
    got = list(array.shape) if array.dtype != object else type(values).__name__
    raise UserError(
      f'reward {name} returned {got}, expected one number per completion,'
      f' {list(shape)}, or per pair of them, {[*shape, shape[1]]}'
      f' ({quote(i, prompts)}).'
    )
  if array.dtype.kind not in 'biuf':
    raise UserError(
      f'reward {name} returned {array.dtype}, expected numbers'
      f' ({quote(0, prompts)}).'
    )
  with np.errstate(over='ignore'):
    result = array.astype(np.float32)
  bad = np.argwhere(~np.isfinite(result))
  if len(bad):
    i, *k = bad[0].tolist()
    raise UserError(
      f'reward {name} returned {array[tuple(bad[0])]} for completion'
      f' {" against ".join(map(str, k))}, expected a finite float32'
      f' ({quote(i, prompts)}).'
    )
  return _antisymmetric(result, prompts, name) if pairs else result


def _shape(row: Any) -> tuple[int, ...] | None:
  """Of what one prompt was given; None if it is ragged."""
  try:
    return np.shape(row)
  except ValueError:
    return None


def _antisymmetric(win: np.ndarray, prompts, name: str) -> np.ndarray:
  other = win.swapaxes(-1, -2)
  wrong = np.abs(win + other - 1) > 1e-3
  wrong |= (win < -1e-3) | (win > 1 + 1e-3)
  if wrong.any():
    b, i, j = np.argwhere(wrong)[0].tolist()
    raise UserError(
      f'judge {name} says that completion {i} beats {j} with probability'
      f' {win[b, i, j]:.4g}, and {j} beats {i} with {win[b, j, i]:.4g}; both'
      f' lie in [0, 1] and sum to 1 ({quote(b, prompts)}).'
    )
  return np.clip((win + 1 - other) / 2, 0, 1).astype(np.float32)


def against(
  judge: PreferenceFn, opponents: Sequence[Sequence[str]], context: Context
) -> RewardFn:
  """A judge as a reward: how often a completion beats fixed opponents.

  Args:
    judge: of pairs.
    opponents: [B][m] completions of the very prompts that will be asked about.
    context: theirs.
  """

  def wins(prompts, completions, given):
    m = len(opponents[0])
    both = [[*a, *b] for a, b in zip(completions, opponents, strict=True)]
    tokens = [[*a, *b] for a, b in zip(given.tokens, context.tokens)]
    finished = np.concatenate([given.finished, context.finished], 1)
    joint = given._replace(tokens=tokens, finished=finished)
    win, _ = call(judge, prompts, both, joint)
    return win[:, :-m, -m:].mean(-1)

  return wins


def worker(threads: int = 1) -> Callable[..., futures.Future]:
  """Returns submit(f, *args): so many threads make the calls, in turn.

  They do not keep the process alive as an executor's would: a call may hang.
  """
  calls: queue.SimpleQueue = queue.SimpleQueue()

  def run():
    while True:
      future, f, args = calls.get()
      try:
        future.set_result(f(*args))
      except BaseException as e:  # pylint: disable=broad-except
        future.set_exception(e)

  def submit(f, *args) -> futures.Future:
    future = futures.Future()
    calls.put((future, f, args))
    return future

  for _ in range(threads):
    threading.Thread(target=run, daemon=True).start()
  return submit


def _one_by_one(attempt, prompts, completions, context: Context):
  """Asks for each prompt alone; those that fail have weight 0."""
  found, error = [], None
  for i in range(len(prompts)):
    try:
      found.append(attempt(*some([i], prompts, completions, context)))
    except UserError as e:
      found.append(None)
      error = e
  good = next((x for x in found if x is not None), None)
  if good is None:
    raise UserError(f'the reward fails on every prompt of a batch: {error}')
  filled = [x or (0.5 + 0 * good[0], {k: 0 * v for k, v in good[1].items()})
            for x in found]  # fmt: skip
  parts = {k: np.concatenate([x[1][k] for x in filled]) for k in good[1]}
  weight = np.array([x is not None for x in found], np.float32)
  return np.concatenate([x[0] for x in filled]), parts, weight


def _in_time(work: Callable[[], Any], timeout: float, prompts) -> Any:
  """Calls `work`, in a thread that is given up when its time is over."""
  if not timeout:
    return work()
  answers: queue.SimpleQueue = queue.SimpleQueue()

  def run():
    try:
      answers.put((work(), None))
    except BaseException as e:  # pylint: disable=broad-except
      answers.put((None, e))

  threading.Thread(target=run, daemon=True).start()
  try:
    answer, error = answers.get(timeout=timeout)
  except queue.Empty as e:
    raise UserError(
      f'the reward took more than reward.timeout = {timeout:g} s for'
      f' {len(prompts)} prompt(s) ({quote(0, prompts)}).'
    ) from e
  if error is not None:
    raise error
  return answer


def _first_that_raises(reward, prompts, completions, context: Context) -> str:
  """Asks for one prompt at a time, to find the one that is to blame."""
  for i in range(len(prompts)):
    try:
      reward(*some([i], prompts, completions, context))
    except Exception:  # pylint: disable=broad-except
      return quote(i, prompts)
  return 'on the batch only, on no prompt alone'


def some(index: Sequence[int], prompts, completions, context: Context):
  """What a reward gets when it is asked about some of the prompts."""
  rows, tokens, finished, turns = context
  pick = lambda xs: [xs[i] for i in index]
  part = Context(pick(rows), pick(tokens), finished[np.array(index)], turns)
  return pick(prompts), pick(completions), part


def quote(i: int, prompts: Sequence[str]) -> str:
  """How an error names a prompt."""
  return f'prompt {i}: {prompts[i][:60]!r}'


def _lengths(context: Context) -> np.ndarray:
  return np.array([[len(y) for y in row] for row in context.tokens], np.float32)


def _name(reward) -> str:
  return getattr(reward, '__name__', repr(reward))
