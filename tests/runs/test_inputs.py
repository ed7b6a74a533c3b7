"""What a run reads by its path is what it was, or the run says so."""

import copy
import json
import os
import shutil
import subprocess
import sys

from absl import flags
from conftest import core
import jax
import pytest
import toy

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import sample
from bond_jax.runs import fingerprints, provenance

LENGTH = """
import helper
def length(path=''):
  return lambda p, c, x: [[helper.sign * len(y) for y in ys] for ys in c]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A folder with data, a user's reward module and one that it imports."""
  toy.write_data(str(tmp_path))
  write(tmp_path / 'my_length.py', LENGTH)
  write(tmp_path / 'helper.py', 'sign = 1\n')
  write(tmp_path / 'table.txt', 'a')
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)
  forget()
  yield tmp_path
  forget()


def write(path, text):
  path.parent.mkdir(exist_ok=True, parents=True)
  path.write_text(text)


def forget():
  for name in ('my_length', 'helper'):
    sys.modules.pop(name, None)


def with_length(folder, **args):
  config = toy.get_config(str(folder))
  for section in (config.reward, config.gold):
    section.function = 'my_length:length'
    with config.unlocked():
      section.args = args
  return config


def everything(place):
  """A config that names each kind of input."""
  config = with_length(place, path=str(place / 'table.txt'))
  config.weights = str(place / 'weights')
  config.tokenizer.path = str(place / 'some.model')
  config.model.lora.weights = str(place / 'adapter')
  config.reference = str(place / 'other')
  for name in (
    'weights/model.safetensors', 'some.model', 'other/tokenizer.model',
    'adapter/adapter_model.safetensors', 'other/reward/model.npz',
    'other/sft/checkpoints/3/sha256.json',
  ):  # fmt: skip
    write(place / name, 'x')
  return config


@pytest.mark.parametrize(
  'name, key',
  [
    ('train.jsonl', 'data.name'),
    ('validation.jsonl', 'data.name'),
    ('my_length.py', 'reward.function module my_length'),
    ('helper.py', 'reward.function module helper'),
    ('table.txt', 'reward.args.path'),
    ('weights/model.safetensors', 'weights'),
    ('some.model', 'tokenizer.path'),
    ('adapter/adapter_model.safetensors', 'model.lora.weights'),
    ('other/tokenizer.model', 'reference tokenizer'),
    ('other/sft/checkpoints/3/sha256.json', 'reference sft'),
    ('other/reward/model.npz', 'reference reward'),
  ],
)
def test_an_input_that_changes_is_named(name, key, place):
  config = everything(place)
  look = lambda: provenance.inputs(config, str(place / 'run'), 'train')
  before = look()
  assert fingerprints.changed(before, look()) == []
  with open(place / name, 'a') as f:
    f.write('#')
  forget()
  lines = fingerprints.changed(before, look())
  assert [x for x in lines if x.startswith(key)], lines
  kinds = {'reward': ('reward', 'gold')}.get(key.partition('.')[0], (key,))
  assert all(line.startswith(kinds) for line in lines), lines


def test_a_function_that_another_calls_is_an_input(place):
  """As TRL's, which an adapter of ours is told of."""
  config = with_length(place)
  config.reward.function = 'bond_jax.rewards.trl:reward'
  with config.unlocked():
    config.reward.args = dict(function='my_length:length')
  look = lambda: provenance.inputs(config, str(place / 'run'), 'train')
  before = look()
  with open(place / 'my_length.py', 'a') as f:
    f.write('#')
  forget()
  assert any('reward.args.function module my_length' in line
             for line in fingerprints.changed(before, look()))  # fmt: skip
  assert fingerprints.steady(before, look())[1]  # no output of a reward


def test_files_that_come_and_go(place):
  """A shard more is other data; a file that a reward makes is its own."""
  config = with_length(place, path=str(place / 'cache'))
  config.data.name = str(place / '*.jsonl')
  look = lambda: provenance.inputs(config, str(place / 'run'), 'train')
  before = look()
  write(place / 'cache', 'made by the reward')
  assert fingerprints.changed(before, look()) == []
  made = look()
  write(place / 'cache', 'more of it')
  kept, others = fingerprints.steady(made, look())
  assert not others  # it was written during the run
  assert fingerprints.changed(kept, look()) == []
  shutil.copy(place / 'train.jsonl', place / 'train-2.jsonl')
  (line,) = fingerprints.changed(kept, look())
  assert 'train-2.jsonl (absent ->' in line
  assert fingerprints.steady(made, look())[1] == [line]
  os.remove(place / 'train-2.jsonl')
  os.remove(place / 'train.jsonl')
  (line,) = fingerprints.changed(kept, look())
  assert line.endswith('-> absent)')


