"""The devices that a plan is made for, of which none has to be there.

TPUs are those that libtpu, their compiler, can compile for. Published peaks of
one chip are from Google Cloud's pages on each generation ("TPU v5e" and so on),
seen in November 2026; what the compiler leaves of the memory is what it says
when a program needs more.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import psutil

import bond_jax
from bond_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
  """Published peaks of a chip, and the memory that a program may have."""

  memory: float  # bytes
  flops: float | None = None  # bfloat16, per second; None: not known
  bandwidth: float | None = None  # of its memory, bytes per second
  interconnect: float | None = None  # to other chips, both ways, of all links


CHIPS = {
  'v4': Chip(30.75 * GIB, 275e12, 1228e9, 600e9),
  'v5e': Chip(15.75 * GIB, 197e12, 819e9, 400e9),
  'v5p': Chip(95.73 * GIB, 459e12, 2765e9, 1200e9),
  'v6e': Chip(31.24 * GIB, 918e12, 1638e9, 800e9),
}
EXAMPLES = 'v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:2x4, cpu:8'


def devices(topology: str) -> tuple[list[Any], Chip]:
  """The devices of 'v5e:4x4' or 'cpu:8', and what one of them is.

  A UserError for a name that nobody knows, and without libtpu.
  """
  kind, _, shape = topology.partition(':')
  if kind == 'cpu' and shape.isdigit() and int(shape):
    return _cpus(int(shape))
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+){1,2}', shape):
    raise UserError(
      f'--topology={topology}: no such devices; known are {", ".join(CHIPS)}'
      ' with the chips of a slice by their grid, and cpu with a number:'
      f' {EXAMPLES}.'
    )
  os.environ['TPU_LIBRARY_PATH'] = _libtpu()
  # Not to ask the machine whether it is a TPU, nor to claim the one it may be.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['TPU_ACCELERATOR_TYPE'] = 'v5litepod-4'  # any: else it complains
  from jax.experimental import topologies  # not a part of every run

  # Two cores of a v4 are one device, as they are on its VMs.
  options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  if not set(shape) - set('1x'):  # one chip is not a whole host
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options
    )
  except Exception as e:
    reason = ' '.join(str(e).split())
    raise UserError(
      f'--topology={topology}: the TPU compiler knows no such slice ({reason});'
      f' known are, for instance, {EXAMPLES}.'
    ) from e
  return list(found.devices), CHIPS[kind]


def _cpus(count: int) -> tuple[list[Any], Chip]:
  with contextlib.suppress(RuntimeError):  # jax has been used here already
    jax.config.update('jax_num_cpu_devices', count)
  found = jax.devices('cpu')
  if len(found) < count:
    raise UserError(
      f'--topology=cpu:{count}: this process has {len(found)} CPU devices.'
    )
  return found[:count], Chip(psutil.virtual_memory().total / count)


def compiler(topology: str) -> dict[str, str]:
  """The version of the TPU compiler, where it is what compiles."""
  if topology.startswith('cpu:'):
    return {}
  folder = os.path.dirname(os.path.dirname(_libtpu()))
  found = importlib.metadata.distributions(name='libtpu', path=[folder])
  return {'libtpu': next((d.version for d in found), 'unknown')}


def _libtpu() -> str:
  """The path of the TPU compiler; a UserError if it is not installed."""
  root = pathlib.Path(bond_jax.__file__).absolute().parents[1]
  paths = [
    os.environ.get('TPU_LIBRARY_PATH', ''),
    str(root / '.libtpu/libtpu/libtpu.so'),
  ]
  spec = importlib.util.find_spec('libtpu')
  if spec and spec.origin:
    paths.append(os.path.join(os.path.dirname(spec.origin), 'libtpu.so'))
  for path in paths:
    if os.path.exists(path):
      return path
  raise UserError(
    'the TPU compiler, libtpu, is not installed: "make setup" does that, on'
    ' Linux x86-64 alone. --topology=cpu:8 makes the same table with the'
    ' compiler for CPUs.'
  )
