"""The front of many runs: exact areas, and what is read of a run's folder."""

import json
import shutil

import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.evaluation import sweep


def test_the_front_are_the_points_that_no_other_beats():
  kl = np.array([1.0, 3.0, 2.0, 2.0, 4.0])
  rate = np.array([0.6, 0.7, 0.7, 0.65, 0.69])
  assert sweep.on_front(kl, rate).tolist() == [0, 2]
  # 3 is beaten by 2 at the same rate and less KL; 4 by 1.


def test_the_area_is_that_of_the_staircase():
  kl, rate = np.array([1.0, 2.0]), np.array([0.6, 0.7])
  # 0.5 up to a KL of 1, 0.6 up to 2, 0.7 up to the limit.
  area = (0.5 + 0.6 + 2 * 0.7) / 4
  assert sweep.front_area(kl, rate, 4.0) == pytest.approx(area)
  assert sweep.front_area(kl, rate, 2.0) == pytest.approx((0.5 + 0.6) / 2)
  # Another point that is beaten changes nothing, nor does the order.
  more = np.array([1.5, 2.0, 1.0]), np.array([0.55, 0.7, 0.6])
  assert sweep.front_area(*more, 4.0) == pytest.approx(area)
  # The estimate of a KL may be negative, and a win rate below one half.
  assert sweep.front_area(
    np.array([-0.01, 1.0]), np.array([0.45, 0.6]), 2.0
  ) == pytest.approx((0.5 + 0.6) / 2)
  assert sweep.front_area(np.zeros(1), np.array([0.5]), 0.0) == 0.5


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A finished run, a part of one, a broken one, and what is no run."""
  folder = tmp_path_factory.mktemp('runs')
  for name in ('a', 'b'):
    (folder / name).mkdir()
    toy.before('evaluate', str(folder / name))
  shutil.copy(f'{toy.finished()}/summary.json', folder / 'a')
  (folder / 'started').mkdir()
  (folder / 'started' / 'config.json').write_text('{}')
  (folder / 'other').mkdir()
  return folder


def test_a_sweep_reads_what_runs_have_left(runs, capsys):
  sweep.sweep(f'{runs}/*', None)
  out = json.loads((runs / 'sweep' / 'summary.json').read_text())
  assert (runs / 'sweep' / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  assert list(out['runs']) == [f'{runs}/a', f'{runs}/b']
  assert list(out['skipped']) == [f'{runs}/started']
  rows = [r for r in toy.rows(toy.finished(), 'train') if 'kl/reference' in r]
  assert [r['step'] for r in rows] == [3, 6]
  row = out['runs'][f'{runs}/a']
  assert row['last'] == {
    'step': 6,
    'kl': rows[1]['kl/reference'],
    'win_rate': rows[1]['win_rate/reference'],
    'reward': rows[1]['reward/validation'],
  }
  assert out['kl_limit'] == max(r['kl/reference'] for r in rows)
  summary = toy.summary(toy.finished())
  (told,) = row['evaluations']
  for key in ('win_rate', 'kl', 'effective_n', 'frontier_reason'):
    assert told[key] == summary[key]
  assert out['runs'][f'{runs}/b'] == row | {'evaluations': []}
  said = capsys.readouterr().out
  assert f'{runs}/started is left out, because it has no checkpoint' in said
  assert 'Best-of-N, no ties' in said
  # Its own folder is no run when it is asked again.
  sweep.sweep(f'{runs}/*', str(runs / 'elsewhere'))
  again = json.loads((runs / 'elsewhere' / 'summary.json').read_text())
  assert again == out


def test_best_of_n_has_the_area_of_its_curve():
  ns = np.array([2.0, 4.0, 8.0])
  rate, kl = sweep.curves.closed_form(ns)
  points = sweep.Points(ns, kl, rate, rate)
  out = sweep.summarise({'none': points})
  # A staircase of three steps lies below the curve, one of many reaches it.
  assert out['runs']['none']['front_area'] < out['best_of_n_area'] - 0.02
  ns = np.geomspace(1, 8, 3000)
  rate, kl = sweep.curves.closed_form(ns)
  out = sweep.summarise({'none': sweep.Points(ns, kl, rate, rate)})
  area = out['runs']['none']['front_area']
  assert area == pytest.approx(out['best_of_n_area'], abs=2e-4)


@pytest.mark.parametrize('name, says', [
  ('nothing*', 'names no runs'), ('started', 'names 1 without checkpoints'),
])  # fmt: skip
def test_no_runs_are_one_line(runs, name, says):
  with pytest.raises(UserError, match=says):
    sweep.sweep(f'{runs}/{name}', None)


def test_the_command_needs_no_workdir(runs):
  done = toy.command('evaluate', f'--sweep={runs}/a', f'--out={runs}/one')
  out, err = done.communicate(timeout=900)
  assert done.returncode == 0, err
  assert f'sweep: done, see {runs}/one/sweep.png' in out
  done = toy.command('evaluate')
  out, err = done.communicate(timeout=900)
  assert done.returncode == 2 and err.count('\n') == 1
  assert '--workdir is not set' in err


def one(folder, rows, summary=None):
  """A run of such metrics, and perhaps such an evaluation."""
  (folder / 'train').mkdir(parents=True)
  (folder / 'config.json').write_text('{}')
  lines = [json.dumps(row) + '\n' for row in rows]
  (folder / 'train' / 'metrics.jsonl').write_text(''.join(lines))
  if summary is not None:
    (folder / 'summary.json').write_text(json.dumps(summary))


ROW = {'step': 3, 'kl/reference': 0.4, 'win_rate/reference': 0.6,
       'reward/validation': 0.1}  # fmt: skip
EVALUATION = dict(kl=0.5, kl_stderr=0.1, win_rate=0.6, reward_policy=0.2,
                  win_rate_interval=[0.5, 0.7], effective_n=None)  # fmt: skip


@pytest.mark.parametrize('key', list(ROW))
def test_a_row_that_was_changed_is_one_line(tmp_path, key):
  for value in ('0.6', [1], True, 10**400, float('nan')):
    folder = tmp_path / f'{type(value)}{len(str(value))}'
    one(folder, [ROW, ROW | {key: value}])
    with pytest.raises(UserError, match=f'{key} is .*expected a number'):
      sweep.checkpoints(str(folder))


def test_a_checkpoint_without_a_finite_number_is_left_out(tmp_path):
  rows = [ROW | {key: None} for key in ROW]
  one(tmp_path, [*rows, {'step': 1}, ROW | {'step': 4}])
  assert sweep.checkpoints(str(tmp_path)).step.tolist() == [4]


@pytest.mark.parametrize(
  'values',
  [
    dict(kl='x'), dict(kl_stderr=None), dict(win_rate=[1]),
    dict(win_rate_interval=[0.5]), dict(win_rate_interval='ab'),
    dict(win_rate_interval=[0.5, None]), dict(effective_n='x'),
    dict(frontier_efficiency={}),
  ],
)  # fmt: skip
def test_an_evaluation_that_was_changed_is_one_line(tmp_path, values):
  one(tmp_path, [ROW], EVALUATION | values)
  with pytest.raises(UserError, match='summary.json: .* expected a number'):
    sweep.evaluations(str(tmp_path))


def test_a_mean_outside_its_interval_is_drawn(tmp_path):
  """As rounding puts it, where all prompts say the same."""
  one(tmp_path / 'a', [ROW], EVALUATION | dict(win_rate=0.8))
  sweep.sweep(f'{tmp_path}/*', str(tmp_path / 'out'))
  assert (tmp_path / 'out' / 'sweep.png').exists()
