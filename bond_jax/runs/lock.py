"""One run at a time in a workdir: `<workdir>/.lock` says whose it is.

The file is locked with flock, and names its owner, who writes its `beat` anew
every BEAT seconds. What that guarantees:

- On one machine, and on file systems that share locks (NFS since Linux 2.6.12,
  Lustre with -o flock, CephFS), the kernel lets one process in, and lets go of
  the lock when that ends, however it ends: what is left is taken over at once.
- A mounted bucket (gcsfuse) locks within each machine alone. Between machines
  the beat decides: the second run waits PATIENCE seconds for a new one, without
  comparing clocks, and is refused if it comes. Two that start in the same
  moment may both get in; every owner reads the file at each beat, and the one
  that is not in it ends, so that this lasts BEAT seconds, not for good.
- Of several hosts, host 0 holds the lock for all.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from typing import Any
import uuid

from bond_jax.devices import hosts
from bond_jax.errors import UserError

BEAT = 10.0  # seconds
PATIENCE = 35.0  # seconds: three beats, and what a file system takes to show it
_SIZE = 4096  # bytes: written over, it needs no room on a disk that is full


@contextlib.contextmanager
def held(workdir: str, stage: str) -> Iterator[None]:
  """Holds the workdir within; a UserError that names who does, if not we."""
  taken = []
  hosts.once(lambda: taken.append(_Lock(workdir, stage)))
  try:
    yield
  finally:
    for lock in taken:  # on host 0
      lock.release()


class _Lock:
  """The lock of a workdir, from its making to its release."""

  def __init__(self, workdir: str, stage: str):
    self._path, self._fd = os.path.join(workdir, '.lock'), -1
    self._me = _describe(stage)
    try:
      os.makedirs(workdir, exist_ok=True)
      self._take()
    except OSError as e:
      raise UserError(
        f'cannot write to --workdir={workdir}: {e.strerror}; give another one.'
      ) from e
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()

  def release(self) -> None:
    self._end.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      if _is(self._fd, self._path):
        os.remove(self._path)
    os.close(self._fd)

  def _take(self) -> None:
    while True:
      fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        locked = _flock(fd)
        owner = _read(self._path)
        if locked is False or (owner and not self._gone(owner, bool(locked))):
          raise UserError(
            f'{os.path.dirname(self._path)} is in use by {_name(owner)}. Wait'
            ' for it or end it, or give another --workdir.'
          )
        if _is(fd, self._path):  # else its last owner has just removed it
          self._write(fd)
          self._fd, fd = fd, -1
          return
      finally:
        if fd >= 0:
          os.close(fd)

  def _gone(self, owner: dict[str, Any], locked: bool) -> bool:
    """Whether the owner in the file is no more; `locked`: by us, by now."""
    here = owner['host'] == self._me['host']
    if here and owner['boot'] == self._me['boot']:
      if not locked and _runs(owner['pid']):
        return False
      why = 'its process is gone'
    elif here and owner['beat'] < time.time() - _uptime():
      why = 'the machine was started anew since'
    else:
      print(
        f'{self._path} names {_name(owner)}: waiting {PATIENCE:.0f} s for a'
        ' sign of life',
        flush=True,
      )
      until = time.monotonic() + PATIENCE
      while time.monotonic() < until:
        time.sleep(min(1.0, PATIENCE / 10))
        now = _read(self._path)
        if now != owner:
          return not now
      why = f'no sign of life in {PATIENCE:.0f} s'
    print(f'took over the lock of {_name(owner)}: {why}', flush=True)
    return True

  def _write(self, fd: int) -> None:
    self._me['beat'] = time.time()
    os.pwrite(fd, json.dumps(self._me).encode().ljust(_SIZE), 0)
    os.fsync(fd)

  def _beat(self) -> None:
    while not self._end.wait(BEAT):
      try:
        owner = _read(self._path)
        if owner and owner['id'] != self._me['id']:
          _lose(f'{self._path} is now of {_name(owner)}')
        if not _is(self._fd, self._path):  # somebody removed it
          os.close(self._fd)
          self._take()
        self._write(self._fd)
      except UserError as e:
        _lose(str(e))
      except OSError:  # a disk that is full or away: saves will say so
        pass


def _describe(stage: str) -> dict[str, Any]:
  now = datetime.datetime.now().astimezone()
  return {
    'pid': os.getpid(),
    'host': socket.gethostname(),
    'boot': _line('/proc/sys/kernel/random/boot_id'),
    'stage': stage,
    'started': now.isoformat(' ', 'seconds'),
    'command': shlex.join(sys.argv)[:1000],
    'id': uuid.uuid4().hex,
  }


def _name(owner: dict[str, Any] | None) -> str:
  if not owner:
    return 'a process that has not said yet who it is'
  return (
    f'process {owner["pid"]} on {owner["host"]}, {owner["stage"]}, started'
    f' {owner["started"]} ({owner["command"]})'
  )


def _lose(why: str) -> None:
  """Ends the process: two runs in one workdir would spoil each other's."""
  print(f'error: this run lost its workdir: {why}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(2)


def _flock(fd: int) -> bool | None:
  """Whether we have locked a file; None where files cannot be locked."""
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True


def _is(fd: int, path: str) -> bool:
  try:
    return os.path.samestat(os.fstat(fd), os.stat(path))
  except FileNotFoundError:
    return False


def _read(path: str) -> dict[str, Any] | None:
  """What a lock says of its owner; None of an empty, torn or absent one."""
  try:
    with open(path, encoding='utf-8') as f:
      return json.loads(f.read())
  except (OSError, ValueError):
    return None


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _uptime() -> float:
  """Seconds since the machine was started; 0 where it does not say."""
  return float((_line('/proc/uptime') or '0').split()[0])


def _line(path: str) -> str:
  try:
    with open(path, encoding='utf-8') as f:
      return f.readline().strip()
  except OSError:
    return ''
