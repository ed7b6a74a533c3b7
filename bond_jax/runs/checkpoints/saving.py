"""Saving and resuming a stage: its checkpoints while it runs.

A save that fails is a line, not a traceback: the last good checkpoint stays,
and the stage stops or goes on, as `failure` says. A thread writes. Where the
save before is not written PATIENCE seconds after the next is due, the next is
left out; but the last step of a stage, and the one at which it is stopped, wait
as long as the store takes.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import glob
import logging
import os
import re
import shutil
import sys
import time
from typing import Any, Self

from bond_jax.devices import hosts
from bond_jax.errors import one_line, UserError
from bond_jax.runs import command, fingerprints, show
from bond_jax.runs.checkpoints import checkpoint, checksums
from bond_jax.runs.settings import configs
from bond_jax.types import TrainState

PATIENCE = 60.0  # seconds for which a step waits for the save before


class Saver:
  """Saves the steps of one stage; a context, which ends when all is written."""

  def __init__(
    self,
    folder: str,
    stage: str,
    failure: str,
    facts: dict[str, Any],
    inputs: Callable[[], dict[str, str]] = dict,
  ):
    """Reads the folder; `start` becomes the last good step, or None.

    `failure` is what a failed save does, 'stop' or 'go_on'. `facts`, and the
    fingerprints `inputs()` of what the stage reads, are saved with each step; a
    UserError if these changed since the last good one, and nobody accepted it.
    """
    self.folder = os.path.abspath(folder)
    hosts.once(self._clear)
    hosts.once(lambda: checksums.set_aside(self.folder))
    self._checkpoints = checkpoint.manager(self.folder)
    self.start = hosts.once(self._checkpoints.latest_step)
    self._stage, self._failure, self._facts = stage, failure, facts
    self._writing: int | None = None  # a step whose save has not been checked
    self._read, self._inputs = inputs, inputs()
    configs.agree({'inputs': self._inputs})
    if self.start is not None:
      self._before = checkpoint.read_facts(self._checkpoints, self.start)
      then = self._before.pop('inputs', self._inputs)
      lines = fingerprints.changed(then, self._inputs)
      fingerprints.accept(f'{stage}, which goes on after {self.start},', lines)

  def __enter__(self) -> Self:
    for name in ('absl', 'asyncio'):
      logging.getLogger(name).addFilter(_no_traces)
    if sys.unraisablehook is not _no_echoes:
      _no_echoes.hook, sys.unraisablehook = sys.unraisablehook, _no_echoes
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      self.finish()
    with contextlib.suppress(Exception):  # what was raised matters more
      self._checkpoints.close()

  def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state and the data of the last good step; reports what changed."""
    state, data = checkpoint.restore(self._checkpoints, like)
    hosts.say(f'{self._stage}: goes on after step {self.start}')
    if changed := configs.differences(self._before, self._facts):
      hosts.say(
        f'{self._stage}: changed since it was saved: {"; ".join(changed)}'
      )
    return state, data

  def best(self, like: Any) -> tuple[int, Any]:
    """The best step, and its parameters."""
    step = checkpoint.choose(self._checkpoints, 'best')
    return step, checkpoint.restore_params(self._checkpoints, like, step)

  def look(self) -> None:
    """Reports a failed save early; several hosts do so at the next save."""
    busy = self._checkpoints.is_saving_in_progress
    if self._writing is not None and hosts.count() == 1 and not busy():
      self._settle()

  def save(
    self,
    step: int,
    state: TrainState,
    data: dict[str, Any],
    score: float | None,
    rows: Callable[[], None],
    *,
    must: bool = False,
  ) -> None:
    """Saves a step, after `rows()` has written the metrics up to it.

    A step that `must` be saved is on disk when this returns, or a UserError
    says why not, whatever `failure` is.
    """
    if must:
      self._wait_for_it()
    elif not self._wait(PATIENCE):
      show.warn(
        f'{self._stage}: step {self._writing} is still being written, after'
        f' waiting {PATIENCE:.0f} s for it, so step {step} is not saved. The'
        f' last good checkpoint is {self._last_good()}.'
      )
      return
    self._settle()
    self._failure = 'stop' if must else self._failure
    if error := _first_error(rows, OSError):
      self._fail(step, error)
      return
    self._writing = step
    self._inputs, changed = fingerprints.steady(self._inputs, self._read())
    if changed:
      show.warn(
        f'{self._stage}: step {step}: changed while the stage runs:'
        f' {"; ".join(changed[:3])}. What is read next is of the changed files.'
      )
    facts = {**self._facts, 'inputs': self._inputs}
    try:
      checkpoint.save(self._checkpoints, step, state, data, score, facts)
    except UserError:
      raise
    except Exception as e:
      if hosts.count() > 1:  # the others are inside of it, and do not know
        raise UserError(f'step {step} could not be saved: {_brief(e)}') from e
      self._fail(step, _brief(e))
    if must:
      self.finish()

  def finish(self) -> None:
    """Waits until the last save is whole; a UserError if it is not."""
    self._wait_for_it()
    self._failure = 'stop'
    self._settle()

  def _wait_for_it(self) -> None:
    while not self._wait(PATIENCE):
      hosts.say(f'{self._stage}: step {self._writing} is still being written')

  def _wait(self, seconds: float) -> bool:
    """Whether, on all hosts, the save before is written or has failed."""
    until = time.monotonic() + seconds
    busy = self._checkpoints.is_saving_in_progress
    while busy() and time.monotonic() < until:
      time.sleep(0.02)
    return not any(hosts.gather(busy()))

  def _settle(self) -> None:
    """Handles a failure of the save before."""
    error = _first_error(self._checkpoints.wait_until_finished)
    step, self._writing = self._writing, None
    if error:
      self._fail(step, error)

  def _clear(self) -> None:
    """Deletes unfinished checkpoints: nobody else writes here."""
    for path in glob.glob(os.path.join(self.folder, '*.orbax-checkpoint-tmp*')):
      shutil.rmtree(path, ignore_errors=True)

  def _fail(self, step: int, error: str) -> None:
    self._writing = None
    command.leave_threads()  # some of Orbax's wait for the others for ever
    hosts.once(self._clear)
    with contextlib.suppress(Exception):  # it may think that it still saves
      self._checkpoints.close()
    self._checkpoints = checkpoint.manager(self.folder)
    line = (
      f'{self._stage}: step {step} could not be saved ({error}). The last good'
      f' checkpoint is {self._last_good()}.'
    )
    if self._failure == 'stop':
      raise hosts.Disagreement(
        f'{line} Make room, or let it write there, and start the same command'
        " again; with save_failure 'go_on' it would train on."
      )
    show.warn(line)

  def _last_good(self) -> str:
    steps = [s for s in checksums.steps(self.folder) if s != self._writing]
    return f'of step {steps[-1]} in {self.folder}' if steps else 'none yet'


