"""From rows of text to batches of prompts, with Grain.

Axes: B prompts, P prompt length, T completion length. All arrays are numpy.
The order is a global shuffle, drawn anew each epoch; it depends on the seed
alone. Iterators are Grain's: `get_state()` is a JSON value, and an iterator
that gets it by `set_state()`, in this process or another, goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import itertools
import json
import os
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from bond_jax import movie_reviews  # noqa: F401 (registers the builder)
from bond_jax.errors import UserError
from bond_jax.tokenizer import chat, Tokenizer
from bond_jax.types import Prompts

Row = dict[str, Any]  # a str 'text', or 'messages' of roles and contents
Source = Sequence[Row]  # random access
KINDS = ('opening', 'text', 'turn')  # of prompts; see `encoder`
Encode = Callable[[Row], list[int] | None]  # a prompt's pieces; None: left out


def source(name: str, split: str, data_dir: str) -> Source:
  """Returns the rows of a split of a prepared TFDS builder, or of a JSONL file.

  `name` is a registered builder, or a path that ends in .jsonl, in which
  "{split}" stands for the split. A UserError says what is missing, or which
  line is malformed.
  """
  if name.endswith('.jsonl'):
    return _read_jsonl(name.replace('{split}', split))
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (tfds.core.DatasetNotFoundError, ValueError) as e:
    raise UserError(
      f'data name {name!r} is neither a TFDS builder nor a .jsonl path.'
    ) from e
  if not os.path.exists(os.path.join(builder.data_dir, 'dataset_info.json')):
    raise UserError(
      f'{name} is not prepared in {data_dir!r}; run'
      f' "python -m bond_jax.movie_reviews --data_dir={data_dir}" first.'
      if name == 'movie_reviews'
      else f'{name} is not prepared in {data_dir!r} as array_record files.'
    )
  if split not in builder.info.splits:
    raise UserError(
      f'{name} has no split {split!r}; it has {sorted(builder.info.splits)}.'
    )
  if 'text' not in builder.info.features:
    raise UserError(
      f'{name} has no feature "text"; it has {sorted(builder.info.features)}.'
    )
  rows = builder.as_data_source(split=split)
  return grain.MapDataset.source(rows).map(_decode)


def _decode(row: dict[str, Any]) -> dict[str, Any]:
  return {**row, 'text': row['text'].decode('utf-8')}


def _read_jsonl(path: str) -> list[dict[str, Any]]:
  try:
    with open(path, 'rb') as f:
      lines = f.read().removesuffix(b'\n').split(b'\n')
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror}.') from e
  if lines == [b'']:
    raise UserError(f'{path} is empty; expected one {{"text": ...}} per line.')
  rows = []
  for i, line in enumerate(lines, 1):
    try:
      row = json.loads(line.decode('utf-8'))
    except ValueError as e:  # also UnicodeDecodeError
      raise UserError(f'{path}:{i}: not JSON in UTF-8 ({e}).') from e
    if not _is_row(row):
      raise UserError(
        f'{path}:{i}: expected an object with a string "text", or with'
        ' "messages", a list of objects with strings "role" and "content".'
      )
    rows.append(row)
  return rows


def _is_row(row: Any) -> bool:
  if not isinstance(row, dict):
    return False
  if 'messages' not in row:
    return isinstance(row.get('text'), str)
  return isinstance(row['messages'], list) and all(
    isinstance(m, dict)
    and isinstance(m.get('role'), str)
    and isinstance(m.get('content'), str)
    for m in row['messages']
  )


def sentences(
  rows: Source, tokenizer: Tokenizer, *, length: int, batch: int, seed: int
) -> grain.DatasetIterator:
  """Yields (Prompts, completion i32[B, 1, T], mask bool[B, 1, T]) for ever.

  The prompt is BOS, the completion the whole sentence and EOS, right-padded
  to T = `length`, or cut there and then without EOS. A batch may span epochs.
  """

  def example(i: int, row: dict[str, Any]):
    pieces = tokenizer.encode(row['text']) + [tokenizer.eos_id]
    return i % len(rows), pieces[:length]

  def collate(examples):
    ids, pieces = zip(*examples, strict=True)
    prompts = _prompts(ids, [[tokenizer.bos_id]] * len(ids), 1)
    mask = np.arange(length) < np.array([len(p) for p in pieces])[:, None]
    completion = np.full(mask.shape, tokenizer.pad_id, np.int32)
    completion[mask] = np.concatenate(pieces)
    return prompts, completion[:, None], mask[:, None]

  return _iterate(rows, example, collate, batch, seed)


def encoder(
  kind: str, tokenizer: Tokenizer, *, length: int, system: bool
) -> Encode:
  """Returns the function that makes a row the pieces of a prompt, BOS first.

  Args:
    kind: 'opening', BOS and the first `length` - 1 pieces of a text that goes
      on after them; 'text', the whole text; 'turn', the row's messages, or its
      text as the user's only one, in the template of turns.
    tokenizer: the vocabulary.
    length: P. Texts and turns that are longer are left out.
    system: see `tokenizer.chat`.
  """
  check_prompt(kind, length)

  def pieces_of(row: Row) -> list[int]:
    if 'text' not in row:
      raise UserError(
        f"a row has no text, which prompt.kind {kind!r} needs; take 'turn' for"
        ' messages.'
      )
    return [tokenizer.bos_id, *tokenizer.encode(row['text'])]

  def opening(row: Row) -> list[int] | None:
    pieces = pieces_of(row)
    return pieces[:length] if len(pieces) > length else None

  def text(row: Row) -> list[int] | None:
    pieces = pieces_of(row)
    return pieces if len(pieces) <= length else None

  def turn(row: Row) -> list[int] | None:
    messages = row.get('messages')
    if messages is None:
      messages = [{'role': 'user', 'content': row['text']}]
    pieces = chat(tokenizer, messages, system=system)
    return pieces if len(pieces) <= length else None

  return dict(zip(KINDS, (opening, text, turn), strict=True))[kind]


def last_words(row: Row) -> str:
  """What the user said last: the prompt, as a person would quote it."""
  return row['messages'][-1]['content'] if 'messages' in row else row['text']


def check_prompt(kind: str, length: int) -> None:
  """Refuses a kind that `encoder` does not know, and an empty prompt."""
  if kind not in KINDS:
    raise UserError(f'prompt.kind is {kind!r}; known are {", ".join(KINDS)}.')
  if length < 1:
    raise UserError(f'prompt.length must be 1 or more, got {length}.')


def prompts(
  rows: Source, encode: Encode, *, length: int, batch: int, seed: int
) -> grain.DatasetIterator:
  """Yields Prompts of P = `length`, padded on the left, for ever.

  Rows that `encode` leaves out are passed over; a UserError if all are.
  """
  fixed_prompts(rows, encode, length=length, count=1)  # else no end

  def example(i: int, row: Row):
    pieces = encode(row)
    return pieces and (i % len(rows), pieces)

  def collate(examples):
    return _prompts(*zip(*examples, strict=True), length)

  return _iterate(rows, example, collate, batch, seed)


def fixed_prompts(
  rows: Source, encode: Encode, *, length: int, count: int
) -> Prompts:
  """Returns the first `count` distinct prompts, in the order of the rows."""
  found = {}
  for i in range(len(rows)):
    pieces = encode(rows[i])
    if pieces:
      found.setdefault(tuple(pieces), i)
    if len(found) == count:
      return _prompts(found.values(), found.keys(), length)
  raise UserError(
    f'the data has {len(found)} distinct prompts of prompt.length {length};'
    f' {count} are asked for. Ask for fewer, choose another length, or give'
    ' more data.'
  )


def _prompts(ids, pieces, length: int) -> Prompts:
  """Packs piece lists into Prompts, padded on the left with PAD, 0."""
  lengths = np.array([len(p) for p in pieces])
  mask = np.arange(length) >= length - lengths[:, None]
  tokens = np.zeros(mask.shape, np.int32)
  tokens[mask] = list(itertools.chain.from_iterable(pieces))
  weight = np.ones(len(lengths), np.float32)
  return Prompts(tokens, mask, np.array(list(ids), np.int32), weight)


def _iterate(
  rows: Source, example: Callable, collate: Callable, batch: int, seed: int
) -> grain.DatasetIterator:
  """Shuffles, repeats, makes examples (None: left out) and batches them."""
  # No threads: on a few cores they only fight over the interpreter.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  dataset = (
    grain.MapDataset.source(rows)
    .seed(seed)
    .map_with_index(example)
    .filter(lambda x: x is not None)
    .shuffle()
    .repeat()
    .to_iter_dataset(options)
    .batch(batch, drop_remainder=True, batch_fn=collate)
  )
  return iter(dataset)
