"""The command: a run becomes a folder, or one line says why not."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

from conftest import core, random_params
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
import toy

from bond_jax.data import tokenizer
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.types import TrainState
from bond_jax.weights import export, load, stacks
from bond_jax.weights import official as weights
from bond_jax.weights.huggingface import reader, writer

RANK, ALPHA = 2, 3.0


def adapters(seed):
  tree = jax.eval_shape(
    lambda: lora.init(toy.MODEL, jax.random.key(0), rank=RANK, targets='attn')
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), tree
  )


def leave(workdir, stage, trees):
  """What a finished stage leaves: checkpoints 3, 6, ...; the first is best."""
  os.makedirs(os.path.join(workdir, stage))
  with open(os.path.join(workdir, stage, 'summary.json'), 'w') as f:
    f.write('{}')
  with checkpoint.manager(os.path.join(workdir, stage, 'checkpoints')) as c:
    for i, tree in enumerate(trees):
      state = TrainState(np.int32(i), jax.device_put(tree), {}, {}, {})
      checkpoint.save(c, 3 * i + 3, state, {}, -i)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run that trained all weights, and one that trained adapters."""
  found = {}
  for name, rank in (('full', 0), ('low', RANK)):
    workdir = str(tmp_path_factory.mktemp('runs') / name)
    config = toy.get_config(toy.folder())
    config.model.lora.update(dict(rank=rank, alpha=ALPHA, targets='attn'))
    config.model.temperature = 0.7
    leave(workdir, 'sft', [random_params(toy.MODEL, 5)])
    draw = adapters if rank else lambda seed: random_params(toy.MODEL, seed)
    leave(workdir, 'train', [draw(6), draw(7)])
    with open(os.path.join(workdir, 'config.json'), 'w') as f:
      f.write(config.to_json_best_effort())
    with open(f'{toy.folder()}/train.jsonl') as f:
      texts = [json.loads(row)['text'] for row in f]
    tokenizer.train(texts, os.path.join(workdir, 'tokenizer.model'), 96)
    found[name] = workdir
  return found


def like():
  shapes = stacks.init_shapes(toy.MODEL)
  mesh = sharding.make_mesh(data=1, model=1)
  return sharding.tree_structs(shapes, mesh)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('which, seed', [('last', 7), ('best', 6), ('3', 6)])
def test_the_checkpoint_that_was_asked_for(runs, tmp_path, which, seed, capsys):
  out = str(tmp_path / 'out')
  export.main(runs['full'], out, which, 'hf', 'float32')
  same(reader.load(out, toy.MODEL, like()), random_params(toy.MODEL, seed))
  summary = toy.summary(out)
  assert (summary['step'], summary['checkpoint']) == (3 * seed - 15, which)
  assert summary['format'] == 'hf'
  assert out in capsys.readouterr().out
  with open(os.path.join(out, 'generation_config.json')) as f:
    assert json.load(f)['temperature'] == 0.7
  ours = os.path.join(runs['full'], 'tokenizer.model')
  theirs = os.path.join(out, 'tokenizer.model')
  assert tokenizer.load(ours).sha256 == tokenizer.load(theirs).sha256


@pytest.mark.parametrize('form', core(1, ['hf', 'official']))
def test_what_the_policy_started_from(runs, tmp_path, form):
  """The sft stage's parameters; with LoRA a fresh adapter adds nothing."""
  for name in ('full', 'low'):
    out = str(tmp_path / name)
    export.main(runs[name], out, 'reference', form, 'float32')
    same(weights.load(out, toy.MODEL, like()), random_params(toy.MODEL, 5))
    found = toy.summary(out)
    assert (found['step'], found['checkpoint']) == (0, 'reference')


def test_the_official_layout(runs, tmp_path):
  out = str(tmp_path / 'out')
  export.main(runs['full'], out, 'last', 'official', 'bfloat16')
  loaded = weights.load(out, toy.MODEL, like())
  same(loaded, random_params(toy.MODEL, 7))


@pytest.mark.parametrize('factor', core(1, [1.5, 0.0]))
def test_an_extrapolated_policy(runs, tmp_path, factor):
  """All weights so many times as far from where training started."""
  start = random_params(toy.MODEL, 5)
  config = dataclasses.replace(toy.MODEL, lora_scale=ALPHA / RANK)
  merged = lora.merge(config, start, adapters(7))
  ends = {'full': random_params(toy.MODEL, 7), 'low': merged}
  for name, end in ends.items():
    out = str(tmp_path / name)
    export.main(runs[name], out, 'last', 'official', 'float32', factor)
    jax.tree.map(
      lambda x, y, got: np.testing.assert_allclose(
        got, x + factor * (y - x), rtol=1e-5, atol=1e-6
      ),
      start,
      end,
      weights.load(out, toy.MODEL, like()),
    )
    assert toy.summary(out)['extrapolated'] == factor


@pytest.mark.parametrize('factor', [-0.5, float('nan'), float('inf')])
def test_factors_that_mean_nothing(runs, tmp_path, factor):
  out = str(tmp_path / 'out')
  with pytest.raises(UserError, match='--extrapolate='):
    export.main(runs['full'], out, 'last', 'hf', 'float32', factor)
  with pytest.raises(UserError, match='--checkpoint=reference'):
    export.main(runs['full'], out, 'reference', 'hf', 'float32', 1.5)
  assert not os.path.exists(out)


