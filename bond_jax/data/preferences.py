"""Preferences between two texts: from rows to pairs, pieces and batches.

Axes: N texts, M pairs of them, B rows of a batch, L pieces. All arrays are
numpy, padded on the right.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from bond_jax.data import sources
from bond_jax.data.conversations import Messages, prompt_turns, transcripts
from bond_jax.data.examples import pack, Row, Source, UNTHREADED
from bond_jax.data.tokenizer import chat, Tokenizer
from bond_jax.errors import BadRow, UserError

SPLITS = ('train', 'validation', 'test')
_ROUNDS = 16  # of pairing rows that are left over from the round before


class Judged(NamedTuple):
  """The judged texts of a split, N of them, and M pairs."""

  texts: list[str]  # N, without a prompt that was a turn
  pieces: list[list[int]]  # N, with the prompt; see `encode`
  pairs: np.ndarray  # i64[M, 2], of texts: the preferred one, the other
  gap: np.ndarray  # f64[M], how much better that one is
  rating: np.ndarray | None  # f64[N]; None where only preferences are known
  unit: np.ndarray  # i64[N], texts of one unit have their prompt in common
  left_out: int  # rows that are longer than the model may read
  bad: Sequence[BadRow] = ()  # of rows that are skipped


def encode(
  tokenizer: Tokenizer, text: str, messages: Messages | None, *, system: bool
) -> list[int]:
  """The pieces of a text as a reward model reads it, the end included.

  BOS, the text and EOS; or, of an answer to `messages`, these in the template
  of turns, the answer, and the end of its turn. `system`: see `tokenizer.chat`.
  """
  if messages is None:
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
  prompt = chat(tokenizer, messages, system=system)
  return [*prompt, *tokenizer.encode(text), tokenizer.end_of_turn]


def texts(row: Row) -> list[str]:
  """Everything that people wrote in a row, for training a vocabulary on it."""
  found = []
  for key in ('text', 'messages', 'chosen', 'rejected'):
    if key == 'messages' and transcripts(row):  # which have them already
      continue
    value = row.get(key) or ()
    found += (
      [value] if isinstance(value, str) else [m['content'] for m in value]
    )
  return found


def read(
  rows: Source,
  split: str,
  tokenizer: Tokenizer,
  *,
  turns: bool,
  system: bool,
  length: int,
  pair: Callable[[np.ndarray], np.ndarray],
) -> Judged:
  """Reads preferences, or ratings and the pairs that follow from them.

  Rows with 'chosen' and 'rejected' are a pair each: two texts that go on from
  the row's 'text', if it has one; or two answers to its 'messages' (else to its
  'text', as the user's). Where they are messages themselves, or transcripts
  that are the row's only prompt, the last ones are the answers, and those
  before them, if any, the prompt. A number 'margin' is the pair's gap, 1
  without it.
  Rows with 'text' and 'rating' are paired by `pair`, the gap being the
  difference of the ratings. Rows without either are a UserError.

  Args:
    rows: of the data.
    split: their name, for errors.
    tokenizer, system: as of `tokenizer.chat`.
    turns: the texts are answers to turns.
    length: pieces of the longest text; rows with longer ones are left out.
    pair: `pairs_of` with its settings.
  """
  keys, bad = _columns(rows, split), []

  def judge(row: Row) -> tuple[list[str], list[list[int]], float] | tuple[()]:
    row = _last_turns(row, turns)
    texts = [_whole(row, key, turns) for key in keys]
    messages = prompt_turns(row) if turns else None
    ids = [encode(tokenizer, text, messages, system=system) for text in texts]
    if max(map(len, ids)) > length:
      return ()
    if len(keys) == 1:
      return texts, ids, number_of(row, 'rating')
    gap = 1.0 if row.get('margin') is None else number_of(row, 'margin')
    return texts, ids, gap

  used = [found for found in sources.each(rows, judge, bad.append) if found]
  if not used:
    raise UserError(
      f'all {len(rows)} rows of the {split} split are longer than'
      f' reward_model.length = {length} pieces, or bad.'
    )
  texts = [text for some, _, _ in used for text in some]
  pieces = [ids for _, some, _ in used for ids in some]
  numbers = np.array([number for *_, number in used])
  left_out, unit = len(rows) - len(used) - len(bad), np.arange(len(texts))
  if len(keys) == 2:
    pairs = unit.reshape(-1, 2)
    return Judged(texts, pieces, pairs, numbers, None, unit // 2, left_out, bad)
  pairs = pair(numbers)
  if not len(pairs):
    raise UserError(
      f'no two ratings of the {split} split, {numbers.min():g} to'
      f' {numbers.max():g}, differ by reward_model.min_gap or more: there is no'
      ' pair to learn from.'
    )
  gap = numbers[pairs[:, 0]] - numbers[pairs[:, 1]]
  return Judged(texts, pieces, pairs, gap, numbers, unit, left_out, bad)


def cut_anew(
  judged: Judged,
  i: int,
  tokenizer: Tokenizer,
  *,
  drop: float,
  length: int,
  rng: np.random.Generator,
) -> list[int]:
  """The pieces of a text, drawn by `Tokenizer.encode_anew`.

  Its prompt and what marks the ends stay as they are; where there would be more
  than `length` pieces, the whole text does.
  """
  text, ids = judged.texts[i], judged.pieces[i]
  prompt = ids[: -1 - len(tokenizer.encode(text))]
  new = tokenizer.encode_anew(text, drop=drop, rng=rng)
  found = [*prompt, *new, ids[-1]]
  return found if len(found) <= length else ids


def _last_turns(row: Row, turns: bool) -> Row:
  """The row with its answers as texts, if it has them in conversations."""
  pair = [row.get(key) for key in ('chosen', 'rejected')]
  if found := turns and transcripts(row):
    return {**row, 'chosen': found[1], 'rejected': found[2]}
  if not all(isinstance(talk, list) for talk in pair):
    return row
  prompt, other = (talk[:-1] for talk in pair)
  if prompt != other:
    raise BadRow("'chosen' and 'rejected' answer different messages.")
  answers = {k: row[k][-1]['content'] for k in ('chosen', 'rejected')}
  return {**row, **({'messages': prompt} if prompt else {}), **answers}


def _columns(rows: Source, split: str) -> tuple[str, ...]:
  """The columns that hold what is judged: of a pair, or of a rated text."""

  def columns(row: Row) -> tuple[str, ...] | None:
    there = {key for key, value in row.items() if value is not None}
    found = [keys for keys in (('chosen', 'rejected'), ('text', 'rating'))
             if there >= {*keys}]  # fmt: skip
    return found[0] if found else None

  if found := next(sources.each(rows, columns), None):
    return found if 'chosen' in found else ('text',)
  names = next(sources.each(rows, sorted))
  raise UserError(
    f'the {split} split has the columns {", ".join(names)}; a reward'
    " model is trained on 'chosen' and 'rejected', or on 'text' and 'rating'."
  )


def _whole(row: Row, key: str, turns: bool) -> str:
  """The text of a column: the answer to turns, or with the text before it."""
  text = _text(row, key)
  after_text = key != 'text' and row.get('text') is not None
  if turns and not (row.get('messages') or after_text):
    raise BadRow("it has no 'messages', which prompt.kind 'turn' needs.")
  return _text(row, 'text') + text if after_text and not turns else text


def _text(row: Row, key: str) -> str:
  value = row.get(key)
  value = value.decode('utf-8') if isinstance(value, bytes) else value
  if not isinstance(value, str):
    raise BadRow(f'{key!r} is {value!r:.60}, expected a text.')
  return value


def number_of(row: Row, key: str) -> float:
  """A field that is a finite number, or a text that says one; else a BadRow."""
  try:
    value = float(row[key])
  except (KeyError, OverflowError, TypeError, ValueError):
    value = np.nan
  if not np.isfinite(value):
    raise BadRow(
      f'{key!r} is {row.get(key, "not there")!r:.60}, expected a number.'
    )
  return value


def pairs_of(
  rating: np.ndarray, *, min_gap: float, partners: int, seed: int
) -> np.ndarray:
  """Pairs of texts whose ratings differ by `min_gap` or more, i64[M, 2].

  Each text meets up to `partners` others, drawn by the seed, and almost all
  texts meet as many: in each of as many rounds they are shuffled and paired,
  and what did not fit is shuffled again. Of a pair, the better text is first.
  """
  found = [np.zeros((0, 2), np.int64)]
  for k in range(partners):
    rng = np.random.default_rng([seed, k])
    left = np.arange(len(rating))
    for _ in range(_ROUNDS):
      left = rng.permutation(left)
      half = len(left) // 2
      pairs, odd = left[: 2 * half].reshape(-1, 2), left[2 * half :]
      gap = rating[pairs[:, 0]] - rating[pairs[:, 1]]
      fits = (np.abs(gap) >= min_gap) & (gap != 0)
      better = np.where((gap > 0)[:, None], pairs, pairs[:, ::-1])
      found.append(better[fits])
      left = np.concatenate([pairs[~fits].ravel(), odd])
  return np.unique(np.concatenate(found), axis=0)


def batches(
  pieces: Callable[[int, np.random.Generator], Sequence[int]],
  groups: np.ndarray,
  target: np.ndarray,
  *,
  length: int,
  batch: int,
  dropout: float,
  seed: int,
) -> grain.DatasetIterator:
  """Yields (tokens i32[B, G, L], mask bool[B, G, L], target f32[B]) for ever.

  An iterator of Grain's, as those of `examples`: shuffled anew each epoch, with
  get_state() and set_state(state).

  Args:
    pieces: f(i, rng), the pieces of text i.
    groups: i64[M, G], texts that are read together: pairs, or single ones.
    target: f64[M], of each group.
    length: of the longest of `pieces`.
    batch: B, groups.
    dropout: the share of its pieces that each text goes without, drawn anew
      each time. The first and the last stay.
    seed: of all draws.
  """
  hidden = lambda n: int(dropout * max(0, n - 2))
  most = length - hidden(length)  # less hidden, a shorter text is shorter

  def thinned(ids: Sequence[int], rng) -> list[int]:
    n = len(ids)
    gone = rng.permutation(max(0, n - 2))[: hidden(n)] + 1
    return np.delete(ids, gone).tolist()

  def example(i: int, rng) -> tuple[list[list[int]], Any]:
    return [thinned(pieces(j, rng), rng) for j in groups[i]], target[i]

  def collate(examples):
    texts, targets = zip(*examples, strict=True)
    tokens, mask = pack([ids for group in texts for ids in group], most)
    shape = (len(examples), -1, most)
    targets = np.array(targets, np.float32)
    return tokens.reshape(shape), mask.reshape(shape), targets

  dataset = (
    grain.MapDataset.source(range(len(groups)))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(example)
    .to_iter_dataset(UNTHREADED)
    .batch(batch, drop_remainder=True, batch_fn=collate)
  )
  return iter(dataset)