def test_large_files_are_sampled(tmp_path, monkeypatch):
  """Both ends count; a copy with another time is the same file."""
  monkeypatch.setattr(fingerprints, 'WHOLE', 100)
  monkeypatch.setattr(fingerprints, '_SAMPLE', 8)
  path = tmp_path / 'large'
  path.write_bytes(bytes(range(256)) * 10)
  look = lambda: {'weights': fingerprints.of_file(str(path))}
  before = look()
  assert 'samples' in before['weights']
  os.utime(path, (0, 0))
  assert look() == before
  for i in (0, 2559):
    content = bytearray(bytes(range(256)) * 10)
    content[i] ^= 1
    path.write_bytes(content)
    assert fingerprints.changed(before, look())


def killed(stage, config, workdir):
  """As if it had been killed after step 3."""
  toy.run(stage, config, workdir)
  os.remove(f'{workdir}/{stage}/summary.json')
  shutil.rmtree(f'{workdir}/{stage}/checkpoints/6')


def accept(monkeypatch):
  # Of a copy: the commands' own may be defined once in a process.
  values = copy.deepcopy(flags.FLAGS)
  if 'accept_changes' not in values:
    flags.DEFINE_bool('accept_changes', False, '', flag_values=values)
  values['accept_changes'].value = True
  monkeypatch.setattr(flags, 'FLAGS', values)


@pytest.mark.long
def test_supervised_training_goes_on_from_the_same_data_alone(
  place, monkeypatch, capsys
):
  config, workdir = with_length(place), str(place / 'run')
  killed('sft', config, workdir)
  lines = (place / 'train.jsonl').read_text().splitlines()
  (place / 'train.jsonl').write_text('\n'.join(lines[:100][::-1]) + '\n')
  with pytest.raises(UserError, match=r'train\.jsonl .*--accept_changes'):
    toy.run('sft', config, workdir)
  assert toy.steps(workdir, 'sft') == [3]
  accept(monkeypatch)
  capsys.readouterr()
  toy.run('sft', config, workdir)
  assert 'It goes on, with --accept_changes' in capsys.readouterr().out
  assert toy.steps(workdir, 'sft')[-1] == 6


def test_training_goes_on_with_the_same_reward_alone(place):
  config, workdir = with_length(place), str(place / 'run')
  toy.before('train', workdir, config)
  killed('train', config, workdir)
  write(place / 'helper.py', 'sign = -1\n')
  forget()
  with pytest.raises(UserError, match='reward.function module helper'):
    toy.run('train', config, workdir)
  write(place / 'helper.py', 'sign = 1\n')
  forget()
  toy.run('train', config, workdir)
  assert min(row['reward/policy'] for row in toy.rows(workdir, 'train')) > 0


def test_data_that_changes_while_a_stage_runs_is_said(
  place, monkeypatch, capsys
):
  path, once = place / 'validation.jsonl', iter([True])
  monkeypatch.setattr(
    'bond_jax.training.guard.check_finite',
    lambda *_: next(once, 0) and path.write_text(path.read_text() * 2),
  )
  toy.run('sft', with_length(place), str(place / 'run'))
  said = capsys.readouterr().err
  assert 'changed while the stage runs' in said and 'validation.jsonl' in said


