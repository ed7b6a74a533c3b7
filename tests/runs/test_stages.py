"""The pieces that a config names, and what is said of a wrong one."""

import json
import os

import jax
import language
import pytest
import toy

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import policies
from bond_jax.rewards import make
from bond_jax.runs import environment, files, stages
from bond_jax.runs.settings import configs
from bond_jax.training import checks, setups
from bond_jax.weights import load
from configs import demo, figures


@pytest.fixture
def config(tmp_path):
  toy.write_data(tmp_path)
  return toy.get_config(str(tmp_path))


def change(config, path, value):
  """Sets `path` (a.b.c) of a config, also one that the demo does not have."""
  *sections, key = path.split('.')
  for section in sections:
    config = config[section]
  with config.unlocked(), config.ignore_type():
    config[key] = value


def test_the_toy_passes(config):
  config.mesh.data = 8
  assert dict(checks.check(config).shape) == {'data': 8, 'model': 1}


@pytest.mark.parametrize(
  'path, value, says',
  [
    ('mesh.data', 3, 'mesh data=3 x model=1 needs 3 devices'),
    (
      'sampling_mesh.data',
      4,
      'sampling_mesh data=4 x model=1 has to use the 8',
    ),
    ('sampling_mesh.model', 3, 'sampling_mesh data=2 x model=3 .* 8 devices'),
    ('mesh.data', 0, 'data=0 x model=1: both must be 1 or more, data=-1 apart'),
    ('mesh.model', 0, 'data=8 x model=0: both must be 1 or more'),
    ('mesh.model', -1, 'data=8 x model=-1: both must be 1 or more'),
    ('sft.batch', 12, r'sft.batch \(12\) .* multiple of 8.*use 8 or 16'),
    ('train.batch', 4, r'train.batch \(4\) .* multiple of 8.*use 8'),
    ('train.micro_batches', 3, r'train.batch \(8\) .* multiple of 24'),
    ('train.epochs', 2, "jbond trains on the policy's .*train.epochs to 1"),
    ('train.rollouts', 3, "jbond trains on the policy's .* set train.rollo"),
    ('task', 'bond_jax.text_task', "expected 'text' or 'enumerable'"),
    ('train.probe_prompts', 9, r'train.probe_prompts \(9\) .* use 8 or 16'),
    ('evaluate.prompts', 4, r'evaluate.prompts \(4\) .* use 8'),
    ('train.steps', 0, r'config.train.steps is 0, expected a whole number, 1'),
    ('model.name', 'gemma9', "model.name is 'gemma9'; known are .*gemma3_tiny"),
    ('model.sizes.kv_heads', 3, r'heads \(2\) .* multiple of kv_heads \(3\)'),
    ('tokenizer.vocab_size', 97, r'vocab_size \(97\) is larger than the 96'),
    ('algorithm.name', 'ppo', "algorithm.name is 'ppo'; known are .*jbond"),
    ('algorithm.name', '../jbond', r"is '../jbond'; known are .*jbond"),
    (
      'algorithm.args.gamma',
      0.5,
      "algorithm.args has 'gamma', .*; known are anchor_rate, backward_weight,"
      ' drift_weight, num_anchor',
    ),
    ('algorithm.args.backward_weight', 2, r'must lie in \[0, 1\], got 2'),
    ('reward.function', 'toy', 'write it as "module:function"'),
    ('reward.function', 'no_such_module:f', "cannot import 'no_such_module'"),
    ('reward.function', 'toy:prize', "'toy' has no function 'prize'"),
    ('reward.args.scale', 3, "toy:reward: .*'scale'.* allowed are path, fuse"),
    ('gold.args.x', 3, 'rewards.text:vader: .* allowed are none'),
  ],
)
def test_a_wrong_setting_is_said_before_anything_is_written(
  config, tmp_path, path, value, says
):
  config.mesh.data = 8
  change(config, path, value)
  workdir = str(tmp_path / 'run')
  for stage in ('sft', 'train', 'evaluate'):
    with pytest.raises(UserError, match=says) as e:
      toy.run(stage, config, workdir)
    assert '\n' not in str(e.value)
    # So that the mended config is not refused in favour of the wrong one.
    assert not os.path.exists(workdir)


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
@pytest.mark.parametrize(
  'content, says',
  [
    (b'', '{}.jsonl is empty'),
    (b'{"text": "a"}\nnot json\n', '{}.jsonl:2: not JSON in UTF-8'),
    (b'{"text": "a"}\n\n{"text"\n', '{}.jsonl:3: not JSON in UTF-8'),
    (b'{"text": "a"}\n{"text": 3}\n', '{}.jsonl:2: expected .* string "text"'),
    (b'{"text": "\xff"}\n', '{}.jsonl:1: not JSON in UTF-8'),
    (None, 'cannot read .*{}.jsonl: No such file'),
  ],
)
def test_broken_data_is_said_with_its_line(
  config, tmp_path, split, content, says
):
  path = tmp_path / f'{split}.jsonl'
  path.unlink() if content is None else path.write_bytes(content)
  with pytest.raises(UserError, match=says.format(split)) as e:
    toy.run('sft', config, str(tmp_path / 'run'))
  assert '\n' not in str(e.value)
  assert not os.path.exists(tmp_path / 'run')


