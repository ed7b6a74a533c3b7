"""Hugging Face folders into shards: bit for bit, or one clear error."""

import dataclasses
import json
import os
import sys

from conftest import core
from folders import (
  change,
  CONFIGS,
  export,
  exported,
  like_of,
  mesh_of,
  params_of,
  read,
  same,
)
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import toy

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models.gemma import configs
from bond_jax.models.gemma import model as gemma
from bond_jax.weights import stacks
from bond_jax.weights.huggingface import config_json, reader, writer

# -- Round trips


@pytest.mark.parametrize(
  'name, shard_bytes',
  core(1, [('gemma3', 10**9), *((name, 3000) for name in CONFIGS)]),
)
def test_out_of_eight_devices_and_into_four(tmp_path, name, shard_bytes):
  config, params = params_of(name)
  on_eight = jax.device_put(params, sharding.tree_shardings(params, mesh_of()))
  path = str(tmp_path / 'out')
  export(on_eight, config, path, shard_bytes, dtype='float32')
  files = [f for f in os.listdir(path) if f.endswith('.safetensors')]
  assert (len(files) > 2) == (shard_bytes < 10**9)
  for mesh in (mesh_of(), mesh_of(data=2, model=2)):
    like = like_of(config, mesh)
    loaded = reader.load(path, config, like)
    same(loaded, params)
    jax.tree.map(lambda x, s: _check_shards(x, s.sharding), loaded, like)
    table = loaded['embedder']['input_embedding']
    assert table.sharding.device_set == set(mesh.devices.flat)
    assert table.addressable_shards[0].data.size < table.size


def _check_shards(x, wanted):
  assert x.sharding == wanted
  assert {s.data.shape for s in x.addressable_shards} == {
    wanted.shard_shape(x.shape)
  }


@pytest.mark.parametrize('name', ['gemma2', 'gemma1_multi_head'])
def test_any_axis_may_be_split(tmp_path, name):
  """Copies and heads' insides too, which no rule of ours splits."""
  config, params = exported(name, tmp_path / 'x')
  mesh = sharding.make_mesh(data=4, model=2)

  def split(struct):
    axes = [None] * len(struct.shape)
    if struct.shape[-1] % 4 == 0:
      axes[-1] = 'data'
    if len(axes) > 2 and struct.shape[1] % 2 == 0:  # [layers, copies, ...]
      axes[1] = 'model'
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.ShapeDtypeStruct(
      struct.shape,
      struct.dtype,
      sharding=jax.sharding.NamedSharding(mesh, spec),
    )

  like = jax.tree.map(split, stacks.init_shapes(config))
  same(reader.load(str(tmp_path / 'x'), config, like), params)


@pytest.mark.parametrize('name', CONFIGS)
def test_theirs_to_ours_to_theirs(tmp_path, name):
  """In bfloat16, as the releases are, and by way of float32 parameters."""
  config, _ = exported(name, tmp_path / 'a', 'bfloat16', shard_bytes=3000)
  loaded = reader.load(str(tmp_path / 'a'), config, like_of(config, mesh_of()))
  export(loaded, config, tmp_path / 'b', 3000, dtype='bfloat16')
  a, b = toy.listing(tmp_path / 'a'), toy.listing(tmp_path / 'b')
  assert a == b
  assert len(a) > 4


@pytest.mark.parametrize('source', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('wanted', ['float32', 'bfloat16'])
def test_dtypes_are_cast_once(tmp_path, source, wanted):
  config, _ = exported('gemma1_multi_head', tmp_path / 'x')
  file = str(tmp_path / 'x' / reader.SINGLE)
  tensors = {k: x.astype(source) for k, x in load_file(file).items()}
  save_file(tensors, file)
  loaded = reader.load(
    str(tmp_path / 'x'), config, like_of(config, mesh_of(), wanted)
  )
  table = loaded['embedder']['input_embedding']
  expected = tensors['model.embed_tokens.weight'].astype(wanted)
  np.testing.assert_array_equal(np.asarray(table), expected)
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(wanted)}


# -- What is not ours


