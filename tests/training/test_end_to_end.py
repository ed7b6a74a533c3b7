"""All four stages, as functions and as the commands that users type."""

import os
import shutil

import pytest
import toy

from bond_jax.runs import files

PROMISED = (
  'win_rate', 'win_rate_interval', 'kl', 'kl_stderr', 'effective_n',
  'frontier_efficiency', 'reward_policy', 'reward_reference', 'anchor_drift',
  'steps', 'seconds', 'phase_seconds', 'compilations_after_first_step',
  'tie_rate', 'signal_fires', 'gold_win_rate',
)  # fmt: skip


def arguments(workdir):
  return [
    f'--config={toy.TESTS}/toy.py:{toy.folder()}',
    f'--workdir={workdir}',
  ]


def test_the_summary_keeps_its_promise():
  found = files.read_json(os.path.join(toy.finished(), 'summary.json'))
  assert not [key for key in PROMISED if key not in found]
  for key in PROMISED:
    if found[key] is None:
      assert key in ('effective_n', 'frontier_efficiency')
      assert found['frontier_reason']
  assert found['steps'] == 6
  assert found['compilations_after_first_step'] == 0
  of_data = toy.summary(toy.finished(), 'train')
  assert of_data['prompts_looked_at'] == 300
  assert of_data['prompts_left_out'] == of_data['empty_lines'] == 0
  low, high = found['win_rate_interval']
  assert 0 <= low <= found['win_rate'] <= high <= 1
  phases = found['phase_seconds']
  assert found['seconds'] == pytest.approx(sum(phases.values()), abs=0.01)
  for phase in (
    'sft/update', 'reward/fit', 'train/sample', 'train/reward', 'train/update',
    'evaluate/sample', 'evaluate/judge',
  ):  # fmt: skip
    assert phases[phase] > 0


def test_a_finished_run_is_left_alone(capsys, tmp_path):
  workdir = str(tmp_path / 'run')
  shutil.copytree(toy.finished(), workdir)
  before = toy.listing(workdir)
  capsys.readouterr()
  for stage in toy.STAGES:
    toy.run(stage, toy.get_config(toy.folder()), workdir)
    out = capsys.readouterr().out
    assert out.startswith(f'{stage}: finished already, see ')
    assert out.count('\n') == 1
  assert toy.listing(workdir) == before


@pytest.mark.long
def test_kill_9_and_again_ends_as_an_undisturbed_run(tmp_path):
  """The four commands, `train` dying at step 5: also a second run of it all."""
  workdir = str(tmp_path / 'run')

  def run(stage):
    process = toy.command(stage, *arguments(workdir))
    return *process.communicate(), process.returncode

  for stage in ('sft', 'reward_model'):
    out, err, status = run(stage)
    assert status == 0, err
  toy.light(workdir, 7, 'kill')
  out, err, status = run('train')
  assert status == -9
  assert toy.steps(workdir, 'train') == [3]
  out, err, status = run('train')
  assert status == 0, err
  assert 'train: goes on after step 3\n' in out
  out, err, status = run('evaluate')
  assert status == 0, err
  assert 'Win rate against the reference' in out
  for stage in ('sft', 'train'):
    toy.same_end(workdir, toy.finished(), stage)
  assert toy.summary(workdir) == toy.summary(toy.finished())
  a, b = toy.listing(workdir), toy.listing(toy.finished())
  for name in ('completions.jsonl', 'tokenizer.model', 'config.json'):
    assert a[name] == b[name], name
  # Nothing of the libraries: only our progress line is on stderr. (A cache of
  # programs, which the tests have and users do not, makes jax 0.10 talk.)
  lines = [x for x in err.splitlines() if 'cpu_aot_loader' not in x]
  assert [x for x in lines if not x.startswith('evaluate ')] == []


@pytest.mark.long
def test_mistakes_are_one_line_and_status_2(tmp_path):
  """Through the real commands; `test_command` and others have the rest."""
  workdir = str(tmp_path / 'run')
  cases = [
    ('evaluate', ['--config.train.bach=3'], "config.train has no 'bach'"),
    (
      'train',
      ['--config.mesh.data=8', '--config.train.batch=12'],
      'batch (12)',
    ),
    ('sft', [f'--config.data.name={tmp_path}/x.jsonl'], 'x.jsonl:3: not JSON'),
  ]
  (tmp_path / 'x.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n{"text"\n')
  running = [
    toy.command(stage, *arguments(workdir), *args) for stage, args, _ in cases
  ]
  for process, (stage, _, says) in zip(running, cases, strict=True):
    out, err = process.communicate()
    assert process.returncode == 2, stage
    assert out == ''
    assert err.startswith('error: '), stage
    assert err.count('\n') == 1, err
    assert says in err
  assert not os.path.exists(workdir)
