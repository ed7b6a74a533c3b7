"""The metrics of a stage: rows of JSONL, TensorBoard, the progress line.

Of several hosts only the first writes.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import time
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from bond_jax.devices import hosts
from bond_jax.errors import UserError
from bond_jax.runs import files, progress, show
from bond_jax.runs.settings import fields

is_number = fields.NUMBER.allows  # of a value of JSON


class Writer(contextlib.AbstractContextManager):
  """Writes what one stage reports: a line, JSONL rows, TensorBoard scalars.

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

    `resumed_at`: steps completed in the restored checkpoint; None starts
    afresh, and drops what an earlier attempt has left. The progress line begins
    with `title`, counts to `total` steps, and repeats the metrics `show`.
    """
    self._seconds: collections.Counter[str] = collections.Counter()
    self._main = hosts.first()
    if self._main:
      os.makedirs(folder, exist_ok=True)
      path = os.path.join(folder, 'metrics.jsonl')
      keep = -1 if resumed_at is None else resumed_at
      _drop_after(path, keep)
      self._rows = _Rows(path)
      board = os.path.join(folder, 'tensorboard')
      os.makedirs(board, exist_ok=True)
      # Not a SummaryWriter: its thread dies of a full disk, and its queue then
      # blocks the run.
      path = os.path.join(board, 'events')
      self._board = EventsWriter(path, f'.{os.getpid()}')
      # Events of older files from this step on are replaced.
      start = SessionLog(status=SessionLog.START)
      self._plot([Event(step=keep + 1, session_log=start)])
    self._line = progress.Line(title, total, resumed_at or 0, show, self._main)

  def __exit__(self, *_) -> None:
    self.close()

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Times a part of a step; the next row has its sum in `seconds/<name>`.

    Block on the results inside: jax returns before the device has finished.
    """
    outer, begin = self._line.phase, time.monotonic()
    self._line.phase = name, begin
    try:
      yield
    finally:
      self._seconds[name] += time.monotonic() - begin
      self._line.phase = outer

  def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one row, and returns it; scalars only, null if not finite."""
    self._line.advance(step)
    values = {key: np.asarray(value).item() for key, value in metrics.items()}
    values |= {f'seconds/{k}': round(v, 6) for k, v in self._seconds.items()}
    self._seconds.clear()
    self._line.last |= values
    row = {'step': step} | {
      k: v if math.isfinite(v) else None for k, v in values.items()
    }
    if self._main:
      self._rows.append((json.dumps(row) + '\n').encode())
      self._plot(
        Event(step=step, summary=summary.scalar(k, v))
        for k, v in values.items()
      )
    return row

  def _plot(self, events: Iterable[Event], flush: bool = False) -> None:
    """Writes to TensorBoard's file, which ends where that fails."""
    try:
      for event in events if self._board else ():
        event.wall_time = time.time()
        self._board.write_event(event)
      if flush and self._board:
        self._board.flush()
    except OSError as e:
      self._board = None
      show.warn(
        f'cannot write for TensorBoard ({e.strerror}), which sees no later step'
        ' of this process; metrics.jsonl has them all.'
      )

  def sync(self) -> None:
    """Closes metrics.jsonl and opens it again, before a checkpoint is saved.

    A mounted bucket stores a file when it is closed: the rows that a
    checkpoint takes as written must not be lost with the machine. An OSError if
    a row cannot be written; it is tried again with the next one.
    """
    if self._main:
      self._rows.sync()
      self._plot((), flush=True)

  def close(self) -> None:
    self._line.close()
    if self._main:
      self._rows.close()
      self._plot((), flush=True)


class _Rows:
  """Appends to a file; what cannot be written now is written later.

  The first failure is reported. No row is torn: the next attempt goes on where
  the last one ended.
  """

  def __init__(self, path: str):
    self._path, self._rest, self._file, self._warned = path, b'', None, False

  def _send(self) -> None:
    if not self._file:
      self._file = open(self._path, 'ab', buffering=0)  # noqa: SIM115
    while self._rest:
      self._rest = self._rest[self._file.write(self._rest) :]
    self._warned = False

  def append(self, data: bytes) -> None:
    self._rest += data
    try:
      self._send()
    except OSError as e:
      if not self._warned:
        show.warn(
          f'cannot write to {self._path} ({e.strerror}); its rows are kept in'
          ' memory, and written when that is possible.'
        )
      self._warned = True

  def sync(self) -> None:
    """Writes and closes the file, or raises; the next row opens it again."""
    self._send()
    file, self._file = self._file, None
    file.close()

  def close(self) -> None:
    self.append(b'')
    with contextlib.suppress(OSError):
      if self._file:
        self._file.close()


def read_rows(path: str) -> list[dict[str, Any]]:
  """Reads a JSONL file, except a last line that a kill has torn.

  A UserError names a line that is not a JSON object.
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
  total: collections.Counter[str] = collections.Counter()
  for row in rows:
    for key, value in row.items():
      if key.startswith('seconds/') and is_number(value):
        total[key.removeprefix('seconds/')] += value
  return dict(total)


def _drop_after(path: str, step: int) -> None:
  """Removes the rows after `step` from a JSONL file."""
  if not os.path.exists(path):
    return
  rows = [
    row
    for row in read_rows(path)
    if is_number(row.get('step')) and row['step'] <= step
  ]
  with files.whole(path) as f:
    f.writelines(json.dumps(row) + '\n' for row in rows)
