"""Batches split into micro-batches, and each padded no more than it has to be.

Axes: B prompts, M completions of each, P prompt length, T completion length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bond_jax.types import Array, Prompts, Rollout


def split(tree: Any, n: int) -> Any:
  """[B, ...] -> [n, B / n, ...]; each part is spread over the mesh."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(len(x) // n, n, *x.shape[1:]), 1, 0), tree
  )


def join(x: Array) -> Array:
  """The inverse of `split`, for one array."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def trim(size: tuple[int, int], prompts: Prompts, completion, mask):
  """The last P' columns of the prompts, the first T' of the completions."""
  p, t = size
  prompts = prompts._replace(
    tokens=prompts.tokens[:, -p:], mask=prompts.mask[:, -p:]
  )
  return prompts, completion[..., :t], mask[..., :t]


def fold(buckets: int, f, carry: Any, parts: Any, prompt_mask, mask):
  """Folds carry, out = f(carry, part, size) over micro-batches, in turn.

  Args:
    buckets: sizes are j / buckets of (P, T), rounded up; f is compiled for
      each, in a loop of its own. A conditional would copy the carry.
    f: looks at no more of a part than `size`, (P', T'), which holds it: the
      least, if no part is shorter than the one before, see `by_length`.
    carry, parts: any; a pytree with leading axis n.
    prompt_mask, mask: bool[n, b, P], bool[n, b, M, T].

  Returns:
    The last carry, and what came out of each part, stacked.
  """
  n, whole = len(mask), (prompt_mask.shape[-1], mask.shape[-1])
  if buckets == 1:
    return jax.lax.scan(lambda carry, x: f(carry, x, whole), carry, parts)
  at = lambda i: jax.tree.map(lambda x: x[i], parts)
  sizes = [
    tuple(-(-length * j // buckets) for length in whole)
    for j in range(1, buckets + 1)
  ]
  out = jax.eval_shape(lambda: f(carry, at(0), whole)[1])
  outs = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), out)

  def body(size, i, so_far):
    carry, outs = so_far
    carry, out = f(carry, at(i), size)
    return carry, jax.tree.map(lambda all_, x: all_.at[i].set(x), outs, out)

  p, t = prompt_mask.sum(-1).max(1), mask.sum(-1).max((1, 2))
  held = [(p > a) | (t > b) for a, b in sizes[:-1]]
  # Of each micro-batch, the index of the least size that holds it.
  place = jax.lax.cummax(sum(x.astype(jnp.int32) for x in held))
  first = 0
  for j, size in enumerate(sizes):
    last = n if j == buckets - 1 else (place <= j).sum()
    carry, outs = jax.lax.fori_loop(
      first, last, functools.partial(body, size), (carry, outs)
    )
    first = last
  return carry, outs


def by_length(n: int, parts: int, prompts: Prompts, drawn: Rollout, judged):
  """The batch in an order in which n micro-batches hold rows of like lengths.

  Rows stay in their one of the `parts` of the mesh.
  """
  b = len(prompts.mask)
  share = lambda mask: mask.sum(-1) / mask.shape[-1]
  length = jnp.maximum(share(prompts.mask), share(drawn.mask).max(-1))
  order = jnp.argsort(length.reshape(parts, -1), axis=1)
  # `split` deals rows out to the micro-batches one by one.
  order = order.reshape(parts, n, -1).swapaxes(1, 2).reshape(parts, -1)

  def sort(x):
    x = x.reshape(parts, b // parts, *x.shape[1:])
    index = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, 1).reshape(b, *x.shape[2:])

  return jax.tree.map(sort, (prompts, drawn, judged))
