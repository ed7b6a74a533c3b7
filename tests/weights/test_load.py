"""Runs that start from the weights and the vocabulary of a released model."""

import dataclasses
import json
import os

from conftest import core
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import test_tokenizer
import toy

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import sample
from bond_jax.models import lora, policies
from bond_jax.models.gemma import model as gemma
from bond_jax.training import sft
from bond_jax.weights import identify, load, official
from bond_jax.weights.gguf import writer as gguf_writer
from bond_jax.weights.huggingface import adapter, reader, writer
from configs import gemma_jbond

VOCAB = 120  # pieces of the vocabulary with turns; the model has 128 rows


@pytest.fixture(scope='module')
def release(tmp_path_factory):
  """A folder as one downloads it: weights and a vocabulary."""
  folder = tmp_path_factory.mktemp('release')
  sizes = policies.make_sizes(gemma_config().model, VOCAB)
  params = jax.jit(lambda: gemma.init(sizes, jax.random.key(5)))()
  official.save_official(params, sizes, str(folder / 'weights'))
  content = test_tokenizer.with_turns().processor.serialized_model_proto()
  (folder / 'tokenizer.model').write_bytes(content)
  return str(folder), jax.device_get(params)


def gemma_config(folder='', rank=0):
  """What configs/gemma3_1b_jbond.py says, at the size of a test."""
  toy.get_config('')  # which names the toy model
  config = gemma_jbond.get_config(
    'toy', vocab_size=VOCAB, learning_rate=1e-2, lora_rank=rank
  )
  config.model.sizes = dict(vocab_size=128)
  config.weights = f'{folder}/weights'
  config.tokenizer.path = f'{folder}/tokenizer.model'
  config.data.name = f'{toy.folder()}/{{split}}.jsonl'
  config.reward.function = config.gold.function = 'bond_jax.rewards.text:vader'
  config.prompt.length, config.length, config.chunk = 64, 4, 32
  config.train.update(
      dict(steps=2, batch=8, micro_batches=1, save_every=1, probe_prompts=8,
           probe_completions=2)
  )  # fmt: skip
  config.train.optimizer.warmup_steps = 1
  config.evaluate.update(
      dict(prompts=8, policy_completions=2, reference_completions=4,
           at_once=2, samples_shown=2)
  )  # fmt: skip
  config.model.dtype = 'float32'
  return config


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.long
@pytest.mark.parametrize('rank, devices', [(0, 1), (2, 8)])
def test_a_run_from_weights(release, tmp_path, rank, devices):
  """Both stages, with rank from an adapter; saved is what is trained."""
  folder, params = release
  workdir = str(tmp_path / 'run')
  config = gemma_config(folder, rank)
  config.model.lora.exact_anchor = bool(rank)
  config.mesh.data = devices
  sizes = policies.make_sizes(config.model, VOCAB)
  policy = policies.make_policy(config.model, VOCAB)
  if rank:
    rng = np.random.default_rng(1)
    start = jax.tree.map(
      lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32),
      jax.eval_shape(policy.init, jax.random.key(0)),
    )
    config.model.lora.weights = low = str(tmp_path / 'low')
    adapter.export_adapter(start, sizes, low, base=folder)
  for stage in ('train', 'evaluate'):
    toy.run(stage, config, workdir)
  mesh = sharding.make_mesh(**config.mesh)
  reference, base = load.load_frozen(config, policy, workdir, mesh)
  first, last = (toy.saved(workdir, 'train', step) for step in (1, 2))
  if rank:
    same(base, params)
    same(reference, start)
    # The anchor is of products: each the average of two.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    anchor = lora.dense(sizes, reference)
    jax.tree.map(close, first['rest']['anchor'], jax.device_get(anchor))
  else:
    assert base == {}
    same(reference, params)
  # The first step is the warm-up's, at a rate of 0.
  same(first['params'], jax.device_get(reference))
  assert abs(toy.rows(workdir, 'train')[0]['kl/reference']) < 1e-5
  moved = jax.tree.map(
    lambda a, b: (a != b).any(), last['params'], first['params']
  )
  assert all(jax.tree.leaves(moved))
  summary = toy.summary(workdir)
  assert summary['steps'] == 2 and 'sft_validation_loss' not in summary
  with open(os.path.join(workdir, 'completions.jsonl')) as f:
    rows = [json.loads(line) for line in f]
  # The prompt as the reward sees it: the user's words.
  with open(config.data.name.replace('{split}', 'test')) as f:
    said = [json.loads(line)['text'] for line in f]
  assert all(row['prompt'] == said[row['id']] for row in rows)
  assert os.path.exists(os.path.join(workdir, 'report.html'))


def test_the_scale_is_alpha_over_rank():
  config = gemma_config(rank=4)
  config.model.lora.alpha = 6.0
  assert policies.make_sizes(config.model, VOCAB).lora_scale == 1.5
  config.model.lora.rank = 0
  assert policies.make_sizes(config.model, VOCAB).lora_scale is None


