"""What every command shares: flags, configs, and errors that fit one line."""

from __future__ import annotations

from collections.abc import Callable
import importlib
import json
import os
import sys
from typing import Any

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from bond_jax.errors import UserError


def load(reference: str) -> Callable[..., Any]:
  """Returns the function named `module:function`; a UserError if it is not there."""
  module, _, name = reference.partition(':')
  if not module or not name:
    raise UserError(
      f'{reference!r} names no function; write it as "module:function", for'
      ' instance "bond_jax.rewards:ridge".'
    )
  try:
    return getattr(importlib.import_module(module), name)
  except ModuleNotFoundError as e:
    raise UserError(
      f'{reference!r}: cannot import {e.name!r}; is it installed, and is the'
      ' folder that holds it on PYTHONPATH?'
    ) from e
  except AttributeError as e:
    raise UserError(f'{reference!r}: module {module!r} has no {name!r}.') from e


def differences(a: dict[str, Any], b: dict[str, Any], prefix='') -> list[str]:
  """Lists the leaves in which two nested dicts differ, as `path: old -> new`."""
  rows = []
  for key in sorted(set(a) | set(b)):
    old, new = a.get(key, '(absent)'), b.get(key, '(absent)')
    if isinstance(old, dict) and isinstance(new, dict):
      rows += differences(old, new, f'{prefix}{key}.')
    elif old != new:
      rows.append(f'{prefix}{key}: {old!r} -> {new!r}')
  return rows


def claim_workdir(workdir: str, config: ml_collections.ConfigDict) -> None:
  """Makes `workdir` belong to `config`, or refuses when it has another owner."""
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, 'config.json')
  mine = json.loads(config.to_json_best_effort())
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      rows = differences(json.load(f), mine)
    if rows:
      raise UserError(
        f'{workdir} belongs to another config ({"; ".join(rows)}). Nothing'
        ' was changed; give another --workdir, or the first config again.'
      )
    return
  write_json(path, mine)


def write_json(path: str, value: Any) -> None:
  """Writes JSON whole or not at all: to a temporary name, then renamed."""
  temporary = path + '.tmp'
  with open(temporary, 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=2)
    f.write('\n')
  os.replace(temporary, path)


def read_json(path: str) -> Any:
  with open(path, encoding='utf-8') as f:
    return json.load(f)


def run(
  main: Callable[[ml_collections.ConfigDict, str], None], doc: str
) -> None:
  """Runs `main(config, workdir)` as a command; exits 0 only when it worked.

  A UserError ends with one line on stderr and status 2; `--debug` shows the
  traceback instead.
  """
  config_file = config_flags.DEFINE_config_file(
    'config',
    None,
    'A configs/*.py file, with an optional ":argument".',
    lock_config=True,
  )
  workdir = flags.DEFINE_string('workdir', None, 'The folder of this run.')
  debug = flags.DEFINE_bool('debug', False, 'Show tracebacks of user errors.')
  flags.mark_flags_as_required(['config', 'workdir'])

  def body(argv):
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
      print(f'error: unexpected argument {argv[1]!r}', file=sys.stderr)
      return 2
    try:
      main(config_file.value, os.path.normpath(workdir.value))
    except UserError as e:
      if debug.value:
        raise
      print(f'error: {e}', file=sys.stderr)
      return 2
    return 0

  app.run(body, flags_parser=lambda args: _parse(args, doc))


def _parse(args: list[str], doc: str) -> list[str]:
  """Parses flags; an unknown key or flag is one line and status 2."""
  sys.modules['__main__'].__doc__ = doc
  try:
    return flags.FLAGS(args)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    print('error: ' + ' '.join(str(e).split()), file=sys.stderr)
    sys.exit(2)
