"""What a checkpoint was made by: compared when a run goes on from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import glob
import hashlib
import json
import os
import re
from typing import Any

from jax.sharding import Mesh
import ml_collections

import bond_jax
from bond_jax.devices import hosts
from bond_jax.runs import configs, environment, fingerprints

# Which splits a stage reads, and which parts of the run that it starts from.
_SPLITS = dict(sft=('train', 'validation'), train=('train', 'validation'),
               reward=('train', 'validation', 'test'), evaluate=('test',),
               sample=())  # fmt: skip
_PARTS = dict(sft=(), reward=('sft',), train=('sft', 'reward'),
              evaluate=('sft', 'reward'), sample=('sft',))  # fmt: skip
_OF_RUN = dict(sft=('checkpoints/*/sha256.json',),
               reward=('checkpoints/*/sha256.json', 'model.*',
                       'tokenizer.model'))  # fmt: skip
# What a policy stands on: another one would make it another model.
_UNDER = ('weights', 'tokenizer', 'model.', 'reference sft',
          'reference tokenizer')  # fmt: skip


def of(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """Facts that may change results, in their last bits or more; JSON."""
  code = fingerprints.of_code(os.path.dirname(bond_jax.__file__))
  settings = json.loads(config.to_json_best_effort())
  settings.pop('evaluate', None)  # it may change, and trains nothing
  return environment.record() | {
    'config': _sha(settings),
    'code': _sha(code),
    'mesh': dict(mesh.shape),
    'hosts': hosts.count(),
    'device': mesh.devices.flat[0].device_kind,
    'dtype': {'model': config.model.dtype},
  }


def _sha(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[
    :12
  ]


def inputs(
  config: ml_collections.ConfigDict, workdir: str, stage: str
) -> dict[str, str]:
  """A fingerprint of all that a stage reads by a path, by the config's key.

  Data, weights, adapters, vocabulary, the run that it starts from; in train and
  evaluate also the modules of the rewards, and what their arguments name. What
  is not on this machine is left out.
  """
  flat = dict(_texts(json.loads(config.to_json_best_effort())))
  start = configs.reference_dir(config, workdir)
  found: dict[str, str | None] = {}
  for key, value in flat.items():
    if re.fullmatch(r'data\.(mix\.[^.]+\.)?name', key):
      for path in _data(key, flat, _SPLITS[stage]):
        found[f'{key} {path}'] = fingerprints.of_path(path)
    elif key in ('weights', 'tokenizer.path', 'model.lora.weights'):
      if value in ('sft', 'random'):  # of a reward model: no path
        continue
      path = os.path.expanduser(value)
      found[f'{key} {value}'] = fingerprints.of_path(path)
    elif stage not in ('train', 'evaluate'):
      continue
    elif re.fullmatch(r'(reward|gold)\.(parts\.[^.]+\.)?function', key):
      found |= _modules(key, value)
    elif re.fullmatch(r'(reward|gold)\.(parts\.[^.]+\.)?args\..+', key):
      path = value.replace('{reference}', start).replace('{workdir}', workdir)
      path = os.path.expanduser(path)
      found[f'{key} {value}'] = fingerprints.of_path(path, deep=False)
      if re.fullmatch(r'[\w.]+:\w+', value):  # a function that another calls
        found |= _modules(key, value)
  found['reference tokenizer'] = _of_run(start, ('tokenizer.model',))
  for part in _PARTS[stage]:
    if stage == 'reward' and config.weights != 'sft':
      continue
    found[f'reference {part}'] = _of_run(f'{start}/{part}', _OF_RUN[part])
  return {key: value for key, value in found.items() if value}


def _texts(value: Any, key: str = '') -> Iterator[tuple[str, str]]:
  """Every text in nested tables, by its path."""
  if isinstance(value, str):
    yield key, value
  items = value.items() if isinstance(value, Mapping) else ()
  for name, inner in items:
    yield from _texts(inner, f'{key}.{name}' if key else name)


def _modules(key: str, function: str) -> dict[str, str]:
  """Those of the module of 'module:function', and of its own imports.

  Our own are among the facts: another version of them is said, not refused.
  """
  if function.startswith('bond_jax.'):
    return {}
  modules = fingerprints.of_modules(function.partition(':')[0])
  return {f'{key} module {name}': x for name, x in modules.items()}


def _data(key: str, flat: Mapping[str, str], splits) -> list[str]:
  """The files, or the folder, that a name of data means for these splits."""
  above, found = key.rpartition('.')[0], []
  for split in splits:
    theirs = flat.get(f'{above}.splits.{split}', split).partition('[')[0]
    name = flat[key].removeprefix('hf:').replace('{split}', theirs)
    path = os.path.expanduser(name)
    prepared = os.path.join(os.path.expanduser(flat['data.data_dir']), name)
    found += glob.glob(path) or [path if os.path.exists(path) else prepared]
  return sorted(set(found))


def _of_run(folder: str, patterns) -> str | None:
  """The fingerprint of what a run has left in a folder; None of nothing."""
  paths = [p for x in patterns for p in glob.glob(os.path.join(folder, x))]
  return fingerprints.of_files(paths, folder) if paths else None


def of_evaluation(
  config: ml_collections.ConfigDict, workdir: str, step: int, against: str
) -> dict[str, str]:
  """All that the rows of an evaluation depend on, as `inputs`."""
  found = inputs(config, workdir, 'evaluate')
  for name, value in config.evaluate.items():
    if name != 'samples_shown':
      found[f'evaluate.{name}'] = str(value)
  sums = f'checkpoints/{step}/sha256.json'
  found['policy'] = str(_of_run(os.path.join(workdir, 'train'), (sums,)))
  if against != 'reference':
    where = os.path.join(against, 'train')
    found['against'] = str(_of_run(where, ('checkpoints/*/sha256.json',)))
  return found


def check_start(
  config: ml_collections.ConfigDict,
  workdir: str,
  made: Mapping[str, Any],
  alone: bool,
) -> None:
  """Refuses a policy whose base, reference or vocabulary has changed since.

  Args:
    config: of the run.
    workdir: of the run.
    made: the facts that the policy's checkpoint was saved with.
    alone: it is used without its reference, which may have changed then, as may
      the weights that it started from, unless it is an adapter of them. Else a
      line says which rewards and data have changed.
  """
  if not (before := made.get('inputs')):
    return
  now = hosts.once(lambda: inputs(config, workdir, 'train'))
  whole = alone and not config.model.lora.rank
  kinds = ('tokenizer', 'reference tokenizer') if whole else _UNDER
  pick = lambda some, yes: {
    k: x for k, x in some.items() if k.startswith(kinds) == yes
  }
  lines = fingerprints.changed(pick(before, True), pick(now, True))
  fingerprints.accept(f'the policy of {workdir}', lines)
  lines = fingerprints.changed(pick(before, False), pick(now, False))
  if lines and not alone:
    hosts.say(f'changed since {workdir} was trained: {"; ".join(lines[:5])}')
