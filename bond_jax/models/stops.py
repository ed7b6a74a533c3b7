"""What ends a completion before its length: a token, or a string in its text.

The strings are looked for in the text of the completion alone, in UTF-8, by an
automaton (Aho and Corasick, 1975). A text is in the state of the longest
beginning of a stop string that it ends with, 0 for none; the last state is that
of every text that contains one. A table says how each token moves each state.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bond_jax.errors import UserError
from bond_jax.types import Array

MOST = 255  # bytes of all stop strings: so many states and one more fit in a u8


class Stop(NamedTuple):
  """What ends a completion, and is itself part of it; see `of` and `make`."""

  ids: tuple[int, ...]  # tokens
  table: np.ndarray | None = None  # u8[S, V], state and token -> state

  def cut(self, completion: Array, mask: Array) -> Array:
    """bool[...], whether completions [..., T] have no end, here or on devices.

    One of T tokens ends with the last of them, or was cut there.
    """
    xp = np if isinstance(completion, np.ndarray) else jnp
    ids = xp.array(self.ids, xp.int32)
    cut = mask[..., -1] & ~xp.isin(completion[..., -1], ids)
    if self.table is None:
      return cut
    table, tokens = xp.asarray(self.table), xp.moveaxis(completion, -1, 0)
    state = xp.zeros(cut.shape, xp.uint8)
    if xp is jnp:
      step = lambda state, token: (table[state, token], None)
      state, _ = jax.lax.scan(step, state, tokens)
    else:
      state = functools.reduce(lambda s, token: table[s, token], tokens, state)
    return cut & (state != len(table) - 1)


def of(tokenizer, texts: Sequence[str]) -> Stop:
  """What ends a completion of a vocabulary: its ids, and these strings."""
  return _of(tokenizer, tuple(texts))


@functools.lru_cache(8)  # a second or two, of a vocabulary of Gemma's size
def _of(tokenizer, texts: tuple[str, ...]) -> Stop:
  return make(tokenizer.stop_ids, tokenizer.pieces() if texts else (), texts)


def make(
  ids: Sequence[int], pieces: Sequence[bytes], texts: Sequence[str]
) -> Stop:
  """What ends a completion whose tokens add these bytes to its text.

  Raises:
    UserError: for a stop string that no text contains, or too many bytes.
  """
  strings = [text.encode() for text in texts]
  # Bytes that make no character are decoded to U+FFFD.
  if not all(strings) or '\ufffd' in ''.join(texts):
    raise UserError(
      f'stop is {tuple(texts)}: an empty string, or one with U+FFFD, ends no'
      ' completion; leave it out.'
    )
  if (size := sum(map(len, strings))) > MOST:
    raise UserError(
      f'stop has {size} bytes in {len(strings)} strings, at most {MOST} are'
      ' possible; shorten them.'
    )
  if not strings:
    return Stop(tuple(ids))
  size, moves = _automaton(strings)
  rows = []
  for piece in pieces:
    row = bytes(range(size))  # from every state to itself
    for byte in piece:
      row = row.translate(moves[byte])
    rows.append(row)
  table = np.frombuffer(b''.join(rows), np.uint8)
  return Stop(tuple(ids), table.reshape(-1, size).T)


def _automaton(strings: Sequence[bytes]) -> tuple[int, list[bytes]]:
  """The number of states, and of each byte, the state that follows on each."""
  begun = sorted({x[:i] for x in strings for i in range(len(x))})  # b'' first
  last = len(begun)
  moves = np.zeros((256, 256), np.uint8)
  moves[:, last] = last
  for state, text in enumerate(begun):
    for byte in set(b''.join(strings)):
      now = text + bytes([byte])
      if now.endswith(tuple(strings)):
        moves[byte, state] = last
      else:
        ends = (now[i:] for i in range(len(now) + 1))
        moves[byte, state] = begun.index(next(x for x in ends if x in begun))
  return last + 1, [x.tobytes() for x in moves]
