"""What every command shares: flags, configs, and errors that fit one line."""

from __future__ import annotations

from collections.abc import Callable
import importlib
import json
import os
import re
import sys
from typing import Any

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

import bond_jax
from bond_jax import fields, hosts, paths
from bond_jax.errors import one_line, Stopped, UserError

VERSION = 'version.json'  # of the package that made a run, and where
_RESTORE = 'it was cut or changed: restore it, or move it away'


def load(reference: str) -> Callable[..., Any]:
  """Returns the function `module:function`; a UserError if it is not there."""
  module, _, name = reference.partition(':')
  if not module or not name:
    raise UserError(
      f'{reference!r} names no function; write it as "module:function", for'
      ' instance "bond_jax.rewards.ridge:ridge".'
    )
  try:
    loaded = importlib.import_module(module)
  except ModuleNotFoundError as e:
    raise UserError(
      f'{reference!r}: cannot import {e.name!r}; is it installed, and is the'
      ' folder that holds it on PYTHONPATH?'
    ) from e
  except Exception as e:
    raise UserError(
      f'{reference!r}: importing it raised {type(e).__name__}: {one_line(e)};'
      ' --debug shows where.'
    ) from e
  if not callable(getattr(loaded, name, None)):
    raise UserError(f'{reference!r}: {module!r} has no function {name!r}.')
  return getattr(loaded, name)


def checkpoint_flag() -> flags.Flag:
  """--checkpoint, for the commands that read one, imported beside another."""
  if 'checkpoint' not in flags.FLAGS:
    flags.DEFINE_string(
      'checkpoint', 'last', 'Which: "last", "best" or the number of a step.'
    )
  return flags.FLAGS['checkpoint']


def debugging() -> bool:
  """Whether this is a command that was given --debug."""
  return 'debug' in flags.FLAGS and bool(flags.FLAGS['debug'].value)


def differences(a: dict[str, Any], b: dict[str, Any], prefix='') -> list[str]:
  """Lists the leaves in which nested dicts differ, as `path: old -> new`."""
  rows = []
  for key in sorted(set(a) | set(b)):
    old, new = a.get(key, '(absent)'), b.get(key, '(absent)')
    if isinstance(old, dict) and isinstance(new, dict):
      rows += differences(old, new, f'{prefix}{key}.')
    elif old != new:
      rows.append(f'{prefix}{key}: {old!r} -> {new!r}')
  return rows


def agree(facts: dict[str, Any]) -> None:
  """A UserError, on all hosts, unless nested `facts` are the same on all."""
  told = hosts.gather(facts)
  others = [i for i, theirs in enumerate(told) if theirs != told[0]]
  if others:
    rows = differences(told[0], told[others[0]])
    more = f' and {len(rows) - 3} more' if len(rows) > 3 else ''
    raise hosts.Disagreement(
      f'{hosts.names(others)} and host 0 do not run the same'
      f' ({"; ".join(rows[:3])}{more}). Start the same command, from the same'
      ' code, on all hosts.'
    )


def check_workdir(workdir: str, config: ml_collections.ConfigDict) -> bool:
  """True if `workdir` is this config's, False if nobody's; else a UserError."""
  path = os.path.join(workdir, 'config.json')
  if not os.path.exists(path):
    return False
  check_version(workdir)
  rows = differences(read_json(path), json.loads(config.to_json_best_effort()))
  # How a run is evaluated may change: it does not change what was trained.
  if rows := [row for row in rows if not row.startswith('evaluate.')]:
    raise UserError(
      f'{workdir} belongs to another config ({"; ".join(rows)}). Nothing'
      ' was changed; give another --workdir, or the first config again.'
    )
  return True


def claim_workdir(workdir: str, config: ml_collections.ConfigDict) -> None:
  """Makes `workdir` belong to `config`; a UserError if it has another owner.

  The settings of its evaluation are then those of `config`.
  """
  workdir = paths.expanded(workdir)
  path = os.path.join(workdir, 'config.json')
  settings = json.loads(config.to_json_best_effort())
  owned = check_workdir(workdir, config)
  if owned and read_json(path) == settings:
    return
  try:
    if not owned:
      os.makedirs(workdir, exist_ok=True)
      made_by = {'bond_jax': bond_jax.__version__, 'folder': os.getcwd()}
      write_json(os.path.join(workdir, VERSION), made_by)
    write_json(path, settings)
  except OSError as e:
    raise UserError(
      f'cannot write to --workdir={workdir}: {e.strerror}; give another one.'
    ) from e


