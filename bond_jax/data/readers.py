"""The formats of data: readers of rows by index.

Rows are as they were written; `conversations.py` knows what fields mean.
"""

import bisect
import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
import glob
import gzip
import io
import itertools
import json
import os
import re
from typing import Any, NamedTuple
import zlib

import numpy as np

from bond_jax.errors import BadRow, UserError

JSON = '.jsonl', '.json', '.jsonl.gz', '.json.gz'  # how such paths end
_COMMIT = '[0-9a-f]{40}'


class Table(NamedTuple):
  """The rows of some files or of a data set."""

  size: int
  read: Callable[[int], Any]
  place: Callable[[int], str]  # of a row, for people
  holds: Sequence[tuple[str, int]]  # real path of each file, and its rows
  empty: int = 0  # lines that were skipped


def paths(name: str) -> list[str]:
  """The files that a path means, in the order of their names."""
  if os.path.exists(name) or not glob.has_magic(name):
    return [name]
  if not (found := sorted(glob.glob(name))):
    raise UserError(f'no file matches {name}.')
  return found


def jsonl(paths: Sequence[str], check: Callable[[Any], Any] | None) -> Table:
  """Holds rows of JSON in memory: lines, or the elements of one array.

  Empty lines are no rows. Every row must pass `check` before this returns.
  """
  places, rows, holds, empty = [], [], [], 0
  for path in paths:
    before = len(rows)
    for place, row in _values(path):
      if not row.strip():
        empty += 1
        continue
      try:
        if check:
          check(_parse(row))
      except BadRow as e:
        raise BadRow(f'{place}: {e}') from e
      places.append(place)
      rows.append(row)
    if len(rows) == before:
      raise UserError(
        f'{path} is empty; expected one {{"text": ...}} per line.'
      )
    holds.append((os.path.realpath(path), len(rows) - before))
  read = lambda i: _parse(rows[i])
  return Table(len(rows), read, places.__getitem__, holds, empty)


def _values(path: str) -> Iterator[tuple[str, bytes]]:
  """The place and the JSON of each line or element."""
  try:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
      content = f.read().removeprefix(codecs.BOM_UTF8)  # Notepad writes it
  except (OSError, EOFError, zlib.error) as e:  # the latter two: of gzip
    raise _unreadable(path, e) from e
  if not content.lstrip().startswith(b'['):
    for number, line in enumerate(io.BytesIO(content), 1):
      yield f'{path}:{number}', line.removeprefix(codecs.BOM_UTF8)
    return
  try:
    values = json.loads(content.decode('utf-8'))
  except json.JSONDecodeError as e:
    raise UserError(f'{path}:{e.lineno}: not JSON ({e.msg}).') from e
  except (UnicodeDecodeError, RecursionError) as e:
    raise UserError(f'{path}: not JSON in UTF-8 ({e}).') from e
  for i, value in enumerate(values):
    yield f'{path}, row {i}', json.dumps(value).encode()


def _parse(value: bytes) -> Any:
  try:
    row = json.loads(value.decode('utf-8'))
    if b'\\u' in value:  # an escape may be half a character, which is no text
      json.dumps(row, ensure_ascii=False).encode('utf-8')
  except UnicodeError as e:
    raise BadRow(f'not JSON in UTF-8 ({e}); save the file as UTF-8.') from e
  except (ValueError, RecursionError) as e:
    raise BadRow(f'not JSON in UTF-8 ({e}).') from e
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
      raise _unreadable(path, e) from e
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
  read = lambda i: table.slice(i, 1).to_pylist()[0]

  def place(i: int) -> str:
    k = bisect.bisect_right(starts, i) - 1
    return f'{paths[k]}, row {i - starts[k]}'

  holds = [*zip(map(os.path.realpath, paths), map(len, tables))]
  return Table(len(table), read, place, holds)


def _unreadable(path: str, error: Exception) -> UserError:
  reason = getattr(error, 'strerror', None) or _first_line(error)
  return UserError(f'cannot read {path}: {reason.rstrip(".")}.')


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def hugging_face(name: str, split: str) -> Table:
  """Opens hf:owner/name@commit, or a folder that save_to_disk wrote."""
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
  held = target if match else os.path.realpath(target)
  if isinstance(found, datasets.DatasetDict):
    _check_split(name, split, found)
    found, held = found[split], os.path.join(held, split)
  found = found.with_format(None)  # Python's own types
  place = lambda i: f'{name}, row {i}'
  return Table(len(found), found.__getitem__, place, [(held, len(found))])


def _check_split(name: str, split: str, known: Mapping[str, Any]) -> None:
  if split not in known:
    raise UserError(
      f'{name} has no split {split!r}; it has {", ".join(sorted(known))}.'
      ' data.splits says which of them is ours.'
    )


def builder(name: str, split: str, data_dir: str) -> Table:
  """Opens a prepared builder; preparing one needs TensorFlow, reading not."""
  import tensorflow_datasets as tfds  # takes a second

  if name == 'movie_reviews':
    from bond_jax.data import movie_reviews  # noqa: F401 (registers it)
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, ValueError) as e:
    raise UserError(
      f'data.name {name!r} is neither a TFDS builder, installed or prepared in'
      f' {data_dir!r}, nor a path that ends in {", ".join(JSON)} or .parquet,'
      ' nor a dataset of Hugging Face, hf:owner/name@commit.'
    ) from e
  prepare = (
    f'prepare it once, in Python: tfds.builder({name!r}, data_dir={data_dir!r},'
    " file_format='array_record').download_and_prepare()"
  )
  if name == 'movie_reviews':
    prepare = f'run "python -m bond_jax.movie_reviews --data_dir={data_dir}"'
  if not os.path.exists(os.path.join(builder.data_dir, 'dataset_info.json')):
    raise UserError(f'{name} is not prepared in {data_dir!r}; {prepare} first.')
  kind = builder.info.file_format
  if kind is not tfds.core.FileFormat.ARRAY_RECORD:
    raise UserError(
      f'{name} is prepared in {data_dir!r} as {kind.value}, which cannot be'
      f' read by index without TensorFlow. Move {builder.data_dir} away, and'
      f' {prepare}.'
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
    return row | {key: transposed(row[key]) for key in turned}

  place = lambda i: f'{name}, row {i} of {split}'
  held = os.path.join(os.path.realpath(builder.data_dir), split)
  return Table(len(rows), read, place, [(held, len(rows))])


def transposed(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
  """A list of dicts, of a dict of equally long lists, or of such dicts."""
  values = [
    transposed(value) if isinstance(value, dict) else value
    for value in columns.values()
  ]
  return [dict(zip(columns, x)) for x in zip(*values, strict=True)]


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
