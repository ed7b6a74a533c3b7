"""Writers of one stage: progress line, JSONL, TensorBoard; counts compilations.

Of several hosts only the first writes. The progress line comes from a thread of
its own, so it also moves while XLA compiles or a long phase runs.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import shutil
import socket
import struct
import sys
import threading
import time
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from bond_jax.devices import hosts
from bond_jax.errors import UserError

# jax reports a scalar of this name when a compilation starts, and a duration
# when it has ended; a hit in the persistent cache counts as a short one.
_COMPILE = '/jax/core/compile/backend_compile_duration'
_compiled: collections.Counter[str] = collections.Counter()
_compiling: dict[int, tuple[str, float]] = {}  # thread -> program, since when


def _on_start(event: str, _: float, **metadata: Any) -> None:
  if event == _COMPILE:
    _compiling[threading.get_ident()] = (
      metadata['fun_name'],
      time.monotonic(),
    )


def _on_end(event: str, _: float, **metadata: Any) -> None:
  if event == _COMPILE:
    _compiling.pop(threading.get_ident(), None)
    _compiled[metadata['fun_name']] += 1


jax.monitoring.register_scalar_listener(_on_start)
jax.monitoring.register_event_duration_secs_listener(_on_end)


def compilations(*programs: str) -> int:
  """Counts XLA compilations in this process since this module was imported.

  Args:
    *programs: names of jitted functions; none of them = all programs, also
      the small ones that eager array operations compile.
  """
  if not programs:
    return _compiled.total()
  return sum(_compiled[f'jit({name})'] for name in programs)


class Writer:
  """What one stage of a run tells: a line, JSONL rows, TensorBoard scalars.

  Write a step's row before its checkpoint is saved: on resumption at step s
  the rows up to s are taken as written, and later ones are dropped, so that
  the file ends as an undisturbed run's does, apart from the times.
  """

  def __init__(
    self,
    folder: str,
    title: str,
    total: int,
    resumed_at: int | None = None,
    show: Sequence[str] = (),
  ):
    """Opens `folder`/metrics.jsonl and `folder`/tensorboard.

    Args:
      folder: of the stage; made if it is missing.
      title: the first word of the progress line.
      total: steps of the whole stage.
      resumed_at: steps completed in the restored checkpoint; None starts
        afresh, and drops what an earlier attempt has left.
      show: keys of metrics that the progress line repeats.
    """
    self._title, self._total, self._show = title, total, show
    self._step = self._first = resumed_at or 0
    self._began, self._since = time.monotonic(), None
    self._last: dict[str, Any] = {}
    self._phase: tuple[str, float] | None = None
    self._seconds: collections.defaultdict[str, float] = (
      collections.defaultdict(float)
    )
    self._main = hosts.first()
    if not self._main:
      return
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'metrics.jsonl')
    keep = -1 if resumed_at is None else resumed_at
    _drop_after(path, keep)
    self._file = _File(path)
    self._board = _File(_board_path(os.path.join(folder, 'tensorboard')))
    self._board.append(_event(file_version='brain.Event:2'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._board.append(_event(step=keep + 1, session_log=start))
    self._line = _Line(self._status)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Times a part of a step; the next row has its sum in `seconds/<name>`.

    Block on the results inside: jax returns before the device has finished.
    """
    outer, self._phase = self._phase, (name, time.monotonic())
    try:
      yield
    finally:
      self._seconds[name] += time.monotonic() - self._phase[1]
      self._phase = outer

  def advance(self, step: int) -> None:
    """Moves the progress line to `step` completed steps."""
    if self._since is None:
      # The first step compiles: the ETA is taken from the later ones.
      self._first, self._since = step, time.monotonic()
    self._step = step

  def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one row, and returns it; scalars only, null if not finite."""
    self.advance(step)
    values = {key: np.asarray(value).item() for key, value in metrics.items()}
    values |= {f'seconds/{k}': round(v, 6) for k, v in self._seconds.items()}
    self._seconds.clear()
    self._last |= values
    row = {'step': step} | {k: _finite(v) for k, v in values.items()}
    if not self._main:
      return row
    self._file.append((json.dumps(row) + '\n').encode())
    for key, value in values.items():
      event = _event(step=step, summary=summary.scalar(key, value))
      self._board.append(event, later=True)
    return row

  def sync(self) -> None:
    """Closes metrics.jsonl and opens it again, before a checkpoint is saved.

    A bucket that is mounted stores a file when it is closed: the rows that a
    checkpoint takes as written must not be lost with the machine. An OSError if
    a row cannot be written; it is tried again with the next one.
    """
    if self._main:
      self._file.sync()
      self._board.append(b'')

  def close(self) -> None:
    if self._main:
      self._line.close()
      self._file.close()
      self._board.close()

  def _status(self, done: bool) -> str:
    parts = [f'{self._title:<9}{self._step}/{self._total}']
    now = time.monotonic()
    done_here, since = self._step - self._first, self._since
    if done:
      parts.append(f'in {clock(now - self._began)}')
    elif since and done_here:
      left = (self._total - self._step) * (now - since) / done_here
      parts.append(f'eta {clock(left)}')
    for key in self._show:
      if key in self._last:
        parts.append(f'{key} {text(self._last[key])}')
    running = next(iter(list(_compiling.values())), None)
    phase = self._phase
    if running and not done:
      parts.append(f'compiling {running[0]} ... {clock(now - running[1])}')
    elif phase and not done:
      parts.append(f'{phase[0]} {clock(now - phase[1])}')
    return '  '.join(parts)


class _File:
  """Appends to a file; what cannot be written now is written later.

  The first failure is told. Nothing is torn: what is left is written where the
  last piece ended.
  """

  def __init__(self, path: str):
    self._path, self._rest, self._told = path, b'', False
    self._fd = self._open()

  def _open(self) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return os.open(self._path, flags, 0o644)

  def _send(self) -> None:
    if self._fd < 0:
      self._fd = self._open()
    while self._rest:
      self._rest = self._rest[os.write(self._fd, self._rest) :]
    self._told = False

  def append(self, data: bytes, later: bool = False) -> None:
    """Appends now, or `later` with what comes next."""
    self._rest += data
    if later:
      return
    try:
      self._send()
    except OSError as e:
      if not self._told:
        print(
          f'\nWARNING: cannot write to {self._path} ({e.strerror}); its rows'
          ' are kept in memory, and written when that is possible.',
          file=sys.stderr,
          flush=True,
        )
      self._told = True

  def sync(self) -> None:
    """Writes and closes the file; an OSError if that is not possible.

    The next row opens it again.
    """
    self._send()
    fd, self._fd = self._fd, -1
    os.close(fd)

  def close(self) -> None:
    self.append(b'', later=not self._rest)
    with contextlib.suppress(OSError):  # as told above, or before the save
      if self._fd >= 0:
        os.close(self._fd)


def _board_path(folder: str) -> str:
  """A new file that TensorBoard finds."""
  os.makedirs(folder, exist_ok=True)
  name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}'
  return os.path.join(folder, name)


def _event(**fields: Any) -> bytes:
  """A record of TensorBoard's: length, data, and a checksum of each."""
  data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
  head = struct.pack('<Q', len(data))
  sums = [struct.pack('<I', masked_crc32c(part)) for part in (head, data)]
  return head + sums[0] + data + sums[1]


