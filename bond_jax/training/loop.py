"""The loop of every stage: step, measure, log, save, stop, go on.

A stage says what a step is (`Job`); everything that keeps a run whole is here.
Killed at any moment and started again, it goes on from its last checkpoint and
ends with the same parameters.
"""

from collections.abc import Callable, Iterable
import os
from typing import Any, NamedTuple

from bond_jax.devices import hosts
from bond_jax.runs import log, stopping
from bond_jax.runs.checkpoints import saving
from bond_jax.training import guard as guard_lib
from bond_jax.types import TrainState

Row = dict[str, Any]


class Job(NamedTuple):
  """What the loop repeats."""

  name: str
  # The steps of one iteration: the state and the metrics after each of them.
  iterate: Callable[[TrainState], Iterable[tuple[TrainState, Row]]]
  measure: Callable[[TrainState], Row]  # validation, when a step is saved
  position: Callable[[], dict[str, Any]]  # in the data
  score: Callable[[Row], float | None]  # of what was measured: more is better
  period: int = 1  # steps of an iteration: a checkpoint holds no half


def run(
  job: Job,
  state: TrainState,
  steps: int,
  save_every: int,
  saver: saving.Saver,
  writer: log.Writer,
  guard: guard_lib.Guard,
) -> TrainState:
  """Runs a job to its last step, from the one after `saver.start`.

  `saver` and `writer` are entered contexts. Saves every `save_every` steps, at
  the last, and where a signal (Stopped) or the guard (UserError) ends it.
  """
  step = saver.start or 0
  while step < steps:
    for state, row in job.iterate(state):  # noqa: B020
      step += 1
      last = step == steps
      stop = step % job.period == 0 and stopping.due()
      due = last or step % save_every == 0
      if due:
        with writer.phase('evaluate'):
          row |= job.measure(state)
        row |= guard.look(step, row)
      ends = last or bool(stop or guard.stops)
      guard.check(row, step, saver.folder)
      if not row['skipped']:
        guard_lib.check_finite(row, step, saver.folder)
      guard.keep(writer.write(step, row))
      saver.look()
      if due or stop:  # the latter without a measure: rows stay as they are
        with writer.phase('save'):
          score = job.score(row) if due else None
          saver.save(step, state, job.position(), score, writer.sync, must=ends)
      if ends and not last:
        raise guard.stops or stopping.stopped(job.name, step)
  return state


def times(folder: str) -> tuple[list[Row], dict[str, Any]]:
  """All rows of metrics.jsonl, and the seconds of a stage for its summary."""
  path = os.path.join(folder, 'metrics.jsonl')
  rows = hosts.once(lambda: log.read_rows(path))
  phases = log.phase_seconds(rows)
  return rows, {
    'seconds': round(sum(phases.values()), 3),
    'phase_seconds': {k: round(v, 3) for k, v in phases.items()},
  }