@contextlib.contextmanager
def on_disk(workdir: str) -> Iterator[None]:
  """Turns the error of a full or read-only disk into a UserError."""
  try:
    yield
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
      raise
    raise UserError(
      f'cannot write to {e.filename or workdir}: {e.strerror}. Make room, or'
      ' let it write there, and start the same command again.'
    ) from e


def _first_error(act: Callable[[], Any], kind=Exception) -> str | None:
  """Calls act() on all hosts; the first error of any, on all of them."""
  error = None
  try:
    act()
  except kind as e:
    error = _brief(e)
  return next(filter(None, hosts.gather(error)), None)


def _brief(error: Exception) -> str:
  """What the system says of an error, or else its type and text."""
  text = f'{type(error).__name__}: {one_line(error)}'
  found = re.search(r"os_error_code='(\d+)'", text)  # tensorstore's
  code = found[1] if found else getattr(error, 'errno', None)
  return os.strerror(int(code)) if code else text[:200]


def _no_traces(record: logging.LogRecord) -> bool:
  """Drops Orbax's tracebacks of what a line reports here.

  Until the process ends: its threads may log after the line.
  """
  if record.name == 'asyncio':
    return 'exception was never retrieved' not in record.getMessage()
  return not (record.exc_info and f'{os.sep}orbax{os.sep}' in record.pathname)


def _no_echoes(event: Any) -> None:
  """Drops tensorstore's reports of writes that nobody waits for any more."""
  if str(event.exc_value) != 'Event loop is closed':
    _no_echoes.hook(event)
