"""Damaged checkpoints: found, named, set aside, and the one before is used."""

import os
import shutil
import subprocess
import sys

from conftest import core
import pytest
from test_checkpoint import mesh, same, saved, state_of  # noqa: F401
import toy

from bond_jax.errors import UserError
from bond_jax.runs.checkpoints import checksums, saving


def saver(folder):
  return saving.Saver(folder, 'train', 'stop', {})


def flip(path):
  """One bit, in the middle."""
  with open(path, 'r+b') as f:
    f.seek(os.path.getsize(path) // 2)
    byte = f.read(1)[0]
    f.seek(-1, os.SEEK_CUR)
    f.write(bytes([byte ^ 4]))


def cut(path):
  os.truncate(path, os.path.getsize(path) - 1)


def largest(folder, item):
  """The file of an item with most of its bytes."""
  found = [
    os.path.join(where, name)
    for where, _, names in os.walk(os.path.join(folder, item))
    for name in names
  ]
  return max(found, key=os.path.getsize)


def half_deleted(folder):
  shutil.rmtree(os.path.join(folder, 'params', 'ocdbt.process_0'))


DAMAGES = {
  'flipped': lambda f: flip(largest(f, 'params')),
  'flipped optimizer': lambda f: flip(largest(f, 'rest')),
  'cut': lambda f: cut(largest(f, 'params')),
  'missing': lambda f: os.remove(largest(f, 'data')),
  'half deleted': half_deleted,
  'no checksums': lambda f: os.remove(os.path.join(f, 'sha256.json')),
  'no metadata': lambda f: os.remove(os.path.join(f, '_CHECKPOINT_METADATA')),
  'empty metadata': lambda f: os.truncate(
    os.path.join(f, '_CHECKPOINT_METADATA'), 0
  ),
  'empty checksums': lambda f: os.truncate(os.path.join(f, 'sha256.json'), 0),
  'empty metrics': lambda f: os.truncate(largest(f, 'metrics'), 0),
}


@pytest.mark.parametrize('how', core(4, DAMAGES))
def test_the_one_before_is_used(tmp_path, mesh, how, capsys):  # noqa: F811
  folder = str(saved(tmp_path, [0.1, 0.2], mesh))
  DAMAGES[how](f'{folder}/2')
  before = toy.listing(f'{folder}/2')
  with pytest.raises(UserError, match=r'checkpoint 2 .* is damaged \(.*also 1'):
    checksums.check(folder, 2, ('params', 'rest', 'data', 'metrics'))
  with saver(folder) as s:
    assert s.start == 1
    state, data = s.restore(state_of(9, mesh))
    same(state, state_of(1, mesh))
    assert data == {'next': [1]}
    s.save(2, state_of(2, mesh), {'next': [2]}, 0.2, lambda: None)
  assert f'DAMAGED: checkpoint 2 in {folder} (' in capsys.readouterr().out
  assert toy.listing(f'{folder}/2.damaged') == before  # nothing is deleted
  with saver(folder) as s:
    assert s.start == 2 and capsys.readouterr().out == ''
  DAMAGES[how](f'{folder}/2')  # once more
  saver(folder).__exit__(None)
  assert {'2.damaged', '2.damaged-1'} < set(os.listdir(folder))


def test_none_is_good(tmp_path, mesh):  # noqa: F811
  folder = str(saved(tmp_path, [0.1, 0.2], mesh))
  for step in (1, 2):
    DAMAGES['flipped'](f'{folder}/{step}')
  before = toy.listing(folder)
  with pytest.raises(UserError, match='every checkpoint in .* is damaged') as e:
    saver(folder)
  assert 'step 2: params/' in str(e.value) and 'step 1: par' in str(e.value)
  assert 'move this folder away to begin the stage anew' in str(e.value)
  assert toy.listing(folder) == before


KILLED = """
import os, signal, sys
sys.path[:0] = ['tests', 'tests/runs']
import conftest
import test_checkpoint
from bond_jax.runs.checkpoints import checksums as integrity
from bond_jax.devices import sharding

def write(folder):
  if os.path.basename(folder)[0] == '2':
    os.kill(os.getpid(), signal.SIGKILL)
  whole(folder)

whole, integrity.write = integrity.write, write
test_checkpoint.saved(
  sys.argv[1], [0.1, 0.2], sharding.make_mesh(data=4, model=2)
)
"""


def test_killed_before_the_checksums_there_is_no_step(tmp_path):
  folder = str(tmp_path)
  done = subprocess.run(
    [sys.executable, '-c', KILLED, folder], cwd=toy.ROOT, capture_output=True
  )
  assert done.returncode == -9, done.stderr
  assert checksums.steps(folder) == [1]
  assert checksums.damage(f'{folder}/1') is None


def test_a_stage_goes_on_from_the_one_before(tmp_path, capsys):
  """And what reads its end says so, and leaves all as it is."""
  workdir, config = str(tmp_path), toy.get_config(toy.folder())
  toy.before('evaluate', workdir)
  DAMAGES['flipped'](f'{workdir}/train/checkpoints/6')
  before = toy.listing(workdir)
  with pytest.raises(UserError, match=r'checkpoint 6 .* is damaged \(params/'):
    toy.run('evaluate', config, workdir)
  after = toy.listing(workdir)
  assert {k: after[k] for k in before} == before
  os.remove(f'{workdir}/train/summary.json')
  toy.run('train', config, workdir)
  assert 'train: goes on after step 3' in capsys.readouterr().out
  toy.same_end(workdir, toy.finished(), 'train')


def test_a_damaged_reference_is_not_trained_from(tmp_path):
  workdir, config = str(tmp_path), toy.get_config(toy.folder())
  toy.before('train', workdir)
  DAMAGES['cut'](f'{workdir}/sft/checkpoints/6')
  with pytest.raises(UserError, match='checkpoint 6 .*sft/checkpoints is dam'):
    toy.run('train', config, workdir)