def test_a_conversation_with_released_weights(release, tmp_path, capsys):
  folder, _ = release
  config = gemma_config(folder)
  tokenizer, draw = sample.open_run(config, str(tmp_path), 'reference')
  messages = [{'role': 'user', 'content': 'the film'}]
  pieces = test_tokenizer.tokenizer.chat(tokenizer, messages, system=False)
  row = {'messages': messages}
  said, (text,), context = draw(row, pieces, 3, 7)
  assert said == ['the film'] and context.rows == [row] and context.turns
  sample.from_run(
      config, str(tmp_path), prompt='the film', n=3, best=False,
      checkpoint='reference', seed=7,
  )  # fmt: skip
  shown = ''.join(f'[{i + 1}] {t}\n' for i, t in enumerate(text))
  assert capsys.readouterr().out == shown


def test_weights_alone_say_what_a_run_says(release, tmp_path, monkeypatch):
  """The release's name tells that it answers; its shapes tell what it is."""
  folder, params = release
  wanted = gemma_config(folder)
  sizes = dataclasses.replace(toy.MODEL, vocab_size=128)
  monkeypatch.setitem(gemma.CONFIGS, 'toy', sizes)
  found = identify.identify(f'{folder}/weights', '')
  assert not found.turns and found.tokenizer == f'{folder}/tokenizer.model'
  named = tmp_path / 'toy-it'
  os.symlink(f'{folder}/weights', named)
  with pytest.raises(
    UserError, match='no tokenizer.model beside it; give --tok'
  ):
    identify.identify(str(named), '')
  found = identify.identify(str(named), f'{folder}/tokenizer.model')
  assert found.turns
  config = sample.config_of(found, wanted.length, 1.0)
  assert policies.make_sizes(config.model, VOCAB) == policies.make_sizes(
    wanted.model, VOCAB
  )
  row = {'messages': [{'role': 'user', 'content': 'the film'}]}
  pieces = test_tokenizer.tokenizer.chat(
    test_tokenizer.with_turns(), row['messages'], system=False
  )
  _, ours = sample.open_weights(config)
  _, theirs = sample.open_run(wanted, str(tmp_path), 'reference')
  assert ours(row, pieces, 3, 7)[1] == theirs(row, pieces, 3, 7)[1]
  other = {**params, 'final_norm': {'scale': np.ones(3, np.float32)}}
  official.save_official(other, None, str(tmp_path / 'other'))
  with pytest.raises(UserError, match='holds no model of'):
    identify.identify(str(tmp_path / 'other'), '')


def test_weights_of_others_alone(release, tmp_path, capsys):
  """Hugging Face and GGUF say their sizes, and whether they have turns."""
  folder, params = release
  toy.get_config('')
  sizes = policies.make_sizes(gemma_config().model, VOCAB)
  path = f'{folder}/tokenizer.model'
  kwargs = dict(dtype='float32', tokenizer_path=path)
  writer.export(params, sizes, str(tmp_path / 'hf'), **kwargs)
  gguf_writer.export(params, sizes, str(tmp_path / 'gguf'), **kwargs)
  files = str(tmp_path / 'hf'), str(tmp_path / 'gguf' / 'model.gguf')
  shown = []
  for file in files:
    found = identify.identify(file, '')
    assert found.turns
    config = sample.config_of(found, 4, 1.0)
    assert config.prompt.kind == 'turn'
    # The scales of norms lose a bit in GGUF: not the same draws, but texts.
    model = sample.open_weights(config)
    sample.talk(config, model, prompt='the film', n=3, seed=7)
    shown.append(capsys.readouterr().out)
  assert all('[3] ' in text for text in shown), shown
  described = tmp_path / 'hf' / 'tokenizer_config.json'
  base = json.loads(described.read_text())
  del base['chat_template']
  described.write_text(json.dumps(base))
  assert not identify.identify(files[0], '').turns
  os.remove(tmp_path / 'hf' / 'tokenizer.model')
  assert identify.identify(files[0], path).tokenizer == path


@pytest.mark.long
def test_the_command_with_weights_alone(release):
  folder, params = release
  sizes = policies.make_sizes(gemma_config().model, VOCAB)
  out = os.path.join(folder, 'gguf')
  kwargs = dict(dtype='float32', tokenizer_path=f'{folder}/tokenizer.model')
  gguf_writer.export(params, sizes, out, **kwargs)
  weights = f'--weights={out}/model.gguf'
  for more, status, says in (
    (['--prompt=the film', '--n=2', '--length=4'], 0, '[2] '),
    (['--prompt=the film', '--best'], 2, '--best is for runs'),
    (['--prompt=x', '--weights=/nowhere.gguf'], 2, 'no folder or GGUF file'),
    (['--prompt=x', '--workdir=runs/x'], 2, '--workdir is for runs'),
  ):
    process = toy.command('sample', weights, *more)
    text = ''.join(process.communicate())
    assert process.returncode == status and says in text, text


