"""Rows of text by their index: of TFDS builders, files and Hugging Face.

A row is a dict. What it says to the program:

  text                 the prompt, or the text that prompts are openings of
  messages             a prompt of turns, each with a role and a content
  prompt               either of these, in rows that have neither
  chosen, rejected     two answers to it, texts or messages: a preference pair;
                       with messages, or whole texts, no prompt need be there

Whatever else it holds, rewards find it in `Context.rows`. Rows are read when
they are asked for, by `readers.py`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
import math
import re
from typing import Any, NamedTuple

from bond_jax import readers
from bond_jax.errors import UserError

Row = dict[str, Any]
Source = Sequence[Row]  # random access


class Rows(Sequence):
  """Some rows of a table, under our names for the fields, each checked."""

  def __init__(
    self, table: readers.Table, fields: Mapping[str, str], window: range
  ):
    self._table, self._fields, self._window = table, fields, window
    self.empty = table.empty

  def __len__(self) -> int:
    return len(self._window)

  def __getitem__(self, i: int) -> Row:
    i = self._window[i]
    place = self._table.place(i)
    try:
      row = self._table.read(i)
    except UnicodeDecodeError as e:
      raise UserError(f'{place}: not UTF-8 ({e}).') from e
    return prepare(self._fields, row, place)


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
    starts = [0, *itertools.accumulate(sizes)]
    self.parts = tuple(
      Part(name, start, *sources[name]) for name, start in zip(names, starts)
    )
    self._starts, self._size = starts[:-1], starts[-1]

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, i: int) -> Row:
    i = range(self._size)[i]
    part = self.parts[bisect.bisect_right(self._starts, i) - 1]
    return {**part.rows[i - part.start], 'source': part.name}


def parts(rows: Source) -> tuple[Part, ...]:
  """The sources of a mixture; of other rows one, without a name."""
  return rows.parts if isinstance(rows, Mixture) else (Part('', 0, rows, 1.0),)


def empty_lines(rows: Source) -> int:
  """How many lines of the files hold nothing and are no rows."""
  held = [part.rows for part in parts(rows)]
  return sum(some.empty for some in held if isinstance(some, Rows))


def source(
  name: str,
  split: str,
  data_dir: str,
  *,
  fields: Mapping[str, str] | None = None,
  splits: Mapping[str, str] | None = None,
) -> Source:
  """Returns the rows of a split; a UserError says what is wrong, and where.

  Args:
    name: a TFDS builder; a path that ends in .jsonl or .parquet, in which * and
      ? match many files and "{split}" stands for the split; or "hf:" and a
      folder that `save_to_disk` wrote or owner/name@commit, with a subset
      owner/name:subset@commit.
    split: train, validation or test.
    data_dir: where TFDS builders are prepared.
    fields: our name -> theirs. If it names the text and not the messages, or
      the other way round, what they call the other is dropped.
    splits: our split -> theirs, of which [a:b] takes rows or per cent:
      {'validation': 'train[:5%]'}.
  """
  fields = fields or {}
  asked = (splits or {}).get(split, split)
  split, window = _window(asked)
  filled = name.replace('{split}', split)
  if name.startswith('hf:'):
    table = readers.hugging_face(filled, split)
  elif name.endswith('.jsonl'):
    table = readers.jsonl(
      readers.paths(filled), functools.partial(prepare, fields)
    )
  elif name.endswith('.parquet'):
    table = readers.parquet(readers.paths(filled))
  else:
    table = readers.builder(name, split, data_dir)
  rows = Rows(table, fields, window(table.size))
  if not rows:
    raise UserError(f'{filled} is empty: it has no rows of split {asked!r}.')
  rows[0]  # before anything is spent
  return rows


def check_row(row: Any) -> str:
  """What a row lacks, by our names for its fields; '' if nothing."""
  known = f'; it has {", ".join(row)}' if isinstance(row, dict) else ''
  row = row if isinstance(row, dict) else {}
  if isinstance(row.get('text'), bytes):
    return 'the text is not UTF-8.'
  pair = [row.get(name) for name in ('chosen', 'rejected')]
  if 'messages' in row:
    asks = _is_messages(row['messages'])
  elif 'text' in row:
    asks = isinstance(row['text'], str)
  else:
    asks = None not in pair  # enough for a reward model
  if not asks:
    return (
      'expected an object with a string "text", or with "messages", a list of'
      ' objects with strings "role" and "content", or with "chosen" and'
      f' "rejected"{known}. data.fields gives fields these names.'
    )
  if pair != [None, None] and not (
    all(isinstance(x, str) for x in pair) or all(map(_is_messages, pair))
  ):
    return '"chosen" and "rejected" must both be strings or both be messages.'
  return ''


def _is_messages(value: Any) -> bool:
  return (
    isinstance(value, list)
    and bool(value)
    and all(
      isinstance(m, dict)
      and isinstance(m.get('role'), str)
      and isinstance(m.get('content'), str)
      for m in value
    )
  )


def prepare(fields: Mapping[str, str], row: Any, place: str) -> Row:
  """The row under our names; a UserError if it is none."""
  if fields and isinstance(row, dict):
    for ours, theirs in fields.items():
      if theirs not in row:
        raise UserError(
          f'{place}: no field {theirs!r}, which data.fields calls {ours!r}; it'
          f' has {", ".join(row)}.'
        )
    named = {ours: row[theirs] for ours, theirs in fields.items()}
    gone = set(fields.values())
    if not {'text', 'messages'}.isdisjoint(fields):
      gone |= {'text', 'messages'}
    row = {k: v for k, v in row.items() if k not in gone} | named
  if isinstance(row, dict) and {'text', 'messages'}.isdisjoint(row):
    ours = {str: 'text', list: 'messages'}.get(type(row.get('prompt')))
    row = {ours if ours and k == 'prompt' else k: v for k, v in row.items()}
  if problem := check_row(row):
    raise UserError(f'{place}: {problem}')
  return row


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
