"""How inputs are made and judged when the readers are fuzzed; see fuzz.py.

An input is bytes. Three sources make them: `mutated`, seeded changes of valid
ones, in their bytes or their JSON; hypothesis; and atheris, which looks for
branches that no input has taken yet (where it is installed).

A reader may take an input or refuse it with a UserError on one line. Anything
else is a finding: another exception, more than LIMIT seconds, a file written,
moved or made outside its folder, a process started, an object unpickled, or a
connection to another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import copy
import io
import json
import os
import pathlib
import random
import re
import signal
import sys
import threading
import traceback
from typing import Any, NamedTuple

from hypothesis import strategies as st

from bond_jax.errors import UserError

LIMIT = 10  # seconds for an input; most take a few milliseconds

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.symlink',
            'os.link', 'os.truncate', 'os.chmod', 'shutil.rmtree',
            'shutil.move', 'shutil.copyfile')  # fmt: skip
_RUNS = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn',
         'os.fork', 'pickle.find_class')  # fmt: skip
_UNPRINTABLE = re.compile('\n(?!  )|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]')


class Target(NamedTuple):
  """A reader, and inputs of it; the first of them is valid."""

  name: str
  form: str  # of the inputs: 'json', 'lines' of JSON, 'words' or 'bytes'
  seeds: Sequence[bytes]
  read: Callable[[bytes], Any]
  share: float = 1.0  # of the inputs that others get: it is slow


class Outcome(NamedTuple):
  kind: str  # 'accepted', 'refused', 'traceback', 'hang' or 'outside'
  said: str  # what was raised or written, and where


class Refused(Exception):
  """Raised by a target whose reader itself prints a line and ends."""


class Hang(BaseException):
  """Raised in the main thread when an input takes too long."""


# -- Judging one input


class Watch:
  """What the process does to the world while an input is read."""

  def __init__(self, folder: str):
    self._folder = os.path.realpath(folder)
    self.found: list[str] = []
    self.active = False
    sys.addaudithook(self._hook)  # for the life of the process

  def _inside(self, path: Any) -> bool:
    if isinstance(path, int) or path is None:  # an open file
      return True
    path = os.path.realpath(os.fsdecode(path))
    if path in (os.devnull, self._folder):
      return True
    return path.startswith(self._folder + os.sep)

  def _hook(self, event: str, args: tuple) -> None:
    if not self.active:
      return
    if event == 'open':
      path, _, flags = args
      if isinstance(flags, int) and flags & _WRITES and not self._inside(path):
        self.found.append(f'writes {path!r}')
    elif event in _CHANGES:
      names = [x for x in args[:2] if isinstance(x, str | bytes | os.PathLike)]
      self.found += [f'{event} {x!r}' for x in names if not self._inside(x)]
    elif event in _RUNS:
      self.found.append(f'{event} {args[0]!r}')
    elif event == 'socket.connect' and args[1][0] not in ('127.0.0.1', '::1'):
      self.found.append(f'connects to {args[1]}')


@contextlib.contextmanager
def bounded(seconds: float):
  """Raises Hang in here after so many seconds; in the main thread alone."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def late(*_):
    raise Hang

  before = signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def judge(target: Target, data: bytes, watch: Watch) -> Outcome:
  """Gives one input to a reader, and says what came of it."""
  watch.found.clear()
  watch.active = True
  kind, said = 'accepted', ''
  try:
    with (
      bounded(LIMIT),
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(io.StringIO()),
    ):
      target.read(data)
  except (UserError, Refused) as e:
    kind, said = 'refused', str(e)
    if _UNPRINTABLE.search(said) or len(said) > 10_000:
      kind, said = 'traceback', f'not one line: {said[:300]!r}'
  except Hang:
    kind, said = 'hang', _where(sys.exc_info()[2])
  except Exception as e:  # pylint: disable=broad-except
    said = f'{type(e).__name__}: {e}'[:300]
    kind, said = 'traceback', f'{said} at {_where(e.__traceback__)}'
  finally:
    watch.active = False
  if watch.found:
    return Outcome('outside', '; '.join(watch.found)[:300])
  return Outcome(kind, said)


def _where(trace) -> str:
  """The last line of the package's that a traceback passes, and its last."""
  frames = traceback.extract_tb(trace)
  ours = [f for f in frames if f'bond_jax{os.sep}' in f.filename] or frames
  name = lambda f: f'{os.path.basename(f.filename)}:{f.lineno}'
  return f'{name(ours[-1])} ({name(frames[-1])})'


def listing(folder: str) -> list[tuple[str, int]]:
  """Every file below a folder, with its size."""
  root = pathlib.Path(folder)
  files = (p for p in root.rglob('*') if p.is_file() and not p.is_symlink())
  return sorted((str(p.relative_to(root)), p.stat().st_size) for p in files)


# -- Making inputs