def test_supervised_training_starts_from_weights(release, tmp_path):
  folder, params = release
  config = gemma_config(folder)
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.make_policy(config.model, VOCAB, full=True)
  optimizer = sft.optimizer_lib.adam(steps=2, **config.train.optimizer)
  state = sft.init_state(config, policy, optimizer, mesh)
  same(state.params, params)


@pytest.mark.parametrize(
  'path, value, says',
  [
    ('weights', '/nowhere', '/nowhere is no folder'),
    ('tokenizer.path', '/nowhere', 'cannot read the tokenizer /nowhere'),
    ('tokenizer.sha256', 'f' * 64, 'it is the vocabulary of another model'),
    ('tokenizer.vocab_size', 119, 'has 120 pieces, .* of another model'),
    ('model.sizes.features', 32, 'not hold the model of the config'),
    ('prompt.length', 8, '0 distinct prompts of prompt.length 8'),
    ('prompt.kind', 'turns', "prompt.kind is 'turns', expected 'opening'"),
    ('model.lora.rank', -1, 'lora.rank is -1, expected a whole number, 0'),
    ('model.lora.rank', 1.5, 'lora.rank is 1.5, expected a whole number'),
  ],
)
def test_what_does_not_fit_is_one_error(release, tmp_path, path, value, says):
  config = gemma_config(release[0], rank=1)
  node = config
  *above, last = path.split('.')
  for key in above:
    node = node[key]
  with config.ignore_type(), config.unlocked():
    node[last] = value
  with pytest.raises(UserError, match=says):
    toy.run('train', config, str(tmp_path / 'run'))


@pytest.mark.parametrize('rank', [0, 2])
def test_padding_beyond_the_vocabulary_is_cut(release, tmp_path, rank):
  """Under all weights that are trained, and under adapters."""
  _, params = release
  config = gemma_config(rank=rank)
  sizes = policies.make_sizes(config.model, VOCAB)
  folder = tmp_path / 'x'
  writer.export(params, sizes, str(folder), dtype='float32')
  tensors = load_file(folder / reader.SINGLE)
  table = tensors['model.embed_tokens.weight']
  padding = np.ones((60, table.shape[1]), np.float32)
  tensors['model.embed_tokens.weight'] = np.concatenate([table, padding])
  save_file(tensors, folder / reader.SINGLE)
  config.weights = str(folder)
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.make_policy(config.model, VOCAB)
  frozen = load.load_frozen(config, policy, str(tmp_path), mesh)
  full = frozen.base if rank else frozen.reference
  found = np.asarray(full['embedder'].pop('input_embedding'))
  np.testing.assert_array_equal(found[:VOCAB], table)
  assert found.shape == (128, table.shape[1])
  rest = {**params, 'embedder': {}}
  same(full, rest)


@pytest.mark.parametrize(
  'path, says, not_said',
  [
    ('', 'cannot read .*run/tokenizer.model.*sft stage', 'release'),
    ('mine', 'cannot read .*mine.*tokenizer.model of the original', 'sft'),
  ],
)
def test_whose_vocabulary_is_missing(tmp_path, path, says, not_said):
  config = gemma_config()
  config.tokenizer.path = path and str(tmp_path / path)
  with pytest.raises(UserError, match=says) as e:
    load.load_tokenizer(config, str(tmp_path / 'run'))
  assert not_said not in str(e.value)


@pytest.mark.long
@pytest.mark.parametrize(
  'name', ['gemma_2b', 'gemma_7b', 'gemma3_270m', 'gemma3_1b', 'gemma3_4b_lora']
)
def test_configs_ask_for_what_they_need(name):
  out = toy.command(
    'train', f'--config=configs/{name}_jbond.py', '--workdir=/nowhere/run'
  )
  _, error = out.communicate()
  assert out.returncode == 2 and error.count('\n') == 1
  for flag in ('weights', 'tokenizer.path', 'data.name', 'reward.function'):
    assert f'--config.{flag}' in error


@pytest.mark.parametrize(
  'stage, config, flags',
  core(
    0,
    [
      (
        'train',
        'xsum_bond.py:backward_weight=1',
        'reward.args.path train.steps',
      ),
      ('sft', 'xsum_sft.py', 'weights tokenizer.path'),
      ('train', 'ultrafeedback_wind.py:algorithm=sppo', 'data.name weights'),
    ],
  ),
)
def test_the_papers_settings_ask_too(stage, config, flags):
  out = toy.command(stage, f'--config=configs/{config}', '--workdir=/nowhere/x')
  _, error = out.communicate()
  assert out.returncode == 2 and error.count('\n') == 1
  assert all(f'--config.{flag}' in error for flag in flags.split())
