"""Which host rewards which rows of a batch, and how all hosts get the results.

Prompts are on every host: each reads the whole batch. Completions are on the
mesh, and a host can read only the rows that its devices hold, a part of mesh
axis `data`. Where `data` has fewer parts than there are hosts, several hold the
same rows. So each row has one owner among the hosts that hold it; owners call
the reward with their rows, and send the results to all others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from bond_jax.devices import hosts, sharding


def owners(mesh: Mesh, size: int) -> np.ndarray:
  """The process that owns each row of a batch of that size: i64[size].

  Hosts that hold the same part share its rows out evenly, in order.
  """
  holders: dict[tuple[int, int], set[int]] = {}
  shards = sharding.by_row(mesh).devices_indices_map((size,))
  for device, (rows,) in shards.items():
    part = rows.indices(size)[:2]
    holders.setdefault(part, set()).add(device.process_index)
  owner = np.zeros(size, np.int64)
  for (begin, end), some in holders.items():
    place = np.arange(end - begin) * len(some) // (end - begin)
    owner[begin:end] = np.array(sorted(some))[place]
  return owner


def own(mesh: Mesh, size: int) -> np.ndarray:
  """The rows that this host owns, in order: i64[N]; N may be 0."""
  return np.flatnonzero(owners(mesh, size) == jax.process_index())


def take(tree: Any, rows: np.ndarray) -> Any:
  """Rows of host arrays, or of arrays on the mesh that this host holds."""

  def some(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return np.asarray(x)[rows]
    parts = {s.index[0].indices(len(x))[:2]: s for s in x.addressable_shards}
    held = np.concatenate([np.arange(*part) for part in sorted(parts)])
    data = np.concatenate([np.asarray(parts[k].data) for k in sorted(parts)])
    return data[np.searchsorted(held, rows)]

  return jax.tree.map(some, tree)


def join(parts: Sequence[tuple[np.ndarray, Any]]) -> Any:
  """Joins the results of all owners, (rows, tree of arrays) each, in row order.

  The tree of an owner without rows is ignored.
  """
  order = np.argsort(np.concatenate([rows for rows, _ in parts]))
  trees = [tree for rows, tree in parts if len(rows)]
  return jax.tree.map(lambda *x: np.concatenate(x)[order], *trees)


def over(rows: np.ndarray, f: Callable[[], Any]) -> Any:
  """Calls f() on every host that owns `rows`; the results of all, on all."""
  return join(hosts.gather((rows, f() if len(rows) else None)))


def fetch(tree: Any) -> Any:
  """Arrays on the mesh, whole, on every host."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