STRANGE: tuple[Any, ...] = (
  None, True, False, 0, 1, -1, 2, 7, 10**18, -(10**18), 2**63, 10**400, 0.5,
  -0.0, 1e308, float('nan'), float('inf'), '', ' ', 'a', '0', 'x/y', '../../x',
  '/', '\x00', 'a\nb', '\x1b[2J', 'é\u2028', '\ud800', 'a' * 3000, '{x}', '%s',
  [], [[]], [None], [0, 1], ['a'], [[0.5, 0.5]], {}, {'': {}}, {'a': None},
  {'text': 1}, 'nan', b'\xff'.decode('latin-1'), '[::0]', 'train[:0]',
)  # fmt: skip
_BITS = (
  b'\x00', b'\xff' * 8, b'\x7f' * 4, b'"', b'{', b'}', b'[' * 2000, b'\n',
  b'\r\n\r\n', b',', b'null', b'NaN', b'1e999', b'9' * 5000, b'-', b':',
  b'\\ud800', b'\xed\xa0\x80', b'\xef\xbb\xbf', b'{"a":' * 500, b'18446744073',
)  # fmt: skip


def mutated(target: Target, rng: random.Random) -> bytes:
  """A valid input with one to four changes."""
  data = rng.choice(target.seeds)
  if target.form in ('json', 'lines') and rng.random() < 0.7:
    return _changed_json(data, target.form, rng)
  if target.form == 'words':
    return _changed_words(data, rng)
  out = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    _change(out, rng)
  return bytes(out)


def _change(out: bytearray, rng: random.Random) -> None:
  i = rng.randrange(len(out) + 1)
  j = min(len(out), i + rng.choice((1, 1, 2, 4, 8, 64)))
  match rng.randrange(6):
    case 0 if i < len(out):
      out[i] ^= 1 << rng.randrange(8)
    case 1:
      out[i:j] = b''
    case 2:
      out[i:i] = rng.choice(_BITS)
    case 3:
      out[i:j] = rng.randbytes(j - i)
    case 4:
      del out[i:]
    case _:
      out[i:i] = out[i:j] * rng.choice((1, 3, 50))


def _changed_json(data: bytes, form: str, rng: random.Random) -> bytes:
  lines = data.splitlines() if form == 'lines' else [data]
  k = rng.randrange(len(lines))
  value = json.loads(lines[k])
  for _ in range(rng.choice((1, 1, 2))):
    value = replaced(value, rng.choice(STRANGE), rng.randrange)
  lines[k] = json.dumps(value).encode()
  return b'\n'.join(lines) + b'\n' * (form == 'lines')


def _changed_words(data: bytes, rng: random.Random) -> bytes:
  """Command lines, an argument in each line: the value or all of one."""
  words = data.decode().split('\n')
  i = rng.randrange(len(words))
  strange = rng.choice(STRANGE)
  if not isinstance(strange, str):
    strange = repr(strange)
  name, _, value = words[i].partition('=')
  words[i] = rng.choice((
      f'{name}={strange}', name, f'{name}.{strange}={value}', strange,
      f'{name}x={value}', f'--{strange}', f'{name}={value}{strange}',
      f'--config.{rng.choice(("train", "model", "data.fields"))}={strange}',
  ))  # fmt: skip
  return '\n'.join(words).encode('utf-8', 'surrogatepass')


def replaced(value: Any, strange: Any, draw: Callable[[int], int]) -> Any:
  """A copy in which something inside is strange, gone, renamed or doubled.

  `draw(n)` chooses one of n.
  """
  value = copy.deepcopy(value)
  places = list(_places(value))
  if not places:
    return strange
  inside, key = places[draw(len(places))]
  how = draw(8)
  if how == 0:
    del inside[key]
  elif how == 1 and isinstance(inside, dict):
    inside[f'{key}x'] = inside.pop(key)
  elif how == 2 and isinstance(inside, list):
    inside.insert(key, copy.deepcopy(inside[key]))
  elif how == 3:
    inside[key] = [inside[key]]
  elif how < 6 and (alike := _alike(inside[key])):
    inside[key] = alike[draw(len(alike))]
  else:
    inside[key] = strange
  return value


def _alike(value: Any) -> list[Any]:
  """Values of the same kind, which are read further than others."""
  found = [x for x in STRANGE if type(x) is type(value)]
  if type(value) in (int, float) and abs(value) < 1e300:
    found += [value + 1, -value, value * 3, value / 2, value // 2, 10**6]
  return found


def _places(value: Any):
  """Every (dict or list, key) in a JSON value."""
  if isinstance(value, dict | list):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
      yield value, key
      yield from _places(inner)


_LEAVES = (
  st.sampled_from(STRANGE)
  | st.integers()
  | st.floats()
  | st.text(st.characters(codec='utf-8'), max_size=20)
)
_VALUES = st.recursive(
  _LEAVES,
  lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x),
  max_leaves=6,
)


@st.composite
def inputs(draw, target: Target) -> bytes:
  """Inputs of a target as hypothesis makes them, so that it can shrink them."""
  data = draw(st.sampled_from(target.seeds))
  which = lambda n: draw(st.integers(0, n - 1))
  if target.form == 'words':
    return _changed_words(data, draw(st.randoms(use_true_random=False)))
  if target.form in ('json', 'lines') and which(8):
    lines = data.splitlines() if target.form == 'lines' else [data]
    k = which(len(lines))
    value = replaced(json.loads(lines[k]), draw(_VALUES), which)
    lines[k] = json.dumps(value).encode()
    return b'\n'.join(lines) + b'\n' * (target.form == 'lines')
  i = which(len(data) + 1)
  j = min(len(data), i + which(9))
  return data[:i] + draw(st.binary(max_size=16)) + data[j:]