def check_version(workdir: str) -> str:
  """The folder that a run was started in, '' if that is not recorded.

  A UserError if a newer version of this package made it.
  """
  path = os.path.join(workdir, VERSION)
  if not os.path.exists(path):
    return ''
  made = {'folder': '', 'bond_jax': None, **read_json(path)}
  theirs, ours = made['bond_jax'], bond_jax.__version__
  number = lambda version: [int(x) for x in re.findall(r'\d{1,9}', version)]
  if not isinstance(theirs, str):
    raise UserError(
      f'{path} names no version of bond_jax; the newest one may read the run'
      ' once that file is moved away.'
    )
  if number(theirs) > number(ours):
    raise UserError(
      f'{workdir} was made by bond_jax {theirs}, and this is {ours}: update it.'
    )
  return str(made['folder'])


def read_config(
  workdir: str, name: str = 'config.json'
) -> ml_collections.ConfigDict:
  """The config that a run was started with; a UserError if there is none."""
  path = os.path.join(workdir, name)
  remedy = (
    '--workdir is the folder of a run, and of a new one --config says what it'
    ' is'
  )
  check_version(workdir)
  raw = read_json(path, remedy)
  try:
    # What was a tuple is a list in JSON, and must be hashable again.
    config = ml_collections.ConfigDict(_tuples(raw)).lock()
    fields.check(config.to_dict())
    return config
  except UserError as e:
    raise UserError(
      f'{path}: {e} It was changed, or another version of bond_jax made it.'
    ) from e
  except (ValueError, TypeError, LookupError, AttributeError) as e:
    raise UserError(
      f'{path} is no config ({one_line(e)}); restore it, or give --config.'
    ) from e


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def write_json(path: str, value: Any) -> None:
  """Writes JSON whole or not at all: to a temporary name, then renamed."""
  temporary = path + '.tmp'
  with open(temporary, 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=2)
    f.write('\n')
    f.flush()
    os.fsync(f.fileno())  # a summary says that a stage is done
  os.replace(temporary, path)


def read_json(path: str, remedy: str = _RESTORE) -> dict[str, Any]:
  """The object in a file of ours; a UserError if it is cut or changed."""
  reason = 'it is not JSON of ours'
  try:
    with open(path, encoding='utf-8') as f:
      value = json.load(f)
    if isinstance(value, dict):
      return value
  except OSError as e:
    reason = e.strerror
  except (ValueError, RecursionError):  # also of bytes that are not UTF-8
    pass
  raise UserError(f'cannot read {path} ({reason}); {remedy}.')


def run(
  main: Callable[[ml_collections.ConfigDict, str], None],
  doc: str,
  *,
  folder: str = 'workdir',
  partial: bool = False,
) -> None:
  """Runs `main(config, folder)` as a command; see `execute`, `run_flags`."""
  given = run_flags(folder, partial)
  execute(lambda: main(*given()), doc)


def run_flags(
  folder: str = 'workdir', partial: bool = False
) -> Callable[[], tuple[ml_collections.ConfigDict, str]]:
  """Defines --config and the folder; returns what gives both, once parsed.

  Without --config it is that of the run in the workdir.

  Args:
    folder: the flag that names it.
    partial: fields of the config without a default may be left unset.
  """
  config_file = config_flags.DEFINE_config_file(
    'config',
    None,
    'A configs/*.py file, with an optional ":argument", or a config.json.',
    lock_config=True,
  )
  flags.FLAGS['config'].parser = _Parser('config')
  path = paths.flag(folder, None, 'The folder of what is written.')
  if folder == 'workdir':
    flags.DEFINE_bool(
      'accept_changes', False, 'Go on although files that a run reads changed.'
    )

  def given():
    if not path.value:
      raise UserError(f'--{folder} is not set; it says where to write.')
    if flags.FLAGS['config'].present:
      config, file = _loaded(config_file, partial)
    elif folder == 'workdir':
      file = os.path.join(path.value, 'config.json')
      config = read_config(path.value)
    else:
      raise UserError('--config is not set; give a configs/*.py file.')
    if file.endswith('.json'):
      _tell(config, file)
      where = os.path.dirname(file) or '.'
      paths.go_to(paths.home(where, check_version(where)))
    return config, path.value

  return given


