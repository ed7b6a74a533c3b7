"""Figure 1 of Faster WIND: what it writes, and what the command refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import toy

from benchmarks.papers import wind_1
from bond_jax.errors import UserError


@pytest.fixture
def small(monkeypatch):
  for key, value in {
      'prompts': 2, 'arms': 5, 'd_prompts': 2, 'd_arms': 8, 'c_runs': 2,
      'c_steps': 3, 'b_betas': [2.0, 0.2, 0.02],
      'c_comparisons': [100, 1000, 10000],
  }.items():  # fmt: skip
    monkeypatch.setitem(wind_1.SETTINGS, key, value)


@pytest.mark.long
def test_the_figure_writes_what_it_draws(small, tmp_path, capsys):
  wind_1.main(str(tmp_path), 3)
  png = (tmp_path / 'bandit_figure1.png').read_bytes()
  assert png[:4] == b'\x89PNG'
  data = json.loads((tmp_path / 'bandit_figure1.json').read_text())
  again = wind_1.compute(3)  # the seed decides all
  assert {k: data[k] for k in 'abcd'} == again
  assert data['settings']['arms'] == 5 and 'settings ours' in data['note']
  for way in data['a'].values():
    assert len(way) == 61 and way[-1] < way[0]
  ours = [v[-1] for v in data['a'].values()]
  assert max(ours[:4]) < 1e-12 < ours[4]  # all but beta > 0 reach the limit
  assert data['b']['WIND to iterative BoN'][-1] < 1e-8
  assert set(data['d']) == {
      'one value per arm', 'linear, squared risk', 'linear, kl risk',
      'linear, nce risk',
  }  # fmt: skip
  assert np.shape(data['c']['one value per arm, any risk']) == (3, 2)
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['asked']['seed'] == 3 and summary['seconds'] > 0
  assert 'numpy' in summary['versions']
  assert capsys.readouterr().out.count('power of M') == 5


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write to --out=.*file'):
    wind_1.main(str(tmp_path / 'file'), 0)


@pytest.mark.long
@pytest.mark.parametrize(
  'args, message',
  [([], '--out'), (['--out=x', 'y'], "unexpected argument 'y'")],
)
def test_a_mistake_on_the_command_line_is_one_line(args, message):
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.papers.wind_1', *args],
    cwd=toy.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and message in done.stderr
  assert done.stderr.count('\n') == 1
