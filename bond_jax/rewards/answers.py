"""The answers of rewards: arrays of finite numbers, or a one-line error."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bond_jax.errors import UserError


def check(
  values: Any, shape: tuple[int, int], prompts: Sequence[str], name: str
) -> np.ndarray:
  """Returns `values` as f32 if they are finite numbers of the right shape.

  That is [B, K], or for probabilities that i beats j [B, K, K], which sum to 1
  with their transpose, to a thousandth, and are made to do so exactly.
  """
  expected = (
    f'one number per completion, {list(shape)}, or per pair of them,'
    f' {[*shape, shape[1]]}'
  )

  def fault(got: Any, expected: str = expected, i: int = 0) -> UserError:
    return UserError(
      f'reward {name} returned {got}, expected {expected}'
      f' ({quote(i, prompts)}).'
    )

  kind = type(values).__name__
  try:
    array = np.asarray(plain(values))
  except ValueError:  # ragged
    array = np.array(None)
  except Exception as e:
    raise fault(f'{kind}, which cannot be read ({reason(e)})') from e
  pairs = array.ndim == 3
  if array.shape != shape + shape[1:] * pairs:
    raise fault(kind if array.dtype == object else list(array.shape))
  if array.dtype.kind not in 'biuf':
    raise fault(array.dtype, 'numbers')
  with np.errstate(over='ignore'):
    result = array.astype(np.float32)
  bad = np.argwhere(~np.isfinite(result))
  if len(bad):
    i, *k = bad[0].tolist()
    got = f'{array[i, *k]} for completion {" against ".join(map(str, k))}'
    raise fault(got, 'a finite float32', i)
  return antisymmetric(result, prompts, name) if pairs else result


def combine(
  parts: Mapping[str, np.ndarray], weights: Mapping[str, float], name: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """One reward of several: of scores the weighted sum, of judges the mean.

  Returns it, f32[B, K] or f64[B, K, K], and of scores the weighted parts. A
  UserError, which `name`s the whole, for parts of both kinds, which have no
  sum, and for weights of judges below 0, or all 0.
  """
  scores, judges = (
    [k for k, v in parts.items() if v.ndim == ndim] for ndim in (2, 3)
  )
  if not parts:
    raise UserError(f'reward {name} returned a dict without any part.')
  if scores and judges:
    raise UserError(
      f'reward {name} has parts of both kinds: {", ".join(scores)} gives a'
      f' number for each completion, {", ".join(judges)} compares pairs. Take'
      ' parts of one kind.'
    )
  if scores:
    weighted = {k: weights[k] * v for k, v in parts.items()}
    return sum(weighted.values()), weighted
  share = np.array([weights[k] for k in judges], np.float64)
  if share.min() < 0 or not share.sum() > 0:
    raise UserError(
      f'reward {name} is the mean of the judges {", ".join(judges)}, by weights'
      f' that are {share.tolist()}; they must be 0 or more, and not all 0.'
    )
  return np.average([parts[k] for k in judges], axis=0, weights=share), {}


def plain(values: Any) -> Any:
  """The answer for NumPy: arrays of any framework, also in lists.

  torch's tensors may have a gradient, and be on a GPU or in bfloat16.
  """
  if isinstance(values, list | tuple):
    return [plain(value) for value in values]
  if hasattr(values, 'detach'):  # torch
    values = values.detach().cpu()
    values = values.double() if values.is_floating_point() else values
  if hasattr(values, 'dtype'):
    values = np.asarray(values)
    if values.dtype.kind == 'V' and np.can_cast(values.dtype, np.float32):
      values = values.astype(np.float32)  # of ml_dtypes, exact
  return values


def antisymmetric(win: np.ndarray, prompts, name: str) -> np.ndarray:
  """Probabilities f32[B, K, K], exact; a UserError if they are none."""
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


def quote(i: int, prompts: Sequence[str]) -> str:
  """How an error names a prompt."""
  return f'prompt {i}: {prompts[i][:60]!r}'


def reason(error: BaseException) -> str:
  """An error of somebody else's code on one line."""
  line = ' '.join(f'{type(error).__name__}: {error}'.split())
  if 'signal only works in main thread' in line:
    line += (
      '. Rewards have a thread of their own, in which no SIGALRM can be set:'
      " turn that time limit off, for instance math_verify's"
      ' parsing_timeout=None and timeout_seconds=None, and set reward.timeout'
    )
  return line
