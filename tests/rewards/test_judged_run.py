"""Whole runs on judges of pairs, on several rewards, on rewards that fail."""

import json
import threading

import jax
import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards.ridge import ridge

RIDGE = {'path': '{reference}/reward/model.npz'}


def duel(path):
  """The ridge rating's comparisons; in all stages in the thread of this."""
  rating, here = ridge(path), threading.current_thread()
  assert here is not threading.main_thread()

  def duel_judge(prompts, completions, context):
    assert threading.current_thread() is here
    value = rating(prompts, completions, context)
    return 0.5 + 0.5 * np.sign(value[:, :, None] - value[:, None, :])

  return duel_judge


def length():
  return lambda prompts, completions, context: np.array(
    [[len(y) for y in ys] for ys in context.tokens]
  )


def picky(path):
  """3 for every text, and no answer for a batch with a row of odd length."""
  del path

  def picky_reward(prompts, completions, context):
    if any(len(row['text']) % 2 for row in context.rows):
      raise ConnectionError('odd')
    return np.full((len(prompts), len(completions[0])), 3.0)

  return picky_reward


def get_config(function, **changes):
  config = toy.get_config(toy.folder())
  with config.unlocked():
    config.reward.update(function=f'test_judged_run:{function}', args=RIDGE)
    del config.reward.args['fuse']
  config.update_from_flattened_dict(
    {f'reward.{k}': v for k, v in changes.items()}
  )
  return config


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('judged') / 'run')
  config = get_config('duel', opponents=4)
  toy.before('train', workdir, config)
  toy.run('train', config, workdir)
  return workdir, config


def test_a_judge_trains_as_the_reward_it_compares(judged):
  """J-BOND looks at ranks alone: the same bits, from pairs."""
  pairs, scalar = (
    toy.saved(workdir, 'train', 6) for workdir in (judged[0], toy.finished())
  )
  for part in ('params', 'rest'):
    jax.tree.map(np.testing.assert_array_equal, pairs[part], scalar[part])
  rows = zip(
    toy.rows(judged[0], 'train'), toy.rows(toy.finished(), 'train'), strict=True
  )
  for a, b in rows:
    assert a['signal/fires'] == b['signal/fires']
    # What is reported is how often a completion beats the two others.
    assert (
      0 <= a['reward/policy'] <= 1 and a['reward/policy'] != b['reward/policy']
    )
    total = a['reward/policy'] + 2 * a['reward/anchor']
    np.testing.assert_allclose(total, 1.5, rtol=1e-5)


def test_a_judge_evaluates_against_the_reference(judged):
  workdir, config = judged
  toy.run('evaluate', config, workdir)
  with open(f'{workdir}/completions.jsonl') as f:
    rows = [json.loads(line) for line in f]
  worth = {who: [r['reward'] for r in rows if r['who'] == who] for who in
           ('policy', 'reference')}  # fmt: skip
  assert {4 * x for x in worth['policy']} <= {0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4}
  assert len(set(worth['policy'])) > 3
  # The reference against itself, of other draws: a half, but for the noise.
  assert abs(np.mean(worth['reference']) - 0.5) < 0.15


def test_a_judge_needs_opponents(tmp_path):
  config = get_config('duel')
  toy.before('evaluate', str(tmp_path / 'run'), config)
  with pytest.raises(UserError, match='reward compares pairs.*opponents = 4'):
    toy.run('evaluate', config, str(tmp_path / 'run'))


def test_the_sum_of_two_rewards(tmp_path):
  workdir = str(tmp_path / 'run')
  config = toy.get_config(toy.folder())
  with config.unlocked():
    config.reward.parts = {
      'rating': dict(
        function='bond_jax.rewards.ridge:ridge', args=RIDGE, weight=1.0
      ),
      'short': dict(function='test_judged_run:length', args={}, weight=-0.25),
    }
  config.train.steps = 3
  toy.before('train', workdir, config)
  toy.run('train', config, workdir)
  for row in toy.rows(workdir, 'train'):
    total = (row['reward/policy'] + 2 * row['reward/anchor']) / 3
    parts = row['score/rating'] + row['score/short']
    np.testing.assert_allclose(parts, total, rtol=1e-4)
    np.testing.assert_allclose(
      row['score/short'], -row['length/completion'] / 4, rtol=1e-5
    )


def test_prompts_that_the_reward_fails_on_are_left_out(tmp_path, capsys):
  workdir = str(tmp_path / 'run')
  config = get_config('picky', failure='skip')
  toy.before('train', workdir, config)
  toy.run('train', config, workdir)
  rows = toy.rows(workdir, 'train')
  skipped = [row['reward/skipped'] for row in rows]
  assert all(0 < n < 8 and n == int(n) for n in skipped)
  # What stands for the missing numbers enters no mean.
  assert all(row['reward/policy'] == row['reward/anchor'] == 3 for row in rows)
  said = capsys.readouterr().out
  warning = 'warning: reward test_judged_run:picky gave 3 to all completions'
  assert said.count(warning) == 1
