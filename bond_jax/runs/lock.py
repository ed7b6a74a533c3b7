"""One run at a time in a workdir: `<workdir>/.lock` names it.

The file is locked with flock, which the kernel releases when the process ends,
however it ends. File systems that share locks between machines (NFS, Lustre
with -o flock, CephFS) refuse a second run on another machine too; a mounted
bucket locks within each machine alone. Of several hosts, host 0 holds the lock.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import os
import shlex
import socket
import sys

from bond_jax.devices import hosts
from bond_jax.errors import UserError


@contextlib.contextmanager
def held(workdir: str, stage: str) -> Iterator[None]:
  """Holds the workdir in the block; a UserError names the run that does."""
  path = os.path.join(workdir, '.lock')
  taken: list[int] = []
  hosts.once(lambda: taken.append(_take(path, stage)))
  try:
    yield
  finally:
    for fd in taken:  # on host 0
      with contextlib.suppress(OSError):
        if _is(fd, path):
          os.remove(path)
      os.close(fd)


def _take(path: str, stage: str) -> int:
  """Locks the file, writes who we are into it, and returns its descriptor."""
  workdir = os.path.dirname(path)
  now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
  place = f' on {socket.gethostname()}, '
  owner = (
    f'process {os.getpid()}{place}{stage}, started {now}'
    f' ({shlex.join(sys.argv)[:1000]})\n'
  )
  try:
    os.makedirs(workdir, exist_ok=True)
    while not _is(fd := _locked(path), path):
      os.close(fd)  # its last owner has just removed it
    before = _owner(fd)
    os.ftruncate(fd, 0)
    os.pwrite(fd, owner.encode(), 0)
  except OSError as e:
    raise UserError(
      f'cannot write to --workdir={workdir}: {e.strerror}; give another one.'
    ) from e
  if before:
    elsewhere = place not in before and (
      '; if it still runs, on a file system that locks within one machine'
      ' alone, end one of the two'
    )
    print(f'took over the lock of {before}{elsewhere or ""}', flush=True)
  return fd


def _locked(path: str) -> int:
  fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    owner = _owner(fd) or 'a process that has just started'
    os.close(fd)
    raise UserError(
      f'{os.path.dirname(path)} is in use by {owner}. Wait for it or end it, or'
      ' give another --workdir.'
    ) from None
  except OSError as e:
    print(f'WARNING: {path} cannot be locked ({e.strerror}): see that no second'
          ' run writes to this workdir.', file=sys.stderr)  # fmt: skip
  return fd


def _owner(fd: int) -> str:
  return os.pread(fd, 2000, 0).decode(errors='replace').partition('\n')[0]


def _is(fd: int, path: str) -> bool:
  try:
    return os.path.samestat(os.fstat(fd), os.stat(path))
  except FileNotFoundError:
    return False
