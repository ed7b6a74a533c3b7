"""Several processes, one per host, that run the same command together.

The same command is started on every host, with one file system for the
workdir. `start` joins them as jax finds them: JAX_COORDINATOR_ADDRESS with
JAX_NUM_PROCESSES and JAX_PROCESS_ID, a TPU pod, GKE, SLURM or Open MPI. With
one process every function here returns at once, and nothing is started.

What they tell each other, `gather` sends over jax's coordination service, which
lives in host 0: no device takes part, nothing is compiled, and a host waits for
another one's reward for as long as that takes. All hosts make these calls in
the same order, from their main threads.

They end together. An error on one host is told to all by `together`; a thread
of each waits for that, prints the same line and ends its process with the same
status. A host that is killed tells nothing. Then collectives on CPUs fail at
once; elsewhere jax notices after HEARTBEAT seconds, or at once if it was host
0, and aborts the process from C++, which a handler of SIGABRT turns into a line
and status 1. jax's own lines come before it, and a library that takes SIGABRT
for itself, or a host that holds Python's lock, leaves it at those and 134.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import io
import itertools
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed
from jax.sharding import Mesh

from bond_jax.errors import Stopped, UserError

JOIN = 300  # seconds that hosts wait for each other at the start
HEARTBEAT = 20  # seconds after which a silent host counts as dead
_ANSWER = 8  # seconds in which a live host hears that another one stops
_FOREVER = 10**10  # milliseconds
_STOP = 'bond_jax/stop'
_AGAIN = (
  'start the same command on all hosts again: it goes on from the last'
  ' checkpoint.'
)

# What numpy makes arrays and numbers of.
_ARRAYS = {
  ('numpy', 'ndarray'),
  ('numpy', 'dtype'),
  ('numpy._core.multiarray', '_reconstruct'),
  ('numpy._core.multiarray', 'scalar'),
  ('numpy._core.numeric', '_frombuffer'),
}

_rounds = itertools.count()
_alone = False  # inside of `once`
_failed = False  # this host is telling the others of its own error
_leaving = threading.Lock()
_watcher: threading.Thread | None = None


class Disagreement(UserError):
  """Raised on all hosts alike; the line says itself which host it is."""


# -- together from the start to the end


def start(timeout: int = JOIN) -> None:
  """Joins the other hosts, if there are any; before jax touches a device.

  A UserError, or that line and status 2, if they are not there in `timeout`
  seconds.
  """
  global _watcher
  if _watcher or not (_client() or _several()):
    return
  # A signal is for the command to take, not for a service that nobody asks.
  jax.config.update('jax_enable_preemption_service', False)
  _take_aborts(timeout)
  number = lambda name: int(os.environ[name]) if name in os.environ else None
  try:
    if not _client():
      jax.distributed.initialize(
        num_processes=number('JAX_NUM_PROCESSES'),
        process_id=number('JAX_PROCESS_ID'),
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
      )
  except Exception as e:
    raise UserError(
      f'cannot join the other hosts ({_brief(e)}); check'
      ' JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and'
      ' JAX_PROCESS_ID, or unset all three for one process.'
    ) from e
  _watcher = threading.Thread(target=_watch, daemon=True)
  _watcher.start()


@contextlib.contextmanager
def together(debug: bool = False) -> Iterator[None]:
  """Ends all hosts as one: when all have done the work, or one has failed."""
  stopped = None
  try:
    yield
  except BaseException as e:
    if not isinstance(e, Stopped) or not e.together:
      if _watcher:
        _fail(e, debug)
      raise
    stopped = e
  if _watcher:
    gather(None)
    if first():
      _client().key_value_set(_STOP, json.dumps(None))
    _watcher.join()
    jax.distributed.shutdown()
  if stopped:
    raise stopped


def count() -> int:
  return distributed.global_state.num_processes if _client() else 1


def index() -> int:
  return distributed.global_state.process_id if _client() else 0


def first() -> bool:
  """Whether this is the host that prints and writes."""
  return index() == 0


def say(line: str) -> None:
  """Prints a line, once for all hosts."""
  if first():
    print(line, flush=True)


# -- telling each other


def gather(value: Any) -> list[Any]:
  """The values of all hosts, which all of them get.

  They are what `_loads` lets through: plain values of Python, numpy's arrays,
  and named tuples of this package.

  Two milliseconds for four processes of one machine, and two seconds if each
  of them has ten megabytes to tell.
  """
  if count() == 1 or _alone:
    return [value]
  client, folder = _client(), f'bond_jax/{next(_rounds)}'
  client.key_value_set_bytes(f'{folder}/{index()}', pickle.dumps(value))
  if first():
    parts = [
      client.blocking_key_value_get_bytes(f'{folder}/{i}', _FOREVER)
      for i in range(count())
    ]
    client.key_value_set_bytes(f'{folder}/all', pickle.dumps(parts))
  else:
    parts = client.blocking_key_value_get_bytes(f'{folder}/all', _FOREVER)
    parts = _loads(parts)
  # Host 0 has heard of all in this round, so that they have read the last one.
  if first() and (last := int(folder.rpartition('/')[2])):
    client.key_value_delete(f'bond_jax/{last - 1}/')
  return [_loads(part) for part in parts]


class _Plain(pickle.Unpickler):
  """Reads what `gather` sends, and calls nothing else that a pickle names.

  Whoever reaches the port of host 0 may put a value into its service.
  """

  def find_class(self, module: str, name: str) -> Any:
    if (module.replace('numpy.core', 'numpy._core'), name) in _ARRAYS:
      return super().find_class(module, name)
    if module.startswith('bond_jax.'):
      found = super().find_class(module, name)
      if isinstance(found, type) and issubclass(found, tuple):
        return found
    raise UserError(
      f'a host was sent {module}.{name}, which no host of ours sends; see that'
      ' nobody else reaches the port of JAX_COORDINATOR_ADDRESS.'
    )


def _loads(content: bytes) -> Any:
  return _Plain(io.BytesIO(content)).load()


def once(f: Callable[[], Any]) -> Any:
  """f(), called on host 0 alone; the others wait for what it returns.

  For decisions, and for files that one must write. Within it there are no
  other hosts.
  """
  global _alone
  if count() == 1 or _alone:
    return f()
  value = None
  if first():
    _alone = True
    try:
      value = f()
    finally:
      _alone = False
  return gather(value)[0]


def check_shared(folder: str, patience: float = 5.0) -> None:
  """A UserError unless all hosts see what host 0 writes in `folder`."""
  if count() == 1:
    return

  def write() -> str:
    # A new name each time, of which no file system remembers its absence.
    name = f'.hosts-{os.urandom(8).hex()}'
    with open(os.path.join(folder, name), 'w', encoding='utf-8'):
      return name

  path, until = os.path.join(folder, once(write)), time.monotonic() + patience
  while not (seen := os.path.exists(path)) and time.monotonic() < until:
    time.sleep(0.2)  # what others wrote may take a while to be seen
  blind = [i for i, sees in enumerate(gather(seen)) if not sees]
  once(lambda: os.remove(path))
  if blind:
    raise Disagreement(
      f'{folder} is not shared: {names(blind)} did not see there what host 0'
      ' wrote. Give a --workdir on a file system that is mounted on all hosts.'
    )


def check_mesh(mesh: Mesh) -> None:
  """A UserError if a host has no device in the mesh."""
  used = {device.process_index for device in mesh.devices.flat}
  idle = sorted(set(range(jax.process_count())) - used)
  if idle:
    raise Disagreement(
      f'mesh data={mesh.shape["data"]} x model={mesh.shape["model"]} has no'
      f' device of {names(idle)}; with mesh.data=-1 it takes all.'
    )


# -- how it ends


def _client():
  return distributed.global_state.client


def _several() -> bool:
  """Whether the environment says that there is more than one process."""
  if number := os.environ.get('JAX_NUM_PROCESSES'):
    return int(number) > 1
  if os.environ.get('JAX_COORDINATOR_ADDRESS'):
    return True
  try:  # as jax.distributed.initialize does
    known = clusters.ClusterEnv._cluster_types
    found = (c for c in known if not c.opt_in_only_method)
    cluster = next((c for c in found if c.is_env_present()), None)
    return cluster is not None and cluster.get_process_count() > 1
  except Exception:  # a TPU without a metadata server, for instance
    return False


def _watch() -> None:
  """Waits until some host stops all; ends this one then."""
  try:
    told = _client().blocking_key_value_get(_STOP, _FOREVER)
  except Exception:  # the service has ended with its host
    if _failed:
      return
    _leave(f'host 0 died or does not answer: {_AGAIN}', 1)
  if (told := json.loads(told)) is not None and not _failed:
    _leave(*_verdict(*told))  # None: all have done the work


def _fail(error: BaseException, debug: bool) -> NoReturn:
  """Tells all hosts about an error on this one, and ends it."""
  global _failed
  _failed = True
  message, status = f'host {index()}: {_brief(error)}', 1
  if isinstance(error, UserError):
    message, status = f'host {index()}: {error}', 2
  elif isinstance(error, Stopped):
    message, status = str(error), error.status
  elif isinstance(error, KeyboardInterrupt):
    message, status = f'interrupted; {_AGAIN}', 130
  if isinstance(error, Disagreement):
    message = str(error)
  mine, told = (message, status), None
  with contextlib.suppress(Exception):  # another host was faster, or is gone
    _client().key_value_set(_STOP, json.dumps(mine))
  with contextlib.suppress(Exception):
    told = json.loads(_client().key_value_try_get(_STOP))
  line, status = _verdict(*(told or mine))
  if debug or (mine[1] == 1 and status == 1 and line == (told or mine)[0]):
    traceback.print_exception(error)
  _leave(line, status)


def _verdict(message: str, status: int) -> tuple[str, int]:
  """The line and the status with which hosts end, when all have answered."""
  client, until = _client(), time.monotonic() + _ANSWER
  missing = [0]
  try:
    client.key_value_set(f'{_STOP}ped/{index()}', '', allow_overwrite=True)
    while missing and time.monotonic() < until:
      time.sleep(0.05)
      heard = client.key_value_dir_get(f'{_STOP}ped/')
      heard = {int(key.rpartition('/')[2]) for key, _ in heard}
      missing = sorted(set(range(count())) - heard)
  except Exception:  # host 0 is gone, and with it the service
    missing = [0]
  if not missing:
    return message, status
  return f'{names(missing)} died or does not answer ({message}): {_AGAIN}', 1


def _leave(line: str, status: int) -> NoReturn:
  """Ends the process at once, whatever its threads do, with one line."""
  if not _leaving.acquire(blocking=False):
    time.sleep(60)  # another thread is about to
  print(f'error: {line}', file=sys.stderr, flush=True)
  if first():
    time.sleep(1)  # without the service, the others would be aborted
  sys.stdout.flush()
  os._exit(status)


def _take_aborts(timeout: int) -> None:
  """Says what it means when jax aborts the process."""

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def aborted(_):
    state = distributed.global_state
    if _watcher:
      _leave(
        'this host was ended because another one died, or did not answer for'
        f' {HEARTBEAT} s (jax names it above): {_AGAIN}', 1
      )  # fmt: skip
    who = 'not all hosts came' if state.process_id == 0 else 'nobody answers'
    _leave(
      f'host {state.process_id} of {state.num_processes}: {who} at'
      f' {state.coordinator_address} within {timeout} s. Check that the command'
      ' runs on all hosts with the same JAX_COORDINATOR_ADDRESS, that it is'
      " host 0's, and that its port is open.", 2
    )  # fmt: skip

  _take_aborts.handler = aborted  # C holds no reference
  ctypes.CDLL(None).signal(signal.SIGABRT, aborted)


def _brief(error: BaseException) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def names(hosts: Sequence[int]) -> str:
  return (
    f'host {hosts[0]}'
    if len(hosts) == 1
    else (f'hosts {", ".join(map(str, hosts))}')
  )
