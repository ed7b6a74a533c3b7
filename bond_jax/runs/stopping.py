"""Ending on request: SIGTERM, which a preempted machine gets, and Ctrl-C.

Within `deferred`, the loop of a training stage, a first signal is a request:
the loop asks `due()` after every step, saves, and raises `stopped`. Anywhere
else there is nothing to save, and it ends the stage at once. A second signal
ends the process at once anywhere, and so does the clock BOUND seconds after
the first: a thread sees to both, because Python's own handlers wait for the
main thread, and that waits for devices and compilations.

The status is 143 after SIGTERM and 130 after Ctrl-C (128 + the signal).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

from bond_jax.devices import hosts
from bond_jax.errors import Stopped

BOUND = 300  # seconds from the first signal to the end, whatever happens

_asked: int | None = None  # the signal that this host got
_told: int | None = None  # the signal that all hosts know that one of them got
_deferring = False


@contextlib.contextmanager
def listening() -> Iterator[None]:
  """Takes signals in this block, in the main thread; in others, nothing."""
  global _asked, _told
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  _asked = _told = None
  # Children of a script that runs them in the background ignore Ctrl-C.
  taken = [
    s
    for s in (signal.SIGTERM, signal.SIGINT)
    if signal.getsignal(s) != signal.SIG_IGN
  ]
  ours, theirs = os.pipe()
  for end in (ours, theirs):
    os.set_blocking(end, False)
  before = {s: signal.signal(s, _handle) for s in taken}
  fd = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
  thread = threading.Thread(target=_watch, args=(ours,), daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(fd)
    for s, handler in before.items():
      signal.signal(s, handler)
    os.write(theirs, b'\0')  # no signal has this number
    thread.join()
    os.close(ours)
    os.close(theirs)
    _asked = _told = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """Signals in this block only make `due()` true."""
  global _deferring
  _deferring = True
  try:
    yield
  finally:
    _deferring = False


def asked() -> int | None:
  """The signal that this host got, to be told to the others; see `hear`."""
  return _asked


def hear(told: Iterable[int | None]) -> None:
  """Takes in what `asked()` was on all hosts, at one place of all of them."""
  global _told
  _told = next(filter(None, told), _told)


def due() -> int | None:
  """The signal for which all hosts stop here.

  Of several hosts only what all have heard counts, so that they agree.
  """
  return _asked if hosts.count() == 1 else _told


def stopped(stage: str, step: int | None) -> Stopped:
  """What to raise, on all hosts, after a step that is saved; None: the last."""
  number = due()
  done = 'the stage is finished, and no other one starts.'
  if step is not None:
    done = (
      f'ended after step {step}, which is saved; the same command goes on from'
      ' there.'
    )
  name = signal.Signals(number).name
  return Stopped(f'{stage}: {name}: {done}', 128 + number, together=True)


def _handle(number: int, _) -> None:
  global _asked
  _asked = _asked or number
  if _deferring:
    return
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  raise Stopped(
    f'{signal.Signals(number).name}: ended before anything of this stage was'
    ' left to save; the same command takes it up again.',
    128 + number,
  )


def _watch(fd: int) -> None:
  """Reads the numbers of signals; ends the process at the second, or late."""
  global _asked
  until = None
  while True:
    left = None if until is None else max(until - time.monotonic(), 0)
    if not select.select([fd], [], [], left)[0]:
      _leave(_asked, f'not at the end of a step after {BOUND} s')
    for number in os.read(fd, 64):
      if number == 0:
        return
      if number not in (signal.SIGTERM, signal.SIGINT):
        continue
      if until is not None:
        _leave(number, 'a second signal')
      _asked, until = number, time.monotonic() + BOUND
      if _deferring:
        print(
          f'\n{signal.Signals(number).name}: saves after this step and ends, in'
          f' at most {BOUND} s; once more ends it at once.',
          file=sys.stderr,
          flush=True,
        )


def _leave(number: int, why: str) -> NoReturn:
  print(
    f'\n{signal.Signals(number).name}: {why}: ended at once; the same command'
    ' goes on from the last checkpoint.',
    file=sys.stderr,
    flush=True,
  )
  sys.stdout.flush()
  os._exit(128 + number)
