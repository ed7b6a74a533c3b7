"""Checksums of checkpoints: the sha256 of every file of a step, beside them.

They are written into the step's folder before that gets its final name, so
that a whole step has them whenever the process dies; a mark in Orbax's own
file, which is written first, tells a step that lost them from one that was
saved before there were any.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures
import hashlib
import json
import os

import orbax.checkpoint as ocp

from bond_jax.errors import UserError

NAME = 'sha256.json'
MARK = {'checksums': NAME}  # custom metadata of a step that has them
_OWN = '_CHECKPOINT_METADATA'
_LATER = (NAME, _OWN, 'commit_success.txt')  # written when the sums are
_THREADS = 4
_TAKEN = '.damaged'


class TemporaryPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """The folder of a step in the making, which gets its checksums at the end.

  Orbax calls this in a thread of its own, on the first host, when all have
  written, and gives the folder its name then: a step without them is not there.
  """

  async def finalize(self) -> None:
    if self.get_final().name.isdigit():  # a step, not an item of one
      write(os.fspath(self.get()))
    await super().finalize()


def write(folder: str) -> None:
  """Writes the checksums of a step's folder, whole or not at all."""
  path = os.path.join(folder, NAME)
  with open(path + '.tmp', 'w', encoding='utf-8') as f:
    json.dump(_sums(folder, _files(folder)), f, indent=1)
    f.flush()
    os.fsync(f.fileno())
  os.replace(path + '.tmp', path)


def damage(folder: str, items: Sequence[str] | None = None) -> str | None:
  """What is wrong with the folder of a step, or None.

  Every file must be there in its size; of `items`, or else of all, every byte
  is read.
  """
  try:
    path = os.path.join(folder, NAME)
    with open(os.path.join(folder, _OWN), encoding='utf-8') as f:
      marked = (json.load(f).get('custom_metadata') or {}).items()
    if not (MARK.items() <= marked or os.path.exists(path)):
      return None  # it was saved before there were checksums
    with open(path, encoding='utf-8') as f:
      sums = json.load(f)
    for name, (size, _) in sums.items():
      if (got := os.path.getsize(os.path.join(folder, name))) != size:
        return f'{name} has {got:,} bytes instead of {size:,}'
    names = [n for n in sums if items is None or n.split(os.sep)[0] in items]
    found = _sums(folder, names)
  except FileNotFoundError as e:
    return f'{os.path.relpath(e.filename, folder)} is missing'
  except (OSError, ValueError, AttributeError) as e:
    return f'it cannot be read: {" ".join(str(e).split())}'
  broken = [name for name in names if found[name] != sums[name]]
  return f'{broken[0]} is not as it was written' if broken else None


def steps(folder: str) -> list[int]:
  """The steps in a folder of checkpoints, damaged ones too."""
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return sorted(int(name) for name in names if name.isdigit())


def set_aside(folder: str) -> None:
  """Gives damaged checkpoints another name, so that the last is a good one.

  The last good one is read whole, those before it only as far as all readers
  read them. A UserError if there is none among them that is good.
  """
  bad, good = {}, None
  for step in reversed(steps(folder)):
    path = os.path.join(folder, str(step))
    if what := damage(path, None if good is None else ('metrics',)):
      bad[step] = what
    elif good is None:
      good = step
  if bad and good is None:
    what = '; '.join(f'step {step}: {what}' for step, what in bad.items())
    raise UserError(
      f'every checkpoint in {folder} is damaged ({what}). Put one of them back'
      ' from a copy, or move this folder away to begin the stage anew.'
    )
  for step, what in bad.items():
    name = taken = f'{step}{_TAKEN}'
    i = 1
    while os.path.exists(os.path.join(folder, name)):
      name, i = f'{taken}-{i}', i + 1
    os.rename(os.path.join(folder, str(step)), os.path.join(folder, name))
    print(
      f'DAMAGED: checkpoint {step} in {folder} ({what}). It is now {name}, and'
      f' nobody reads it; the last good one is that of step {good}.',
      flush=True,
    )


def check(folder: str, step: int, items: Sequence[str]) -> None:
  """A UserError if what is about to be read of a step is damaged."""
  if what := damage(os.path.join(folder, str(step)), items):
    others = [str(s) for s in steps(folder) if s != step]
    stage = os.path.dirname(os.path.abspath(folder))
    raise UserError(
      f'checkpoint {step} in {folder} is damaged ({what}). Put it back from a'
      f' copy, or move {os.path.join(stage, "summary.json")} away and run the'
      ' stage again, which goes on from a good one'
      + (f'; there are also {", ".join(others)}.' if others else '.')
    )


def _files(folder: str) -> list[str]:
  """The files below a folder, relative to it."""
  found = []
  for where, _, names in os.walk(folder):
    for name in names:
      path = os.path.relpath(os.path.join(where, name), folder)
      if path not in _LATER and path != NAME + '.tmp':
        found.append(path)
  return sorted(found)


def _sums(folder: str, names: Sequence[str]) -> dict[str, list[int | str]]:
  """name -> [bytes, sha256 in hexadecimal]."""

  def of(name: str) -> list[int | str]:
    with open(os.path.join(folder, name), 'rb') as f:
      sha = hashlib.file_digest(f, 'sha256')
      return [f.tell(), sha.hexdigest()]

  with futures.ThreadPoolExecutor(_THREADS) as threads:
    return dict(zip(names, threads.map(of, names), strict=True))
