"""GGUF files, the format of llama.cpp: their header, and the vocabulary in it.

The reader of the `gguf` package keeps several arrays for each of the 262,144
pieces of Gemma 3 and takes far longer. Numbers are left to the package.
"""

import os
import re
import struct
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from bond_jax.errors import UserError

_MAGIC = b'GGUF'
_VERSIONS = 2, 3
# Of a value, by its number in the file; 8 is a string, 9 an array.
_SCALARS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4',
            7: '?', 10: '<u8', 11: '<i8', 12: '<f8'}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Kinds of pieces, the same numbers in SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# USER_DEFINED pieces that llama.cpp does not show: its converter makes them
# CONTROL.
_HIDDEN = re.compile(
  r'<(start|end)_of_(turn|image)>|<mask>|<2mass>|\[@BOS@\]|<unused\d+>'
  r'|<\|.+|.+\|>'
)


class Tensor(NamedTuple):
  """One tensor, not read yet."""

  shape: tuple[int, ...]  # rows first
  kind: int  # a number of gguf.GGMLQuantizationType
  start: int  # byte in the file


class Header(NamedTuple):
  """What a file says before its numbers."""

  path: str
  fields: dict[str, Any]  # key -> number, string, array or list of strings
  tensors: dict[str, Tensor]
  content: np.ndarray  # its bytes, mapped


def read(path: str) -> Header:
  """The header of a file; a UserError for one that is no GGUF, or is cut."""
  try:
    content = np.memmap(path, mode='r')
  except (OSError, ValueError) as e:  # ValueError: it is empty
    reason = getattr(e, 'strerror', None) or 'it is empty'
    raise UserError(f'cannot read {path} ({reason}); name a GGUF file.') from e
  if bytes(content[:4]) != _MAGIC:
    raise UserError(
      f'{path} does not begin with {_MAGIC.decode()}: it is no GGUF file, or'
      ' was not downloaded whole.'
    )
  try:
    return _read(path, content)
  except (struct.error, ValueError, LookupError, OverflowError, MemoryError,
          RecursionError) as e:  # fmt: skip
    raise UserError(
      f'{path} is cut or damaged ({type(e).__name__}: {e}); download it again.'
    ) from e


def _read(path: str, content: np.ndarray) -> Header:
  cursor = _Cursor(content, 4)
  version = cursor.number('<I')
  if version not in _VERSIONS:
    raise UserError(
      f'{path} is of GGUF version {version} or big-endian; readable are'
      f' {" and ".join(map(str, _VERSIONS))}, little-endian.'
    )
  tensors, count = cursor.number('<Q'), cursor.number('<Q')
  fields = {}
  for _ in range(count):
    key = cursor.string()
    fields[key] = cursor.value(cursor.number('<I'))
  if fields.get('split.count', 1) > 1:
    raise UserError(
      f'{path} is one of {fields["split.count"]} parts; merge them with'
      ' "llama-gguf-split --merge".'
    )
  rows = []
  for _ in range(tensors):
    name, dims = cursor.string(), cursor.number('<I')
    shape = [cursor.number('<Q') for _ in range(dims)]
    kind, start = cursor.number('<I'), cursor.number('<Q')
    rows.append((name, Tensor(tuple(shape[::-1]), kind, start)))
  align = fields.get('general.alignment', 32)
  first = cursor.at + -cursor.at % align
  found = {k: x._replace(start=x.start + first) for k, x in rows}
  if len(found) < len(rows):
    raise ValueError('a tensor is there twice')
  return Header(path, fields, found, content)


