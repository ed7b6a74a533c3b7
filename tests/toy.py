"""The smallest run that has everything: data, a model, a config, a reward.

Also a config file: `--config=tests/toy.py:FOLDER`, FOLDER being where
`write_data` has written.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from bond_jax.devices import hosts
from bond_jax.models.gemma import model as gemma
from bond_jax.rewards.ridge import ridge
from bond_jax.types import Context

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
# The folder of the workers of one test run; see conftest.py.
shared: str | None = None
STAGES = ('sft', 'reward_model', 'train', 'evaluate')

MODEL = gemma.Config(
    vocab_size=96, features=16, layers=2, heads=2, kv_heads=1, head_size=8,
    feed_forward=32, pattern=('local', 'global'), window=4, qk_norm=True,
    post_norms=True, gating_transposed=True,
)  # fmt: skip

OPTIMIZER = dict(
    learning_rate=1e-2, warmup_steps=4, decay_to=0.1, b1=0.9, b2=0.99,
    epsilon=1e-8, weight_decay=0.0, clip=1.0,
)  # fmt: skip

SUBJECTS = 'the film a story this plot some scene one actor every joke no song'
VERBS = 'is was seems feels looks stays'
PRAISE, BLAME = (
  'good great warm fine bright rich',
  'bad dull cold poor weak thin',
)


def write_data(folder: str) -> None:
  """Writes train, validation and test.jsonl; praise makes ratings high."""
  rng = np.random.default_rng(0)
  draw = lambda words: str(rng.choice(words.split()))
  for split, count in (('train', 300), ('validation', 60), ('test', 60)):
    with open(os.path.join(folder, f'{split}.jsonl'), 'w') as f:
      for _ in range(count):
        good = rng.random(2) < 0.5
        clauses = [
          f'{draw(SUBJECTS)} {draw(VERBS)} {draw(PRAISE if g else BLAME)}'
          for g in good
        ]
        rating = float(good.sum() - 1 + rng.normal() / 4)
        row = {'text': ' and '.join(clauses), 'rating': rating}
        f.write(json.dumps(row) + '\n')


def get_config(folder: str) -> ml_collections.ConfigDict:
  """The demo's config at the size of a test; saves at step 3 and step 6."""
  path = os.path.join(ROOT, 'configs', 'demo.py')
  spec = importlib.util.spec_from_file_location('demo', path)
  demo = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(demo)
  config = demo.get_config()
  gemma.CONFIGS['toy'] = MODEL
  config.mesh.data = 1
  config.data.name = os.path.join(folder, '{split}.jsonl')
  config.model.name = 'toy'
  config.tokenizer.vocab_size = 96
  config.prompt.length, config.length, config.chunk = 3, 6, 48
  config.sft.update(
    dict(steps=6, batch=8, length=8, save_every=3, validation_batches=1)
  )
  config.train.update(
    dict(steps=6, batch=8, save_every=3, probe_prompts=8, probe_completions=2)
  )
  config.sft.optimizer.update(OPTIMIZER)
  config.train.optimizer.update(OPTIMIZER)
  config.algorithm.args.update(
    dict(backward_weight=0.5, anchor_rate=0.05, drift_weight=0.5)
  )
  config.reward_model.update(dict(order=2, min_count=2, alphas=(0.3, 1.0)))
  config.evaluate.update(
      dict(prompts=16, policy_completions=4, reference_completions=8,
           at_once=4, samples_shown=5)
  )  # fmt: skip
  config.reward.function = 'toy:reward'
  config.reward.args.fuse = '{workdir}/fuse'
  return config


def reward(path: str, fuse: str):
  """The ridge reward, and a fuse for each host; see `light`."""
  rating = ridge(path)

  def toy_reward(prompts, completions, context):
    if os.path.exists(f'{fuse}{hosts.index()}'):
      _burn(f'{fuse}{hosts.index()}')
    return rating(prompts, completions, context)

  return toy_reward


def context(completions, rows=None, turns=False) -> Context:
  """Of texts that nobody drew: a token per character, none cut."""
  return Context(
    rows=[{} for _ in completions] if rows is None else rows,
    tokens=[[list(y.encode()) for y in ys] for ys in completions],
    finished=np.ones((len(completions), len(completions[0])), bool),
    turns=turns,
  )


def light(workdir: str, calls: int, how: str, host: int = 0) -> None:
  """Lets something happen at a reward's call number `calls` on one host.

  'raise', 'kill' (-9), 'term' (SIGTERM), 'fill' the file system, and free it
  three calls later, make checkpoints 'readonly', or 'forget' all compiled
  programs. The first call is of the probe's reference; each step calls once,
  and each save once more.
  """
  with open(os.path.join(workdir, f'fuse{host}'), 'w') as f:
    f.write(f'{calls} {how}')


def _burn(fuse: str) -> None:
  with open(fuse) as f:
    calls, how = f.read().split()
  if int(calls) > 1:
    with open(fuse, 'w') as f:
      f.write(f'{int(calls) - 1} {how}')
    return
  os.remove(fuse)
  if how == 'raise':
    raise RuntimeError('the fuse has burnt down')
  if how == 'forget':
    jax.clear_caches()
    return
  if how == 'term':
    os.kill(os.getpid(), signal.SIGTERM)
    return
  workdir = os.path.dirname(fuse)
  ballast = os.path.join(workdir, 'ballast')
  while how in ('fill', 'readonly', 'kill') and not steps(workdir, 'train'):
    time.sleep(0.01)  # else a fast machine is before the first save is whole
  if how == 'fill':
    light(workdir, 3, 'free')
    with contextlib.suppress(OSError), open(ballast, 'wb', 0) as f:
      while f.write(b'x' * 512):
        pass
    return
  if how == 'free':
    os.remove(ballast)
    return
  if how == 'readonly':
    there = os.path.join(workdir, 'train', 'checkpoints')
    for flags in ('--bind', there), ('-o', 'remount,ro,bind'):
      subprocess.run(['mount', *flags, there], check=True)
    return
  os.kill(os.getpid(), signal.SIGKILL)