def test_no_way_leads_on_from_an_adapter():
  """Two adapters apart: no multiple of one of them."""
  config = toy.get_config(toy.folder())
  config.model.lora.update(dict(rank=RANK, weights='an/adapter'))
  with pytest.raises(UserError, match='an/adapter'):
    load.extrapolated(config, adapters(7), adapters(6), 1.5)
  tree = adapters(7)
  assert load.extrapolated(config, tree, adapters(6), 1.0) is tree


def test_adapters_merged_and_alone(runs, tmp_path):
  whole, low = str(tmp_path / 'whole'), str(tmp_path / 'low')
  official = str(tmp_path / 'official')
  export.main(runs['low'], whole, 'last', 'hf', 'float32')
  export.main(runs['low'], low, 'last', 'adapter', 'bfloat16')
  export.main(runs['low'], official, 'last', 'official', 'bfloat16')
  config = dataclasses.replace(toy.MODEL, lora_scale=ALPHA / RANK)
  expected = lora.merge(config, random_params(toy.MODEL, 5), adapters(7))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, reader.load(whole, toy.MODEL, like()), expected)
  loaded = weights.load(official, toy.MODEL, like())
  jax.tree.map(close, loaded, expected)
  with open(os.path.join(low, 'adapter_config.json')) as f:
    said = json.load(f)
  assert (said['r'], said['lora_alpha']) == (RANK, ALPHA)
  assert said['base_model_name_or_path'] == runs['low']
  tensors = load_file(os.path.join(low, 'adapter_model.safetensors'))
  assert {x.shape[0] for k, x in tensors.items() if 'lora_A' in k} == {RANK}
  modules = {k.split('.')[-3] for k in tensors}
  assert modules == {'q_proj', 'k_proj', 'v_proj', 'o_proj'}


def test_a_run_that_began_with_a_folder_of_theirs(runs, tmp_path):
  """Its tokenizer files come along; an adapter says that it is for it."""
  start, workdir = str(tmp_path / 'start'), str(tmp_path / 'run')
  spm = os.path.join(runs['low'], 'tokenizer.model')
  writer.export(
    random_params(toy.MODEL, 5), toy.MODEL, start, dtype='float32',
    tokenizer_path=spm,
  )  # fmt: skip
  with open(os.path.join(start, 'tokenizer.json'), 'w') as f:
    f.write('{"as": "it is"}')
  shutil.copytree(runs['low'], workdir)
  config = toy.get_config(toy.folder())
  config.model.lora.update(dict(rank=RANK, alpha=ALPHA, targets='attn'))
  config.tokenizer.path = config.weights = start  # the file is found there
  del config.sft
  with open(os.path.join(workdir, 'config.json'), 'w') as f:
    f.write(config.to_json_best_effort())
  out, low = str(tmp_path / 'out'), str(tmp_path / 'low')
  export.main(workdir, out, 'last', 'hf', 'float32')
  assert toy.listing(out)['tokenizer.json'] == b'{"as": "it is"}'
  config = dataclasses.replace(toy.MODEL, lora_scale=ALPHA / RANK)
  expected = lora.merge(config, random_params(toy.MODEL, 5), adapters(7))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, reader.load(out, toy.MODEL, like()), expected)
  export.main(workdir, low, 'last', 'adapter', 'float32')
  with open(os.path.join(low, 'adapter_config.json')) as f:
    assert json.load(f)['base_model_name_or_path'] == start


@pytest.mark.parametrize(
  'run, which, form, out, why',
  [
    ('full', '4', 'hf', 'x', 'there are 3, 6, and "last" and "best"'),
    ('full', 'last', 'adapter', 'x', 'was trained without LoRA'),
    ('full', 'last', 'hf', '', 'exists; name a local one'),
    ('none', 'last', 'hf', 'x', 'config.json .No such file'),
  ],
)
def test_what_cannot_be_exported(runs, tmp_path, run, which, form, out, why):
  workdir = runs.get(run, str(tmp_path / run))
  with pytest.raises(UserError, match=why) as e:
    export.main(workdir, os.path.join(tmp_path, out), which, form, 'float32')
  assert '\n' not in str(e.value)
  assert not os.listdir(tmp_path)


def test_a_run_that_is_not_finished(runs, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(runs['full'], workdir)
  (workdir / 'train' / 'summary.json').unlink()
  with pytest.raises(UserError, match='train stage has not finished'):
    export.main(str(workdir), str(tmp_path / 'x'), 'last', 'hf', 'float32')
  assert os.listdir(tmp_path) == ['run']


@pytest.mark.long
@pytest.mark.parametrize(
  'args, why',
  [
    (['--workdir=/no/run', '--out=x'], 'cannot read /no/run/config.json'),
    (['--workdir=r', '--out=x', '--format=onnx'], 'hf|adapter|official|gguf'),
  ],
)
def test_the_command_line_has_one_line_for_each_error(tmp_path, args, why):
  result = subprocess.run(
    [sys.executable, '-m', 'bond_jax.export', *args],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': toy.ROOT},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert why in result.stderr.strip().splitlines()[-1]
  assert 'Traceback' not in result.stderr
  assert not os.listdir(tmp_path)