def half_evaluated(config, workdir):
  """Rows of some calls, as a killed evaluation leaves them."""
  toy.before('evaluate', workdir, config)
  toy.run('evaluate', config, workdir)
  os.remove(f'{workdir}/summary.json')
  path = f'{workdir}/completions.jsonl'
  with open(path) as f:
    lines = f.readlines()
  with open(path, 'w') as f:
    f.writelines(lines[: len(lines) // 2])
  return path, lines


def rewards(path):
  with open(path) as f:
    return [json.loads(line)['reward'] for line in f]


def reverse(place):
  write(place / 'helper.py', 'sign = -1\n')
  forget()


def test_an_evaluation_never_mixes_two_rewards(place, capsys):
  config, workdir = with_length(place), str(place / 'run')
  path, lines = half_evaluated(config, workdir)
  reverse(place)
  capsys.readouterr()
  toy.run('evaluate', config, workdir)
  said = capsys.readouterr().out
  assert 'was begun with other inputs' in said and 'judged anew' in said
  assert len(rewards(path)) == len(lines) and max(rewards(path)) <= 0
  assert min(rewards(f'{path}.before')) >= 0 > min(rewards(path))
  assert toy.summary(workdir)['win_rate'] is not None
  write(place / 'helper.py', 'sign = 1\n')
  forget()
  with pytest.raises(UserError, match='reward.function module helper'):
    toy.run('evaluate', config, workdir)  # finished, of another reward


@pytest.mark.parametrize('change', core(2, ['nothing', 'settings', 'policy']))
def test_an_evaluation_goes_on_with_the_same_things_alone(
  change, place, capsys
):
  config, workdir = with_length(place), str(place / 'run')
  path, lines = half_evaluated(config, workdir)
  if change == 'settings':
    config.evaluate.at_once = 2
  elif change == 'policy':
    sums = f'{workdir}/train/checkpoints/6/sha256.json'
    with open(sums, 'a') as f:
      f.write('\n')
  capsys.readouterr()
  toy.run('evaluate', config, workdir)
  said = capsys.readouterr().out
  assert ('judged anew' in said) == (change != 'nothing')
  assert os.path.exists(f'{path}.before') == (change != 'nothing')
  assert len(rewards(path)) == len(lines)


def test_the_settings_of_an_evaluation_may_change(place):
  """Also of a run that is finished: they do not change what was trained."""
  config, workdir = with_length(place), str(place / 'run')
  toy.before('evaluate', workdir, config)
  toy.run('evaluate', config, workdir)
  config.evaluate.prompts = 8
  with pytest.raises(UserError, match=r'evaluate.prompts \(16 -> 8\)'):
    toy.run('evaluate', config, workdir)
  os.remove(f'{workdir}/summary.json')
  toy.run('evaluate', config, workdir)
  assert toy.summary(workdir)['prompts'] == 8
  with open(f'{workdir}/config.json') as f:
    assert json.load(f)['evaluate']['prompts'] == 8
  config.train.steps += 1
  with pytest.raises(UserError, match='train.steps: 6 -> 7'):
    toy.run('evaluate', config, workdir)


@pytest.mark.parametrize('command', core(0, ['sample', 'evaluate']))
def test_a_policy_stands_on_what_it_was_trained_on(command, place, monkeypatch):
  """With another reference its KL would be to something else."""
  config, workdir = with_length(place), str(place / 'run')
  config.model.lora.rank = 2
  toy.before('train', workdir, config)
  toy.run('train', config, workdir)
  with open(f'{workdir}/sft/checkpoints/6/sha256.json', 'a') as f:
    f.write('\n')
  act = {
    'evaluate': lambda: toy.run('evaluate', config, workdir),
    'sample': lambda: sample.open_run(config, workdir, 'last'),
  }[command]
  with pytest.raises(UserError, match='reference sft .*--accept_changes'):
    act()
  accept(monkeypatch)
  act()


@pytest.mark.long
def test_the_environment_changes_no_number(monkeypatch):
  """x64, promotion, the generator: pinned, whatever is set around us."""
  script = (
    'import jax, numpy as np; from bond_jax.runs import environment'
    '; from bond_jax.runs.settings import configs'
    '; environment.configure_jax()'
    '; x = jax.random.normal(configs.key(7, "stream"), (3,)) + np.float64(1)'
    '; print(x.dtype, x.tolist())'
  )
  strange = {
    'JAX_ENABLE_X64': '1', 'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
    'JAX_DEFAULT_PRNG_IMPL': 'rbg', 'JAX_THREEFRY_PARTITIONABLE': '0',
    'JAX_RANDOM_SEED_OFFSET': '3', 'JAX_NUMPY_RANK_PROMOTION': 'allow',
  }  # fmt: skip
  plain, other = (
    subprocess.run(
      [sys.executable, '-c', script], cwd=toy.ROOT, text=True, check=True,
      capture_output=True, env={**os.environ, **variables},
    ).stdout
    for variables in ({}, strange)
  )  # fmt: skip
  assert plain == other and plain.startswith('float32')


def test_what_the_environment_may_change_is_recorded(monkeypatch):
  config = toy.get_config(toy.folder())
  mesh = sharding.make_mesh(data=4, model=2)
  before = provenance.of(config, mesh)
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
  with jax.default_matmul_precision('bfloat16'):
    now = provenance.of(config, mesh)
  assert now['environment'] == {'XLA_FLAGS': os.environ['XLA_FLAGS']}
  name = 'jax_default_matmul_precision'
  assert now['jax'][name] == 'bfloat16' != before['jax'][name]