class _Cursor:
  """Reads one value after another."""

  def __init__(self, content: np.ndarray, at: int):
    self.content, self.at = content.data, at

  def take(self, size: int) -> memoryview:
    start, self.at = self.at, self.at + size
    if self.at > len(self.content):
      raise ValueError(f'it ends at byte {len(self.content)}')
    return self.content[start : self.at]

  def number(self, form: str) -> Any:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def string(self) -> str:
    return bytes(self.take(self.number('<Q'))).decode()

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      dtype = np.dtype(_SCALARS[kind])
      found = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
      # 1e-6 in 32 bits is 1e-6, not 9.99999997e-7.
      return float(str(found)) if dtype == np.float32 else found.item()
    kind, count = self.number('<I'), self.number('<Q')
    if kind in _SCALARS:
      dtype = np.dtype(_SCALARS[kind])
      return np.frombuffer(self.take(count * dtype.itemsize), dtype)
    return [self.value(kind) for _ in range(count)]


def field(header: Header, key: str, kind: type) -> Any:
  """A value that must be there; a UserError if not, or of another type."""
  value = header.fields.get(key)
  if not isinstance(value, kind) or isinstance(value, bool):
    raise UserError(
      f'{header.path}: {key} is {value!r:.60}, expected {kind.__name__}; it was'
      ' converted by another program than that of llama.cpp, or is damaged.'
    )
  return value


def sentencepiece_model(header: Header) -> bytes:
  """The SentencePiece model whose pieces a file holds, as Gemma's own has them.

  What the converter of llama.cpp changed is undone: spaces in pieces, the
  kinds of marks, and pieces without a text that fill up the embedding.
  """
  kind = header.fields.get('tokenizer.ggml.model')
  if kind != 'llama':
    raise UserError(
      f'{header.path} has a tokenizer of kind {kind!r:.60}; readable is'
      " 'llama', that of SentencePiece, which Gemma's has; name the"
      ' tokenizer.model of the original release as tokenizer.path.'
    )
  key = 'tokenizer.ggml.'
  pieces = field(header, f'{key}tokens', list)
  scores = field(header, f'{key}scores', np.ndarray)
  kinds = field(header, f'{key}token_type', np.ndarray)
  if not len(pieces) == len(scores) == len(kinds):
    raise UserError(
      f'{header.path} has {len(pieces)} pieces, {len(scores)} scores and'
      f' {len(kinds)} kinds of pieces; download it again.'
    )
  count = len(pieces)
  while count and pieces[count - 1] == f'[PAD{count - 1}]':
    count -= 1
  model = sentencepiece_model_pb2.ModelProto()
  # Gemma's first ones. The ids in a file need not be: releases that answer may
  # have the end of a turn as eos.
  first = 'pad', 'eos', 'bos', 'unk'
  of_gemma = list(kinds[:3]) == [CONTROL] * 3 and pieces[3:4] == ['<unk>']
  for i in range(count):
    piece, of = pieces[i], int(kinds[i])
    if of == CONTROL and _HIDDEN.fullmatch(piece):
      of = USER_DEFINED
    if of_gemma and i == 3:
      of = UNKNOWN
    if of in (NORMAL, USER_DEFINED):
      piece = piece.replace(' ', '▁')
    model.pieces.add(piece=piece, score=float(scores[i]), type=of)
  settings = model.trainer_spec
  settings.model_type = settings.BPE
  settings.vocab_size = count
  settings.byte_fallback = bool((kinds == BYTE).any())
  for i, name in enumerate(first * of_gemma):
    setattr(settings, f'{name}_id', i)
    setattr(settings, f'{name}_piece', pieces[i])
  prefix = header.fields.get(f'{key}add_space_prefix', True)
  model.normalizer_spec.name = 'identity'
  model.normalizer_spec.add_dummy_prefix = bool(prefix)
  model.normalizer_spec.remove_extra_whitespaces = False
  return model.SerializeToString(deterministic=True)


def to_gguf(piece: str, kind: int) -> tuple[str, int]:
  """A piece of a SentencePiece model as the converter of llama.cpp has it."""
  if kind == USER_DEFINED and _HIDDEN.fullmatch(piece):
    return piece, CONTROL
  return piece.replace('▁', ' ') if kind == USER_DEFINED else piece, kind


def is_file(path: str) -> bool:
  """Whether a path names a GGUF file, which need not be there."""
  return path.endswith('.gguf') and not os.path.isdir(path)
