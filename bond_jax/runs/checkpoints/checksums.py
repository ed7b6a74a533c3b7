"""Checksums of checkpoints: the sha256 of every file of a step, beside them.

They are written into the step's folder before that gets its final name, so
that a whole step has them whenever the process dies.
"""

from collections.abc import Sequence
from concurrent import futures
import hashlib
import json
import os
import pathlib

import orbax.checkpoint as ocp

from bond_jax.errors import one_line, UserError
from bond_jax.runs import files

NAME = 'sha256.json'
_OWN = '_CHECKPOINT_METADATA'  # Orbax's, changed after the sums are written
_LATER = (NAME, NAME + '.tmp', _OWN, 'commit_success.txt')


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
  """Writes the checksums of a step's folder."""
  paths = (p for p in pathlib.Path(folder).rglob('*') if p.is_file())
  names = sorted(str(p.relative_to(folder)) for p in paths)
  names = [name for name in names if name not in _LATER]
  files.write_json(os.path.join(folder, NAME), _sums(folder, names))


def damage(folder: str, items: Sequence[str] | None = None) -> str | None:
  """What is wrong with the folder of a step, or None.

  Every file must be there in its size; of `items`, or else of all, every byte
  is read.
  """
  try:
    json.loads(pathlib.Path(folder, _OWN).read_text('utf-8'))
    sums = json.loads(pathlib.Path(folder, NAME).read_text('utf-8'))
    for name, (size, _) in sums.items():
      if (got := os.path.getsize(os.path.join(folder, name))) != size:
        return f'{name} has {got:,} bytes instead of {size:,}'
    names = [n for n in sums if items is None or n.split(os.sep)[0] in items]
    found = _sums(folder, names)
  except FileNotFoundError as e:
    return f'{os.path.relpath(e.filename, folder)} is missing'
  except (OSError, TypeError, ValueError, AttributeError) as e:
    return f'it cannot be read: {one_line(e)}'
  changed = [name for name in names if found[name] != sums[name]]
  return f'{changed[0]} is not as it was written' if changed else None


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
    name, i = f'{step}.damaged', 0
    while os.path.exists(os.path.join(folder, name)):
      name, i = f'{step}.damaged-{i + 1}', i + 1
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


def _sums(folder: str, names: Sequence[str]) -> dict[str, list[int | str]]:
  """name -> [bytes, sha256 in hexadecimal]."""

  def of(name: str) -> list[int | str]:
    with open(os.path.join(folder, name), 'rb') as f:
      sha = hashlib.file_digest(f, 'sha256')
      return [f.tell(), sha.hexdigest()]

  with futures.ThreadPoolExecutor(4) as threads:
    return dict(zip(names, threads.map(of, names), strict=True))
