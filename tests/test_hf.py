"""Hugging Face folders in and out: bit for bit and in shards, or one error."""

import dataclasses
import functools
import io
import json
import os
import resource
import sys

from conftest import random_params, TINY
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import sentencepiece
import toy

from bond_jax import hf, hf_config, hf_export, sharding, stacks, tokenizer
from bond_jax.errors import UserError
from bond_jax.models import gemma, gemma_configs, lora

CONFIGS = {
  **TINY,
  # Hugging Face writes query scales as 1 / sqrt(n).
  'gemma2': dataclasses.replace(TINY['gemma2'], query_scale=0.5),
}


def mesh_of(data=4, model=2):
  return sharding.make_mesh(data=data, model=model)


def like_of(config, mesh, dtype='float32'):
  shapes = stacks.init_shapes(config)
  return sharding.tree_structs(shapes, mesh, dtype)


@functools.cache
def params_of(name):
  """Random ones; the rows of the embedding that no token uses are zero."""
  config = CONFIGS[name]
  params = random_params(config, len(name))
  params['embedder']['input_embedding'][config.used_vocab :] = 0
  return config, params


def exported(name, path, dtype='float32', **kwargs):
  config, params = params_of(name)
  hf_export.export(params, config, str(path), dtype=dtype, **kwargs)
  return config, params


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def read(folder, name='config.json'):
  return json.loads((folder / name).read_text())


def change(folder, name='config.json', **values):
  (folder / name).write_text(json.dumps({**read(folder, name), **values}))


# -- Round trips


@pytest.mark.parametrize(
  'name, shard_bytes', [*((name, 3000) for name in CONFIGS), ('gemma3', 10**9)]
)
def test_out_of_eight_devices_and_into_four(tmp_path, name, shard_bytes):
  config, params = params_of(name)
  on_eight = jax.device_put(params, sharding.tree_shardings(params, mesh_of()))
  path = str(tmp_path / 'out')
  hf_export.export(
    on_eight, config, path, dtype='float32', shard_bytes=shard_bytes
  )
  files = [f for f in os.listdir(path) if f.endswith('.safetensors')]
  assert (len(files) > 2) == (shard_bytes < 10**9)
  for mesh in (mesh_of(), mesh_of(data=2, model=2)):
    like = like_of(config, mesh)
    loaded = hf.load(path, config, like)
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
  same(hf.load(str(tmp_path / 'x'), config, like), params)


@pytest.mark.parametrize('name', CONFIGS)
def test_theirs_to_ours_to_theirs(tmp_path, name):
  """In bfloat16, as the releases are, and by way of float32 parameters."""
  config, _ = exported(name, tmp_path / 'a', 'bfloat16', shard_bytes=3000)
  loaded = hf.load(str(tmp_path / 'a'), config, like_of(config, mesh_of()))
  hf_export.export(
    loaded, config, str(tmp_path / 'b'), dtype='bfloat16', shard_bytes=3000
  )
  a, b = toy.listing(tmp_path / 'a'), toy.listing(tmp_path / 'b')
  assert a == b
  assert len(a) > 4


@pytest.mark.parametrize('source', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('wanted', ['float32', 'bfloat16'])
def test_dtypes_are_cast_once(tmp_path, source, wanted):
  config, _ = exported('gemma1_multi_head', tmp_path / 'x')
  file = str(tmp_path / 'x' / hf.SINGLE)
  tensors = {k: x.astype(source) for k, x in load_file(file).items()}
  save_file(tensors, file)
  loaded = hf.load(
    str(tmp_path / 'x'), config, like_of(config, mesh_of(), wanted)
  )
  table = loaded['embedder']['input_embedding']
  expected = tensors['model.embed_tokens.weight'].astype(wanted)
  np.testing.assert_array_equal(np.asarray(table), expected)
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(wanted)}


# -- What is where


