"""What reads a row by its index, wherever it is: the formats of data.

No row is changed here but for bytes that are text; `sources.py` knows what the
fields mean.
"""

from __future__ import annotations

import array
import bisect
import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import glob
import gzip
import io
import itertools
import json
import os
import re
from typing import Any, BinaryIO, NamedTuple
import zlib

import numpy as np
import tensorflow_datasets as tfds

from bond_jax.data import movie_reviews  # noqa: F401 (registers the builder)
from bond_jax.errors import BadRow, UserError

JSON = '.jsonl', '.json', '.jsonl.gz', '.json.gz'  # how such paths end
_COMMIT = '[0-9a-f]{40}'


class Table(NamedTuple):
  """What a place holds, as it is there."""

  size: int
  read: Callable[[int], Any]
  place: Callable[[int], str]  # of a row, for people
  # The files or splits, one after the other, each by a name that is the same
  # however it was asked for, and how many rows it has.
  holds: Sequence[tuple[str, int]]
  empty: int = 0  # lines, skipped


def paths(name: str) -> list[str]:
  """The files that a path means, in the order of their names."""
  if os.path.exists(name) or not glob.has_magic(name):
    return [name]
  if not (found := sorted(glob.glob(name))):
    raise UserError(f'no file matches {name}.')
  return found


def jsonl(paths: Sequence[str], check: Callable[[Any], Any] | None) -> Table:
  """Reads rows of JSON: one per line, or the elements of one array.

  Files that end in .gz are held in memory, unpacked; of others 32 bytes of each
  row are. Empty lines are no rows.

  Args:
    paths: of the files.
    check: what every row must pass before this returns.
  """
  spans = array.array('q')  # of each row: file, first byte, end, line
  empty, openers, holds = 0, [_opener(path) for path in paths], []
  for k, path in enumerate(paths):
    before = len(spans)
    for start, value, number in _values(path, openers[k]):
      if not value.strip():
        empty += 1
        continue
      if check:
        try:
          check(_parse(value))
        except BadRow as e:
          raise BadRow(f'{path}:{number}: {e}') from e
      spans.extend((k, start, start + len(value), number))
    if len(spans) == before:
      raise UserError(
        f'{path} is empty; expected one {{"text": ...}} per line.'
      )
    holds.append((os.path.realpath(path), (len(spans) - before) // 4))
  index = np.frombuffer(spans, np.int64).reshape(-1, 4)

  def place(i: int) -> str:
    return f'{paths[index[i, 0]]}:{index[i, 3]}'

  def read(i: int) -> Any:
    k, start, end, _ = index[i].tolist()
    with _reading(paths[k]), openers[k]() as f:
      f.seek(start)
      value = f.read(end - start)
    return _parse(value)

  return Table(len(index), read, place, holds, empty)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  try:
    yield
  except (OSError, EOFError, zlib.error) as e:  # the latter two: of gzip
    reason = getattr(e, 'strerror', None) or _first_line(e)
    raise UserError(f'cannot read {path}: {reason.rstrip(".")}.') from e


def _opener(path: str) -> Callable[[], BinaryIO]:
  """What opens the file, unpacked."""
  if not path.endswith('.gz'):
    return functools.partial(open, path, 'rb')
  with _reading(path), gzip.open(path) as f:
    return functools.partial(io.BytesIO, f.read())


def _values(
  path: str, opener: Callable[[], BinaryIO]
) -> Iterator[tuple[int, bytes, int]]:
  """Of each line, or element of an array: first byte, bytes, line, from 1."""
  start, first = 0, True
  with _reading(path), opener() as f:
    for number, line in enumerate(f, 1):
      if line.startswith(codecs.BOM_UTF8):  # Notepad and Excel write it
        line = line.removeprefix(codecs.BOM_UTF8)
        start += len(codecs.BOM_UTF8)
      if first and line.lstrip().startswith(b'['):
        yield from _elements(path, line + f.read(), start, number)
        return
      first &= not line.strip()
      yield start, line, number
      start += len(line)


def _elements(
  path: str, content: bytes, start: int, number: int
) -> Iterator[tuple[int, bytes, int]]:
  """What `_values` says, of an array that begins at this byte and line."""
  decode, gap = json.JSONDecoder().raw_decode, re.compile('[ \t\r\n]*')
  skip = lambda at: gap.match(text, at).end()
  before, broken = 0, 'not JSON in UTF-8'
  try:
    text = content.decode('utf-8')
    at = skip(text.index('[') + 1)
    more = text[at : at + 1] != ']'
    while more:
      _, end = decode(text, at)
      start += len(text[before:at].encode('utf-8'))
      number += text.count('\n', before, at)
      yield start, text[at:end].encode('utf-8'), number
      before, at = at, skip(end)
      more = text[at : at + 1] == ','
      at = skip(at + 1) if more else at
    if text[at : at + 1] != ']' or skip(at + 1) < len(text):
      raise json.JSONDecodeError('Expecting one array', text, at)
  except json.JSONDecodeError as e:
    number += text.count('\n', before, e.pos)
    raise UserError(f'{path}:{number}: {broken} ({e.msg}).') from e
  except UnicodeDecodeError as e:
    number += content.count(b'\n', 0, e.start)
    raise UserError(f'{path}:{number}: {broken} ({e}).') from e
  except RecursionError as e:
    raise UserError(f'{path}:{number}: {broken} ({e}).') from e


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

  holds = [*zip(map(os.path.realpath, paths), map(len, tables))]
  return Table(len(table), read, place, holds)


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
  """Opens a prepared builder; none is prepared here, which needs TensorFlow."""
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, ValueError) as e:
    raise UserError(
      f'data.name {name!r} is neither a TFDS builder, installed or prepared in'
      f' {data_dir!r}, nor a path that ends in {", ".join(JSON)} or .parquet,'
      ' nor a dataset of Hugging Face, hf:owner/name@commit.'
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
