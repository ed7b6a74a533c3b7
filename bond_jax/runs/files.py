"""Files written whole or not at all: text, JSON and named arrays."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import os
from typing import Any, IO
import zipfile
import zlib

import numpy as np

from bond_jax.errors import UserError

_RESTORE = 'it was cut or changed: restore it, or move it away'


@contextlib.contextmanager
def whole(path: str, mode: str = 'w') -> Iterator[IO]:
  """A file to write to, which replaces `path` when the block succeeds."""
  encoding = None if 'b' in mode else 'utf-8'
  with open(path + '.tmp', mode, encoding=encoding) as f:
    yield f
    f.flush()
    os.fsync(f.fileno())  # a summary means that a stage is done
  os.replace(path + '.tmp', path)


def write_json(path: str, value: Any) -> None:
  with whole(path) as f:
    json.dump(value, f, indent=2)
    f.write('\n')


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


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes named arrays; makes the folder if it is missing."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with whole(path, 'wb') as f:
    np.savez(f, **arrays)


def read(
  path: str,
  use: Callable[[Mapping[str, np.ndarray]], Any],
  what: str,
  remedy: str,
) -> Any:
  """Reads a file of `write`, and returns what `use` makes of its arrays.

  A FileNotFoundError if it is absent. A UserError, "path is not `what`;
  `remedy`", if it is another file, or `use` raises a KeyError or ValueError.
  """
  try:
    with np.load(path, allow_pickle=False) as f:
      return use(dict(f))
  except FileNotFoundError:
    raise
  except (
    OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error,
    MemoryError,  # of a size that the file claims
    NotImplementedError,  # of an unknown compression
  ) as e:  # fmt: skip
    raise UserError(f'{path} is not {what} ({e}); {remedy}.') from e