def test_names_and_shapes_of_every_family(tmp_path):
  norms = {
    'gemma3': (
      'input_layernorm post_attention_layernorm pre_feedforward_layernorm'
      ' post_feedforward_layernorm self_attn.q_norm self_attn.k_norm'
    ),
    'gemma2': (
      'input_layernorm post_attention_layernorm pre_feedforward_layernorm'
      ' post_feedforward_layernorm'
    ),
    'gemma1_multi_query': 'input_layernorm post_attention_layernorm',
    'gemma1_multi_head': 'input_layernorm post_attention_layernorm',
  }
  matrices = (
    'self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj'
    ' mlp.gate_proj mlp.up_proj mlp.down_proj'
  )
  for name, config in CONFIGS.items():
    exported(name, tmp_path / name)
    found = load_file(tmp_path / name / hf.SINGLE)
    layer = f'{matrices} {norms[name]}'.split()
    assert set(found) == {
      'model.embed_tokens.weight',
      'model.norm.weight',
      *(
        f'model.layers.{j}.{module}.weight'
        for j in range(config.layers)
        for module in layer
      ),
    }
    rows = config.used_vocab or config.vocab_size
    assert found['model.embed_tokens.weight'].shape == (rows, config.features)
    assert read(tmp_path / name)['vocab_size'] == rows


@pytest.mark.parametrize('name', CONFIGS)
def test_their_matrices_are_our_products(tmp_path, name):
  """x W^T with theirs is the einsum of models/gemma.py with ours."""
  config, params = exported(name, tmp_path / 'x')
  found = load_file(tmp_path / 'x' / hf.SINGLE)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape)
  c = config
  for j, (_, layer) in enumerate(gemma.layers(config, params)):
    theirs = lambda x, module, j=j: (
      x @ found[f'model.layers.{j}.{module}.weight'].T.astype('f8')
    )
    attn, mlp = layer['attn'], layer['mlp']
    x = draw(c.features)
    if 'qkv_einsum' in attn:
      q, k, v = np.einsum('D,CNDH->CNH', x, attn['qkv_einsum']['w'])
    else:
      q = np.einsum('D,NDH->NH', x, attn['q_einsum']['w'])
      k, v = np.einsum('D,CKDH->CKH', x, attn['kv_einsum']['w'])
    gate = mlp['gating_einsum']
    gate = gate if c.gating_transposed else gate.swapaxes(1, 2)
    heads, wide = draw(c.heads, c.head_size), draw(c.feed_forward)
    pairs = {
      'self_attn.q_proj': (x, q),
      'self_attn.k_proj': (x, k),
      'self_attn.v_proj': (x, v),
      'self_attn.o_proj': (
        heads, np.einsum('NH,NHD->D', heads, attn['attn_vec_einsum']['w'])
      ),
      'mlp.gate_proj': (x, gate[0] @ x),
      'mlp.up_proj': (x, gate[1] @ x),
      'mlp.down_proj': (wide, wide @ mlp['linear']),
    }  # fmt: skip
    for module, (into, out) in pairs.items():
      np.testing.assert_allclose(
        theirs(into.reshape(-1), module), out.reshape(-1), rtol=1e-9
      )
    ours = {'pre_attention_norm': 'input_layernorm'}
    if c.post_norms:
      ours['post_attention_norm'] = 'post_attention_layernorm'
      ours['pre_ffw_norm'] = 'pre_feedforward_layernorm'
      ours['post_ffw_norm'] = 'post_feedforward_layernorm'
    else:
      ours['pre_ffw_norm'] = 'post_attention_layernorm'
    for mine, theirs_ in ours.items():
      np.testing.assert_array_equal(
        layer[mine]['scale'], found[f'model.layers.{j}.{theirs_}.weight']
      )


def test_rows_that_no_token_uses_are_zero_wherever_a_shard_begins(tmp_path):
  config, _ = exported('gemma2', tmp_path / 'x')
  assert (config.vocab_size, config.used_vocab) == (22, 17)
  config = dataclasses.replace(config, vocab_size=48)  # a shard of zeros alone
  like = like_of(config, mesh_of(data=1, model=8))
  table = hf.load(str(tmp_path / 'x'), config, like)['embedder']
  found = load_file(tmp_path / 'x' / hf.SINGLE)['model.embed_tokens.weight']
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
  tensors = load_file(folder / hf.SINGLE)
  tensors = {prefix + k.removeprefix('model.'): x for k, x in tensors.items()}
  name = f'{prefix}embed_tokens.weight'
  tensors[name] = np.concatenate([tensors[name], np.ones((3, 16), 'f4')])
  vision = (
    'model.vision_tower.' if 'language' in prefix[6:] else 'vision_tower.'
  )
  tensors[f'{vision}patch.weight'] = np.ones(3, 'i4')
  tensors['lm_head.weight'] = tensors[name]
  save_file(tensors, folder / hf.SINGLE)
  text = {**read(folder), 'vocab_size': 14}
  text.pop('architectures')
  raw = {
    'architectures': ['Gemma3ForConditionalGeneration'],
    'text_config': text,
    'vision_config': {},
  }
  (folder / 'config.json').write_text(json.dumps(raw))
  same(hf.load(str(folder), config, like_of(config, mesh_of())), params)


