"""What is written: names, shapes, products, adapters, and nothing by halves."""

import dataclasses
import os
import resource

from conftest import core
from folders import change, CONFIGS, exported, params_of, read
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
import toy

from bond_jax.errors import UserError
from bond_jax.models import lora
from bond_jax.models.gemma import model as gemma
from bond_jax.weights.huggingface import adapter, reader, writer

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
    found = load_file(tmp_path / name / reader.SINGLE)
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
  found = load_file(tmp_path / 'x' / reader.SINGLE)
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


@pytest.mark.parametrize('name', core(1, CONFIGS))
def test_adapters_add_up_to_the_merged_model(tmp_path, name):
  """base + alpha / r B A of the adapter's folder is the merged folder."""
  config, params = params_of(name)
  config = dataclasses.replace(config, lora_scale=1.5)
  adapters = adapters_of(config)
  writer.export(params, config, str(tmp_path / 'base'), dtype='float32')
  writer.export(
    params, config, str(tmp_path / 'whole'), dtype='float32', lora=adapters
  )
  adapter.export_adapter(
    adapters, config, str(tmp_path / 'low'), base='someone/base'
  )
  base, whole = (
    load_file(tmp_path / f / reader.SINGLE) for f in ('base', 'whole')
  )
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
    writer.export(
      half, config, str(tmp_path / dtype), dtype=dtype, lora=adapters
    )
  whole, rounded = (
    load_file(tmp_path / x / reader.SINGLE) for x in ('float32', 'bfloat16')
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
  adapter.export_adapter(
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


# -- Folders that cannot be written


def test_an_existing_folder_stays_as_it_is(tmp_path):
  path = tmp_path / 'x'
  path.mkdir()
  (path / 'mine').write_text('!')
  with pytest.raises(UserError, match='x exists; name a folder'):
    exported('gemma3', path)
  assert toy.listing(tmp_path) == {'x/mine': b'!'}


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path):
  config = dataclasses.replace(
    CONFIGS['gemma3'], vocab_size=2 * 10**9, features=10**6
  )
  shapes = jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))
  with pytest.raises(UserError, match=r'needs 40000\d\d.\d+ GB, and .* free'):
    writer.export(shapes, config, str(tmp_path / 'x'), dtype='bfloat16')
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


def test_other_dtypes_and_places_are_refused(tmp_path):
  with pytest.raises(UserError, match="'int8'; known are float32, bfloat16"):
    exported('gemma3', tmp_path / 'x', dtype='int8')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write .*file/x'):
    exported('gemma3', tmp_path / 'file' / 'x')
