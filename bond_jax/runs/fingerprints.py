"""What files hold, in a few characters: to see that a path is what it was.

A path in a config stays the same when the file behind it does not. A
fingerprint is one line of text: the size, and the sha256 of all bytes, or for a
large file of samples, with the time of its last change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import datetime
import hashlib
import importlib
import importlib.util
import os
import sys
import types

from absl import flags

from bond_jax.devices import hosts

WHOLE = 256 * 2**20  # bytes; of a larger file samples are hashed
_SAMPLES, _SAMPLE = (
  16,
  2**16,
)  # so many, of so many bytes, the first and last too
_MOST = 5000  # files of a folder that are looked at
_SINCE = ', modified '
WRITTEN = 'written during the run'


def of_file(path: str) -> str:
  """The fingerprint of one file."""
  size = os.path.getsize(path)
  with open(path, 'rb') as f:
    if size <= WHOLE:
      sha = hashlib.file_digest(f, 'sha256').hexdigest()
      return f'{size:,} bytes, sha256 {sha[:16]}'
    found = hashlib.sha256()
    for i in range(_SAMPLES):
      f.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
      found.update(f.read(_SAMPLE))
    changed = datetime.datetime.fromtimestamp(os.fstat(f.fileno()).st_mtime)
  return (
    f'{size:,} bytes, sha256 of samples {found.hexdigest()[:16]}'
    f'{_SINCE}{changed.isoformat(" ", "seconds")}'
  )


def of_files(paths: Iterable[str], folder: str) -> str:
  """The fingerprint of some files of a folder, by their names in it."""
  paths = sorted(paths)[:_MOST]
  parts = [(os.path.relpath(p, folder), of_file(p)) for p in paths]
  # The time of a large file counts for nothing that a copy does not keep.
  text = repr([(name, part.partition(_SINCE)[0]) for name, part in parts])
  sha = hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()
  return f'{len(parts)} files, sha256 {sha[:16]}'


def of_path(path: str, deep: bool = True) -> str | None:
  """That of a file or a folder; None if it is neither.

  `deep`: of a folder all files below it, else those in it alone.
  """
  if os.path.isfile(path):
    return of_file(path)
  if not os.path.isdir(path):
    return None
  found = []
  for where, folders, names in os.walk(path):
    folders[:] = sorted(folders) if deep else []
    found += [os.path.join(where, name) for name in sorted(names)]
    if len(found) > _MOST:
      break
  return of_files(filter(os.path.isfile, found), path)


def of_modules(name: str) -> dict[str, str]:
  """Those of a module and of what it imports of the user's own, by name.

  Packages that are installed, Python's and ours are left out below the first.
  So is one that cannot be imported.
  """
  todo, found = [name] if name else [], {}
  while todo:
    name = todo.pop()
    try:
      module = sys.modules.get(name) or importlib.import_module(name)
    except ImportError:  # whoever calls it says so
      continue
    path = getattr(module, '__file__', None)
    if name in found or not path or not path.endswith('.py'):
      continue
    found[name] = of_file(path)
    todo += [other for other in _imported(module) if _is_own(other)]
  return found


def _imported(module: types.ModuleType) -> set[str]:
  """The modules that a module's names are, or come from."""
  values = list(vars(module).values())
  return {
    value.__name__
    if isinstance(value, types.ModuleType)
    else getattr(value, '__module__', None)
    for value in values
  } - {None, module.__name__}


def _is_own(name: str) -> bool:
  """Whether a module is the user's: not installed, not Python's, not ours."""
  if not isinstance(name, str) or name.partition('.')[0] in (
    'bond_jax',
    *sys.stdlib_module_names,
  ):
    return False
  path = getattr(sys.modules.get(name), '__file__', None) or ''
  return path.endswith('.py') and 'site-packages' not in path.split(os.sep)


def of_code(folder: str) -> dict[str, str]:
  """Of every .py file below a folder: what it is called, and its hash."""
  found = {}
  for where, _, names in os.walk(folder):
    for name in sorted(n for n in names if n.endswith('.py')):
      path = os.path.join(where, name)
      with open(path, 'rb') as f:
        found[os.path.relpath(path, folder)] = hashlib.sha256(
          f.read()
        ).hexdigest()[:12]
  return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  """The inputs that are not what they were, a line each.

  The time of a change alone does not count, nor does a file that was not there
  and is no data, nor one that was written during the run.
  """
  lines = []
  for name in sorted({*before, *now}):
    old, new = (x.get(name, 'absent').partition(_SINCE)[0]
                for x in (before, now))  # fmt: skip
    new_file = old == 'absent' and not name.startswith('data.')
    if old != new and old != WRITTEN and not new_file:
      lines.append(f'{name} ({old} -> {new})')
  return lines


def steady(
  before: Mapping[str, str], now: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
  """What to record of inputs that were looked at again during a run.

  Files in the arguments of a reward that have changed are the reward's own
  output. Returns the record, and the other inputs that have changed.
  """
  lines = changed(before, now)
  own = {
    name: WRITTEN
    for name in (line.partition(' (')[0] for line in lines)
    if '.args.' in name and ' module ' not in name
  }
  others = [line for line in lines if line.partition(' (')[0] not in own]
  return {**before, **own}, others


def accept(what: str, lines: Sequence[str]) -> None:
  """A UserError, on all hosts, for inputs that have changed.

  With --accept_changes a line instead. All hosts have the same `lines`.
  """
  if not lines:
    return
  more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
  said = f'{what} reads what has changed: {"; ".join(lines[:3])}{more}'
  if 'accept_changes' in flags.FLAGS and flags.FLAGS['accept_changes'].value:
    hosts.say(f'{said}. It goes on, with --accept_changes.')
    return
  raise hosts.Disagreement(
    f'{said}. Put back what was there, give another --workdir to begin anew, or'
    ' go on all the same with --accept_changes.'
  )
