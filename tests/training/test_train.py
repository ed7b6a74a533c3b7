"""The third stage as a whole: what goes wrong in it, and what it survives."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards import calling
from bond_jax.runs import command
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.runs.settings import configs, defaults
from bond_jax.training import guard
from bond_jax.training import step as step_lib
from bond_jax.training.tasks import text_task
from bond_jax.types import TrainState

# The reward's call at step 5: the probe's reference, five steps, one save.
CALL_OF_STEP_5 = 7


@pytest.fixture
def config():
  return toy.get_config(toy.folder())


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / 'run'
  path.mkdir()
  return str(path)


def test_rows_tell_what_users_watch():
  rows = toy.rows(toy.finished(), 'train')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  for row in rows:
    assert 0 <= row['signal/fires'] <= 1
    assert row['sampler_gap'] < 1e-4
    assert {'loss', 'reward/policy', 'reward/anchor', 'tie_rate'} <= set(row)
  assert rows[0]['anchor/drift'] < 1e-6  # the rate of the first step is 0
  assert rows[-1]['anchor/drift'] > 1e-3
  probed = [row['step'] for row in rows if 'win_rate/reference' in row]
  assert probed == [3, 6]


def test_a_reward_that_raises_costs_nothing(config, workdir):
  toy.before('train', workdir)
  toy.light(workdir, CALL_OF_STEP_5, 'raise')
  with pytest.raises(UserError, match='RuntimeError: the fuse has') as e:
    toy.run('train', config, workdir)
  assert '\n' not in str(e.value)
  assert toy.steps(workdir, 'train') == [3]
  assert not os.path.exists(f'{workdir}/train/summary.json')
  assert [row['step'] for row in toy.rows(workdir, 'train')] == [1, 2, 3, 4]
  toy.run('train', config, workdir)
  toy.same_end(workdir, toy.finished(), 'train')


def test_compilations_are_counted(config, workdir):
  assert toy.summary(toy.finished(), 'train')[
    'compilations_after_first_step'
  ] == 0  # fmt: skip
  toy.before('train', workdir)
  toy.light(workdir, CALL_OF_STEP_5, 'forget')
  toy.run('train', config, workdir)
  found = toy.summary(workdir, 'train')
  assert found['compilations_after_first_step'] == 4  # the programs of a step
  assert toy.rows(workdir, 'train') == toy.rows(toy.finished(), 'train')


@pytest.mark.long
def test_lengths_of_all_sizes_compile_nothing_anew(config, workdir):
  """Texts cut to any length, slots, buckets, stops: one program each."""
  config.prompt.update(dict(kind='text', length=12, longer='cut'))
  config.slots, config.stop = 4, ('e', 'film')
  config.train.update(dict(micro_batches=4, buckets=2))
  toy.before('train', workdir, config)
  toy.run('train', config, workdir)
  found = toy.summary(workdir, 'train')
  assert found['compilations_after_first_step'] == 0
  assert found['prompts_cut'] > 0 and 'prompts_left_out' not in found
  for row in toy.rows(workdir, 'train'):
    assert 0 < row['slots/busy'] <= 1
    assert row['length/completion'] < 5 and row['truncated'] < 0.5
    assert row['sampler_gap'] < 1e-4


@pytest.mark.long
def test_eight_devices_are_one(config, workdir):
  config.mesh.data = 8
  toy.before('train', workdir, config)
  toy.run('train', config, workdir)
  one, eight = (toy.rows(w, 'train') for w in (toy.finished(), workdir))
  for a, b in zip(one[:3], eight[:3], strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-5), key
  assert one[2]['gradient_norm'] > 0.01


BAD = """
import numpy as np

def reward(kind):
  def bad(prompts, completions, context):
    n, k = len(prompts), len(completions[0])
    return {
        'nan': np.full((n, k), np.nan),
        'count': np.zeros((n, k - 1)),
        'text': np.full((n, k), 'good'),
    }[kind]
  return bad