class _Parser(ConfigFileFlagParser):
  """Of --config: it may be the config.json of a run, too."""

  def parse(self, path):
    path = paths.expanded(path)
    if not path.endswith('.json'):
      return super().parse(path)
    return read_config(os.path.dirname(path) or '.', os.path.basename(path))


_left_behind = False  # a library's thread that may never end


def leave_threads() -> None:
  """Lets the process end although a thread of a library does not."""
  global _left_behind
  _left_behind = True


def _tell(config: ml_collections.ConfigDict, path: str) -> None:
  """Says which code beside ours a run's own config.json lets us call."""
  named = fields.functions(config.to_dict())
  if others := [x for x in named if not x.startswith('bond_jax.')]:
    print(
      f'{path} names {", ".join(map(repr, others))}: code that'
      ' is run; go on only if you trust that folder.',
      file=sys.stderr,
    )


def execute(main: Callable[[], None], doc: str) -> None:
  """Parses the flags and runs `main()`; exits 0 only when it worked.

  A UserError ends with one line on stderr and status 2; `--debug` shows the
  traceback instead. A run that was asked to stop ends with 143 (SIGTERM) or 130
  (Ctrl-C). Where `main` joins other hosts, all of them end so.
  """
  debug = flags.DEFINE_bool('debug', False, 'Show tracebacks of user errors.')

  def body(argv):
    status = run_main(argv)
    if _left_behind:  # Python would wait for it
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
    return status

  def run_main(argv):
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
      print(f'error: unexpected argument {argv[1]!r}', file=sys.stderr)
      return 2
    try:
      with hosts.together(debug.value):
        main()
    except UserError as e:
      if debug.value:
        raise
      print(f'error: {e}', file=sys.stderr)
      return 2
    except Stopped as e:
      print(e, file=sys.stderr)
      return e.status
    except KeyboardInterrupt:
      print('interrupted; the same command takes it up again', file=sys.stderr)
      return 130
    return 0

  app.run(body, flags_parser=lambda args: _parse(args, doc))


def _loaded(
  given: flags.FlagHolder, partial: bool
) -> tuple[ml_collections.ConfigDict, str]:
  """The config, and its file; a UserError if that could not be read."""
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    config = given.value
  except OSError:
    config = None
  if isinstance(config, ml_collections.ConfigDict):
    unset = [] if partial else fields.unset(config.to_dict(), '--config')
    if unset:
      raise UserError(
        f'{", ".join(unset)}: not set. They have no default; {path} says what'
        ' they are.'
      )
    return config, paths.expanded(path)
  raise UserError(f'cannot read --config={path}; give a configs/*.py file.')


def _parse(args: list[str], doc: str) -> list[str]:
  """Parses flags; an unknown key or flag is one line and status 2."""
  sys.modules['__main__'].__doc__ = doc
  try:
    for name in (arg.partition('=')[0] for arg in args[1:]):
      if name.startswith('-') and len(name) > 200:  # absl compares them all
        raise flags.Error(f'Unknown command line flag {name[:40]!r} ...')
    return flags.FLAGS(args)
  except (
    flags.Error,
    AttributeError,
    KeyError,
    OSError,
    SyntaxError,
    TypeError,
    UserError,
    ValueError,
  ) as e:
    said = UserError(_unknown_key(args) or one_line(e))
    print(f'error: {said}', file=sys.stderr)
    sys.exit(2)


def _unknown_key(args: list[str]) -> str | None:
  """Finds the first override of a key that the config does not have."""
  text = '\0'.join(args)
  path = re.search(r'--?config[=\0]([^\0]+)', text)
  if not path and (given := re.search(r'--?(?:no)?config\.[^=\0]+', text)):
    return f'{given[0]} changes a config file; give that too, with --config.'
  try:
    config = flags.FLAGS['config'].parser.parse(path[1]).to_dict()
  except Exception:  # the config itself is the matter
    return None
  for name in re.findall(r'--?(?:no)?config\.([^=\0]+)', text):
    bare = re.sub(r'\[.*?\]', '', name)
    if said := fields.unknown(config, bare.split('.')):
      return f'--config.{name}: {said}'
  return None
