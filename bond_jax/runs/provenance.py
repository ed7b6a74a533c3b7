"""What a checkpoint was made by: compared when a run goes on from it."""

from collections.abc import Mapping
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
from bond_jax.runs import environment, fingerprints
from bond_jax.runs.settings import configs, fields

# Stage -> the splits that it reads, and the parts of the run it starts from.
_READS = {
  'sft': (('train', 'validation'), ()),
  'reward': (('train', 'validation', 'test'), ('sft',)),
  'train': (('train', 'validation'), ('sft', 'reward')),
  'evaluate': (('test',), ('sft', 'reward')),
}
_OF_RUN = {
  'sft': ('checkpoints/*/sha256.json',),
  'reward': ('checkpoints/*/sha256.json', 'model.*', 'tokenizer.model'),
}
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
  text = json.dumps(value, sort_keys=True).encode()
  return hashlib.sha256(text).hexdigest()[:12]


def inputs(
  config: ml_collections.ConfigDict, workdir: str, stage: str
) -> dict[str, str]:
  """Fingerprints all that a stage reads by a path, by the config's key.

  Data, weights, adapters, vocabulary, the run that it starts from; in train and
  evaluate also the teacher, the modules of the rewards, and the files in their
  arguments.
  What is not on this machine is left out.
  """
  flat = fields.leaves(json.loads(config.to_json_best_effort()))
  flat = {key: value for key, value in flat.items() if isinstance(value, str)}
  start = configs.reference_dir(config, workdir)
  splits, parts = _READS[stage]
  found: dict[str, str | None] = {}
  for key, value in flat.items():
    path = value.replace('{reference}', start).replace('{workdir}', workdir)
    path = os.path.expanduser(path)
    if re.fullmatch(r'data\.(mix\.[^.]+\.)?name', key):
      for name in _data(key, flat, splits):
        found[f'{key} {name}'] = fingerprints.of_path(name)
    elif key == 'data.stored':
      if value and stage == 'train':
        for name in _data(key, flat, ('train',)):
          found[f'{key} {name}'] = fingerprints.of_path(name)
    elif key in ('weights', 'tokenizer.path', 'model.lora.weights'):
      if value not in ('sft', 'random'):  # of a reward model
        found[f'{key} {value}'] = fingerprints.of_path(path)
    elif stage not in ('train', 'evaluate'):
      continue
    elif key == 'teacher' and value:
      found[f'{key} {value}'] = fingerprints.of_path(path)
    elif re.fullmatch(r'(reward|gold)\.(parts\.[^.]+\.)?function', key):
      found |= _modules(key, value)
    elif re.fullmatch(r'(reward|gold)\.(parts\.[^.]+\.)?args\..+', key):
      found[f'{key} {value}'] = fingerprints.of_path(path, deep=False)
      if re.fullmatch(r'[\w.]+:\w+', value):  # a function that another calls
        found |= _modules(key, value)
  found['reference tokenizer'] = _of_run(start, ('tokenizer.model',))
  for part in parts:
    if stage != 'reward' or config.weights == 'sft':
      found[f'reference {part}'] = _of_run(f'{start}/{part}', _OF_RUN[part])
  return {key: value for key, value in found.items() if value}


def _modules(key: str, function: str) -> dict[str, str]:
  """Fingerprints the module of 'module:function' and its own imports.

  This package's code is among the facts: a change of it is only reported.
  """
  if function.startswith('bond_jax.'):
    return {}
  modules = fingerprints.of_modules(function.partition(':')[0])
  return {f'{key} module {name}': x for name, x in modules.items()}


def _data(key: str, flat: Mapping[str, str], splits) -> list[str]:
  """The files, or the folder, that a name of data means for these splits."""
  section, found = key.rpartition('.')[0], []
  for split in splits:
    named = flat.get(f'{section}.splits.{split}', split).partition('[')[0]
    name = flat[key].removeprefix('hf:').replace('{split}', named)
    path = os.path.expanduser(name)
    prepared = os.path.join(os.path.expanduser(flat['data.data_dir']), name)
    found += glob.glob(path) or [path if os.path.exists(path) else prepared]
  return sorted(set(found))


def _of_run(folder: str, patterns) -> str | None:
  """Fingerprints what a run has left in a folder; None if it left nothing."""
  paths = [p for x in patterns for p in glob.glob(os.path.join(folder, x))]
  return fingerprints.of_files(paths, folder) if paths else None


def of_evaluation(
  config: ml_collections.ConfigDict,
  workdir: str,
  step: int,
  against: str,
  factor: float = 1.0,
) -> dict[str, str]:
  """Fingerprints all that the rows of an evaluation depend on."""
  found = inputs(config, workdir, 'evaluate')
  for name, value in config.evaluate.items():
    if name != 'samples_shown' and (value or name != 'minutes'):
      found[f'evaluate.{name}'] = str(value)
  sums = f'checkpoints/{step}/sha256.json'
  found['policy'] = str(_of_run(os.path.join(workdir, 'train'), (sums,)))
  if factor != 1:
    found['factor'] = str(factor)
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

  `made` are the facts that its checkpoint was saved with. One that is used
  `alone`, without its reference, may have another now, and other weights that
  it started from, unless it is an adapter of them. Of one that is not a line
  says which rewards and data have changed.
  """
  if not (before := made.get('inputs')):
    return
  now = hosts.once(lambda: inputs(config, workdir, 'train'))
  whole = alone and not config.model.lora.rank
  kinds = ('tokenizer', 'reference tokenizer') if whole else _UNDER
  if not alone:
    kinds += ('teacher',)
  lines = fingerprints.changed(before, now)
  under = [line for line in lines if line.startswith(kinds)]
  fingerprints.accept(f'the policy of {workdir}', under)
  lines = [line for line in lines if line not in under]
  if lines and not alone:
    hosts.say(f'changed since {workdir} was trained: {"; ".join(lines[:5])}')
