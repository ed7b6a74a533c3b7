"""Rows by their index: of TFDS builders, files and Hugging Face.

They are read when they are used, and are dicts as `conversations.py` says. A
bad one stops the run, or is left out; see `made` and `each`.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
import re
from typing import Any, NamedTuple, TypeVar

import ml_collections

from bond_jax.data import conversations, readers
from bond_jax.errors import BadRow, UserError
from bond_jax.runs import paths
from bond_jax.runs.settings import fields

Row = conversations.Row
Source = Sequence[Row]  # random access
T = TypeVar('T')

BAD_ROWS = ('stop', 'skip')  # what becomes of them


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Sequence):
  """Some rows of a table, under our names for the fields, each checked."""

  table: readers.Table
  fields: Mapping[str, str]
  window: range
  skip: bool = False

  def __len__(self) -> int:
    return len(self.window)

  def __getitem__(self, i: int) -> Row:
    return self.use(i, lambda row: row)

  def use(self, i: int, make: Callable[[Row], T]) -> T:
    """What `make` returns for a row; a BadRow of both says where it is."""
    i = self.window[i]
    try:
      return make(conversations.prepare(self.fields, self.table.read(i)))
    except UnicodeDecodeError as e:
      raise BadRow(f'{self.table.place(i)}: not UTF-8 ({e}).') from e
    except BadRow as e:
      raise BadRow(f'{self.table.place(i)}: {e}') from e

  def held(self) -> Iterator[tuple[str, range]]:
    """Of each file, or split, that rows come from, which ones do."""
    start, window = 0, self.window
    for name, size in self.table.holds:
      first, end = max(window.start - start, 0), min(window.stop - start, size)
      yield name, range(first, end)
      start += size


class Part(NamedTuple):
  """A source in a mixture; its rows have ids from `start` on."""

  name: str
  start: int
  rows: Source
  weight: float


class Mixture(Sequence):
  """Sources with weights; as a sequence, one after the other, by name.

  A row says under 'source' where it is from.
  """

  def __init__(self, sources: Mapping[str, tuple[Source, float]]):
    for name, (_, weight) in sources.items():
      if not (isinstance(weight, int | float) and 0 < weight < math.inf):
        raise UserError(
          f'data.mix.{name}.weight must be a number above 0, got {weight!r}.'
        )
    names = sorted(sources)  # a config has them in this order, too
    sizes = [len(sources[name][0]) for name in names]
    *starts, self._size = itertools.accumulate(sizes, initial=0)
    self.parts = tuple(
      Part(name, start, *sources[name]) for name, start in zip(names, starts)
    )

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, i: int) -> Row:
    part, i = self.find(i)
    return {**part.rows[i], 'source': part.name}

  def find(self, i: int) -> tuple[Part, int]:
    """The source of a row, and its place there."""
    i = range(self._size)[i]
    start_of = lambda part: part.start
    part = self.parts[bisect.bisect_right(self.parts, i, key=start_of) - 1]
    return part, i - part.start


def parts(rows: Source) -> tuple[Part, ...]:
  """The sources of a mixture; of other rows one, without a name."""
  return rows.parts if isinstance(rows, Mixture) else (Part('', 0, rows, 1.0),)


def made(
  rows: Source,
  i: int,
  make: Callable[[Row], T],
  bad: Callable[[BadRow], Any] = lambda e: None,
) -> T | Any:
  """Returns `make(rows[i])`; a BadRow says where the row is.

  Where bad rows are left out, it returns `bad(error)` instead.
  """
  if isinstance(rows, Mixture):
    part, i = rows.find(i)
    rows = part.rows
  try:
    return rows.use(i, make) if isinstance(rows, Rows) else make(rows[i])
  except BadRow as e:
    if isinstance(rows, Rows) and rows.skip:
      return bad(e)
    raise _stop(e) from e


def each(
  rows: Source,
  make: Callable[[Row], T],
  bad: Callable[[BadRow], None] = lambda e: None,
) -> Iterator[T]:
  """What `made` returns for each row, unless that is None."""
  # By index: iterating, Grain starts threads that take four times as long.
  for i in range(len(rows)):
    if (found := made(rows, i, make, bad)) is not None:
      yield found


def _stop(e: BadRow) -> BadRow:
  return BadRow(f"{e} Correct it, or set data.bad_rows='skip' to leave it out.")


def skipped(bad: Sequence[BadRow], count: int, what: str) -> str:
  """The line that says how many of so many rows are left out, and why."""
  return (
    f'{what}: {len(bad):,} of {count:,} rows are bad and left out; the first:'
    f' {bad[0]}'
  )


def check_apart(rows: Mapping[str, Source], *pairs: tuple[str, str]) -> None:
  """Refuses pairs of splits that have rows of one place in common."""
  for one, other in pairs:
    both = itertools.product(_held(rows[one]), _held(rows[other]))
    for (name, some), (other_name, others) in both:
      common = range(max(some.start, others.start), min(some.stop, others.stop))
      if name == other_name and common:
        raise UserError(
          f'the splits {one} and {other} have {len(common)} rows in common,'
          f' of {name}: nothing may be fitted and judged on the same ones.'
          ' data.name needs "{split}" in the name and a file for each split,'
          " or data.splits windows of one: {'train': 'train[10%:]',"
          " 'validation': 'train[:5%]', 'test': 'train[5%:10%]'}."
        )


def _held(rows: Source) -> list[tuple[str, range]]:
  some = [part.rows for part in parts(rows)]
  return [held for x in some if isinstance(x, Rows) for held in x.held()]


def empty_lines(rows: Source) -> int:
  """How many lines of the files hold nothing and are no rows."""
  held = [part.rows for part in parts(rows)]
  return sum(some.table.empty for some in held if isinstance(some, Rows))


def source(
  name: str,
  split: str,
  data_dir: str,
  *,
  fields: Mapping[str, str] | None = None,
  splits: Mapping[str, str] | None = None,
  bad_rows: str = 'stop',
) -> Source:
  """Opens the rows of a split; a UserError names the first bad one.

  Args:
    name: a TFDS builder; a path that ends in .jsonl, .json, these with .gz, or
      .parquet, in which * and ? match many files and "{split}" stands for the
      split; or "hf:" and a folder that `save_to_disk` wrote or
      owner/name@commit, with a subset owner/name:subset@commit.
    split: train, validation or test.
    data_dir: where TFDS builders are prepared.
    fields: our name -> the name in the rows. If it names the text and not the
      messages, or the other way round, their field of that name is dropped.
    splits: our split -> the name in the data, of which [a:b] takes rows or per
      cent: {'validation': 'train[:5%]'}.
    bad_rows: 'stop' at the first one, or 'skip' them, as `made` does.
  """
  if bad_rows not in BAD_ROWS:
    raise UserError(
      f'data.bad_rows is {bad_rows!r}; known are {", ".join(BAD_ROWS)}.'
    )
  fields, skip = fields or {}, bad_rows == 'skip'
  written = (splits or {}).get(split, split)
  split, window = _window(written)
  hub = 'hf:' if name.startswith('hf:') else ''
  name = hub + paths.expanded(name.removeprefix(hub))
  filled = name.replace('{split}', split)
  if hub:
    table = readers.hugging_face(filled, split)
  elif name.endswith(readers.JSON):
    check = None if skip else functools.partial(conversations.prepare, fields)
    try:
      table = readers.jsonl(readers.paths(filled), check)
    except BadRow as e:
      raise _stop(e) from e
  elif name.endswith('.parquet'):
    table = readers.parquet(readers.paths(filled))
  else:
    table = readers.builder(name, split, paths.expanded(data_dir))
  rows = Rows(table, fields, window(table.size), skip)
  if not rows:
    raise UserError(f'{filled} is empty: it has no rows of split {written!r}.')
  bad = []  # before anything is spent
  if next(each(rows, lambda row: row, bad.append), None) is None:
    raise UserError(f'all {len(rows)} rows are bad; the first: {bad[0]}')
  return rows


def _window(split: str) -> tuple[str, Callable[[int], range]]:
  """Of 'train[10:50%]' the name, and the rows of so many that it means."""
  match = re.fullmatch(r'([^\[\]]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?', split)
  if not match:
    raise UserError(
      f'data.splits has {split!r}; write a name, or rows of it as in'
      " 'train[:1000]' or 'train[5%:]'."
    )
  name, *bounds = match.groups()

  def place(bound: str | None, size: int) -> int | None:
    if bound is None or not bound.endswith('%'):
      return bound and int(bound)
    return round(size * int(bound[:-1]) / 100)

  def window(size: int) -> range:
    return range(size)[slice(*(place(bound, size) for bound in bounds))]

  return name, window


def rows(config: ml_collections.ConfigDict, split: str) -> Source:
  """The rows of a split of the run's data, or of the sources that it mixes.

  Of the split 'stored' those with completions, of `data.stored`.
  """
  section = config.data
  common = {k: section[k] for k in ('data_dir', 'bad_rows') if k in section}
  if split == 'stored':
    return source(section.stored, 'train', **common)

  def part(name, weight=1.0, fields=None, splits=None):
    names = dict(fields=fields, splits=splits)
    return source(name, split, **names, **common), weight

  for name, args in section.mix.items():
    fields.check_arguments(f'data.mix.{name}', part, args)
  if section.mix:
    return Mixture({k: part(**v) for k, v in section.mix.items()})
  return part(section.name, fields=section.fields, splits=section.splits)[0]