"""


@pytest.mark.parametrize(
  'kind, says',
  [
    ('nan', 'reward bad_rewards:reward returned nan for completion 0'),
    (
      'count',
      r'reward bad_rewards:reward returned \[8, 1\], expected .* \[8, 2\]',
    ),
    ('text', 'reward bad_rewards:reward returned <U4, expected numbers'),
  ],
)
def test_a_bad_reward_is_one_line(
  config, workdir, tmp_path, monkeypatch, kind, says
):
  (tmp_path / 'bad_rewards.py').write_text(BAD)
  monkeypatch.syspath_prepend(str(tmp_path))
  with config.unlocked():
    config.reward = defaults.reward('bad_rewards:reward', kind=kind)
  toy.before('train', workdir, config)
  before = toy.listing(workdir)
  with pytest.raises(UserError, match=says) as e:
    toy.run('train', config, workdir)
  assert '\n' not in str(e.value)
  after = toy.listing(workdir)
  assert {k: after[k] for k in before} == before
  assert toy.steps(workdir, 'train') == []


def test_a_poisoned_parameter_stops_the_run(config, workdir, monkeypatch):
  toy.before('train', workdir)
  params = jax.tree.map(np.copy, toy.saved(workdir, 'sft', 6)['params'])
  params['final_norm']['scale'][3] = np.nan
  state = TrainState(np.int32(7), params, {}, {}, {})
  with monkeypatch.context() as m:
    m.setattr(checkpoint, 'broken', lambda _: [])
    with checkpoint.manager(f'{workdir}/sft/checkpoints') as checkpoints:
      checkpoint.save(checkpoints, 7, jax.device_put(state), {}, 0.0)
  with pytest.raises(
    UserError, match='step 1 changed nothing: its loss is nan'
  ) as e:
    toy.run('train', config, workdir)
  assert 'Not finite are params/final_norm/scale, ' in str(e.value)
  assert '\n' not in str(e.value)
  assert toy.steps(workdir, 'train') == []


def poison(monkeypatch, steps):
  """Puts a NaN into what the first prompt of some steps is found worth."""
  weigh = step_lib.weigh

  def poisoned(setup, state, *args):
    batch, row = weigh(setup, state, *args)
    bad = jnp.isin(state.step, jnp.array(steps) - 1)
    spoil = lambda x: x.at[0].set(jnp.where(bad, jnp.nan, x[0]))
    return batch._replace(rows=jax.tree.map(spoil, batch.rows)), row

  monkeypatch.setattr(step_lib, 'weigh', poisoned)


def test_a_step_that_is_not_finite_is_skipped_as_often_as_asked(
  config, workdir, monkeypatch, capsys
):
  config.train.skip_limit = 1
  toy.before('train', workdir, config)
  poison(monkeypatch, [2, 4])
  toy.run('train', config, workdir)
  rows = toy.rows(workdir, 'train')
  assert [row['skipped'] for row in rows] == [0, 1, 0, 1, 0, 0]
  assert [r['step'] for r in rows if r['loss'] is None] == [2, 4]
  assert np.isfinite([r['kl/reference'] for r in rows[2::3]]).all()
  said = capsys.readouterr().out
  assert 'step 2 changed nothing: its loss is nan' in said
  assert 'Not finite are rows/' in said and ' of prompts ' in said
  assert toy.summary(workdir, 'train')['steps'] == 6


def test_two_such_steps_in_a_row_are_too_many(config, workdir, monkeypatch):
  config.train.skip_limit = 1
  toy.before('train', workdir, config)
  poison(monkeypatch, [5, 6])
  with pytest.raises(UserError, match='train.skip_limit allows 1 such') as e:
    toy.run('train', config, workdir)
  assert str(e.value).startswith('step 6 changed nothing')
  assert toy.steps(workdir, 'train') == [3]


@pytest.mark.long
def test_debug_shows_where_a_nan_arose(config, workdir, monkeypatch):
  toy.before('train', workdir, config)
  poison(monkeypatch, [1])
  monkeypatch.setattr(command, 'debugging', lambda: True)
  with pytest.raises(FloatingPointError) as e:
    toy.run('train', config, workdir)
  files = {os.path.basename(str(entry.path)) for entry in e.traceback}
  assert {'guard.py', 'step.py'} <= files


@pytest.mark.long
def test_a_slow_fault_ends_a_run_that_asks_for_it(
  config, workdir, monkeypatch, capsys
):
  """With its step saved, and the same command goes on from it."""
  config.train.skip_limit, config.train.watch.stop = 1, ('skipped',)
  toy.before('train', workdir, config)
  poison(monkeypatch, [2])
  with pytest.raises(UserError, match="train.watch.stop has 'skipped'") as e:
    toy.run('train', config, workdir)
  assert str(e.value).startswith('step 3: 1 of the last 3 steps were not')
  assert toy.steps(workdir, 'train') == [3]
  assert toy.rows(workdir, 'train')[-1]['watch/skipped'] == 1
  assert 'train: step 3: 1 of the last 3' in capsys.readouterr().out
  toy.run('train', config, workdir)
  rows = toy.rows(workdir, 'train')
  assert [row['step'] for row in rows if 'watch/skipped' in row] == [3, 6]
  assert toy.summary(workdir, 'train')['steps'] == 6


@pytest.mark.parametrize(
  'row, name',
  [
    ({'loss': np.inf}, 'loss'),
    ({'gradient_norm': np.float32('nan')}, 'gradient_norm'),
    ({'kl/reference': -np.inf}, 'kl/reference'),
    ({'validation_loss': np.nan}, 'validation_loss'),
  ],
)
def test_check_finite(row, name):
  good = {'loss': 1.0, 'gradient_norm': 0.0}
  guard.check_finite({**good, 'other': np.nan}, 3, 'there')
  with pytest.raises(UserError, match=rf'step 3: {name} is .* in there;'):
    guard.check_finite({**good, **row}, 3, 'there')


def test_what_an_earlier_stage_should_have_left(config, workdir):
  with pytest.raises(UserError, match=r'tokenizer\.model.*sft stage'):
    toy.run('train', config, workdir)
  toy.before('train', workdir)
  os.rename(f'{workdir}/sft/summary.json', f'{workdir}/kept')
  with pytest.raises(UserError, match='the sft stage has not finished'):
    toy.run('train', config, workdir)
  os.rename(f'{workdir}/kept', f'{workdir}/sft/summary.json')
  os.remove(f'{workdir}/reward/model.npz')
  with pytest.raises(UserError, match='run the reward_model stage'):
    toy.run('train', config, workdir)
  assert toy.steps(workdir, 'train') == []


def test_another_config_is_refused(config, workdir):
  toy.before('train', workdir)
  before = toy.listing(workdir)
  config.train.optimizer.learning_rate = 0.5
  with pytest.raises(UserError) as e:
    toy.run('train', config, workdir)
  assert '(train.optimizer.learning_rate: 0.01 -> 0.5)' in str(e.value)
  assert toy.listing(workdir) == before
  assert json.loads(before['config.json'])['train']['batch'] == 8


def test_the_probe_draws_the_two_sides_apart():
  """Of one policy, so that equal keys would give equal rewards: all ties."""

  def draw(params, stream):
    return np.random.default_rng(stream).random((4, 8)) + params

  texts = [[''] * 8] * 4
  read = lambda drawn: ([''] * 4, texts, toy.context(texts, rows=drawn))
  reward = lambda prompts, completions, context: context.rows
  gold = lambda prompts, completions, context: -2 * np.array(context.rows)
  ratio = lambda frozen, drawn: frozen + drawn
  probe = text_task.probe_of(
    draw, functools.partial(draw, 0.0), ratio, calling.asker(reward),
    calling.asker(gold), read, np.arange(4),
  )  # fmt: skip
  assert probe(0.0, lambda: 0.0)['win_rate/reference'] != 0.5
  found = probe(2.0, lambda: 0.0)
  assert found['win_rate/reference'] == 1 and found['win_rate/gold'] == 0
  mean = found['reward/validation']
  assert found['gold/validation'] == pytest.approx(-2 * mean, rel=1e-6)


@pytest.mark.parametrize('compares', [False, True])
def test_a_probe_that_has_nothing_to_compare_is_one_line(compares):
  """The reward fails on one half of the prompts, then on the other."""
  texts, failing = [['a', 'b']] * 4, [0, 1]
  read = lambda _: ([*'pqrs'], texts, toy.context(texts))

  def picky(prompts, completions, context):
    if len(prompts) > 1 or 'pqrs'.index(prompts[0]) in failing:
      raise ConnectionError('gone')
    k = len(completions[0])
    return np.full((1, k, k), 0.5) if compares else np.zeros((1, k))

  gold = calling.asker(lambda p, c, x: np.zeros((len(p), len(c[0]))))
  probe = text_task.probe_of(
    lambda *_: None, lambda _: None, lambda *_: np.zeros(1),
    calling.asker(picky, failure='skip'), gold, read, np.arange(4),
  )  # fmt: skip
  assert probe(None, lambda: None)['win_rate/reference'] == 0.5
  failing[:] = [2, 3]
  with pytest.raises(UserError, match='no validation prompt .*probe_prompts'):
    probe(None, lambda: None)
  failing[:] = range(4)
  with pytest.raises(UserError, match='fails on every prompt'):
    probe(None, lambda: None)


def test_gold_that_compares_pairs_is_refused_before_a_step(config, workdir):
  config.gold.function = 'test_train:compare'
  toy.before('train', workdir, config)
  with pytest.raises(UserError, match='gold compares pairs; it must be a'):
    toy.run('train', config, workdir)
  assert toy.steps(workdir, 'train') == []


def compare():
  return lambda prompts, completions, context: np.full(
    (len(prompts), *2 * [len(completions[0])]), 0.5
  )


# -- a second run from the reference of the first -----------------------------


@pytest.fixture(scope='module')
def second(tmp_path_factory):
  """Its workdir, config and random keys: trained and judged, and no more."""
  workdir = str(tmp_path_factory.mktemp('second') / 'run')
  config = toy.get_config(toy.folder())
  config.reference = f'{toy.finished()}/'
  keys, make = [], configs.key

  def key(seed, stream):
    keys.append((stream, make(seed, stream)))
    return keys[-1][1]

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(configs, 'key', key)
    for stage in ('train', 'evaluate'):
      toy.run(stage, config, workdir)
  return workdir, config, keys


def test_a_second_run_starts_from_the_first_s_reference(second):
  """Of the same seed and settings, so that all comes out the same."""
  workdir, _, _ = second
  toy.same_end(workdir, toy.finished(), 'train')
  assert toy.summary(workdir) == toy.summary(toy.finished())
  left = os.listdir(workdir)
  assert not {'sft', 'reward', 'tokenizer.model'} & set(left)


@pytest.mark.parametrize('stage', ['sft', 'reward_model'])
def test_what_a_second_run_borrows_it_does_not_make(second, stage):
  workdir, config, _ = second
  before = toy.listing(workdir)
  with pytest.raises(UserError, match=f'its {stage} stage is run there') as e:
    toy.run(stage, config, workdir)
  assert '\n' not in str(e.value)
  assert toy.listing(workdir) == before


@pytest.mark.parametrize(
  'section, key, value, says',
  [
    ('tokenizer', 'vocab_size', 90, 'has 96 pieces, .* another model than toy'),
    (
      'model',
      'sizes',
      {'layers': 1},
      r"another model \(model.sizes.layers: '.absent.' -> 1\);",
    ),
  ],
)
def test_a_reference_of_another_model_is_refused(
  config, workdir, section, key, value, says
):
  config.reference = toy.finished()
  with config.unlocked(), config.ignore_type():
    config[section][key] = value
  with pytest.raises(UserError, match=says) as e:
    toy.run('train', config, workdir)
  assert '\n' not in str(e.value)


def test_training_probe_and_evaluation_draw_apart(second):
  _, _, keys = second
  assert {name for name, _ in keys} == {
    'train', 'order', 'probe', 'evaluate',
  }  # fmt: skip
  found = {tuple(jax.random.key_data(key).tolist()) for _, key in keys}
  assert len(found) == len(keys) == 4
