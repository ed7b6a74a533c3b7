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
status. A host that is killed tells nothing: jax notices after HEARTBEAT
seconds, and ends the processes of the others with lines of its own.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import io
import itertools
import json
import os
import pickle
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed
from jax.sharding import Mesh

from bond_jax.errors import one_line, Stopped, UserError

JOIN = 300  # seconds that hosts wait for each other at the start
HEARTBEAT = 20  # seconds after which a silent host counts as dead
_FOREVER = 10**10  # milliseconds
_STOP = 'bond_jax/stop'
_PATIENCE = 5  # seconds in which a host hears from the service in host 0
_AGAIN = (
  'start the same command on all hosts again: it goes on from the last'
  ' checkpoint.'
)

# What pickled arrays and numbers of numpy name.
_ARRAYS = {
  'numpy ndarray', 'numpy dtype', 'numpy._core.multiarray _reconstruct',
  'numpy._core.multiarray scalar', 'numpy._core.numeric _frombuffer',
}  # fmt: skip

_rounds = itertools.count()
_alone = False  # inside of `once`
_watcher: threading.Thread | None = None


class Disagreement(UserError):
  """Raised on all hosts alike; the line says itself which host it is."""


# -- together from the start to the end


def start(timeout: int = JOIN) -> None:
  """Joins the other hosts, if there are any; before jax touches a device.

  If they are not there in `timeout` seconds, jax ends the process.
  """
  global _watcher
  if _watcher or not (_client() or _several()):
    return
  # A signal is for the command to take, not for jax's own service.
  jax.config.update('jax_enable_preemption_service', False)
  number = lambda name: int(os.environ[name]) if name in os.environ else None
  try:
    if not _client():
      print(f'joining the other hosts, for {timeout} s at most', flush=True)
      jax.distributed.initialize(
        num_processes=number('JAX_NUM_PROCESSES'),
        process_id=number('JAX_PROCESS_ID'),
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
      )
  except Exception as e:
    raise UserError(
      f'cannot join the other hosts ({one_line(e)}); check'
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

  Plain values of Python, numpy's arrays, and named tuples of this package. Four
  processes of one machine need two milliseconds for small values, and two
  seconds for ten megabytes each.
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
  # Host 0 has the values of all in this round, so all have read the last one.
  if first() and (last := int(folder.rpartition('/')[2])):
    client.key_value_delete(f'bond_jax/{last - 1}/')
  return [_loads(part) for part in parts]


class _Plain(pickle.Unpickler):
  """Reads what `gather` sends, and calls nothing else that a pickle names.

  Anyone who reaches the port of host 0 can put a value into its service.
  """

  def find_class(self, module: str, name: str) -> Any:
    if f'{module.replace("numpy.core", "numpy._core")} {name}' in _ARRAYS:
      return super().find_class(module, name)
    if module.startswith('bond_jax.'):
      found = super().find_class(module, name)
      if isinstance(found, type) and issubclass(found, tuple):
        return found
    raise UserError(
      f'a host received {module}.{name}, which no host of ours sends; see that'
      ' nobody else reaches the port of JAX_COORDINATOR_ADDRESS.'
    )


def _loads(content: bytes) -> Any:
  return _Plain(io.BytesIO(content)).load()


def once(f: Callable[[], Any]) -> Any:
  """Calls f on host 0 alone; all hosts get what it returns.

  For decisions, and for files that only one may write. Inside of f, `gather`
  and `once` involve no other host.
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
    # A new name each time: file systems cache that a name is absent.
    name = f'.hosts-{os.urandom(8).hex()}'
    with open(os.path.join(folder, name), 'w', encoding='utf-8'):
      return name

  path, until = os.path.join(folder, once(write)), time.monotonic() + patience
  while not (seen := os.path.exists(path)) and time.monotonic() < until:
    time.sleep(0.2)  # the file may become visible late
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
  """Waits until some host stops all; ends this process then."""
  try:
    stop = json.loads(_client().blocking_key_value_get(_STOP, _FOREVER))
  except Exception:  # the service has ended with its host
    stop = f'host 0 died or does not answer: {_AGAIN}', 1
  if stop:  # None: all have done the work
    _leave(*stop)


def _fail(error: BaseException, debug: bool) -> NoReturn:
  """Tells all hosts, this one too, to end with an error of this one."""
  line, status = f'host {index()}: {type(error).__name__}: {one_line(error)}', 1
  if isinstance(error, UserError):
    here = '' if isinstance(error, Disagreement) else f'host {index()}: '
    line, status = f'{here}{error}', 2
  elif isinstance(error, Stopped):
    line, status = str(error), error.status
  elif isinstance(error, KeyboardInterrupt):
    line, status = f'interrupted; {_AGAIN}', 130
  if debug or status == 1:
    traceback.print_exception(error)
  with contextlib.suppress(Exception):  # another host was faster, or is gone
    _client().key_value_set(_STOP, json.dumps((line, status)))
  _watcher.join(_PATIENCE)  # it ends the process
  _leave(line, status)


def _leave(line: str, status: int) -> NoReturn:
  """Ends the process at once, whatever its threads do, with one line."""
  print(f'error: {line}', file=sys.stderr, flush=True)
  if first():
    time.sleep(1)  # the others read the line from a service of this process
  sys.stdout.flush()
  os._exit(status)


def names(hosts: Sequence[int]) -> str:
  return f'host{"s" * (len(hosts) > 1)} {", ".join(map(str, hosts))}'
