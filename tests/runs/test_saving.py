"""Saves that fail or take long: lines, not tracebacks, and nothing is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading

from conftest import core
import jax
import numpy as np
import pytest
from test_checkpoint import mesh, same, state_of  # noqa: F401
import toy

from bond_jax.devices import sharding
from bond_jax.errors import Stopped, UserError
from bond_jax.runs import log, provenance
from bond_jax.runs.checkpoints import checkpoint, checksums, saving

LIMIT = """
import resource, sys
import jax
sys.path[:0] = ['tests', 'tests/runs']
import conftest, test_checkpoint
from bond_jax.devices import sharding
from bond_jax.runs import command, log
from bond_jax.runs.checkpoints import saving

def limit(size):
  resource.setrlimit(
    resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
  )
"""
SAVES = (
  LIMIT
  + """
def main():
  mesh = sharding.make_mesh(data=4, model=2)
  with saving.Saver(folder, 'train', failure, {}) as saver:
    for step in (1, 2, 3):
      state = test_checkpoint.state_of(step, mesh)
      noise = jax.random.normal(jax.random.key(0), (1 << 18,))
      saver.save(step, state._replace(aux=noise), {}, -step, lambda: None)
      saver._wait(60)
      limit((1 << 18) if step == 1 else -1)
      saver.look()
      print('after', step, flush=True)

folder, failure = sys.argv.pop(), sys.argv.pop()
command.execute(main, '')
"""
)
ROWS = (
  LIMIT
  + """
folder = sys.argv[1]
with log.Writer(folder, 'train', 9) as writer:
  for step in range(1, 9):
    if step in (3, 6):
      limit(60 if step == 3 else -1)
    writer.write(step, {'loss': step / 8})
    try:
      writer.sync()
    except OSError as e:
      print('failed', step)
