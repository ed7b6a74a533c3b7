"""From rows of text to batches of prompts, with Grain.

Axes: B prompts, P prompt length, T completion length. All arrays are numpy.
Rows are shuffled anew each epoch, by the seed. A mixture takes turns between
its sources, by their weights, and each has epochs of its own. Iterators are
Grain's: `get_state()` is a JSON value, from which `set_state()` goes on.

Every host yields the whole batch, of which `sharding.put_batch` takes what its
devices hold, because which rows are too long is not known before they are read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools
from typing import Any, NamedTuple
import zlib

import grain
import numpy as np

from bond_jax.data import sources
from bond_jax.data.conversations import prompt_turns
from bond_jax.data.sources import Row, Source, source  # noqa: F401 (for callers)
from bond_jax.data.tokenizer import chat, Tokenizer
from bond_jax.errors import BadRow, UserError
from bond_jax.types import Prompts

KINDS = ('opening', 'text', 'turn')  # of prompts; see `encoder`
FATES = {'drop': 'left out', 'cut': 'cut on the left'}  # of longer ones
# No threads: on a few cores they only fight over the interpreter.
UNTHREADED = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
Make = Callable[[Row], Any]  # an example; None: left out; may raise a BadRow
Encode = Callable[[Row], list[int] | None]  # one that makes a prompt's pieces


def pairs(
  rows: Source,
  make: Make,
  *,
  prompt_length: int = 1,
  length: int,
  batch: int,
  seed: int,
) -> grain.DatasetIterator:
  """Yields (Prompts, completion i32[B, 1, T], mask bool[B, 1, T]) for ever.

  `make` is `sentence` or `answer` with their settings. P = `prompt_length`,
  T = `length`, padded on the right. A batch may span epochs.
  """

  def collate(examples):
    ids, pairs = zip(*examples, strict=True)
    prompts, pieces = zip(*pairs, strict=True)
    completion, mask = pack(pieces, length)
    prompts = padded(ids, prompts, prompt_length)
    return prompts, completion[:, None], mask[:, None]

  return _iterate(rows, make, collate, batch, seed)


def sentence(tokenizer: Tokenizer, length: int) -> Make:
  """Returns the function that makes a row BOS, and its text and EOS.

  A longer text is cut to `length` pieces, and then without EOS.
  """

  def make(row: Row) -> tuple[list[int], list[int]]:
    text = text_of(row, "sft.target 'text' needs")
    pieces = [*tokenizer.encode(text), tokenizer.eos_id]
    return [tokenizer.bos_id], pieces[:length]

  return make


def answer(encode: Encode, tokenizer: Tokenizer, length: int) -> Make:
  """Returns the function that makes a row a prompt and its 'completion'.

  That ends as a drawn one does, with the end of a turn where the vocabulary has
  one, else EOS; a longer one is cut to `length` pieces.
  """

  def make(row: Row) -> tuple[list[int], list[int]] | None:
    if not isinstance(row.get('completion'), str):
      raise BadRow(
        "a row has no text under 'completion'; its fields are"
        f' {", ".join(row)}. Name it with data.fields, or train on whole texts'
        " with sft.target 'text'."
      )
    prompt = encode(row)
    pieces = [*tokenizer.encode(row['completion']), tokenizer.stop_ids[-1]]
    return prompt and (prompt, pieces[:length])

  return make


def text_of(row: Row, needs: str) -> str:
  """The row's text; a BadRow, which says what needs it, if it has none."""
  if not isinstance(row.get('text'), str):
    raise BadRow(
      f'a row has no text, which {needs}; its fields are {", ".join(row)}.'
    )
  return row['text']


