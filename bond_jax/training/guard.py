"""The guard of a training loop: steps that are not finite, and slow faults."""

from __future__ import annotations

import os
from typing import Any

import ml_collections
import numpy as np

from bond_jax.devices import hosts
from bond_jax.errors import UserError
from bond_jax.runs import command, log
from bond_jax.training import faults, watch
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, TrainState


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
  """Watches the rows of a run; `stops` is the error that should end it."""

  def __init__(self, config: ml_collections.ConfigDict, setup: step_lib.Setup):
    self.stops: UserError | None = None
    self._setup = setup
    self._limit = config.train.skip_limit
    settings = config.train.watch
    self._stop_at = settings.stop
    names = 'kl', 'entropy', 'length', 'signal', 'speed'
    self._limits = {name: settings[name] for name in names}
    self._limits['moves'] = setup.algorithm.anchor.moves
    self._seen: list[watch.Row] = []
    self._found: dict[str, str] = {}
    self._names: list[str] = []  # of what the last step broke
    self._skipped = 0  # steps in a row

  def catch_up(self, folder: str) -> None:
    """Takes in the rows of a run that goes on."""
    path = os.path.join(folder, 'metrics.jsonl')
    for row in hosts.once(lambda: log.read_rows(path)):
      self.keep(row)

  def broken(
    self, state: TrainState, frozen: Frozen, batch: step_lib.Batch
  ) -> None:
    """Looks at a step that was skipped; --debug makes it again, and raises."""
    self._names = faults.find(self._setup, state, frozen, batch)
    if command.debugging():
      faults.rerun(self._setup, state, frozen, batch)

  def check(self, row: dict[str, Any], step: int, folder: str) -> None:
    """A UserError for a step that is one too many not to be finite."""
    names, self._names = self._names, []
    if not row['skipped']:
      self._skipped = 0
      return
    self._skipped += 1
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    what = (
      f'step {step} changed nothing: its loss is {row["loss"]}, the norm of its'
      f' gradient {row["gradient_norm"]}. Not finite are'
      f' {", ".join(names[:4])}{more}'
    )
    if self._skipped > self._limit:
      raise UserError(
        f'{what}. train.skip_limit allows {self._limit} such steps in a row.'
        f' The last checkpoint in {folder} is good; a lower learning rate is'
        ' the usual remedy, and --debug shows where it arose.'
      )
    hosts.say(f'train: {what}')

  def look(self, step: int, row: dict[str, Any]) -> dict[str, float]:
    """What is wrong when a step is saved, as metrics; says what is new."""
    rows = [*self._seen, row]
    found = hosts.once(lambda: watch.look(rows, **self._limits))
    for name in found.keys() - self._found.keys():
      hosts.say(f'train: step {step}: {found[name]}')
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
