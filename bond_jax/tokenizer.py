"""SentencePiece: text to piece ids and back, and a vocabulary of one's own.

The convention is Gemma's: PAD 0, EOS 1, BOS 2, UNK 3, spaces kept as they are,
none put in front. So a text may be cut anywhere between two pieces:
decode(a) + decode(b) == decode(a + b).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import io
import os

import sentencepiece

from bond_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary; `sha256` names the file it came from."""

  processor: sentencepiece.SentencePieceProcessor
  sha256: str
  pad_id: int = 0
  eos_id: int = 1
  bos_id: int = 2
  unk_id: int = 3

  @property
  def vocab_size(self) -> int:
    return self.processor.vocab_size()

  def encode(self, text: str) -> list[int]:
    """Returns the pieces of `text`, without BOS or EOS."""
    return self.processor.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, leaving PAD, EOS and BOS out."""
    control = (self.pad_id, self.eos_id, self.bos_id)
    return self.processor.decode([int(i) for i in ids if i not in control])


def parse(content: bytes, name: str) -> Tokenizer:
  """Returns the tokenizer in the bytes of a SentencePiece model file."""
  try:
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(content)
    ids = tuple(
      getattr(processor, f'{c}_id')() for c in ('pad', 'eos', 'bos', 'unk')
    )
  except Exception as e:
    raise UserError(
      f'{name} is not a SentencePiece model. Delete it to train a new one, or'
      ' copy it again.'
    ) from e
  if ids != (0, 1, 2, 3):
    raise UserError(
      f'{name}: PAD, EOS, BOS, UNK are {ids}; they must be (0, 1, 2, 3), as'
      ' in the vocabularies of Gemma.'
    )
  return Tokenizer(processor, hashlib.sha256(content).hexdigest())


def load(path: str) -> Tokenizer:
  """Reads a SentencePiece model; a UserError if it is missing or broken."""
  try:
    with open(path, 'rb') as f:
      return parse(f.read(), path)
  except OSError as e:
    raise UserError(
      f'cannot read the tokenizer {path} ({e.strerror}); run the sft stage'
      ' first, or copy a SentencePiece model there.'
    ) from e


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
  temporary = path + '.tmp'
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  with open(temporary, 'wb') as f:
    f.write(content)
  os.replace(temporary, path)
  return parse(content, path)


def ensure(path: str, sentences: Iterable[str], vocab_size: int) -> Tokenizer:
  """Loads the tokenizer at `path`, after training it unless it is there.

  `sentences` is read only if it must be: pass a generator.
  """
  if not os.path.exists(path):
    return train(sentences, path, vocab_size)
  tokenizer = load(path)
  if tokenizer.vocab_size != vocab_size:
    raise UserError(
      f'{path} has {tokenizer.vocab_size} pieces, the config asks for'
      f' {vocab_size}. Give another --workdir, or delete the file.'
    )
  return tokenizer