def encoder(
  kind: str,
  tokenizer: Tokenizer,
  *,
  length: int,
  system: bool,
  longer: str = 'drop',
) -> Encode:
  """Returns the function that makes a row the pieces of a prompt, BOS first.

  Args:
    kind: 'opening', BOS and the first `length` - 1 pieces of a text that goes
      on after them; 'text', the whole text; 'turn', the row's `prompt_turns` in
      the template of turns.
    tokenizer: the vocabulary.
    length: P.
    system: see `tokenizer.chat`.
    longer: 'drop', longer texts and turns are left out; 'cut', of their pieces
      after BOS the last are kept.
  """
  check_prompt(kind, length, longer)

  def encode(row: Row) -> list[int] | None:
    if kind == 'turn':
      pieces = chat(tokenizer, prompt_turns(row), system=system)
    else:
      needs = f"prompt.kind {kind!r} needs; take 'turn' for messages"
      pieces = [tokenizer.bos_id, *tokenizer.encode(text_of(row, needs))]
    if kind == 'opening':
      return pieces[:length] if len(pieces) > length else None
    more = len(pieces) - length
    if more <= 0:
      return pieces
    return None if longer == 'drop' else [pieces[0], *pieces[1 + more :]]

  return encode


def last_words(row: Row, kind: str = 'turn') -> str:
  """The prompt that `encoder` makes of a row, as a person would quote it.

  Whole, also where it is cut: the text, or the last of the turns.
  """
  return prompt_turns(row)[-1]['content'] if kind == 'turn' else row['text']


def check_prompt(kind: str, length: int, longer: str) -> None:
  """Refuses a kind that `encoder` does not know, and an empty prompt."""
  if kind not in KINDS:
    raise UserError(f'prompt.kind is {kind!r}; known are {", ".join(KINDS)}.')
  if length < 1:
    raise UserError(f'prompt.length must be 1 or more, got {length}.')
  if longer not in FATES:
    raise UserError(
      f'prompt.longer is {longer!r}; known are {", ".join(FATES)}.'
    )


def prompts(
  rows: Source, encode: Encode, *, length: int, batch: int, seed: int
) -> grain.DatasetIterator:
  """Yields Prompts of P = `length`, padded on the left, for ever.

  Rows that `encode` leaves out are passed over: the weights of a mixture are
  shares of the prompts that are left.
  """

  def collate(examples):
    return padded(*zip(*examples, strict=True), length)

  return _iterate(rows, encode, collate, batch, seed)


def fixed_prompts(
  rows: Source, encode: Encode, *, length: int, count: int
) -> Prompts:
  """Returns the first `count` distinct prompts, in the order of the rows.

  Of a mixture each source gives the first of its own, as many as its share.
  """
  parts, found = sources.parts(rows), {}  # pieces -> id

  def search(part: sources.Part) -> Iterator[int]:
    for i in range(len(part.rows)):
      pieces = tuple(sources.made(part.rows, i, encode) or ())
      if pieces and pieces not in found:
        found[pieces] = part.start + i
        yield i

  searches = [search(part) for part in parts]
  turns = grain.MapDataset.mix(
    [grain.MapDataset.range(k, k + 1).repeat() for k in range(len(parts))],
    _proportions(parts),
  )
  for i in range(count):
    part = parts[turns[i]]
    if next(searches[turns[i]], None) is None:
      last = part.start + len(part.rows)
      has = sum(part.start <= place < last for place in found.values())
      raise UserError(
        f'{_who(part)} has {has} distinct prompts of prompt.length {length};'
        f' {count} are asked for{" of all sources" if len(parts) > 1 else ""}.'
        ' Ask for fewer, choose another length, or give more data.'
      )
  return padded(found.values(), found.keys(), length)


def _who(part: sources.Part) -> str:
  return f'source {part.name!r} of the data' if part.name else 'the data'


class Count(NamedTuple):
  """How many rows of a source `make` leaves out, of those looked at."""

  name: str
  rows: int
  looked_at: int
  left_out: int


