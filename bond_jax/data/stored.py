"""Completions that were drawn once, with their rewards: to train on offline.

A row is a prompt, as `conversations.py` has it, and

  completions   texts, without what ends them
  rewards       as many finite numbers
  finished      as many bools; False: it was cut, and has no end. Absent: all
                have one

Axes: B prompts, K completions of one that a step sees, T their length.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bond_jax.data.examples import Encode, pack, Row, Source
from bond_jax.data.tokenizer import Tokenizer
from bond_jax.errors import BadRow
from bond_jax.types import Prompts, Rollout

_MOST = float(np.finfo(np.float32).max)


class Stored(NamedTuple):
  """The completions of a prompt as the model reads them, and their rewards."""

  pieces: list[list[int]]  # [N][1 to T], each with its end if it has one
  reward: np.ndarray  # f32[N]


Read = Callable[[Row], Stored]


def reader(
  tokenizer: Tokenizer,
  *,
  end: int,
  stop: Sequence[str],
  length: int,
  least: int,
) -> Read:
  """Returns the function that reads a row's completions, or raises a BadRow.

  Args:
    tokenizer: the vocabulary.
    end: the token that ends a finished completion ...
    stop: ... unless one of these texts in it has ended it.
    length: T. A finished completion has at most so many tokens, its end
      included; one that was cut is cut there.
    least: completions that a row has at least.
  """

  def pieces_of(text: str, finished: bool, name: str) -> list[int]:
    pieces = tokenizer.encode(text)
    if found := {*pieces} & {*tokenizer.stop_ids}:
      raise BadRow(
        f'{name} has the token {found.pop()}, which ends a completion, in its'
        f' text {text!r:.60}; leave it out, and what follows it.'
      )
    if not finished:
      return pieces[:length]
    if not any(x in text for x in stop):
      pieces = [*pieces, end]
    if len(pieces) > length:
      raise BadRow(
        f'{name} has {len(pieces)} tokens, its end included, and length is'
        f' {length}; set a larger one.'
      )
    return pieces

  def read(row: Row) -> Stored:
    texts, rewards, finished = _checked(row, least)
    pieces = [
      pieces_of(text, known, f'completions[{i}]')
      for i, (text, known) in enumerate(zip(texts, finished, strict=True))
    ]
    return Stored(pieces, np.array(rewards, np.float32))

  return read


def _checked(row: Row, least: int) -> tuple[list[str], list[float], list[bool]]:
  """The three fields, of one length; a BadRow if they are not as they must."""
  said = row.get('finished') is not None
  texts = _list(row, 'completions', str, 'a text; tokens cannot be read')
  rewards = _list(row, 'rewards', (int, float), 'a number')
  finished = [True] * len(texts)
  if said:
    finished = _list(row, 'finished', bool, 'true or false')
  if not len(texts) == len(rewards) == len(finished):
    flags = f' and {len(finished)} finished' if said else ''
    raise BadRow(
      f'a row has {len(texts)} completions, {len(rewards)} rewards{flags}; give'
      ' as many of each.'
    )
  if len(texts) < least:
    raise BadRow(
      f'a row has {len(texts)} completions, and the algorithm looks at {least}'
      ' of each prompt; store more, or ask it for fewer.'
    )
  for i, reward in enumerate(rewards):
    if not abs(reward) <= _MOST:  # NaN neither
      raise BadRow(f'rewards[{i}] is {reward!r:.40}; it must be finite.')
  for i, text in enumerate(texts):
    if not text and not (said and finished[i]):
      raise BadRow(
        f'completions[{i}] is empty; leave it out, or say by "finished" that it'
        ' ended at once.'
      )
  return texts, rewards, finished


def _list(row: Row, name: str, kind: Any, what: str) -> list[Any]:
  """The list of a field; a BadRow if it is none, or holds another kind."""
  values = row.get(name)
  if not isinstance(values, list):
    got = f'it is {values!r:.60}' if name in row else f'it has {", ".join(row)}'
    raise BadRow(
      f'a row to train on offline needs a list "{name}"; {got}. python -m'
      ' bond_jax.draw writes such rows.'
    )
  for i, value in enumerate(values):
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
      raise BadRow(f'{name}[{i}] is {value!r:.60}; it must be {what}.')
  return values


def usable(read: Read, encode: Encode) -> Encode:
  """`encode`, with a BadRow for rows whose completions cannot be read, too."""

  def make(row: Row) -> list[int] | None:
    read(row)
    return encode(row)

  return make


def order(seed: int, visit: int, prompt: int, count: int) -> np.ndarray:
  """A random order of so many completions, for a visit: i64[count]."""
  return np.random.default_rng((seed, visit, prompt)).permutation(count)


def draw(
  rows: Source, read: Read, prompts: Prompts, *, num: int, length: int,
  seed: int, visit: int,
) -> tuple[Rollout, np.ndarray]:  # fmt: skip
  """Some of the stored completions of each prompt, on the host.

  Which ones, and in which order, depends on the seed, the prompt and the visit
  alone: each set of K is as likely as another, and each order.

  Args:
    rows: of which `prompts` are some, by their ids.
    read: of `reader`.
    prompts: B of them.
    num: K.
    length: T.
    seed: of the run.
    visit: number of the batch, from 0.

  Returns:
    The Rollout, in which nothing is known of their law and nothing was spent on
    them, log_prob and slot_steps being 0; and the rewards f32[B, K].
  """
  pieces, rewards = [], []
  for i in map(int, prompts.id):
    known = read(rows[i])
    places = order(seed, visit, i, len(known.pieces))[:num]
    pieces += [known.pieces[k] for k in places]
    rewards.append(known.reward[places])
  tokens, mask = pack(pieces, length)
  shape = len(rewards), num
  drawn = Rollout(
    completion=tokens.reshape(*shape, length),
    mask=mask.reshape(*shape, length),
    log_prob=np.zeros((*shape, length), np.float32),
    slot_steps=np.zeros(shape, np.float32),
  )
  return drawn, np.stack(rewards)