# Of a command, where the code of a stage is.
MODULES = {
  'sft': 'training.sft',
  'reward_model': 'reward_models.stage',
  'train': 'training.distil',
  'evaluate': 'evaluation.evaluate',
}


def main_of(stage: str):
  """main(config, workdir) of a stage."""
  return importlib.import_module(f'bond_jax.{MODULES[stage]}').main


def run(stage: str, config, workdir: str) -> None:
  """Runs a stage in this process."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  main_of(stage)(config, workdir)


def environment() -> dict[str, str]:
  """Of a subprocess that compiles as this one does, into the same cache."""
  quick = jax.config.values['jax_disable_most_optimizations']
  return {
    **os.environ,
    'JAX_DISABLE_MOST_OPTIMIZATIONS': str(quick),
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def command(stage: str, *args: str) -> subprocess.Popen:
  """Starts a stage as its users do, on 8 devices, with pipes for its output."""
  return subprocess.Popen(
    [sys.executable, '-m', f'bond_jax.{stage}', *args],
    cwd=ROOT,
    env={**environment(), 'PYTHONPATH': TESTS, 'JAX_NUM_CPU_DEVICES': '8'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@contextlib.contextmanager
def _once(path: str):
  """Yields whether what makes `path` is still to do; one worker at a time."""
  with open(f'{path}.lock', 'w') as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    done = f'{path}.done'
    yield not os.path.exists(done)
    with open(done, 'w'):
      pass


@functools.cache
def folder() -> str:
  """A folder with the data in it, the same for all workers of a test run."""
  path = shared
  if path is None:
    path = tempfile.mkdtemp(prefix='toy')
    atexit.register(shutil.rmtree, path, ignore_errors=True)
  os.makedirs(path, exist_ok=True)
  with _once(f'{path}/data') as missing:
    if missing:
      write_data(path)
  return path


@functools.cache
def finished() -> str:
  """A workdir in which all four stages have run: copy it, do not change it."""
  workdir = os.path.join(folder(), 'finished')
  with _once(workdir) as missing:
    if missing:
      for stage in STAGES:
        run(stage, get_config(folder()), workdir)
  return workdir


def before(stage: str, workdir: str, config=None) -> str:
  """Fills `workdir` with what `finished` held just before a stage ran."""
  parts = {'train': ('sft', 'reward'), 'evaluate': ('sft', 'reward', 'train')}
  for part in parts[stage]:
    shutil.copytree(os.path.join(finished(), part), f'{workdir}/{part}')
  shutil.copy(os.path.join(finished(), 'tokenizer.model'), workdir)
  config = config or get_config(folder())
  with open(os.path.join(workdir, 'config.json'), 'w') as f:
    f.write(config.to_json_best_effort())
  return str(workdir)


def steps(workdir: str, stage: str) -> list[int]:
  """The steps of which there is a whole checkpoint."""
  path = os.path.join(workdir, stage, 'checkpoints')
  names = os.listdir(path) if os.path.isdir(path) else []
  return sorted(int(name) for name in names if name.isdigit())


def saved(workdir: str, stage: str, step: int):
  """All that a checkpoint holds, as numpy arrays and JSON."""
  path = os.path.join(os.path.abspath(workdir), stage, 'checkpoints')
  with ocp.CheckpointManager(path) as manager:
    out = manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(),
        rest=ocp.args.StandardRestore(),
        data=ocp.args.JsonRestore(),
      ),
    )
  return jax.device_get(dict(out.items()))


def same_end(workdir: str, other: str, stage: str, step: int = 6) -> None:
  """Asserts that a stage left bit for bit the same in two workdirs."""
  a, b = (saved(w, stage, step) for w in (workdir, other))
  assert a['rest']['step'] == step
  assert a['data'] == b['data']
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert rows(workdir, stage) == rows(other, stage)
  assert steps(workdir, stage) == steps(other, stage)
  assert summary(workdir, stage) == summary(other, stage)


def rows(workdir: str, stage: str) -> list[dict]:
  """The rows of metrics.jsonl, without the times."""
  with open(os.path.join(workdir, stage, 'metrics.jsonl')) as f:
    found = [json.loads(line) for line in f]
  return [
    {k: v for k, v in row.items() if not k.startswith('seconds/')}
    for row in found
  ]


def summary(*path: str) -> dict:
  """A summary.json, without the times."""
  with open(os.path.join(*path, 'summary.json')) as f:
    found = json.load(f)
  times = 'seconds', 'tokens_per_second', 'phase_seconds'
  return {k: v for k, v in found.items() if k not in times}


def listing(path: str) -> dict[str, bytes]:
  """Every file below a folder, and its content."""
  found = {}
  for where, _, names in os.walk(path):
    for name in names:
      with open(os.path.join(where, name), 'rb') as f:
        found[os.path.relpath(f.name, path)] = f.read()
  return found