class _Line:
  """Prints a status: in place on a terminal, else a line every few seconds."""

  def __init__(self, status):
    self._status = status
    self._in_place = sys.stderr.isatty()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    while not self._stop.wait(0.25 if self._in_place else 5.0):
      self._print(self._status(False))

  def _print(self, line: str, end: str = '') -> None:
    if self._in_place:
      width = shutil.get_terminal_size().columns
      # Erases the old line; one that wraps could not be redrawn in place.
      print(
        f'\r\x1b[K{line[: width - 1]}', end=end, file=sys.stderr, flush=True
      )
    else:
      print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    if not self._stop.is_set():
      self._stop.set()
      self._thread.join()
      self._print(self._status(True), end='\n')


def read_rows(path: str) -> list[dict[str, Any]]:
  """Reads a JSONL file, less a last line that a kill has torn.

  A UserError names a line that is no JSON object.
  """
  try:
    with open(path, 'rb') as f:
      lines = f.read().split(b'\n')
  except OSError as e:
    raise UserError(
      f'cannot read {path} ({e.strerror}); has the stage that writes it run?'
    ) from e
  rows = []
  for number, line in enumerate(lines[:-1], 1):
    try:
      row = json.loads(line.decode('utf-8'))
    except (ValueError, RecursionError):
      row = None
    if not isinstance(row, dict):
      raise UserError(
        f'{path}:{number} is no JSON object of ours; the file was cut or'
        ' changed: restore it, or move it away.'
      )
    rows.append(row)
  return rows


def phase_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Sums `seconds/<phase>` over the rows of a stage, resumptions included."""
  total: collections.defaultdict[str, float] = collections.defaultdict(float)
  for row in rows:
    for key, value in row.items():
      if key.startswith('seconds/') and is_number(value):
        total[key.removeprefix('seconds/')] += value
  return dict(total)


def is_number(value: Any) -> bool:
  """Whether a value of JSON is a finite number."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  return abs(value) <= sys.float_info.max


def _drop_after(path: str, step: int) -> None:
  """Rewrites a JSONL file, whole or not at all, without rows after `step`."""
  if not os.path.exists(path):
    return
  rows = read_rows(path)
  rows = [r for r in rows if is_number(r.get('step')) and r['step'] <= step]
  with open(path + '.tmp', 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(row) + '\n' for row in rows)
  os.replace(path + '.tmp', path)


def _finite(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def clock(seconds: float) -> str:
  """Writes seconds as 0:07, 12:34 or 1:02:03."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f'{hours}:{m:02d}:{s:02d}' if hours else f'{m}:{s:02d}'


def text(value: Any) -> str:
  """Writes a value for people: four digits, `n/a` for None, `a to b`."""
  if value is None:
    return 'n/a'
  if isinstance(value, bool | str):
    return str(value)
  if isinstance(value, int):
    return f'{value:,}'
  if isinstance(value, list | tuple):
    return ' to '.join(text(v) for v in value)
  if abs(value) >= 1000:
    return f'{value:,.0f}'
  return f'{value:.4g}'


def scalars(summary: dict[str, Any]) -> list[tuple]:
  """A table of the numbers and names in a summary."""
  plain = [(k, v) for k, v in summary.items() if not isinstance(v, dict)]
  return [('', 'value'), *plain]


def table(rows: Sequence[Sequence[Any]], title: str) -> None:
  """Prints a table: the first row is the head, the first column is text."""
  cells = [[text(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  rule = '-' * (sum(widths) + 3 * (len(widths) - 1))
  print(f'\n{title}\n{rule}')
  for i, row in enumerate(cells):
    parts = [row[0].ljust(widths[0])]
    parts += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
    print('   '.join(parts).rstrip())
    if i == 0:
      print(rule)
  print(rule, flush=True)
