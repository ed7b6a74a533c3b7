"""A fault drill: what is done to runs, and what becomes of them.

    make drill

Short runs of every algorithm on the enumerable language are killed (`kill -9`)
at random moments, every other time while a checkpoint is being written, and
started again, until each has had its share of 200 kills; they must end with the
parameters of a run that nothing disturbed, bit for bit. Then the files of a
newest checkpoint are damaged, 300 times, and read.

Writes summary.json and prints a table: fault, how often, how often it was seen
or did no harm, steps of work lost, the same end or not. Ends with status 1 if a
run was stuck, ended otherwise, or read what was damaged. An hour on two cores;
what is done already is not done again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time

from absl import app, flags, logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from bond_jax.errors import UserError
from bond_jax.runs import files, log, paths, show
from bond_jax.runs.checkpoints import checkpoint, checksums

_OUT = paths.flag('out', None, 'Of the runs.', required=True)
_KILLS = flags.DEFINE_integer('kills', 200, 'Of all runs together.')
_DAMAGES = flags.DEFINE_integer('damages', 300, 'Of a checkpoint.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments and the places.')

# Family -> what is set beside its algorithm.
FAMILIES = {
  'jbond': {},
  'bond': {},
  'bond, learned quantile': {
    'algorithm.args.quantile': 'learned',
    'algorithm.args.anchor': 'periodic:20',
  },
  'best_of_n': {},
  'vbon': {},
  'bonbon': {},
  'wind, iterated': {'train.rollouts': 2, 'train.epochs': 2},
  'sppo': {},
  'rloo': {},
  'tilt': {},
  'qrpo': {},
  'reinforce': {},
  'online_dpo': {},
  'ipo': {},
}  # fmt: skip
SMALL = {
  'train.steps': 120,
  'train.batch': 8,
  'train.save_every': 12,
  'enumerable.prompts': 2,
  'enumerable.vocab': 4,
  'model.sizes.features': 16,
  'model.sizes.layers': 1,
  'model.sizes.heads': 2,
  'model.sizes.kv_heads': 1,
  'model.sizes.head_size': 8,
  'model.sizes.feed_forward': 32,
}
PATIENCE = 600  # seconds without an end: stuck


def start(name: str, workdir: str) -> subprocess.Popen:
  """Starts, or goes on with, the training of a family."""
  algorithm = name.partition(',')[0]
  settings = SMALL | FAMILIES[name]
  cache = os.path.join(os.path.abspath(_OUT.value), 'programs')
  return subprocess.Popen(
    [sys.executable, '-m', 'bond_jax.train', f'--workdir={workdir}',
     f'--config=configs/enumerable.py:algorithm={algorithm}',
     *(f'--config.{key}={value}' for key, value in settings.items())],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache,
         'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'},
  )  # fmt: skip


def finished(workdir: str) -> bool:
  return os.path.exists(os.path.join(workdir, 'train', 'summary.json'))


def step_of(workdir: str) -> int:
  """Steps that metrics.jsonl has told of."""
  path = os.path.join(workdir, 'train', 'metrics.jsonl')
  if not os.path.exists(path):
    return 0
  rows = log.read_rows(path)
  return rows[-1]['step'] if rows else 0


def saving(workdir: str) -> bool:
  """Whether a checkpoint is being written now."""
  folder = os.path.join(workdir, 'train', 'checkpoints')
  try:
    return any('tmp' in name for name in os.listdir(folder))
  except OSError:
    return False


def kill_at(process, workdir: str, moment, seconds: float) -> bool:
  """Kills a run within `seconds`; whether it was still there to be killed.

  'saving' waits for the next checkpoint to be half written.
  """
  until = time.monotonic() + seconds
  if moment == 'saving':
    until += 60
  while time.monotonic() < until and process.poll() is None:
    if moment == 'saving' and saving(workdir):
      break
    time.sleep(0.002)
  alive = process.poll() is None
  process.kill()
  process.wait()
  return alive


def params_of(workdir: str) -> dict[str, np.ndarray]:
  """The parameters, and all else that a finished run has saved last."""
  folder = os.path.join(workdir, 'train', 'checkpoints')
  with checkpoint.manager(folder) as checkpoints:
    return read(checkpoints, checkpoint.choose(checkpoints, 'last'))


def read(checkpoints, step: int) -> dict[str, np.ndarray]:
  """All arrays of a step, and the place in the data."""
  out = checkpoints.restore(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardRestore(),
      rest=ocp.args.StandardRestore(),
      data=ocp.args.JsonRestore(),
    ),
  )
  found = {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(
      {'params': out['params'], 'rest': out['rest']}
    )
  }
  return found | {'data': np.array(json.dumps(out['data'], sort_keys=True))}


def equal(a, b) -> bool:
  return a.keys() == b.keys() and all(
    a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
  )


def drill_family(name: str, kills: int, rng: random.Random) -> dict:
  """Kills runs of a family `kills` times in all, until each is finished."""
  root = os.path.join(_OUT.value, name.replace(', ', '_').replace(' ', '_'))
  path = os.path.join(root, 'summary.json')
  if os.path.exists(path):
    return files.read_json(path)
  shutil.rmtree(root, ignore_errors=True)
  quiet = os.path.join(root, 'undisturbed')
  begun = time.monotonic()
  if status := start(name, quiet).wait(PATIENCE):
    raise SystemExit(f'{quiet}: ended with {status}, undisturbed')
  took = time.monotonic() - begun
  wanted = params_of(quiet)
  told = dict(kills=0, saving=0, runs=0, same=0, stuck=0, lost=[])
  while told['kills'] < kills:
    workdir = os.path.join(root, str(told['runs']))
    told['runs'] += 1
    while not finished(workdir):
      process, before = start(name, workdir), step_of(workdir)
      if told['kills'] < kills:
        moment = 'saving' if rng.random() < 0.5 else 'any'
        if kill_at(process, workdir, moment, rng.random() * took):
          told['kills'] += 1
          told['saving'] += saving(workdir)
          told['lost'].append(max(0, step_of(workdir) - saved(workdir)))
      else:
        try:
          process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
          process.kill()
          told['stuck'] += 1
          break
        if process.returncode and step_of(workdir) == before:
          raise SystemExit(f'{workdir}: ended with {process.returncode}')
    told['same'] += finished(workdir) and equal(params_of(workdir), wanted)
    if told['same'] == told['runs']:
      shutil.rmtree(workdir)  # else it is there to be looked at
  files.write_json(path, told)
  return told


def saved(workdir: str) -> int:
  """The newest step that is whole."""
  folder = os.path.join(workdir, 'train', 'checkpoints')
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def drill_signal(name: str, rng: random.Random, wanted) -> dict:
  """SIGTERM at a random moment after the first save, then to the end."""
  workdir = os.path.join(_OUT.value, 'signals', name.replace(', ', '_'))
  shutil.rmtree(workdir, ignore_errors=True)
  told = dict(status=None, lost=0, same=False)
  process = start(name, workdir)
  while not saved(workdir) and process.poll() is None:
    time.sleep(0.01)
  time.sleep(rng.random() / 2)
  process.terminate()
  told['status'] = process.wait(PATIENCE)
  told['lost'] = step_of(workdir) - saved(workdir)
  while not finished(workdir):
    if start(name, workdir).wait(PATIENCE):
      return told
  told['same'] = equal(params_of(workdir), wanted)
  return told


DAMAGES = ('byte', 'truncated', 'zeros', 'deleted')


def damage(path: str, how: str, rng: random.Random) -> None:
  """Does something to a file."""
  if how == 'deleted':
    os.remove(path)
    return
  with open(path, 'rb') as f:
    content = bytearray(f.read())
  place = rng.randrange(len(content)) if content else 0
  if how == 'truncated' or not content:
    content = content[:place]
  elif how == 'zeros':
    content[place : place + 64] = bytes(len(content[place : place + 64]))
  else:
    content[place] ^= 1 << rng.randrange(8)
  with open(path, 'wb') as f:
    f.write(content)


def drill_damage(source: str, count: int, rng: random.Random) -> dict:
  """Damages a file of the newest checkpoint, `count` times, and reads it."""
  scratch = os.path.join(_OUT.value, 'damaged')
  with checkpoint.manager(source) as checkpoints:
    newest = checkpoint.choose(checkpoints, 'last')
    whole = read(checkpoints, newest)
  told = {how: dict(times=0, seen=0, harmless=0, used=0) for how in DAMAGES}
  for i in range(count):
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    top = os.path.join(scratch, str(newest))
    files = sorted(
      os.path.join(where, name)
      for where, _, names in os.walk(top)
      for name in names
    )
    how = DAMAGES[i % len(DAMAGES)]
    damage(rng.choice(files), how, rng)
    told[how]['times'] += 1
    told[how][outcome(scratch, newest, whole)] += 1
  shutil.rmtree(scratch)
  return told


def outcome(folder: str, newest: int, whole) -> str:
  """'seen', 'harmless' or 'used': what becomes of a damaged checkpoint."""
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      checksums.set_aside(folder)  # what a stage that goes on begins with
  except UserError:
    return 'seen'
  with checkpoint.manager(folder) as checkpoints:
    step = checkpoints.latest_step()
    if step != newest:
      return 'seen'
    return 'harmless' if equal(read(checkpoints, step), whole) else 'used'


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  os.makedirs(_OUT.value, exist_ok=True)
  names = list(FAMILIES)
  table = [('fault', 'times', 'seen or harmless', 'steps lost', 'same end')]
  summary, bad = {}, []
  for i, name in enumerate(names):
    share = _KILLS.value // len(names) + (i < _KILLS.value % len(names))
    told = drill_family(name, share, random.Random(f'{_SEED.value} {name}'))
    summary[f'kill -9, {name}'] = told
    lost = told['lost']
    table.append(
      (f'kill -9, {name}', told['kills'], f'{told["saving"]} in a save',
       f'{np.mean(lost):.1f}, at most {max(lost)}',
       f'{told["same"]} of {told["runs"]}')
    )  # fmt: skip
    if told['same'] != told['runs']:
      bad.append(name)
    print('   '.join(map(str, table[-1])), flush=True)
  for name in names:
    root = name.replace(', ', '_').replace(' ', '_')
    wanted = params_of(os.path.join(_OUT.value, root, 'undisturbed'))
    told = drill_signal(
      name, random.Random(f'{_SEED.value} {name} term'), wanted
    )
    summary[f'SIGTERM, {name}'] = told
    if told['status'] not in (0, 143) or not told['same'] or told['lost']:
      bad.append(f'SIGTERM, {name}')
  terms = [told for key, told in summary.items() if key.startswith('SIGTERM')]
  table.append(
    ('SIGTERM', len(terms), f'{sum(x["status"] == 143 for x in terms)} saved',
     str(max(x['lost'] for x in terms)),
     f'{sum(x["same"] for x in terms)} of {len(terms)}')
  )  # fmt: skip
  source = os.path.join(_OUT.value, 'jbond', 'undisturbed', 'train',
                        'checkpoints')  # fmt: skip
  damages = drill_damage(source, _DAMAGES.value, random.Random(_SEED.value))
  summary['damages'] = damages
  for how, told in damages.items():
    table.append(
      (f'checkpoint: {how}', told['times'],
       f'{told["seen"]} seen, {told["harmless"]} harmless', '', '')
    )  # fmt: skip
    if told['used']:
      bad.append(f'checkpoint: {how}, {told["used"]} used')
  path = os.path.join(_OUT.value, 'summary.json')
  files.write_json(path, summary | {'bad': bad})
  show.table(table, f'drill: done, see {path}')
  if bad:
    raise SystemExit(f'not as it should be: {"; ".join(bad)}')


if __name__ == '__main__':
  app.run(main)