@pytest.mark.parametrize('name', ['probe_prompts', 'probe_completions'])
def test_a_text_task_needs_a_probe(config, name):
  with config.unlocked():
    del config.train[name]
  with pytest.raises(UserError, match=f"config.train has no '{name}'"):
    checks.check(config)


def test_a_reward_knows_the_workdir(config):
  with pytest.raises(UserError, match='no reward model at here/reward/model'):
    make.make_reward(config, config.reward, 'here')


def test_a_reward_that_cannot_be_made_is_one_line(
  config, tmp_path, monkeypatch
):
  (tmp_path / 'mine.py').write_text(
    'def f():\n  raise OSError("the judge\\nis out")\n'
    'def g(*, braces):\n'
    '  return lambda prompts, completions, context: [[len(braces)]]\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  change(config, 'reward.args', {})
  config.reward.function = 'mine:f'
  with pytest.raises(UserError, match='mine:f raised OSError: the judge is'):
    make.make_reward(config, config.reward, 'here')
  config.reward.function = 'mine:g'
  change(config, 'reward.args', {'braces': '{x} {workdir}'})
  reward = make.make_reward(config, config.reward, 'here')
  assert reward(['a'], [['b']], None) == [[len('{x} here')]]


def test_a_stage_works_once(config, tmp_path, capsys):
  workdir = str(tmp_path / 'run')
  calls = []

  def work(run, **asked):
    calls.append(asked)
    return {'loss': 0.25, 'phases': {'a': 1}}

  run = lambda **asked: stages.stage(
    'sft',
    work,
    config,
    workdir,
    folder='sft',
    open_run=checks.open_run,
    **asked,
  )
  run(checkpoint='last')
  written = toy.listing(workdir)
  assert sorted(written) == [
    'config.json', 'sft/summary.json', 'version.json'
  ]  # fmt: skip
  summary = json.loads(written['sft/summary.json'])
  assert summary['loss'] == 0.25
  assert summary['checkpoint'] == 'last'
  assert summary['versions']['jax']
  assert 'loss' in capsys.readouterr().out
  run(checkpoint='last')
  assert capsys.readouterr().out == (
    f'sft: finished already, see {workdir}/sft/summary.json\n'
  )
  with pytest.raises(UserError, match="checkpoint: 'last' -> 'best' asked"):
    run(checkpoint='best')
  config.seed = 1
  with pytest.raises(UserError, match='another config .seed: 0 -> 1.'):
    run(checkpoint='last')
  assert calls == [{'checkpoint': 'last'}]
  assert toy.listing(workdir) == written


def test_a_stage_that_fails_is_not_done(config, tmp_path):
  workdir = str(tmp_path / 'run')

  def work(run):
    raise UserError('no')

  for _ in range(2):
    with pytest.raises(UserError, match='no'):
      stages.stage(
        'sft', work, config, workdir, folder='sft', open_run=checks.open_run
      )
  assert sorted(toy.listing(workdir)) == ['config.json', 'version.json']


def test_params_of_an_unfinished_stage_are_refused(config, tmp_path):
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  mesh = sharding.make_mesh(**config.mesh)
  (tmp_path / 'sft' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='the sft stage has not finished'):
    load.load_params(policy, str(tmp_path), 'sft', 'last', mesh)
  files.write_json(str(tmp_path / 'sft' / 'summary.json'), {})
  with pytest.raises(UserError, match='holds no checkpoint'):
    load.load_params(policy, str(tmp_path), 'sft', 'last', mesh)


def test_no_two_streams_or_seeds_share_a_key():
  streams = ('sft', 'train', 'probe', 'evaluate', 'reference')
  keys = [configs.key(seed, stream) for seed in (0, 1) for stream in streams]
  found = {tuple(jax.random.key_data(key).tolist()) for key in keys}
  assert len(found) == len(keys)
  assert configs.key(1, 'probe') == configs.key(1, 'probe')


# -- the enumerable language --------------------------------------------------


@pytest.mark.parametrize('stage', ['sft', 'reward_model', 'evaluate'])
def test_a_stage_that_a_config_lacks_is_one_line(tmp_path, stage):
  workdir = str(tmp_path / 'run')
  config = language.full_config('algorithm=jbond')
  with pytest.raises(UserError, match=f'has no {stage} section') as e:
    toy.run(stage, config, workdir)
  assert '\n' not in str(e.value)
  assert not os.path.exists(workdir)


@pytest.mark.parametrize('stage', toy.STAGES)
def test_a_config_of_several_runs_is_none_of_a_stage(tmp_path, stage):
  with pytest.raises(UserError, match="config has 'figure', which nothing"):
    toy.run(stage, figures.get_config('bond_2'), str(tmp_path / 'run'))
  assert not os.path.exists(tmp_path / 'run')


def test_every_algorithm_has_its_settings_for_the_language():
  """As many as there are files, and none that its file does not know."""
  folder = os.path.join(toy.ROOT, 'bond_jax', 'algorithms')
  names = [
    f[:-3] for f in os.listdir(folder) if f.endswith('.py') and f[0] != '_'
  ]
  for name in names:
    checks.check(language.full_config(f'algorithm={name}'))


def test_every_algorithm_runs_on_the_demo_s_task_on_one_budget():
  folder = os.path.join(toy.ROOT, 'bond_jax', 'algorithms')
  names = {
    f[:-3] for f in os.listdir(folder) if f.endswith('.py') and f[0] != '_'
  }
  assert names == set(demo.ALGORITHMS)
  for name in names:
    config = demo.get_config(f'algorithm={name}')
    algorithm, train = setups.make_algorithm(config), config.train
    drawn = algorithm.num_policy + algorithm.num_anchor
    assert train.steps * train.batch * drawn == 92_160, name
    assert train.steps % train.save_every == 0


@pytest.mark.parametrize('name', figures.FIGURES)
def test_every_run_of_a_figure_is_a_run(name):
  config = figures.get_config(name)
  assert config.runs.keys() == config.labels.keys()
  for run in config.runs.values():
    checks.check(run)


@pytest.mark.parametrize('argument', ['algorithm=nope', 'jbond', ''])
def test_an_unknown_algorithm_is_refused_with_those_there_are(argument):
  config = language.full_config(argument)
  with pytest.raises(UserError, match='known are best_of_n, .*bond, .*wind'):
    checks.check(config)


@pytest.mark.parametrize(
  'path, value, says',
  [
    ('enumerable.vocab', 16, 'make more than 3000 completions'),
    ('length', 10**15, 'make more than 3000 completions'),
    ('sampling_mesh.data', 2, 'has to use the 1 devices of the mesh'),
    ('train.batch', 12, r'train.batch \(12\) must be a multiple of .* \(8\)'),
    (
      'algorithm.args.beta',
      0.5,
      "'beta', .*; known are anchor_rate, backward_w",
    ),
  ],
)
def test_a_language_that_is_none(path, value, says):
  config = language.full_config('algorithm=jbond')
  change(config, path, value)
  with pytest.raises(UserError, match=says):
    checks.check(config)


@pytest.mark.parametrize(
  'backend, asked, kept',
  [
    ('tpu', None, '~/.cache/bond_jax'),
    ('gpu', '/x', '/x'),
    ('cpu', '/x', '/x'),
  ],
)
def test_where_compilations_are_kept(backend, asked, kept):
  assert folder_of_programs(backend, asked) == os.path.expanduser(kept)


def test_another_kind_of_cpu_has_programs_of_its_own(monkeypatch):
  """A program with instructions that a CPU lacks would end the process."""
  real = environment.cpu()
  assert str(os.cpu_count()) in real.split('\n')
  ours = folder_of_programs('cpu', None)
  assert ours == folder_of_programs('cpu', None)
  assert os.path.dirname(ours) == os.path.expanduser('~/.cache/bond_jax')
  for other in real.replace('sse', 'xxx'), real + ' avx512_bf16':
    monkeypatch.setattr(environment, 'cpu', lambda other=other: other)
    assert (folder_of_programs('cpu', None) == ours) == (other == real)


def folder_of_programs(backend, asked):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', asked)
    environment.keep_compilations(backend)
    return jax.config.jax_compilation_cache_dir
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


@pytest.mark.parametrize(
  'path', ['train.batch', 'train.probe_prompts', 'evaluate.prompts']
)
def test_what_is_drawn_divides_into_the_parts_that_draw(config, path):
  """Of the sampling mesh there may be more than of the mesh."""
  config.mesh = dict(data=2, model=4)
  config.sampling_mesh = dict(data=8, model=1)
  config.train.batch = config.train.probe_prompts = config.evaluate.prompts = 16
  checks.check(config)
  change(config, path, 4)
  with pytest.raises(UserError, match=rf'{path} \(4\) must be .* of 8'):
    checks.check(config)


def test_a_local_layer_sees_something(config):
  change(config, 'model.name', 'gemma_2b')
  change(config, 'model.sizes.pattern', ('local',))
  with pytest.raises(UserError, match='local layers need a window'):
    checks.check(config)
  change(config, 'model.sizes.window', 4)
  checks.check(config)
