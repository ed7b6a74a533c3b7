"""Settings of jax and versions of packages, which may change a number."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
from typing import Any

import jax

_VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'NVIDIA_TF32_OVERRIDE')
_SETTINGS = (
  'jax_default_matmul_precision', 'jax_disable_most_optimizations',
  'jax_optimization_level', 'jax_disable_jit', 'jax_allow_f16_reductions',
  'jax_accurate_erf_inv', 'jax_softmax_custom_jvp',
  'jax_use_hlo_logistic_lowering', 'jax_use_shardy_partitioner',
  'jax_threefry_gpu_kernel_lowering',
)  # fmt: skip


def configure_jax() -> None:
  """Pins the settings of jax that change numbers, against the environment.

  `record` returns those that the environment may change.
  """
  jax.config.update('jax_enable_x64', False)
  jax.config.update('jax_numpy_dtype_promotion', 'standard')
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  jax.config.update('jax_default_prng_impl', 'threefry2x32')
  jax.config.update('jax_threefry_partitionable', True)
  jax.config.update('jax_random_seed_offset', 0)


def keep_compilations(backend: str) -> None:
  """Caches compiled programs for later runs, those that take a second or more.

  The folder is JAX_COMPILATION_CACHE_DIR, or else ~/.cache/bond_jax. A program
  for CPUs fits one kind of them, and may ask for as many threads as it was
  compiled with: each kind has a folder of its own.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  folder = os.path.expanduser('~/.cache/bond_jax')
  if backend == 'cpu':
    digest = hashlib.sha256(cpu().encode()).hexdigest()
    folder = os.path.join(folder, f'cpu_{digest[:16]}')
  jax.config.update('jax_compilation_cache_dir', folder)


def cpu() -> str:
  """What the compiler may look at of this machine's CPUs."""
  found = [platform.machine(), platform.processor(), str(os.cpu_count())]
  with contextlib.suppress(OSError):
    with open('/proc/cpuinfo', encoding='utf-8') as f:
      rows = [row.split(':') for row in f if ':' in row]
    wanted = (
      'model name',
      'model',
      'stepping',
      'flags',
      'Features',
      'CPU part',
    )
    found += sorted({':'.join(row) for row in rows if row[0].strip() in wanted})
  return '\n'.join(found)


def versions() -> dict[str, str]:
  """Of the packages that the numbers depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy',
           'scipy', 'scikit-learn', 'sentencepiece')  # fmt: skip
  return {name: importlib.metadata.version(name) for name in names}


def record() -> dict[str, Any]:
  """Versions and settings that may differ between two runs of one command."""
  values = jax.config.values.items()
  return {
    'versions': versions() | {'python': platform.python_version()},
    'jax': {name: value for name, value in values if name in _SETTINGS},
    'environment': {k: os.environ[k] for k in _VARIABLES if k in os.environ},
  }
