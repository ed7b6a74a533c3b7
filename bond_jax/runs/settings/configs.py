"""The config of a run, as its folder keeps it."""

import json
import os
import re
from typing import Any
import zlib

import jax
import ml_collections

import bond_jax
from bond_jax.devices import hosts
from bond_jax.errors import one_line, UserError
from bond_jax.runs import files, paths
from bond_jax.runs.settings import defaults

VERSION = 'version.json'  # of the package that made a run, and where
# What saved configs called them before there were rooms.
_TASKS = {'bond_jax.text_task': 'text', 'bond_jax.enumerable': 'enumerable'}


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
  others = [i for i, other in enumerate(told) if other != told[0]]
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
  settings = _plain(json.loads(config.to_json_best_effort()))
  rows = differences(_plain(files.read_json(path)), settings)
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
  settings = _plain(json.loads(config.to_json_best_effort()))
  owned = check_workdir(workdir, config)
  if owned and _plain(files.read_json(path)) == settings:
    return
  try:
    if not owned:
      os.makedirs(workdir, exist_ok=True)
      made_by = {'bond_jax': bond_jax.__version__, 'folder': os.getcwd()}
      files.write_json(os.path.join(workdir, VERSION), made_by)
    files.write_json(path, settings)
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
  made = {'folder': '', 'bond_jax': None, **files.read_json(path)}
  version, ours = made['bond_jax'], bond_jax.__version__
  number = lambda text: [int(x) for x in re.findall(r'\d{1,9}', text)]
  if not isinstance(version, str):
    raise UserError(
      f'{path} names no version of bond_jax; the newest one may read the run'
      ' once that file is moved away.'
    )
  if number(version) > number(ours):
    raise UserError(
      f'{workdir} was made by bond_jax {version}, and this is {ours}: update'
      ' it.'
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
  raw = _plain(files.read_json(path, remedy))
  try:
    # What was a tuple is a list in JSON, and must be hashable again.
    config = ml_collections.ConfigDict(_tuples(raw)).lock()
    defaults.check(config.to_dict())
    return config
  except UserError as e:
    raise UserError(
      f'{path}: {e} It was changed, or another version of bond_jax made it.'
    ) from e
  except (ValueError, TypeError, LookupError, AttributeError) as e:
    raise UserError(
      f'{path} is no config ({one_line(e)}); restore it, or give --config.'
    ) from e


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
  """What a config.json has, in the words and with the settings of today."""
  if isinstance(name := settings.get('task'), str):
    settings['task'] = _TASKS.get(name, name)
  return json.loads(json.dumps(defaults.filled(settings)))


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def key(seed: int, stream: str) -> jax.Array:
  """The random key of one purpose: no two streams or seeds share draws."""
  return jax.random.fold_in(
    jax.random.key(seed), zlib.crc32(stream.encode('utf-8'))
  )


def reference_dir(config: ml_collections.ConfigDict, workdir: str) -> str:
  """The run whose sft and reward stages this one starts from."""
  path = config.reference.replace('{workdir}', workdir)
  return os.path.normpath(paths.expanded(path))


def of_reward_model(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """The run's, with what the section `reward_model` has in its place."""
  mine, settings = config.copy_and_resolve_references(), config.reward_model
  with mine.unlocked():
    for name in ('data', 'model', 'tokenizer', 'prompt'):
      if name in settings:
        mine[name].update(settings[name])
    mine.weights = settings.weights
  return mine
