"""What a checkpoint was made by: compared when a run goes on from it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections

from bond_jax import build, command, hosts


def of(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """Facts that may change results, in their last bits or more; JSON."""
  code = command.fingerprints(os.path.dirname(__file__))
  flags = ('jax_default_matmul_precision', 'jax_enable_x64')
  return {
    'config': _sha(json.loads(config.to_json_best_effort())),
    'code': _sha(code),
    'versions': build.versions() | {'python': platform.python_version()},
    'mesh': dict(mesh.shape),
    'hosts': hosts.count(),
    'device': mesh.devices.flat[0].device_kind,
    'dtype': {'model': config.model.dtype}
    | {name: jax.config.values[name] for name in flags},
  }


def _sha(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[
    :12
  ]