def test_rows_that_no_token_uses_are_zero_wherever_a_shard_begins(tmp_path):
  config, _ = exported('gemma2', tmp_path / 'x')
  assert (config.vocab_size, config.used_vocab) == (22, 17)
  config = dataclasses.replace(config, vocab_size=48)  # a shard of zeros alone
  like = like_of(config, mesh_of(data=1, model=8))
  table = reader.load(str(tmp_path / 'x'), config, like)['embedder']
  found = load_file(tmp_path / 'x' / reader.SINGLE)['model.embed_tokens.weight']
  out = np.asarray(table['input_embedding'])
  np.testing.assert_array_equal(out[:17], found)
  assert not out[17:].any()


@pytest.mark.parametrize(
  'prefix', ['language_model.model.', 'model.language_model.']
)
def test_the_text_model_of_one_that_sees_images(tmp_path, prefix):
  """Its vision tensors are not even understood; the rows for images go."""
  config, params = exported('gemma3', tmp_path / 'x')
  folder = tmp_path / 'x'
  tensors = load_file(folder / reader.SINGLE)
  tensors = {prefix + k.removeprefix('model.'): x for k, x in tensors.items()}
  name = f'{prefix}embed_tokens.weight'
  tensors[name] = np.concatenate([tensors[name], np.ones((3, 16), 'f4')])
  vision = (
    'model.vision_tower.' if 'language' in prefix[6:] else 'vision_tower.'
  )
  tensors[f'{vision}patch.weight'] = np.ones(3, 'i4')
  tensors['lm_head.weight'] = tensors[name]
  save_file(tensors, folder / reader.SINGLE)
  # The head is a matter of the whole model, to transformers as well.
  text = {**read(folder), 'vocab_size': 14, 'tie_word_embeddings': False}
  text.pop('architectures')
  raw = {
    'architectures': ['Gemma3ForConditionalGeneration'],
    'model_type': 'gemma3',
    'text_config': text,
    'vision_config': {},
  }
  (folder / 'config.json').write_text(json.dumps(raw))
  same(reader.load(str(folder), config, like_of(config, mesh_of())), params)


HEADS = [
  (name, head)
  for head in (True, False)
  for name in ('gemma2', 'gemma3', 'gemma1_multi_head')
]


@pytest.mark.parametrize('name, head', core(1, HEADS))
def test_rows_beyond_the_vocabulary_are_cut(tmp_path, name, head):
  """And never drawn, where we keep some; and out again without them."""
  config, _ = exported(name, tmp_path / 'x')
  used = config_json.vocab_rows(config)
  tensors = load_file(tmp_path / 'x' / reader.SINGLE)
  table = tensors['model.embed_tokens.weight']
  config = dataclasses.replace(config, used_vocab=used, vocab_size=used + 5)
  for rows in (used + 3, used + 58):
    more = np.ones((rows - used, config.features), 'f4')
    padded = np.concatenate([table, more])
    tensors['model.embed_tokens.weight'] = padded
    if head:
      tensors['lm_head.weight'] = padded
    save_file(tensors, tmp_path / 'x' / reader.SINGLE)
    change(tmp_path / 'x', vocab_size=rows)
    loaded = reader.load(
      str(tmp_path / 'x'), config, like_of(config, mesh_of())
    )
    found = np.asarray(loaded['embedder']['input_embedding'])
    np.testing.assert_array_equal(found[:used], table)
    out = tmp_path / f'out{rows}'
    writer.export(loaded, config, str(out), dtype='float32')
    whole = load_file(out / reader.SINGLE)
    np.testing.assert_array_equal(whole['model.embed_tokens.weight'], table)
    assert read(out)['vocab_size'] == used
    policy = gemma.make(
      config, temperature=1.0, dtype='float32', scan=False, remat='none'
    )
    hidden = np.ones((1, config.features), np.float32)
    assert (np.asarray(policy.logits(loaded, hidden))[0, used:] < -1e9).all()


# -- Several files that claim to be the model: transformers' choice, or none


def stale(folder, shards=True):
  """An index of an earlier save, with its shards or without."""
  tensors = load_file(folder / reader.SINGLE)
  file = 'model-00001-of-00001.safetensors'
  index = {'metadata': {}, 'weight_map': dict.fromkeys(tensors, file)}
  (folder / reader.INDEX).write_text(json.dumps(index))
  if shards:
    save_file({k: 0 * x for k, x in tensors.items()}, folder / file)


