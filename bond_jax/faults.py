"""Which numbers of a step are not finite, by their names.

A step whose loss or gradient is not finite changes nothing (`step.update`), so
that the state that it began with is there to be looked at, with its batch.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bond_jax import shares
from bond_jax import step as step_lib
from bond_jax.types import Array, Frozen, TrainState

NAMES = ('params/', 'anchor/', 'opt_state/', 'log_sampled', 'rows/',
         'log_policy', 'gradient/')  # fmt: skip


def find(
  setup: step_lib.Setup,
  state: TrainState,
  frozen: Frozen,
  batch: step_lib.Batch,
) -> list[str]:
  """What is not finite, in the order in which it comes about.

  Parameters, anchor and optimizer by their paths; what was sampled, what the
  rows were found worth, and log-probs, by the ids of their prompts; gradients.
  Nothing, if a step on `batch` is finite.
  """
  flags = jax.jit(functools.partial(_flags, setup))(state, frozen, batch)
  ids, found = shares.fetch(batch.prompts.id), []
  for name, tree in zip(NAMES, shares.fetch(flags), strict=True):
    for path, bad in jax.tree_util.tree_leaves_with_path(tree):
      if not bad.any():
        continue
      where = f'{name}{jax.tree_util.keystr(path, simple=True, separator="/")}'
      if bad.ndim:
        rows = [int(i) for i in np.asarray(ids)[bad]]
        more = f' and {len(rows) - 5} more' if len(rows) > 5 else ''
        where += f' of prompts {", ".join(map(str, rows[:5]))}{more}'
      found.append(where)
  return found


def broken(tree: Any) -> list[str]:
  """The paths of arrays that hold anything that is not finite."""
  flags = jax.device_get(jax.jit(_whole)(tree))
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, bad in jax.tree_util.tree_leaves_with_path(flags)
    if bad
  ]


def _flags(setup, state, frozen, batch) -> tuple[Any, ...]:
  setup = step_lib.on_base(setup, frozen)
  loss = functools.partial(step_lib.loss_of, setup)
  gradient, _, log_policy = step_lib.gradient_of(
    setup, loss, state.params, batch
  )
  real = batch.prompts.weight > 0
  of_prompts = lambda x: real & jax.vmap(_bad)(x)
  return (
    _whole(state.params),
    _whole(state.anchor),
    _whole(state.opt_state),
    of_prompts(batch.log_sampled),
    jax.tree.map(of_prompts, batch.rows),
    of_prompts(log_policy),
    _whole(gradient),
  )


def _whole(tree: Any) -> Any:
  return jax.tree.map(_bad, tree)


def _bad(x: Array) -> Array:
  """Whether any number of an array is not finite."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return jnp.bool_(False)
  return ~jnp.isfinite(x).all()