# -- config.json


@pytest.mark.parametrize('name', gemma_configs.CONFIGS)
def test_every_model_knows_itself_again(tmp_path, name):
  config = gemma_configs.CONFIGS[name]
  raw = hf_config.to_json(config, 'bfloat16')
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  assert hf.config_of(str(tmp_path)) == config


# What the releases say of themselves, in the words that they leave out too.
RELEASED = {
  'gemma_2b': dict(
    architectures=['GemmaForCausalLM'], model_type='gemma', head_dim=256,
    hidden_act='gelu', hidden_activation=None, hidden_size=2048,
    intermediate_size=16384, num_attention_heads=8, num_hidden_layers=18,
    num_key_value_heads=1, rms_norm_eps=1e-06, rope_theta=10000.0,
    vocab_size=256000, max_position_embeddings=8192,
  ),
  'gemma2_27b': dict(
    architectures=['Gemma2ForCausalLM'], model_type='gemma2', head_dim=128,
    hidden_act='gelu_pytorch_tanh', hidden_activation='gelu_pytorch_tanh',
    hidden_size=4608, intermediate_size=36864, num_attention_heads=32,
    num_hidden_layers=46, num_key_value_heads=16, query_pre_attn_scalar=144,
    sliding_window=4096, final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0, rope_theta=10000.0, vocab_size=256000,
  ),
  'gemma3_1b': dict(
    architectures=['Gemma3ForCausalLM'], model_type='gemma3_text',
    head_dim=256, hidden_size=1152, intermediate_size=6912,
    num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
    query_pre_attn_scalar=256, rope_local_base_freq=10000, rope_scaling=None,
    rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
    attn_logit_softcapping=None, vocab_size=262144,
  ),
  'gemma3_4b': dict(
    architectures=['Gemma3ForConditionalGeneration'], model_type='gemma3',
    text_config=dict(
      hidden_size=2560, intermediate_size=10240, model_type='gemma3_text',
      num_hidden_layers=34, rope_scaling=dict(factor=8.0, rope_type='linear'),
      sliding_window=1024,
    ),
  ),
  'gemma3_270m': dict(
    architectures=['Gemma3ForCausalLM'], model_type='gemma3_text',
    head_dim=256, hidden_size=640, intermediate_size=2048,
    num_attention_heads=4, num_hidden_layers=18, num_key_value_heads=1,
    sliding_window=512, vocab_size=262144,
    layer_types=(['sliding_attention'] * 5 + ['full_attention']) * 3,
    rope_parameters=dict(
      full_attention=dict(rope_theta=1e6, rope_type='default'),
      sliding_attention=dict(rope_theta=1e4, rope_type='default'),
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', RELEASED)
def test_released_configs_are_recognised(tmp_path, name):
  (tmp_path / 'config.json').write_text(json.dumps(RELEASED[name]))
  assert hf.config_of(str(tmp_path)) == gemma_configs.CONFIGS[name]


@pytest.mark.parametrize(
  'values, why',
  [
    (dict(architectures=['LlamaForCausalLM']), 'architecture LlamaForCausalLM'),
    (dict(architectures=None), 'architecture none'),
    (dict(hidden_activation='relu'), "activation is 'relu'"),
    (dict(rms_norm_eps=1e-5), 'rms_norm_eps is 1e-05'),
    (dict(attention_bias=True), 'attention_bias is True'),
    (dict(use_bidirectional_attention=True), 'bidirectional'),
    (dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping is 50.0'),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(rope_scaling=dict(rope_type='yarn')), "rope_type is 'yarn'"),
    (dict(layer_types=['full_attention'] * 4), 'layer_types has 4 entries'),
  ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, values, why):
  raw = hf_config.to_json(CONFIGS['gemma3'], 'float32')
  (tmp_path / 'config.json').write_text(json.dumps({**raw, **values}))
  with pytest.raises(UserError, match=why) as e:
    hf.config_of(str(tmp_path))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'sizes, why',
  [
    (dict(query_scale=0.4), r'query_scale is 0.4'),
    (dict(attention_softcap=5.0, qk_norm=True), 'mix the families'),
    (dict(qk_norm=True, post_norms=False), 'mix the families'),
    (dict(global_rope_base=1e6), 'mix the families'),
  ],
)
def test_what_they_cannot_compute_is_refused(tmp_path, sizes, why):
  config = dataclasses.replace(CONFIGS['gemma2'], **sizes)
  with pytest.raises(UserError, match=why):
    hf_export.export({}, config, str(tmp_path / 'x'), dtype='float32')
  assert not os.listdir(tmp_path)


# -- Folders that cannot be loaded


def drop(folder, name):
  tensors = load_file(folder / hf.SINGLE)
  del tensors[name]
  save_file(tensors, folder / hf.SINGLE)


def add(folder, **tensors):
  save_file({**load_file(folder / hf.SINGLE), **tensors}, folder / hf.SINGLE)


def cut(folder):
  file = folder / hf.SINGLE
  file.write_bytes(file.read_bytes()[:-5])


DAMAGE = {
  'no config': (lambda f: (f / 'config.json').unlink(), 'config.json .No such'),
  'no JSON': (lambda f: (f / 'config.json').write_text('{'), 'not JSON'),
  'no weights': (lambda f: (f / hf.SINGLE).unlink(), 'neither model.safeten'),
  'truncated': (cut, 'model.safetensors is truncated or corrupt'),
  'empty': (lambda f: (f / hf.SINGLE).write_bytes(b''), 'truncated or corrupt'),
  'text': (
    lambda f: (f / hf.SINGLE).write_text('version https://git-lfs' * 9),
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
  'rows too many': (
    lambda f: add(f, **{'model.embed_tokens.weight': np.ones((12, 16), 'f4')}),
    r'embed_tokens.weight: found \(12, 16\), wanted \(11, 16\)',
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
    hf.load(str(tmp_path / 'x'), config, like_of(config, mesh_of()))


def test_a_head_that_is_the_embedding_is_tied(tmp_path):
  config, params = exported('gemma3', tmp_path / 'x')
  table = load_file(tmp_path / 'x' / hf.SINGLE)['model.embed_tokens.weight']
  add(tmp_path / 'x', **{'lm_head.weight': table})
  change(tmp_path / 'x', tie_word_embeddings=False)
  same(hf.load(str(tmp_path / 'x'), config, like_of(config, mesh_of())), params)


def test_a_damaged_index(tmp_path):
  config, _ = exported('gemma3', tmp_path / 'x', shard_bytes=3000)
  folder, like = tmp_path / 'x', like_of(config, mesh_of())
  where = read(folder, hf.INDEX)['weight_map']
  first, last = min(where.values()), max(where.values())
  (folder / 'aside').write_bytes((folder / first).read_bytes())
  (folder / first).unlink()
  with pytest.raises(UserError, match=f'lacks 1 of the .*{first}'):
    hf.load(str(folder), config, like)
  (folder / first).write_bytes((folder / last).read_bytes())
  with pytest.raises(UserError, match=f'{first} does not hold model.embed_tok'):
    hf.load(str(folder), config, like)
  change(folder, hf.INDEX, weight_map={})
  with pytest.raises(UserError, match='has no weight_map'):
    hf.load(str(folder), config, like)


def test_the_wrong_size_is_named(tmp_path):
  raw = hf_config.to_json(gemma_configs.CONFIGS['gemma3_4b'], 'bfloat16')
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  with pytest.raises(
    UserError, match='looks like gemma3_4b, the config says gemma3_1b'
  ):
    hf.load(str(tmp_path), gemma_configs.CONFIGS['gemma3_1b'], {})


@pytest.mark.parametrize(
  'path, why',
  [
    ('/no/such/folder', 'no folder here'),
    ('google/gemma', 'got none'),
    ('google/gemma@main', 'got main'),
    ('google/gemma@' + 'a' * 40, 'huggingface_hub: pip install'),
  ],
)
def test_a_repository_needs_a_commit_and_a_package(monkeypatch, path, why):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=why):
    hf.resolve(path)


# -- Folders that cannot be written


def test_an_existing_folder_stays_as_it_is(tmp_path):
  path = tmp_path / 'x'
  path.mkdir()
  (path / 'mine').write_text('!')
  with pytest.raises(UserError, match='x exists; name a folder'):
    exported('gemma3', path)
  assert toy.listing(tmp_path) == {'x/mine': b'!'}


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path):
  config = dataclasses.replace(CONFIGS['gemma3'], vocab_size=10**14)
  shapes = jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))
  with pytest.raises(UserError, match=r'needs 3200000.\d+ GB, and .* free'):
    hf_export.export(shapes, config, str(tmp_path / 'x'), dtype='bfloat16')
  assert not os.listdir(tmp_path)


def test_a_failure_while_writing_leaves_nothing(tmp_path):
  """A limit on the size of files, instead of a disk that fills up."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
  try:
    with pytest.raises(UserError, match='cannot write .*File too large'):
      exported('gemma3', tmp_path / 'x')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not os.listdir(tmp_path)


def test_other_places_and_dtypes_are_refused(tmp_path):
  with pytest.raises(UserError, match='name a local folder'):
    exported('gemma3', 'gs://bucket/x')
  with pytest.raises(UserError, match="'int8'; known are float32, bfloat16"):
    exported('gemma3', tmp_path / 'x', dtype='int8')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write .*file/x'):
    exported('gemma3', tmp_path / 'file' / 'x')


# -- Adapters


def adapters_of(config, targets='attn|mlp', rank=2):
  """Adapters of which neither half is zero."""
  tree = jax.eval_shape(
    lambda: lora.init(config, jax.random.key(0), rank=rank, targets=targets)
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), tree
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_adapters_add_up_to_the_merged_model(tmp_path, name):
  """base + alpha / r B A of the adapter's folder is the merged folder."""
  config, params = params_of(name)
  config = dataclasses.replace(config, lora_scale=1.5)
  adapters = adapters_of(config)
  hf_export.export(params, config, str(tmp_path / 'base'), dtype='float32')
  hf_export.export(
    params, config, str(tmp_path / 'whole'), dtype='float32', lora=adapters
  )
  hf_export.export_adapter(
    adapters, config, str(tmp_path / 'low'), base='someone/base'
  )
  base, whole = (load_file(tmp_path / f / hf.SINGLE) for f in ('base', 'whole'))
  low = load_file(tmp_path / 'low' / 'adapter_model.safetensors')
  described = read(tmp_path / 'low', 'adapter_config.json')
  assert (described['r'], described['lora_alpha']) == (2, 3)
  assert described['base_model_name_or_path'] == 'someone/base'
  modules = {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj',
             'down_proj'}  # fmt: skip
  assert set(described['target_modules']) == modules
  used = 0
  for key, w in base.items():
    module = f'base_model.model.{key.removesuffix(".weight")}'
    a, b = (low.get(f'{module}.lora_{x}.weight') for x in 'AB')
    used += 2 * (a is not None)
    delta = 0 if a is None else 1.5 * b.astype('f8') @ a.astype('f8')
    np.testing.assert_allclose(whole[key], w + delta, rtol=1e-5, atol=1e-5)
    assert (a is None) == (key.split('.')[-2] not in modules)
  assert used == len(low) == 14 * config.layers


def test_merging_rounds_once(tmp_path):
  """To bfloat16, from a sum in float32, of a base that is in bfloat16."""
  config, params = params_of('gemma3')
  config = dataclasses.replace(config, lora_scale=1.0)
  half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  adapters = adapters_of(config, targets='linear')
  for dtype in ('float32', 'bfloat16'):
    hf_export.export(
      half, config, str(tmp_path / dtype), dtype=dtype, lora=adapters
    )
  whole, rounded = (
    load_file(tmp_path / x / hf.SINGLE) for x in ('float32', 'bfloat16')
  )
  key = 'model.layers.4.mlp.down_proj.weight'
  assert (whole[key] != whole[key].astype(ml_dtypes.bfloat16)).any()
  for key in whole:
    np.testing.assert_array_equal(
      rounded[key], whole[key].astype(ml_dtypes.bfloat16)
    )


def test_an_adapter_of_a_model_that_sees_images(tmp_path):
  """Only the text model's modules are adapted, under their names there."""
  config, _ = exported('gemma3', tmp_path / 'base')
  change(
    tmp_path / 'base',
    architectures=['Gemma3ForConditionalGeneration'],
    text_config={},
  )
  config = dataclasses.replace(config, lora_scale=1.0)
  hf_export.export_adapter(
    adapters_of(config, targets='q_einsum'),
    config,
    str(tmp_path / 'low'),
    base=str(tmp_path / 'base'),
  )
  low = load_file(tmp_path / 'low' / 'adapter_model.safetensors')
  prefix = 'base_model.model.model.language_model.layers.'
  assert all(name.startswith(prefix) for name in low)
  described = read(tmp_path / 'low', 'adapter_config.json')
  assert described['target_modules'] == r'.*language_model.*\.(q_proj)'


def test_an_adapter_of_a_release_that_sees_images(tmp_path):
  """Without its folder at hand, by its sizes."""
  config = gemma_configs.CONFIGS['gemma3_4b']
  config = dataclasses.replace(config, lora_scale=1.0)
  adapters = adapters_of(config, targets='q_einsum', rank=1)
  low = tmp_path / 'low'
  hf_export.export_adapter(adapters, config, str(low), base=str(tmp_path))
  names = list(load_file(low / 'adapter_model.safetensors'))
  assert len(names) == 2 * config.layers
  assert all('.model.language_model.layers.' in name for name in names)


# -- Tokenizers


def tokenizer_file(folder, *symbols):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the film was good', 'the film was bad'] * 9),
    model_writer=model, model_type='bpe', vocab_size=40, pad_id=0, eos_id=1,
    num_threads=1,
    bos_id=2, unk_id=3, minloglevel=2, user_defined_symbols=[*symbols],
    hard_vocab_limit=False,
  )  # fmt: skip
  path = folder / 'spm.model'
  path.write_bytes(model.getvalue())
  return str(path)


def test_completions_end_where_the_vocabulary_says(tmp_path):
  turns = tokenizer_file(tmp_path, '<one>', tokenizer.START, tokenizer.END)
  exported('gemma3', tmp_path / 'x', tokenizer_path=turns, temperature=0.7)
  said = read(tmp_path / 'x', 'generation_config.json')
  assert said['eos_token_id'] == [1, 6]
  assert read(tmp_path / 'x')['eos_token_id'] == [1, 6]
  assert (said['temperature'], said['top_k'], said['top_p']) == (0.7, 0, 1.0)
  assert said['do_sample'] is True
  described = read(tmp_path / 'x', 'tokenizer_config.json')
  assert described['tokenizer_class'] == 'GemmaTokenizer'
  assert 'start_of_turn' in described['chat_template']
  with open(turns, 'rb') as f:
    assert (tmp_path / 'x' / 'tokenizer.model').read_bytes() == f.read()


def test_tokenizer_files_come_from_the_source(tmp_path):
  plain = tokenizer_file(tmp_path)
  exported('gemma3', tmp_path / 'a', tokenizer_path=plain)
  (tmp_path / 'a' / 'tokenizer.json').write_text('{"as": "it is"}')
  exported('gemma3', tmp_path / 'b', source=str(tmp_path / 'a'))
  exported(
    'gemma3', tmp_path / 'c', source=str(tmp_path / 'a'), tokenizer_path=plain
  )
  a, b, c = (toy.listing(tmp_path / x) for x in 'abc')
  assert a == b == c
  assert 'chat_template' not in read(tmp_path / 'a', 'tokenizer_config.json')
  other = tokenizer_file(tmp_path, tokenizer.START)
  with pytest.raises(UserError, match='is not the tokenizer of'):
    exported(
      'gemma3', tmp_path / 'd', source=str(tmp_path / 'a'), tokenizer_path=other
    )
  assert not (tmp_path / 'd').exists()


def test_a_source_without_a_sentencepiece_model(tmp_path):
  exported('gemma3', tmp_path / 'a')
  change(tmp_path / 'a', 'generation_config.json', eos_token_id=[1, 106])
  exported('gemma3', tmp_path / 'b', source=str(tmp_path / 'a'))
  said = read(tmp_path / 'b', 'generation_config.json')
  assert said['eos_token_id'] == [1, 106]