BESIDE = {
  'an index with shards': stale,
  'an index without': lambda f: stale(f, shards=False),
  'no index at all': lambda f: (f / reader.INDEX).write_text('{'),
  'a pickle': lambda f: (f / 'pytorch_model.bin').write_bytes(b'old'),
  'another precision': lambda f: save_file(
    {k: 0 * x for k, x in load_file(f / reader.SINGLE).items()},
    f / 'model.fp16.safetensors',
  ),
  'a checkpoint in a folder': lambda f: exported('gemma2', f / 'checkpoint-9'),
}


@pytest.mark.parametrize('what', BESIDE)
def test_one_file_comes_first(tmp_path, what):
  config, params = exported('gemma3', tmp_path / 'x')
  BESIDE[what](tmp_path / 'x')
  same(
    reader.load(str(tmp_path / 'x'), config, like_of(config, mesh_of())), params
  )


def test_an_index_comes_before_a_pickle(tmp_path):
  config, params = exported('gemma3', tmp_path / 'x', shard_bytes=3000)
  (tmp_path / 'x' / 'pytorch_model.bin').write_bytes(b'old')
  same(
    reader.load(str(tmp_path / 'x'), config, like_of(config, mesh_of())), params
  )


def test_a_tensor_in_two_shards(tmp_path):
  """The later file's, whichever the index names."""
  config, _ = exported('gemma3', tmp_path / 'x', shard_bytes=3000)
  twice(tmp_path / 'x')
  loaded = reader.load(str(tmp_path / 'x'), config, like_of(config, mesh_of()))
  assert (np.asarray(loaded['final_norm']['scale']) == 9).all()


def twice(folder):
  where = read(folder, reader.INDEX)['weight_map']
  last = folder / max(where.values())
  assert last.name != where['model.norm.weight']
  nines = {'model.norm.weight': np.full(16, 9, 'f4')}
  save_file({**load_file(last), **nines}, last)


def second(folder):
  """Another text model, under the names that it has beside an encoder."""
  tensors = load_file(folder / reader.SINGLE)
  prefix = 'language_model.model.'
  add(
    folder,
    **{prefix + k.removeprefix('model.'): 0 * x for k, x in tensors.items()},
  )


RIVALS = {
  'an adapter': (
    lambda f: (f / 'adapter_config.json').write_text('{}'),
    'has adapter_config.json, .* model.lora.weights',
  ),
  'a distributed save': (
    lambda f: (f / 'shard-00001-model-00001-of-00001.safetensors').touch(),
    'has shard-00001-model-00001',
  ),
  'a file by name': (
    lambda f: change(f, transformers_weights='other.safetensors'),
    'has transformers_weights in its config.json',
  ),
  'two models': (second, 'holds two models, model.embed_tokens.weight and'),
  'two heads': (
    lambda f: add(f, **{
      'lm_head.weight': tensors_of(f)['model.embed_tokens.weight'],
      'language_model.lm_head.weight': np.ones((11, 16), 'f4'),
    }),
    'language_model.lm_head.weight is not the embedding',
  ),
}  # fmt: skip


@pytest.mark.parametrize('what', RIVALS)
def test_what_may_be_either_is_refused(tmp_path, what):
  config, _ = exported('gemma3', tmp_path / 'x')
  rival, why = RIVALS[what]
  rival(tmp_path / 'x')
  with pytest.raises(UserError, match=why) as e:
    reader.load(str(tmp_path / 'x'), config, like_of(config, mesh_of()))
  assert '\n' not in str(e.value)


# -- Folders that cannot be loaded


def drop(folder, name):
  tensors = load_file(folder / reader.SINGLE)
  del tensors[name]
  save_file(tensors, folder / reader.SINGLE)


def tensors_of(folder):
  return load_file(folder / reader.SINGLE)


def add(folder, **tensors):
  save_file(
    {**load_file(folder / reader.SINGLE), **tensors}, folder / reader.SINGLE
  )


def cut(folder):
  file = folder / reader.SINGLE
  file.write_bytes(file.read_bytes()[:-5])