def count_left_out(
  rows: Source,
  make: Make,
  most: int = 100_000,
  bad: list[BadRow] | None = None,
) -> list[Count]:
  """Makes examples of the rows of each source, or of a random `most` of them.

  100,000 take some seconds, less than the first step of a real run, and a row
  that is malformed shows before that step; more would not tell more. Those that
  are skipped are appended to `bad`, and are not among the ones left out.
  """
  counts, bad = [], [] if bad is None else bad
  for part in sources.parts(rows):
    places = np.arange(len(part.rows))
    if len(places) > most:  # not every so many: rows may come in a rhythm
      places = np.random.default_rng(0).choice(places, most, replace=False)
    before = len(bad)
    used = sum(
      bool(sources.made(part.rows, int(i), make, bad.append)) for i in places
    )
    left_out = len(places) - used - (len(bad) - before)
    counts.append(Count(part.name, len(part.rows), len(places), left_out))
  return counts


def describe(
  counts: Sequence[Count], kind: str, length: int, fate: str
) -> list[str]:
  """The lines that say how many prompts do not fit, one for each source.

  They are of an encoder that drops what does not, whatever its `fate` is.
  """
  longer = 'not longer' if kind == 'opening' else 'longer'
  fate = FATES['drop' if kind == 'opening' else fate]
  lines = []
  for name, rows, looked_at, left_out in counts:
    of = f', a sample of {rows:,},' if looked_at < rows else ''
    lines.append(
      f'data{f" {name}" if name else ""}: {left_out:,} of {looked_at:,}'
      f' prompts{of} are {longer} than prompt.length = {length} and {fate}'
    )
  return lines


def pack(
  pieces: Iterable[Sequence[int]], length: int, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens i32[R, length] of R texts, and where they are not padding (PAD, 0).

  `left` pads on the left. `length` is that of the longest text, or more.
  """
  pieces = list(pieces)
  lengths = np.array([len(p) for p in pieces])
  mask = np.arange(length) < lengths[:, None]
  if left:
    mask = np.arange(length) >= length - lengths[:, None]
  tokens = np.zeros(mask.shape, np.int32)
  tokens[mask] = list(itertools.chain.from_iterable(pieces))
  return tokens, mask


def padded(
  ids: Iterable[int], pieces: Iterable[Sequence[int]], length: int
) -> Prompts:
  """Prompts of P = `length`, from their ids and pieces."""
  tokens, mask = pack(pieces, length, left=True)
  weight = np.ones(len(tokens), np.float32)
  return Prompts(tokens, mask, np.array(list(ids), np.int32), weight)


def _iterate(
  rows: Source,
  make: Make,
  collate: Callable[[list[tuple[int, Any]]], Any],
  batch: int,
  seed: int,
) -> grain.DatasetIterator:
  """Shuffles, repeats, makes examples (None: left out) and batches them."""
  parts = sources.parts(rows)
  for part in parts:  # else no end
    bad = []
    if next(sources.each(part.rows, make, bad.append), None) is None:
      raise UserError(
        f'{_who(part)} has no row that can be used:'
        f' {bad[0] if bad else "none fits prompt.length."}'
      )
  streams = [_stream(part, make, seed) for part in parts]
  # Mixed after the filter: a weight is a share of what is left.
  mixed = (
    grain.IterDataset.mix(streams, _proportions(parts))
    if len(parts) > 1
    else streams[0]
  )
  return iter(mixed.batch(batch, drop_remainder=True, batch_fn=collate))


def _stream(part: sources.Part, make: Make, seed: int) -> grain.IterDataset:
  """(id, what is made of the row) of one source, for ever."""

  def example(i: int) -> tuple[int, Any] | None:
    pieces = sources.made(part.rows, i, make)
    return pieces and (part.start + i, pieces)

  if part.name:  # another order for each, whatever it is mixed with
    seed = zlib.crc32(f'{seed} {part.name}'.encode())
  return (
    grain.MapDataset.source(range(len(part.rows)))
    .seed(seed)
    .map(example)
    .filter(lambda x: x is not None)
    .shuffle()
    .repeat()
    .to_iter_dataset(UNTHREADED)
  )


def _proportions(parts: Sequence[sources.Part]) -> list[int]:
  """Weights as Grain counts them, the least as 100, but rounded, not cut."""
  least = min(part.weight for part in parts)
  return [round(100 * part.weight / least) for part in parts]
