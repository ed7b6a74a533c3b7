"""Named arrays in a file (.npz), written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
from typing import TypeVar
import zipfile
import zlib

import numpy as np

from bond_jax.errors import UserError

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
