"""A run on several hosts is the run on one, killed or not, on any mesh."""

import json
import os
import shutil

import numpy as np
import pytest
import several
import toy

# The reward's call at a step, on every host: the probe's reference, the steps,
# and a probe after step 3.
CALL_OF_STEP_5 = 7


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The workdir of a run of one process, all stages."""
  workdir = str(tmp_path_factory.mktemp('one') / 'run')
  for stage in toy.STAGES:
    toy.run(stage, several.get_config(toy.folder()), workdir)
  return workdir


def begun(one: str, workdir: str, config, *folders: str) -> str:
  """A workdir with what the first stages of `one` left, of another config."""
  os.makedirs(workdir)
  for folder in ('sft', 'reward', *folders):
    shutil.copytree(os.path.join(one, folder), f'{workdir}/{folder}')
  shutil.copy(os.path.join(one, 'tokenizer.model'), workdir)
  with open(os.path.join(workdir, 'config.json'), 'w') as f:
    f.write(config.to_json_best_effort())
  return workdir


def same_rows(rows, others, rel=1e-5):
  assert rows and len(rows) == len(others)
  for a, b in zip(rows, others):
    assert a.keys() == b.keys()
    for key in a:
      assert b[key] == pytest.approx(a[key], rel=rel, abs=rel), (a['step'], key)


def same_completions(workdir, other):
  def lines(where):
    with open(os.path.join(where, 'completions.jsonl')) as f:
      return [json.loads(line) for line in f]

  ours, theirs = lines(workdir), lines(other)
  assert len(ours) == len(theirs) == 16 * 12
  for a, b in zip(ours, theirs):
    near = {k: v for k, v in a.items() if k.startswith('log_')}
    assert {k: b[k] for k in near} == pytest.approx(near, abs=1e-3)
    assert {**a, **near} == {**b, **near}


@pytest.mark.long
def test_killed_on_two_and_on_four_hosts_it_ends_as_on_one(one, tmp_path):
  """kill -9, of either kind of host, and other numbers of hosts after it."""
  workdir, config = str(tmp_path / 'run'), several.get_config(toy.folder())
  stage = lambda name: f'{name}={workdir}'
  os.makedirs(workdir)
  toy.light(workdir, CALL_OF_STEP_5, 'kill', host=1)
  command = several.run(toy.folder(), '4,1', *map(stage, toy.STAGES[:3]))
  ended = several.launch(2, *command, devices=2)
  assert ended.status == 137
  assert toy.steps(workdir, 'train') == [3]

  # The probe's reference, steps 4 to 8, and a probe after step 6.
  toy.light(workdir, 7, 'kill', host=0)
  command = several.run(toy.folder(), '4,1', stage('train'))
  ended = several.launch(4, *command)
  assert ended.status
  assert 'goes on after step 3' in ended.said[0]
  for lines in several.errors(ended)[1:]:
    assert len(lines) <= 1 and all('last checkpoint' in x for x in lines)
  assert toy.steps(workdir, 'train') == [3, 6]

  for name in ('train', 'evaluate'):
    toy.run(name, config, workdir)
  same_rows(toy.rows(one, 'sft'), toy.rows(workdir, 'sft'))
  same_rows(toy.rows(one, 'train'), toy.rows(workdir, 'train'))
  assert [r['step'] for r in toy.rows(workdir, 'train')] == list(range(1, 11))
  assert toy.summary(one, 'reward') == toy.summary(workdir, 'reward')
  same_completions(one, workdir)
  a, b = (toy.saved(w, 'train', 10) for w in (one, workdir))
  assert a['data'] == b['data']
  near = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4)
  near(*(x['params']['final_norm']['scale'] for x in (a, b)))


@pytest.mark.long
def test_hosts_that_hold_the_same_rows_share_them_out(one, tmp_path):
  """A model axis across hosts; and a reward that fails on one of them."""
  config = several.get_config(toy.folder(), data=1, model=2)
  judged = begun(one, str(tmp_path / 'judged'), config, 'train')
  failing = begun(one, str(tmp_path / 'failing'), config)
  toy.light(failing, CALL_OF_STEP_5, 'raise', host=1)
  command = several.run(
    toy.folder(), '1,2', f'evaluate={judged}', f'train={failing}'
  )
  ended = several.launch(2, *command)
  assert ended.status == 2
  first, second = several.errors(ended)
  assert first == second and len(first) == 1
  assert first[0].startswith('host 1: reward toy:reward raised RuntimeError')
  same_completions(one, judged)
  same_rows(toy.rows(one, 'train')[:4], toy.rows(failing, 'train'), rel=1e-4)
  assert toy.steps(failing, 'train') == [3]
