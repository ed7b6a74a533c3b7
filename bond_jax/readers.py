"""What reads a row by its index, wherever it is: the formats of data.

No row is changed here but for bytes that are text; `sources.py` knows what the
fields mean.
"""

from __future__ import annotations

import array
import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
import glob
import itertools
import json
import os
import re
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from bond_jax import movie_reviews  # noqa: F401 (registers the builder)
from bond_jax.errors import UserError

_COMMIT = '[0-9a-f]{40}'


class Table(NamedTuple):
  """What a place holds, as it is there."""

  size: int
  read: Callable[[int], Any]
  place: Callable[[int], str]  # of a row, for people
  empty: int = 0  # lines, skipped


def paths(name: str) -> list[str]:
  """The files that a path means, in the order of their names."""
  if os.path.exists(name) or not glob.has_magic(name):
    return [name]
  if not (found := sorted(glob.glob(name))):
    raise UserError(f'no file matches {name}.')
  return found


def jsonl(paths: Sequence[str], check: Callable[[Any, str], Any]) -> Table:
  """Reads every line once, to check it; afterwards those that are asked for.

  Empty lines are no rows. What stays in memory is 32 bytes of each line.
  """
  spans = array.array('q')  # of each row: file, first byte, end, line
  empty = 0
  for k, path in enumerate(paths):
    before = len(spans)
    for start, line, number in _lines(path):
      if not line.strip():
        empty += 1
        continue
      place = f'{path}:{number}'
      check(_parse(line, place), place)
      spans.extend((k, start, start + len(line), number))
    if len(spans) == before:
      raise UserError(
        f'{path} is empty; expected one {{"text": ...}} per line.'
      )
  index = np.frombuffer(spans, np.int64).reshape(-1, 4)

  def place(i: int) -> str:
    return f'{paths[index[i, 0]]}:{index[i, 3]}'

  def read(i: int) -> Any:
    k, start, end, _ = index[i].tolist()
    try:
      with open(paths[k], 'rb') as f:
        f.seek(start)
        line = f.read(end - start)
    except OSError as e:
      raise UserError(f'cannot read {paths[k]}: {e.strerror}.') from e
    return _parse(line, place(i))

  return Table(len(index), read, place, empty)


def _lines(path: str) -> Iterator[tuple[int, bytes, int]]:
  """Where each line begins, the line, and its number, from 1."""
  start = 0
  try:
    with open(path, 'rb') as f:
      for number, line in enumerate(f, 1):
        yield start, line, number
        start += len(line)
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror}.') from e


def _parse(line: bytes, place: str) -> Any:
  try:
    row = json.loads(line.decode('utf-8'))
    if b'\\u' in line:  # an escape may be half a character, which is no text
      json.dumps(row, ensure_ascii=False).encode('utf-8')
  except (ValueError, RecursionError) as e:  # also UnicodeError
    raise UserError(f'{place}: not JSON in UTF-8 ({e}).') from e
  return row


