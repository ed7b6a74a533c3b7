"""The progress line of a stage, and the counter of XLA compilations.

The line is printed by a thread of its own, so that it also moves while XLA
compiles or a long phase runs.
"""

import collections
from collections.abc import Sequence
import shutil
import sys
import threading
import time
from typing import Any

import jax

from bond_jax.runs import show

# jax reports a scalar of this name when a compilation starts, and a duration
# when it has ended; a hit in the persistent cache counts as a short one.
_COMPILE = '/jax/core/compile/backend_compile_duration'
_compiled: collections.Counter[str] = collections.Counter()
_compiling: dict[int, tuple[str, float]] = {}  # thread -> program, start time


def _on_start(event: str, _: float, **metadata: Any) -> None:
  if event == _COMPILE:
    _compiling[threading.get_ident()] = metadata['fun_name'], time.monotonic()


def _on_end(event: str, _: float, **metadata: Any) -> None:
  if event == _COMPILE:
    _compiling.pop(threading.get_ident(), None)
    _compiled[metadata['fun_name']] += 1


jax.monitoring.register_scalar_listener(_on_start)
jax.monitoring.register_event_duration_secs_listener(_on_end)


def compilations(*programs: str) -> int:
  """Counts XLA compilations of jitted functions, by name, in this process.

  Without names of all, also the small ones of eager array operations.
  """
  if not programs:
    return _compiled.total()
  return sum(_compiled[f'jit({name})'] for name in programs)


class Line:
  """Steps, ETA, some metrics, and what runs now.

  Redrawn in place on a terminal, else printed as a line every few seconds.
  """

  def __init__(
    self, title: str, total: int, step: int, keys: Sequence[str], visible: bool
  ):
    """Shows the line from now on, if it is `visible`, until `close`.

    After `title` come the completed `step` of `total`, and `keys` of `last`.
    """
    self._title, self._total, self._keys = title, total, keys
    self._step = self._first = step
    self._began, self._since = time.monotonic(), None
    self.last: dict[str, Any] = {}
    self.phase: tuple[str, float] | None = None  # name, start time
    self._in_place = sys.stderr.isatty()
    self._stop = threading.Event()
    self._thread = None
    if visible:
      self._thread = threading.Thread(target=self._run, daemon=True)
      self._thread.start()

  def advance(self, step: int) -> None:
    if self._since is None:
      # The first step compiles: the ETA is taken from the later ones.
      self._first, self._since = step, time.monotonic()
    self._step = step

  def close(self) -> None:
    if self._thread and not self._stop.is_set():
      self._stop.set()
      self._thread.join()
      self._print(self._text(done=True), end='\n')

  def _run(self) -> None:
    while not self._stop.wait(0.25 if self._in_place else 5.0):
      self._print(self._text(done=False))

  def _print(self, line: str, end: str = '') -> None:
    if self._in_place:
      # Erases the old line; one that wraps could not be redrawn in place.
      width = shutil.get_terminal_size().columns
      line = f'\r\x1b[K{line[: width - 1]}'
    else:
      end = '\n'
    print(line, end=end, file=sys.stderr, flush=True)

  def _text(self, done: bool) -> str:
    parts = [f'{self._title:<9}{self._step}/{self._total}']
    now = time.monotonic()
    done_here, since = self._step - self._first, self._since
    if done:
      parts.append(f'in {show.clock(now - self._began)}')
    elif since and done_here:
      left = (self._total - self._step) * (now - since) / done_here
      parts.append(f'eta {show.clock(left)}')
    parts += [
      f'{key} {show.text(self.last[key])}'
      for key in self._keys
      if key in self.last
    ]
    running = next(iter(list(_compiling.values())), None)
    phase = self.phase
    if running and not done:
      parts.append(f'compiling {running[0]} ... {show.clock(now - running[1])}')
    elif phase and not done:
      parts.append(f'{phase[0]} {show.clock(now - phase[1])}')
    return '  '.join(parts)
