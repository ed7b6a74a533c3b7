"""Batches split into micro-batches, and each padded no more than it has to be.

Axes: B prompts, M completions of each, P prompt length, T completion length.
"""

from __future__ import annotations

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


def bucketed(buckets: int, prompt_mask: Array, mask: Array, f) -> Any:
  """f(size) for the least size (P', T') that holds a micro-batch.

  Sizes are j / buckets of (P, T), rounded up; each is compiled once, in one
  program, and which one runs is decided on the device.
  """
  n = buckets
  if n == 1:
    return f((prompt_mask.shape[-1], mask.shape[-1]))
  of = lambda length, j: -(-length * j // n)
  sizes = [
    (of(prompt_mask.shape[-1], j), of(mask.shape[-1], j))
    for j in range(1, n + 1)
  ]
  p, t = prompt_mask.sum(-1).max(), mask.sum(-1).max()
  place = sum(((p > a) | (t > b)).astype(jnp.int32) for a, b in sizes[:-1])
  return jax.lax.switch(place, [lambda size=size: f(size) for size in sizes])


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
