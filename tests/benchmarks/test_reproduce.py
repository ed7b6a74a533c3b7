"""The papers' figures: what is drawn is what the runs have logged."""

import json
import os

import language
import ml_collections
import numpy as np
import pytest
import toy

from benchmarks.papers import reproduce
from bond_jax.errors import UserError

pytestmark = pytest.mark.long


def get_config():
  """Two runs of a few steps; the second draws twice for each rollout's cost."""
  config = ml_collections.ConfigDict()
  config.runs = dict(
    n_10=language.get_config(
      'jbond',
      num_anchor=2,
      backward_weight=0.5,
      anchor_rate=0.02,
      drift_weight=0.0,
    ),
    n_2=language.get_config('best_of_n', n=2, anchor='periodic:1'),
  )
  config.runs.n_2.train.update(dict(rollouts=1, epochs=2))
  config.labels = dict(n_10='ten', n_2='two')
  config.figure = dict(
    title='A figure',
    panels=(('step', 'backward_kl'), ('kl/reference', 'win_rate/reference')),
    log=('backward_kl',),
    best_of=(1, 2, 4),
    reach=(0.51,),
    note='',
  )
  for run in config.runs.values():
    run.train.update(dict(steps=4, save_every=2, batch=8))
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('figure'))
  reproduce.reproduce(get_config(), folder)
  return folder


def read(workdir, name):
  with open(os.path.join(workdir, name)) as f:
    return json.load(f)


def test_the_series_are_the_runs_probes(workdir):
  found = read(workdir, 'figure.json')['runs']
  assert list(found) == ['two', 'ten']  # 2 before 10
  for name, label in (('n_10', 'ten'), ('n_2', 'two')):
    rows = toy.rows(os.path.join(workdir, 'runs', name), 'train')
    probed = [row for row in rows if 'backward_kl' in row]
    assert [row['step'] for row in probed] == [2, 4] == found[label]['step']
    for key in ('backward_kl', 'kl/reference', 'win_rate/reference'):
      assert found[label][key] == [row[key] for row in probed]
  # 8 prompts a step: three completions each, or two for every other step.
  assert found['ten']['completions'] == [48, 96]
  assert found['two']['completions'] == [16, 32]
  seconds = found['ten']['seconds']
  assert 0 < seconds[0] < seconds[1]


def test_best_of_n_stands_beside_them(workdir):
  exact = read(workdir, 'figure.json')['best_of_n']
  assert abs(exact['kl/reference'][0]) < 1e-9
  assert exact['win_rate/reference'][0] == pytest.approx(0.5)
  assert abs(exact['backward_kl'][2]) < 1e-9  # the target of best_of = 4
  assert exact['log_n'] == pytest.approx(np.log([1, 2, 4]).tolist())
  assert all(np.diff(exact['win_rate/reference']) > 0.05)


def test_a_picture_and_a_table_come_of_it(workdir):
  with open(os.path.join(workdir, 'figure.png'), 'rb') as f:
    assert f.read(8) == b'\x89PNG\r\n\x1a\n'
  last = read(workdir, 'summary.json')['at_the_end']
  series = read(workdir, 'figure.json')['runs']
  assert last['ten']['backward_kl'] == series['ten']['backward_kl'][-1]
  assert 'completions to 0.51' in last['two']


def test_a_finished_figure_is_drawn_from_its_runs(workdir, capsys):
  before = read(workdir, 'figure.json')
  reproduce.reproduce(get_config(), workdir)
  assert read(workdir, 'figure.json') == before
  assert capsys.readouterr().out.count('finished already') == 2


def test_what_a_win_rate_took():
  points = {
    'win_rate/reference': [0.6, 0.8, 0.7, 0.9],
    'completions': [10, 20, 30, 40],
    'seconds': [1.0, 3.0, 5.0, 7.0],
    'kl/reference': [0.1, 0.5, 0.3, 1.0],
  }
  took = reproduce.what_it_took(points, 0.75)
  assert took['completions to 0.75'] == pytest.approx(17.5)
  assert took['seconds to 0.75'] == pytest.approx(2.5)
  assert took['kl/reference to 0.75'] == pytest.approx(0.4)
  assert set(reproduce.what_it_took(points, 0.95).values()) == {None}
  assert reproduce.what_it_took(points, 0.5)['completions to 0.5'] == 10


def test_the_floor_of_two_meets_the_log_quantile_thrice():
  """BOND, Figure 8: at 0.1127, 1/2 and 1; once for one draw, and at 1."""
  curves = reproduce.quantile_curves()
  p = np.array(curves['log p']['quantile'])
  gap = np.subtract(
    curves['floor of 2 draws']['quantile_reward'],
    curves['log p']['quantile_reward'],
  )
  crossings = p[:-1][np.sign(gap[:-1]) != np.sign(gap[1:])]
  assert crossings[:2] == pytest.approx([0.1127, 0.5], abs=0.006)
  assert gap[-1] == 0


@pytest.mark.parametrize(
  'change, says',
  [
    (lambda c: c.figure.update(panels=(('step', 'nothing'),)), 'figure.panels'),
    (lambda c: c.figure.update(panels=()), 'figure.panels is .* not empty'),
    (lambda c: c.figure.update(reach=(1.5,)), 'figure.reach'),
    (lambda c: c.figure.update(best_of=(0,)), 'figure.best_of'),
    (lambda c: c.figure.update(pannels=1), "'pannels', .* 'panels'"),
    (lambda c: c.labels.update(other='x'), 'give each run a label'),
    (lambda c: [*c.runs.values()][-1].train.update(stepz=1), "mean 'steps'"),
    (
      lambda c: [*c.runs.values()][-1].train.update(steps=0),
      'train.steps is 0',
    ),
  ],
)
def test_what_would_end_the_last_run_is_said_before_the_first(
  tmp_path, change, says
):
  config = get_config()
  with config.unlocked():
    change(config)
  with pytest.raises(UserError, match=says):
    reproduce.reproduce(config, str(tmp_path / 'figure'))
  assert not os.path.exists(tmp_path / 'figure')