DAMAGE = {
  'no config': (lambda f: (f / 'config.json').unlink(), 'config.json .No such'),
  'no JSON': (lambda f: (f / 'config.json').write_text('{'), 'not a JSON'),
  'no weights': (
    lambda f: (f / reader.SINGLE).unlink(),
    'neither model.safeten',
  ),
  'truncated': (cut, 'model.safetensors is absent, truncated or corrupt'),
  'empty': (
    lambda f: (f / reader.SINGLE).write_bytes(b''),
    'truncated or corrupt',
  ),
  'text': (
    lambda f: (f / reader.SINGLE).write_text('version https://git-lfs' * 9),
    'truncated or corrupt',
  ),
  'another model': (
    lambda f: change(f, hidden_size=1152),
    'looks like another model.*features: found 1152, wanted 16',
  ),
  'a tensor less': (
    lambda f: drop(f, 'model.layers.1.mlp.up_proj.weight'),
    r'layers.1.mlp.up_proj.weight: found absent, wanted \(24, 16\)',
  ),
  'a bias': (
    lambda f: add(f, **{'model.layers.0.mlp.up_proj.bias': np.ones(24, 'f4')}),
    r'up_proj.bias: found \(24,\), wanted absent',
  ),
  'transposed': (
    lambda f: add(
      f, **{'model.layers.0.mlp.up_proj.weight': np.ones((16, 24), 'f4')}
    ),
    r'found \(16, 24\), wanted \(24, 16\)',
  ),
  'rows too few': (
    lambda f: add(f, **{'model.embed_tokens.weight': np.ones((10, 16), 'f4')}),
    r'embed_tokens.weight: found \(10, 16\), wanted \(11, 16\)',
  ),
  'no embedding': (
    lambda f: drop(f, 'model.embed_tokens.weight'),
    'no tensor embed_tokens.weight',
  ),
  'integers': (
    lambda f: add(f, **{'model.norm.weight': np.ones(16, 'i4')}),
    'model.norm.weight is of dtype I32',
  ),
  'untied': (
    lambda f: add(f, **{'lm_head.weight': np.ones((11, 16), 'f4')}),
    'lm_head.weight is not the embedding',
  ),
  'no head': (lambda f: change(f, tie_word_embeddings=False), 'lost the head'),
}  # fmt: skip


@pytest.mark.parametrize('what', DAMAGE)
def test_a_damaged_folder_is_one_clear_error(tmp_path, what):
  config, _ = exported('gemma3', tmp_path / 'x')
  damage, why = DAMAGE[what]
  damage(tmp_path / 'x')
  with pytest.raises(UserError, match=why):
    reader.load(str(tmp_path / 'x'), config, like_of(config, mesh_of()))


def test_a_head_that_is_the_embedding_is_tied(tmp_path):
  config, params = exported('gemma3', tmp_path / 'x')
  table = load_file(tmp_path / 'x' / reader.SINGLE)['model.embed_tokens.weight']
  add(tmp_path / 'x', **{'lm_head.weight': table})
  change(tmp_path / 'x', tie_word_embeddings=False)
  same(
    reader.load(str(tmp_path / 'x'), config, like_of(config, mesh_of())), params
  )


def test_a_damaged_index(tmp_path):
  config, _ = exported('gemma3', tmp_path / 'x', shard_bytes=3000)
  folder, like = tmp_path / 'x', like_of(config, mesh_of())
  where = read(folder, reader.INDEX)['weight_map']
  first, last = min(where.values()), max(where.values())
  (folder / 'aside').write_bytes((folder / first).read_bytes())
  (folder / first).unlink()
  with pytest.raises(UserError, match=f'{first} is absent, trunc'):
    reader.load(str(folder), config, like)
  (folder / first).write_bytes((folder / last).read_bytes())
  with pytest.raises(UserError, match='no tensor embed_tokens'):
    reader.load(str(folder), config, like)
  change(folder, reader.INDEX, weight_map={})
  with pytest.raises(UserError, match='weight_map names None'):
    reader.load(str(folder), config, like)


def test_the_wrong_size_is_named(tmp_path):
  raw = config_json.to_json(configs.CONFIGS['gemma3_4b'], 'bfloat16')
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  with pytest.raises(
    UserError, match='looks like gemma3_4b, the config says gemma3_1b'
  ):
    reader.load(str(tmp_path), configs.CONFIGS['gemma3_1b'], {})


@pytest.mark.parametrize(
  'path, why',
  [
    ('/no/such/folder', 'no folder here'),
    ('google/gemma', 'with its commit: owner/name@'),
    ('google/gemma@main', 'and 40 hexadecimal digits'),
    ('google/gemma@' + 'a' * 40, 'huggingface_hub: pip install'),
  ],
)
def test_a_repository_needs_a_commit_and_a_package(monkeypatch, path, why):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=why):
    reader.resolve(path)
