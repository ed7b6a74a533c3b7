"""Which numbers of a step are not finite, by their names.

A step whose loss or gradient is not finite changes nothing (`step.update`), so
that the state that it began with is there to be looked at, with its batch.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from bond_jax.devices import shares
from bond_jax.runs.checkpoint import not_finite
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, TrainState

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


def rerun(
  setup: step_lib.Setup,
  state: TrainState,
  frozen: Frozen,
  batch: step_lib.Batch,
) -> None:
  """Makes the step again, operation by operation; raises where a NaN arises."""
  with jax.disable_jit(), jax.debug_nans(True):
    step_lib.update(setup, state, frozen, batch)


def _flags(setup, state, frozen, batch) -> tuple[Any, ...]:
  setup = step_lib.on_base(setup, frozen)
  loss = functools.partial(step_lib.loss_of, setup)
  gradient, _, log_policy = step_lib.gradient_of(
    setup, loss, state.params, batch
  )
  real = batch.prompts.weight > 0
  of_prompts = lambda x: real & jax.vmap(not_finite)(x)
  return (
    not_finite(state.params),
    not_finite(state.anchor),
    not_finite(state.opt_state),
    of_prompts(batch.log_sampled),
    jax.tree.map(of_prompts, batch.rows),
    of_prompts(log_policy),
    not_finite(gradient),
  )
