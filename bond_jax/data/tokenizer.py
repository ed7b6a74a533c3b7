"""SentencePiece: text and turns to piece ids and back; new vocabularies.

The convention is Gemma's: PAD 0, EOS 1, BOS 2, UNK 3, spaces kept as they are,
none put in front. So a text may be cut anywhere between two pieces:
decode(a) + decode(b) == decode(a + b). The ids that begin and end a turn differ
between the families, and are looked up by their pieces.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re

import numpy as np
import sentencepiece

from bond_jax.data import gguf
from bond_jax.errors import BadRow, UserError
from bond_jax.runs import files, paths

# What begins and ends a turn, up to Gemma 3 and from Gemma 4 on.
TURNS = ('<start_of_turn>', '<end_of_turn>'), ('<|turn>', '<turn|>')
FILE = 'tokenizer.model'
_RELEASE = f'name the {FILE} of the original release (tokenizer.path)'
OWN = (
  'the sft stage makes it: run that first; where the file is damaged, restore a'
  ' copy or start in another --workdir'
)  # of a run's own vocabulary
Messages = Sequence[dict[str, str]]  # of 'role' and 'content'


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary; `sha256` names the file it came from."""

  processor: sentencepiece.SentencePieceProcessor
  sha256: str
  start_of_turn: int | None  # None where the vocabulary knows no turns
  end_of_turn: int | None
  pad_id: int = 0
  eos_id: int = 1
  bos_id: int = 2
  unk_id: int = 3

  @property
  def vocab_size(self) -> int:
    return self.processor.vocab_size()

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """The tokens that end a completion: EOS, and the end of a turn."""
    if self.end_of_turn is None:
      return (self.eos_id,)
    return self.eos_id, self.end_of_turn

  @property
  def has_system_turn(self) -> bool:
    """Whether a system's words have a turn of their own, as in Gemma 4."""
    return self.start_of_turn == self.processor.piece_to_id(TURNS[1][0])

  def encode(self, text: str) -> list[int]:
    """Returns the pieces of `text`, without BOS or EOS."""
    return self.processor.encode(text)

  @functools.cached_property
  def _merges(self) -> dict[str, float]:
    """The score of each piece that merges may make."""
    of = self.processor
    special = (of.is_control, of.is_unknown, of.is_byte)
    ids = [i for i in range(self.vocab_size) if not any(f(i) for f in special)]
    return {of.id_to_piece(i): of.get_score(i) for i in ids}

  def encode_anew(
    self, text: str, *, drop: float, rng: np.random.Generator
  ) -> list[int]:
    """Returns smaller pieces than `encode` does, other ones each time.

    Of the merges that make a piece of a byte-pair vocabulary, the share `drop`
    is left out at random (BPE-dropout, arXiv 1910.13267), so that rare words
    are read by parts that others have too. SentencePiece's own is drawn anew in
    each process, whatever its seed.
    """
    of, scores, found = self.processor, self._merges, []
    draw = random.Random(rng.bytes(8)).random

    def rank(a: str, b: str) -> float:
      score = scores.get(a + b, -math.inf)
      return score if draw() >= drop else -math.inf

    for word in re.findall(' *[^ ]+| +$', text):  # no piece spans two words
      parts = list(word.replace(' ', '▁'))
      ranks = list(map(rank, parts, parts[1:]))
      while ranks and (best := max(ranks)) > -math.inf:
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        near = parts[max(i - 1, 0) : i + 2]
        ranks[max(i - 1, 0) : i + 2] = map(rank, near, near[1:])
      found += parts
    ids = []
    for known, some in itertools.groupby(found, scores.__contains__):
      some = list(some)
      ids += of.piece_to_id(some) if known else of.encode(''.join(some))
    return ids

  def pieces(self) -> list[bytes]:
    """Returns what each piece adds to a text, in UTF-8."""
    byte = lambda i: bytes.fromhex(self.processor.id_to_piece(i)[3:5])
    before = self.decode([self.unk_id])  # a first piece may lose its space
    text = lambda i: self.decode([self.unk_id, i])[len(before) :].encode()
    ids = range(self.vocab_size)
    return [(byte if self.processor.is_byte(i) else text)(i) for i in ids]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, leaving out what only controls."""
    control = (
      self.pad_id, self.eos_id, self.bos_id,
      self.start_of_turn, self.end_of_turn,
    )  # fmt: skip
    return self.processor.decode([int(i) for i in ids if i not in control])


def chat(
  tokenizer: Tokenizer, messages: Messages, *, system: bool
) -> list[int]:
  """Returns the pieces after which the model writes its turn, BOS once.

  The template of the instruction-tuned releases. A system has a turn of its own
  in Gemma 4 alone: Gemma 3 (`system`) puts its words before the user's first
  ones, Gemma 1 and 2 refuse them.

  Args:
    tokenizer: of a vocabulary with turns.
    messages: 'role' is user or assistant (or model), in turn, the user's first
      and last; before them there may be one of role system.
    system: whether a family without a system's turn takes its words.
  """
  if tokenizer.end_of_turn is None:
    raise UserError(
      f'this vocabulary has no pieces {" and ".join(TURNS[0])}: it is not of'
      " an instruction-tuned model; take prompts of kind 'text'."
    )
  messages = [(m['role'], m['content'].strip()) for m in messages]
  prefix, before = '', []
  if messages and messages[0][0] == 'system' and tokenizer.has_system_turn:
    before, messages = messages[:1], messages[1:]
  elif messages and messages[0][0] == 'system':
    if not system:
      raise BadRow(
        "this family has no system turn; put the system's words into the"
        " user's first message."
      )
    prefix, messages = messages[0][1] + '\n\n', messages[1:]
  roles = [{'model': 'assistant'}.get(role, role) for role, _ in messages]
  due = ['assistant' if i % 2 else 'user' for i in range(len(roles))]
  if roles != due or not len(roles) % 2:
    raise BadRow(
      f'the roles of a conversation are {roles}; user and assistant must take'
      ' turns, the user first and last.'
    )
  ids, newline = [tokenizer.bos_id], tokenizer.encode('\n')
  for role, content in before + messages:
    name = role if role in ('user', 'system') else 'model'
    text = tokenizer.encode(f'{name}\n{prefix}{content}')
    ids += [tokenizer.start_of_turn, *text, tokenizer.end_of_turn, *newline]
    prefix = ''
  return [*ids, tokenizer.start_of_turn, *tokenizer.encode('model\n')]


def parse(content: bytes, name: str, remedy: str = _RELEASE) -> Tokenizer:
  """Returns the tokenizer in the bytes of a SentencePiece model file."""
  try:
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(content)
    of = processor
    ids = of.pad_id(), of.eos_id(), of.bos_id(), of.unk_id()
  except Exception as e:
    raise UserError(f'{name} is not a SentencePiece model; {remedy}.') from e
  if ids != (0, 1, 2, 3):
    raise UserError(
      f'{name}: PAD, EOS, BOS, UNK are {ids}; they must be (0, 1, 2, 3), as'
      ' in the vocabularies of Gemma.'
    )
  turns = [tuple(map(processor.piece_to_id, marks)) for marks in TURNS]
  known = [marks for marks in turns if processor.unk_id() not in marks]
  start, end = known[0] if known else (None, None)
  sha256 = hashlib.sha256(content).hexdigest()
  return Tokenizer(processor, sha256, start, end)


def content_of(path: str) -> bytes:
  """The SentencePiece model at `path`, also where a GGUF file holds it."""
  path = find(path)
  if gguf.is_file(path):
    return gguf.sentencepiece_model(gguf.read(path))
  with open(path, 'rb') as f:
    return f.read()


def find(path: str) -> str:
  """The file of a vocabulary: `path`, or the one in it if it is a folder."""
  path = paths.expanded(path)
  return os.path.join(path, FILE) if os.path.isdir(path) else path


def load(path: str, sha256: str = '', remedy: str = _RELEASE) -> Tokenizer:
  """Reads a SentencePiece model; a UserError if it is missing or broken.

  Args:
    path: the file, a folder that holds it, or a GGUF file of the model. A
      tokenizer.json in a folder must be of the same vocabulary: transformers
      would read that.
    sha256: unless empty, that of the right file.
    remedy: what to do where the file is missing or broken.
  """
  folder, path = paths.expanded(path), find(path)
  other = path
  if not path.endswith('.json'):
    other = os.path.join(os.path.dirname(path), 'tokenizer.json')
  if other == path or (os.path.exists(other) and not os.path.exists(path)):
    raise UserError(
      f'{other} is in the format of another library; a SentencePiece model is'
      f' needed: {_RELEASE}.'
    )
  try:
    tokenizer = parse(content_of(path), path, remedy)
  except OSError as e:
    raise UserError(
      f'cannot read the tokenizer {path} ({e.strerror}); {remedy}.'
    ) from e
  if folder != path and os.path.exists(other):
    _check_same(tokenizer, path, other)
  if sha256 and tokenizer.sha256 != sha256:
    raise UserError(
      f'{path} has the sha256 {tokenizer.sha256}, tokenizer.sha256 asks for'
      f' {sha256}: it is the vocabulary of another model, or was not copied'
      ' whole.'
    )
  return tokenizer


def _check_same(tokenizer: Tokenizer, path: str, other: str) -> None:
  """Refuses a tokenizer.json that has another piece for an id."""
  try:
    with open(other, encoding='utf-8') as f:
      rows = json.load(f).get('added_tokens', [])
    added = {row['id']: row['content'] for row in rows}
  except (OSError, ValueError, LookupError, TypeError, AttributeError,
          RecursionError) as e:  # fmt: skip
    raise UserError(f'cannot read {other} ({e!r}); download it again.') from e
  for i in filter(added.__contains__, range(tokenizer.vocab_size)):
    piece = tokenizer.processor.id_to_piece(i)
    # The writers of tokenizer.json put a tab where the byte of one was.
    if added[i] not in (piece, '\t'):
      raise UserError(
        f'{other} has {added[i]!r:.60} as piece {i}, and {FILE} {piece!r}:'
        f' transformers reads the former. If the latter is right, name {path}.'
      )


def train(sentences: Iterable[str], path: str, vocab_size: int) -> Tokenizer:
  """Trains a byte-pair vocabulary, the same one for the same sentences.

  Every character of `sentences` gets a piece, so none of them holds an UNK.
  Written whole or not at all. A UserError if the text is too small, or its
  alphabet too large, for `vocab_size`.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      pad_id=0,
      eos_id=1,
      bos_id=2,
      unk_id=3,
      character_coverage=1.0,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      split_digits=True,
      num_threads=1,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as e:
    reason = ' '.join(str(e).split())
    raise UserError(
      f'cannot train a vocabulary of {vocab_size} pieces on this text: {reason}'
    ) from e
  content = model.getvalue()
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  with files.whole(path, 'wb') as f:
    f.write(content)
  return parse(content, path)


def ensure(path: str, sentences: Iterable[str], vocab_size: int) -> Tokenizer:
  """Loads the tokenizer at `path`, after training it unless it is there.

  `sentences` is read only if it must be: pass a generator. Of several hosts
  one calls this first: see `hosts.once`.
  """
  if not os.path.exists(path):
    train(sentences, path, vocab_size)
  tokenizer = load(path, remedy=OWN)
  if tokenizer.vocab_size != vocab_size:
    raise UserError(
      f'{path} has {tokenizer.vocab_size} pieces, the config asks for'
      f' {vocab_size}. Give another --workdir, or set tokenizer.vocab_size.'
    )
  return tokenizer