def parquet(paths: Sequence[str]) -> Table:
  """Holds the files in memory, in Arrow's layout."""
  import pyarrow as pa
  import pyarrow.parquet

  tables = []
  for path in paths:
    try:
      tables.append(pyarrow.parquet.ParquetFile(path).read())
    # Arrow says by many kinds what is wrong with a file, some of them Python's.
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as e:
      reason = getattr(e, 'strerror', None) or _first_line(e)
      raise UserError(f'cannot read {path}: {reason.rstrip(".")}.') from e
    if not len(tables[-1]):
      raise UserError(f'{path} is empty: it has no rows.')
  try:
    table = pa.concat_tables(tables, promote_options='permissive')
  except pa.ArrowException as e:
    raise UserError(
      f'{paths[0]} and {len(paths) - 1} more files have columns of different'
      f' types: {_first_line(e)}'
    ) from e
  starts = [0, *itertools.accumulate(map(len, tables))]

  def read(i: int) -> dict[str, Any]:
    return table.slice(i, 1).to_pylist()[0]

  def place(i: int) -> str:
    k = bisect.bisect_right(starts, i) - 1
    return f'{paths[k]}, row {i - starts[k]}'

  return Table(len(table), read, place)


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def hugging_face(name: str, split: str) -> Table:
  try:
    import datasets
  except ModuleNotFoundError as e:
    raise UserError(
      f'{name} needs the package datasets: pip install datasets, in the version'
      ' of requirements-hf.txt.'
    ) from e
  target = name.removeprefix('hf:')
  match = re.fullmatch(rf'([\w.-]+/[\w.-]+)(?::([^@]+))?@({_COMMIT})', target)
  if not match and not os.path.isdir(target):
    raise UserError(
      f'{name}: no folder here, and no dataset of the hub, which is written'
      ' hf:owner/name@commit or hf:owner/name:subset@commit, with the 40'
      ' hexadecimal digits of the commit.'
    )
  try:
    if match:
      repository, subset, commit = match.groups()
      found = datasets.load_dataset(repository, subset, revision=commit)
    else:
      found = datasets.load_from_disk(target)
  except Exception as e:  # of many kinds, by way of its many libraries
    reason = f'{type(e).__name__}: {_first_line(e)}'
    raise UserError(f'cannot read {name}: {reason}') from e
  if isinstance(found, datasets.DatasetDict):
    _check_split(name, split, found)
    found = found[split]
  found = found.with_format(None)  # Python's own types
  return Table(len(found), found.__getitem__, lambda i: f'{name}, row {i}')


def _check_split(name: str, split: str, known: Mapping[str, Any]) -> None:
  if split not in known:
    raise UserError(
      f'{name} has no split {split!r}; it has {", ".join(sorted(known))}.'
      ' data.splits says which of them is ours.'
    )


def builder(name: str, split: str, data_dir: str) -> Table:
  """Opens a prepared builder; none is prepared here, which needs TensorFlow."""
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, ValueError) as e:
    raise UserError(
      f'data.name {name!r} is neither a TFDS builder, installed or prepared in'
      f' {data_dir!r}, nor a path that ends in .jsonl or .parquet, nor a'
      ' dataset of Hugging Face, hf:owner/name@commit.'
    ) from e
  prepare = (
    f"tfds.builder({name!r}, data_dir={data_dir!r}, file_format='array_record')"
    '.download_and_prepare()'
  )
  if not os.path.exists(os.path.join(builder.data_dir, 'dataset_info.json')):
    raise UserError(
      f'{name} is not prepared in {data_dir!r}; run'
      f' "python -m bond_jax.movie_reviews --data_dir={data_dir}" first.'
      if name == 'movie_reviews'
      else f'{name} is not prepared in {data_dir!r}; do so in Python, once:'
      f' {prepare}.'
    )
  kind = builder.info.file_format
  if kind is not tfds.core.FileFormat.ARRAY_RECORD:
    raise UserError(
      f'{name} is prepared in {data_dir!r} as {kind.value}, which cannot be'
      f' read by index without TensorFlow. Move {builder.data_dir} away, and'
      f' do in Python, once: {prepare}.'
    )
  _check_split(name, split, builder.info.splits)
  rows = builder.as_data_source(split=split)
  # TFDS turns a list of dicts, such as messages, into a dict of lists.
  turned = {
    key
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.Sequence)
    and isinstance(feature.feature, tfds.features.FeaturesDict)
  }

  def read(i: int) -> dict[str, Any]:
    row = _decoded(rows[i])
    for key in turned:
      values = zip(*row[key].values(), strict=True)
      row[key] = [dict(zip(row[key], x, strict=True)) for x in values]
    return row

  return Table(len(rows), read, lambda i: f'{name}, row {i} of {split}')


def _decoded(value: Any) -> Any:
  """Bytes as text, as far as they are; lists for arrays of them."""
  if isinstance(value, dict):
    return {k: _decoded(v) for k, v in value.items()}
  if isinstance(value, np.ndarray) and value.dtype.kind == 'O':
    value = list(value)
  if isinstance(value, list):
    return [_decoded(v) for v in value]
  if isinstance(value, bytes):
    try:
      return value.decode('utf-8')
    except UnicodeDecodeError:
      return value  # an image, say; check_row sees it where it is our text
  return value
