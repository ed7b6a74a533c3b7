"""Files of ours, written whole or not at all: JSON and named arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import os
from typing import Any, TypeVar
import zipfile
import zlib

import numpy as np

from bond_jax.errors import UserError

_RESTORE = 'it was cut or changed: restore it, or move it away'


def write_json(path: str, value: Any) -> None:
  """Writes JSON whole or not at all: to a temporary name, then renamed."""
  temporary = path + '.tmp'
  with open(temporary, 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=2)
    f.write('\n')
    f.flush()
    os.fsync(f.fileno())  # a summary says that a stage is done
  os.replace(temporary, path)


def read_json(path: str, remedy: str = _RESTORE) -> dict[str, Any]:
  """The JSON object in a file; a UserError if there is none."""
  reason = 'it is not a JSON object'
  try:
    with open(path, encoding='utf-8') as f:
      value = json.load(f)
    if isinstance(value, dict):
      return value
  except OSError as e:
    reason = e.strerror
  except (ValueError, RecursionError):  # also of bytes that are not UTF-8
    pass
  raise UserError(f'cannot read {path} ({reason}); {remedy}.')


T = TypeVar('T')


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Puts the arrays into a file, in the place of what was there."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path + '.tmp', 'wb') as f:
    np.savez(f, **arrays)
  os.replace(path + '.tmp', path)


def read(
  path: str,
  use: Callable[[Mapping[str, np.ndarray]], T],
  what: str,
  remedy: str,
) -> T:
  """What `use` makes of the arrays of a file that `write` made.

  A FileNotFoundError if it is not there. A UserError, "path is not `what`;
  `remedy`", if it is any other file, or `use` raises a KeyError or ValueError.
  """
  try:
    with np.load(path, allow_pickle=False) as f:
      return use(dict(f))
  except FileNotFoundError:
    raise
  except (
    OSError,
    KeyError,
    ValueError,
    EOFError,
    MemoryError,  # of a size that the file claims
    NotImplementedError,  # of a way to pack it
    zipfile.BadZipFile,
    zlib.error,
  ) as e:
    raise UserError(f'{path} is not {what} ({e}); {remedy}.') from e
