"""The guard of a loop: steps that are not finite, and slow faults.

A step whose loss or gradient is not finite changes nothing, so that the state
that it began with is there to be looked at, with its batch: `find` names what
is not finite. Slow faults are `watch.py`'s.
"""

from collections.abc import Callable, Sequence
import functools
import os
from typing import Any

import jax
import numpy as np

from bond_jax.devices import hosts, shares
from bond_jax.errors import UserError
from bond_jax.runs import command, log
from bond_jax.runs.checkpoints.checkpoint import not_finite
from bond_jax.training import step as step_lib
from bond_jax.training import watch
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
  Nothing, if a step on `batch` is finite. With --debug it raises where a NaN
  arises.
  """
  flags = jax.jit(functools.partial(_flags, setup))(state, frozen, batch)
  ids, found = shares.fetch(batch.prompts.id), []
  for name, tree in zip(NAMES, shares.fetch(flags), strict=True):
    for path, bad in jax.tree_util.tree_leaves_with_path(tree):
      if not bad.any():
        continue
      where = f'{name}{jax.tree_util.keystr(path, simple=True, separator="/")}'
      if bad.ndim:
        where += f' of prompts {_first(np.asarray(ids)[bad], 5)}'
      found.append(where)
  if command.debugging():  # once more, operation by operation
    with jax.disable_jit(), jax.debug_nans(True):
      step_lib.update(setup, state, frozen, batch)
  return found


def _first(names: Sequence, count: int) -> str:
  more = len(names) - count
  listed = ', '.join(map(str, names[:count]))
  return f'{listed} and {more} more' if more > 0 else listed


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


def check_finite(row: dict[str, Any], step: int, folder: str) -> None:
  """A UserError for a step whose numbers are broken; the loss is from before.

  `checkpoint.save` looks at the state after it.
  """
  for name in ('loss', 'gradient_norm', 'validation_loss', 'kl/reference'):
    if name in row and not np.isfinite(row[name]):
      raise UserError(
        f'step {step}: {name} is {row[name]}. Nothing was saved after the'
        f' last checkpoint in {folder}; a lower learning rate is the usual'
        ' remedy.'
      )


class Guard:
  """Watches the rows of the stage `name`.

  Attributes:
    stops: the error that should end it.
    broken: what was not finite in a step that was skipped.
  """

  def __init__(
    self,
    name: str,
    skip_limit: int,
    look: Callable[[Sequence[watch.Row]], dict[str, str]] = lambda rows: {},
    stop_at: Sequence[str] = (),
  ):
    """`look(rows)` finds what goes wrong slowly, a line of advice by its name.

    It ends the stage where `stop_at` has that name, and so do more than
    `skip_limit` steps in a row that are not finite.
    """
    self.stops: UserError | None = None
    self._name, self._limit = name, skip_limit
    self._look, self._stop_at = look, stop_at
    self._seen: list[watch.Row] = []
    self._found: dict[str, str] = {}
    self.broken: list[str] = []
    self._skipped = 0  # steps in a row

  def catch_up(self, folder: str) -> None:
    """Takes in the rows of a run that goes on."""
    path = os.path.join(folder, 'metrics.jsonl')
    for row in hosts.once(lambda: log.read_rows(path)):
      self.keep(row)

  def check(self, row: dict[str, Any], step: int, folder: str) -> None:
    """A UserError for a step that is one too many not to be finite."""
    names, self.broken = self.broken, []
    if not row['skipped']:
      self._skipped = 0
      return
    self._skipped += 1
    what = (
      f'step {step} changed nothing: its loss is {row["loss"]}, the norm of its'
      f' gradient {row["gradient_norm"]}'
    )
    if names:
      what += f'. Not finite are {_first(names, 4)}'
    if self._skipped > self._limit:
      raise UserError(
        f'{what}. train.skip_limit allows {self._limit} such steps in a row.'
        f' The last checkpoint in {folder} is good; a lower learning rate is'
        ' the usual remedy, and --debug shows where it arose.'
      )
    hosts.say(f'{self._name}: {what}')

  def look(self, step: int, row: dict[str, Any]) -> dict[str, float]:
    """What is wrong when a step is saved, as metrics; says what is new."""
    rows = [*self._seen, row]
    found = hosts.once(lambda: self._look(rows))
    for name in found.keys() - self._found.keys():
      hosts.say(f'{self._name}: step {step}: {found[name]}')
    self._found = found
    for name in self._stop_at:
      if name in found:
        self.stops = UserError(
          f'step {step}: {found[name]} The run ends here, since'
          f' train.watch.stop has {name!r}; this step is saved, and the same'
          ' command goes on from it to the next.'
        )
    return {f'watch/{name}': 1.0 for name in found}

  def keep(self, row: watch.Row) -> None:
    """Takes in the row of a step."""
    watch.keep(self._seen, row)
