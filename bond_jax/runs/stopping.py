"""Ending on request: SIGTERM, which a preempted machine gets, and Ctrl-C.

Within `deferred`, the loop of a training stage, a first signal is a request:
the loop asks `due()` after every step, saves, and raises `stopped`. Anywhere
else there is nothing to save, and it ends the stage at once. A second signal
ends the process at once anywhere, as does a timer, BOUND seconds after the
first. A thread does both, because Python's own handlers wait for the main
thread, and that waits for devices and compilations.

The status is 143 after SIGTERM and 130 after Ctrl-C (128 + the signal).
"""

from collections.abc import Iterable, Iterator
import contextlib
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

from bond_jax.devices import hosts
from bond_jax.errors import Stopped

BOUND = 300  # seconds from the first signal to the end, whatever happens
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_here: int | None = None  # the signal that this host got
_agreed: int | None = None  # one that all hosts know of
_deferring = False


@contextlib.contextmanager
def listening() -> Iterator[None]:
  """Takes signals in this block; outside of the main thread it does nothing."""
  global _here, _agreed
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  # Children of a script that runs them in the background ignore Ctrl-C.
  taken = [s for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  before = {s: signal.signal(s, _handle) for s in taken}
  fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=_watch, args=(reader,), daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(fd)
    for s, handler in before.items():
      signal.signal(s, handler)
    writer.close()  # which ends the thread
    thread.join()
    reader.close()
    _here = _agreed = None


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
  """The signal that this host got, for `hear` on all hosts."""
  return _here


def hear(signals: Iterable[int | None]) -> None:
  """Takes in `asked()` of all hosts; all call this after the same step."""
  global _agreed
  _agreed = next(filter(None, signals), _agreed)


def due() -> int | None:
  """The signal for which all hosts stop here.

  Of several hosts only what all have heard counts, so that they agree.
  """
  return _here if hosts.count() == 1 else _agreed


def stopped(stage: str, step: int | None) -> Stopped:
  """What all hosts raise after a step that is saved; None is the last step."""
  number = due()
  done = (
    'the stage is finished, and no other one starts.'
    if step is None
    else f'ended after step {step}, which is saved; the same command goes on'
    ' from there.'
  )
  name = signal.Signals(number).name
  return Stopped(f'{stage}: {name}: {done}', 128 + number, together=True)


def _handle(number: int, _) -> None:
  global _here
  _here = _here or number
  if _deferring:
    return
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  raise Stopped(
    f'{signal.Signals(number).name}: ended before anything of this stage was'
    ' left to save; the same command takes it up again.',
    128 + number,
  )


def _watch(reader: socket.socket) -> None:
  """Reads the numbers of signals; ends the process at the second, or late."""
  first = 0
  try:
    while data := reader.recv(1):
      number = data[0]
      if number not in _SIGNALS:
        continue
      if first:
        _leave(number, 'a second signal')
      first = number
      reader.settimeout(BOUND)
      if _deferring:
        _print(number, f'saves after this step and ends, in at most {BOUND} s;'
               ' once more ends it at once.')  # fmt: skip
  except TimeoutError:
    _leave(first, f'not at the end of a step after {BOUND} s')


def _leave(number: int, why: str) -> NoReturn:
  _print(number, f'{why}: ended at once; the same command goes on from the last'
         ' checkpoint.')  # fmt: skip
  sys.stdout.flush()
  os._exit(128 + number)


def _print(number: int, line: str) -> None:
  name = signal.Signals(number).name
  print(f'\n{name}: {line}', file=sys.stderr, flush=True)
