"""Ties, baselines and masked sums: every convention of the project, once."""

from typing import Any

import jax
import jax.numpy as jnp

from bond_jax.types import Array


def win_matrix(reward: Array) -> Array:
  """P(i beats j) for a deterministic preference induced by a reward.

  Args:
    reward: f32[..., K].

  Returns:
    f32[..., K, K]: 1 if reward i is larger, 1/2 on ties (so 1/2 on the
    diagonal), 0 otherwise. win + its transpose is 1 everywhere.

  >>> win_matrix(jnp.array([1.0, 3, 3])).tolist()
  [[0.5, 0.0, 0.0], [1.0, 0.5, 0.5], [1.0, 0.5, 0.5]]
  """
  mine, other = reward[..., :, None], reward[..., None, :]
  more, as_much = (f(mine, other) for f in (jnp.greater, jnp.greater_equal))
  return 0.5 * more.astype(jnp.float32) + 0.5 * as_much.astype(jnp.float32)


def borda(win: Array) -> Array:
  """How often each beats the others: a score of what was only compared.

  Args:
    win: f32[..., K, K], P(i beats j), with 1/2 on the diagonal.

  Returns:
    f32[..., K] in [0, 1]; 1/2 where there is no other.

  >>> borda(win_matrix(jnp.array([1.0, 3, 3]))).tolist()
  [0.0, 0.75, 0.75]
  """
  others = win.shape[-1] - 1
  if not others:
    return win[..., 0]
  return (win.sum(-1) - 0.5) / others


def leave_one_out_mean(x: Array, weight: Array) -> Array:
  """The mean of the other rows: a baseline that leaves the gradient unbiased.

  Args:
    x: f32[B, ...].
    weight: f32[B], each row's share; rows of weight 0 are not averaged.

  Returns:
    f32[B, ...]: row i holds sum_{j != i} w_j x_j / sum_{j != i} w_j, and 0
    where no other row has weight.

  The last row is a filler, and is in nobody's mean:

  >>> x, weight = jnp.array([1.0, 2, 6, jnp.nan]), jnp.array([1.0, 1, 1, 0])
  >>> leave_one_out_mean(x, weight).tolist()
  [4.0, 3.5, 1.5, 3.0]
  """
  w = weight.reshape(weight.shape + (1,) * (x.ndim - 1))
  mine = jnp.where(w > 0, w * x, 0.0)  # a filler row may hold NaN: 0 NaN = NaN
  others = mine.sum(0, keepdims=True) - mine
  total = w.sum(0, keepdims=True) - w
  return jnp.where(total > 0, others / jnp.where(total > 0, total, 1.0), 0.0)


def weighted_mean(x: Array, weight: Array) -> Array:
  """sum(w x) / sum(w) over the leading axis; x: f32[B, ...], weight: f32[B].

  Rows of weight 0 may hold anything, NaN included; without any weight it is 0.

  >>> float(weighted_mean(jnp.array([1.0, 4, jnp.nan]), jnp.array([1.0, 2, 0])))
  3.0
  """
  w = weight.reshape(weight.shape + (1,) * (x.ndim - 1))
  return jnp.where(w > 0, w * x, 0.0).sum(0) / jnp.maximum(weight.sum(), 1e-9)


def sum_to_go(x: Array) -> Array:
  """Sums over this and all later positions of the last axis: f32[..., T].

  >>> sum_to_go(jnp.array([1.0, 2, 4])).tolist()
  [7.0, 6.0, 4.0]
  """
  return jnp.flip(jnp.cumsum(jnp.flip(x, -1), -1), -1)


def take_rows(x: Array, index: Array) -> Array:
  """Picks completions: x [B, K, ...], index i32[B, M] -> [B, M, ...].

  Args:
    x: of any dtype; each prompt's K completions.
    index: in [0, K), which are wanted of each prompt, in this order.

  >>> x, index = jnp.array([[10, 11, 12], [20, 21, 22]]), jnp.array([[2], [0]])
  >>> take_rows(x, index).tolist()
  [[12], [20]]
  """
  index = index.reshape(index.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def keep_rows(tree: Any, keep: Array) -> Any:
  """Zeroes the rows of every leaf [B, ...] where keep, bool[B], is False.

  A product with 0 would keep NaN:

  >>> keep_rows(jnp.array([1.0, jnp.nan]), jnp.array([True, False])).tolist()
  [1.0, 0.0]
  """

  def one(x):
    rows = keep.reshape(keep.shape + (1,) * (x.ndim - 1))
    return jnp.where(rows, x, jnp.zeros_like(x))

  return jax.tree.map(one, tree)
