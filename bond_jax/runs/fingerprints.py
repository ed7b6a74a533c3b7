"""Fingerprints of files: the size and a sha256, to see what has changed.

A path in a config stays the same when the file behind it does not.
"""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import importlib
import inspect
import os
import pathlib
import sys
import types

from absl import flags

from bond_jax.devices import hosts

WHOLE = 256 * 2**20  # bytes; of a larger file samples are hashed
_SAMPLES = 16  # of a large file, the first and the last bytes included
_SAMPLE = 2**16  # bytes
_MOST = 5000  # files of a folder that are looked at
WRITTEN = 'written during the run'


def of_file(path: str) -> str:
  size = os.path.getsize(path)
  with open(path, 'rb') as f:
    if size <= WHOLE:
      sha = hashlib.file_digest(f, 'sha256').hexdigest()
      return f'{size:,} bytes, sha256 {sha[:16]}'
    samples = hashlib.sha256()
    for i in range(_SAMPLES):
      f.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
      samples.update(f.read(_SAMPLE))
  return f'{size:,} bytes, sha256 of samples {samples.hexdigest()[:16]}'


def of_files(paths: Iterable[str], folder: str) -> str:
  """Fingerprints some files of a folder, and their names in it."""
  paths = sorted(paths)[:_MOST]
  parts = [(os.path.relpath(p, folder), of_file(p)) for p in paths]
  text = repr(parts).encode('utf-8', 'surrogateescape')
  return f'{len(parts)} files, sha256 {hashlib.sha256(text).hexdigest()[:16]}'


def of_path(path: str, deep: bool = True) -> str | None:
  """Fingerprints a file or a folder; None if it is neither.

  `deep`: of a folder all files below it, else only those directly in it.
  """
  if os.path.isfile(path):
    return of_file(path)
  if not os.path.isdir(path):
    return None
  found = pathlib.Path(path).glob('**/*' if deep else '*')
  return of_files((str(p) for p in found if p.is_file()), path)


def of_modules(name: str) -> dict[str, str]:
  """Fingerprints a module, and the user's own modules that it imports.

  A module that cannot be imported is left out: whoever calls it reports that.
  """
  todo, found = [name], {}
  while todo:
    name = todo.pop()
    try:
      module = sys.modules.get(name) or importlib.import_module(name)
    except (ImportError, ValueError):
      continue
    path = getattr(module, '__file__', None) or ''
    if name not in found and path.endswith('.py'):
      found[name] = of_file(path)
      todo += filter(_is_own, _imported(module))
  return found


def _imported(module: types.ModuleType) -> set[str]:
  """The modules that a module's names are, or come from."""
  names = (
    x.__name__ if inspect.ismodule(x) else getattr(x, '__module__', None)
    for x in list(vars(module).values())
  )
  return {name for name in names if isinstance(name, str)}


def _is_own(name: str) -> bool:
  """Whether a module is the user's: not installed, not Python's, not ours."""
  path = getattr(sys.modules.get(name), '__file__', None) or ''
  if name.partition('.')[0] in ('bond_jax', *sys.stdlib_module_names):
    return False
  return path.endswith('.py') and 'site-packages' not in path.split(os.sep)


def of_code(folder: str) -> dict[str, str]:
  """Hashes every .py file below a folder, by its path in it."""
  return {
    str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()[:12]
    for p in sorted(pathlib.Path(folder).rglob('*.py'))
  }


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  """The inputs that are not what they were, a line each.

  A new file does not count if it is not data, nor one that was written during
  the run.
  """
  lines = []
  for name in sorted({*before, *now}):
    old, new = (x.get(name, 'absent') for x in (before, now))
    new_file = old == 'absent' and not name.startswith('data.')
    if old not in (new, WRITTEN) and not new_file:
      lines.append(f'{name} ({old} -> {new})')
  return lines


def steady(
  before: Mapping[str, str], now: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
  """What to record of inputs that are looked at again during a run.

  Files in the arguments of a reward that have changed are the reward's own
  output. Returns the record, and the other inputs that have changed.
  """
  lines = {line.partition(' (')[0]: line for line in changed(before, now)}
  own = {
    name: WRITTEN
    for name in lines
    if '.args.' in name and ' module ' not in name
  }
  return {**before, **own}, [x for name, x in lines.items() if name not in own]


def accept(what: str, lines: Sequence[str]) -> None:
  """A UserError, on all hosts, for inputs that have changed.

  With --accept_changes a line instead. All hosts have the same `lines`.
  """
  if not lines:
    return
  more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
  line = f'{what} reads what has changed: {"; ".join(lines[:3])}{more}'
  if 'accept_changes' in flags.FLAGS and flags.FLAGS['accept_changes'].value:
    hosts.say(f'{line}. It goes on, with --accept_changes.')
    return
  raise hosts.Disagreement(
    f'{line}. Put back what was there, give another --workdir to begin anew, or'
    ' go on all the same with --accept_changes.'
  )