"""
)


def call(code, *args):
  return subprocess.run(
      [sys.executable, '-c', code, *args], cwd=toy.ROOT, text=True,
      capture_output=True, check=False,
  )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize('failure, status', [('stop', 2), ('go_on', 0)])
def test_a_file_that_may_not_grow(tmp_path, failure, status):
  folder = str(tmp_path / 'checkpoints')
  done = call(SAVES, failure, folder)
  assert done.returncode == status, done.stderr
  assert 'Traceback' not in done.stderr
  says = 'train: step 2 could not be saved (File too large)'
  assert says in done.stderr
  assert f'The last good checkpoint is of step 1 in {folder}' in done.stderr
  for step in checksums.steps(folder):
    assert checksums.damage(f'{folder}/{step}') is None
  if failure == 'stop':
    assert done.stdout == 'after 1\n'
    assert os.listdir(folder) == ['1']  # the half one makes room
    assert "'go_on' it would train on" in done.stderr
  else:
    assert done.stdout == 'after 1\nafter 2\nafter 3\n'
    assert sorted(os.listdir(folder)) == ['1', '3']


@pytest.mark.long
def test_rows_that_cannot_be_written_are_written_later(tmp_path):
  done = call(ROWS, str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert 'Traceback' not in done.stderr
  assert done.stdout.split('\n')[0] == 'failed 3'
  assert (
    done.stderr.count('WARNING: cannot write to ') <= 2
  )  # of each file once
  assert 'metrics.jsonl (File too large)' in done.stderr
  rows = log.read_rows(str(tmp_path / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == list(range(1, 9))


@pytest.fixture
def on_tmpfs(tmp_path):
  """run(config flags, how, calls): a train stage on a small file system."""
  if subprocess.run(['unshare', '-Urm', 'true'], check=False).returncode:
    pytest.skip('needs namespaces of users')
  start, end = str(tmp_path / 'start'), str(tmp_path / 'end')
  os.makedirs(start)

  def run(config, how, calls, *flags):
    toy.before('train', start, config)
    toy.light(start, calls, how)
    os.makedirs(workdir := str(tmp_path / 'run'))
    process = subprocess.run(
      ['unshare', '-Urm', 'bash', '-c',
       f'mount -t tmpfs -o size=16m none {workdir} && cp -r {start}/. {workdir}'
       f' && "$@"; status=$?; rm -f {workdir}/ballast; cp -r {workdir} {end};'
       ' exit $status', 'bash', sys.executable, '-m', 'bond_jax.train',
       f'--config={toy.TESTS}/toy.py:{toy.folder()}', f'--workdir={workdir}',
       *flags],
      cwd=toy.ROOT, env={**toy.environment(), 'PYTHONPATH': toy.TESTS},
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Traceback' not in process.stderr, process.stderr
    return process, end

  return run


@pytest.mark.parametrize(
  'how, says',
  core(
    0,
    [
      ('fill', 'No space left on device'),
      ('readonly', 'Read-only file system'),
    ],
  ),
)
def test_a_full_and_a_read_only_disk_stop_the_run(on_tmpfs, how, says):
  config = toy.get_config(toy.folder())
  done, end = on_tmpfs(config, how, 7)  # step 5
  assert done.returncode == 2, done.stderr
  (line,) = [x for x in done.stderr.split('\n') if x.startswith('error: ')]
  assert 'train: step 6 could not be saved (' in line and says in line
  assert 'The last good checkpoint is of step 3 in ' in line
  assert toy.steps(end, 'train') == [3]
  assert checksums.damage(f'{end}/train/checkpoints/3') is None
  assert not os.path.exists(f'{end}/train/summary.json')
  os.remove(f'{end}/fuse0') if how == 'fill' else None
  toy.run('train', config, end)
  toy.same_end(end, toy.finished(), 'train')


@pytest.mark.long
def test_a_disk_that_is_full_for_a_while(on_tmpfs):
  """Rows, too, are those of an undisturbed run."""
  config = toy.get_config(toy.folder())
  config.save_failure, config.train.save_every = 'go_on', 2
  flags = ['--config.save_failure=go_on', '--config.train.save_every=2']
  done, end = on_tmpfs(config, 'fill', 5, *flags)  # steps 3 and 4, and a probe
  assert done.returncode == 0, done.stderr
  assert 'WARNING: train: step 4 could not be saved (' in done.stderr
  assert toy.steps(end, 'train') == [2, 6]
  a, b = (toy.saved(w, 'train', 6) for w in (end, toy.finished()))
  jax.tree.map(np.testing.assert_array_equal, a['params'], b['params'])
  assert [row['step'] for row in toy.rows(end, 'train')] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def slow_store(monkeypatch):
  """A store that takes longer for a checkpoint than a step waits for one.

  It goes on when this event is set, or after its `most` seconds.
  """
  write, go_on = checksums.write, threading.Event()
  go_on.most = 1.5

  def slow(folder):
    go_on.wait(go_on.most)
    write(folder)

  monkeypatch.setattr(checksums, 'write', slow)
  monkeypatch.setattr(saving, 'PATIENCE', 0.1)
  return go_on


def save(saver, step, mesh, **kwargs):  # noqa: F811
  saver.save(step, state_of(step, mesh), {}, step, lambda: None, **kwargs)


def test_a_slow_store_holds_a_step_between_for_a_while_only(
  tmp_path, mesh, slow_store, capsys  # noqa: F811
):  # fmt: skip
  slow_store.most = 30
  with saving.Saver(str(tmp_path), 'train', 'stop', {}) as saver:
    save(saver, 1, mesh)
    save(saver, 2, mesh)
    said = capsys.readouterr().err
    assert 'step 1 is still being written' in said
    assert 'so step 2 is not saved' in said
    slow_store.set()


def test_what_must_be_saved_is_waited_for(tmp_path, mesh, slow_store):  # noqa: F811
  with saving.Saver(str(tmp_path), 'train', 'go_on', {}) as saver:
    save(saver, 1, mesh)
    save(saver, 2, mesh, must=True)
    assert checksums.steps(str(tmp_path)) == [1, 2]  # it does not wait for more
  assert checksums.damage(f'{tmp_path}/2') is None


def test_what_must_be_saved_and_fails_is_an_error(tmp_path, mesh, monkeypatch):  # noqa: F811
  """Whatever save_failure says: else the stage would count as finished."""

  def full(*_):
    raise OSError(28, 'No space left on device')

  with saving.Saver(str(tmp_path), 'train', 'go_on', {}) as saver:
    save(saver, 1, mesh)
    saver.finish()
    saver._failure = 'go_on'
    monkeypatch.setattr(checkpoint, 'save', full)
    save(saver, 2, mesh)  # between: a warning
    with pytest.raises(UserError, match='step 3 could not be saved'):
      save(saver, 3, mesh, must=True)


@pytest.mark.parametrize('stage', core(1, ['train', 'sft', 'reward_model']))
def test_the_last_step_of_a_stage_is_on_a_slow_store(
  stage, tmp_path, slow_store
):
  """Every step saves, so that the store is busy when the last one is due."""
  config = toy.get_config(toy.folder())
  config.train.save_every = config.sft.save_every = 1
  if stage == 'reward_model':
    config = learned(config)
  if stage == 'train':
    toy.before('train', str(tmp_path), config)
  elif stage == 'reward_model':
    shutil.copy(os.path.join(toy.finished(), 'tokenizer.model'), tmp_path)
  toy.run(stage, config, str(tmp_path))
  folder = 'reward' if stage == 'reward_model' else stage
  assert toy.steps(str(tmp_path), folder)[-1] == 6
  assert os.path.exists(tmp_path / folder / 'summary.json')


def learned(config):
  """The config with a small transformer as its reward model."""
  with config.unlocked():
    config.reward_model = dict(
      kind='gemma', weights='random', loss='bradley_terry', margin=0.0,
      pool='last', members=1, dropout=0.0, merge_dropout=0.0, min_gap=0.1,
      partners=1, length=16, batch=8, micro_batches=1, steps=6,
      save_every=1,
      optimizer=dict(toy.OPTIMIZER),
    )  # fmt: skip
  return config


@pytest.mark.parametrize('stage', core(1, ['train', 'sft']))
def test_the_step_of_a_stop_is_on_a_slow_store(
  stage, tmp_path, slow_store, monkeypatch
):
  config = toy.get_config(toy.folder())
  config.train.save_every = config.sft.save_every = 1
  if stage == 'train':
    toy.before('train', str(tmp_path), config)
  write = log.Writer.write

  def signals(writer, step, row):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return write(writer, step, row)

  monkeypatch.setattr(log.Writer, 'write', signals)
  with pytest.raises(Stopped) as e:
    toy.run(stage, config, str(tmp_path))
  step = int(re.search(r'after step (\d+), which is saved', str(e.value))[1])
  assert toy.steps(str(tmp_path), stage)[-1] == step


def test_what_changed_is_said_when_a_run_goes_on(tmp_path, mesh, capsys):  # noqa: F811
  before = {'hosts': 2, 'mesh': {'data': 4, 'model': 2}, 'code': 'a'}
  with saving.Saver(str(tmp_path), 'train', 'stop', before) as saver:
    saver.save(1, state_of(1, mesh), {}, 0.5, lambda: None)
  for now, says in (
    (before, ''),
    (
      before | {'hosts': 1, 'mesh': {'data': 8, 'model': 1}},
      'train: changed since it was saved: hosts: 2 -> 1; mesh.data: 4 -> 8;'
      ' mesh.model: 2 -> 1\n',
    ),
  ):
    with saving.Saver(str(tmp_path), 'train', 'stop', now) as saver:
      saver.restore(state_of(9, mesh))
    assert capsys.readouterr().out == f'train: goes on after step 1\n{says}'


def test_the_facts_of_a_run(tmp_path):
  """What a checkpoint says of what made it, and what else it holds."""
  config = toy.get_config(toy.folder())
  found = provenance.of(config, sharding.make_mesh(data=4, model=2))
  assert found['mesh'] == {'data': 4, 'model': 2} and found['hosts'] == 1
  assert found['versions']['jax'] == jax.__version__
  assert found['dtype']['model'] == 'float32'
  other = toy.get_config(toy.folder())
  other.train.batch = 16
  changed = provenance.of(other, sharding.make_mesh(data=4, model=2))
  assert {k for k in found if found[k] != changed[k]} == {'config'}
  saved = toy.saved(toy.finished(), 'train', 6)
  assert set(saved['rest']) == {'step', 'params', 'anchor', 'opt_state', 'aux'}
  assert saved['data'] and saved['params']
  path = os.path.join(toy.finished(), 'train', 'checkpoints', '6')
  assert {'facts', 'metrics', 'data', 'rest', 'params'} < set(os.listdir(path))


def test_half_written_ones_of_before_are_no_steps(tmp_path, mesh):  # noqa: F811
  with saving.Saver(str(tmp_path), 'train', 'stop', {}) as saver:
    saver.save(1, state_of(1, mesh), {}, 0.5, lambda: None)
  shutil.copytree(tmp_path / '1', tmp_path / '2.orbax-checkpoint-tmp')
  with saving.Saver(str(tmp_path), 'train', 'stop', {}) as saver:
    assert saver.start == 1
    saver.save(2, state_of(2, mesh), {}, 0.6, lambda: None)
  with saving.Saver(str(tmp_path), 'train', 'stop', {}) as saver:
    state, _ = saver.restore(state_of(9, mesh))
  same(state, state_of(2, mesh))
