"""Official checkpoints: those that the gemma library writes we read, and back,
at tiny sizes; names, shapes and constants are the library's at full size."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from gemma import gm
from gemma.gm.ckpts import _checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_logits import _KIND, CONFIGS, library, nested, random_params

from bond_jax.devices import sharding
from bond_jax.models.gemma import model as gemma
from bond_jax.weights import official as weights
from bond_jax.weights import stacks

MODELS = {
  'gemma2_2b': gm.nn.Gemma2_2B,
  'gemma2_9b': gm.nn.Gemma2_9B,
  'gemma2_27b': gm.nn.Gemma2_27B,
  'gemma3_270m': gm.nn.Gemma3_270M,
  'gemma3_1b': gm.nn.Gemma3_1B,
  'gemma3_4b': gm.nn.Gemma3_4B,
  'gemma3_12b': gm.nn.Gemma3_12B,
  'gemma3_27b': gm.nn.Gemma3_27B,
}


def text_model(name):
  kind = MODELS[name]
  return kind(text_only=True) if hasattr(kind, 'text_only') else kind()


def flatten(tree):
  return {
    sharding.path_name(path): x
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def load(path, config, data, model):
  mesh = sharding.make_mesh(data, model)
  shapes = stacks.init_shapes(config)
  like = sharding.tree_structs(shapes, mesh, 'bfloat16')
  params = weights.load(str(path), config, like)
  got = jax.tree.map(lambda x: (x.sharding, x.dtype), params)
  assert got == jax.tree.map(lambda x: (x.sharding, x.dtype), like)
  return params


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def tiny(name):
  params = random_params(CONFIGS[name])
  return CONFIGS[name], jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


@pytest.mark.parametrize(
  'name, layout',
  [
    *(('gemma3', layout) for layout in ('flat', 'nested', 'stacked')),
    ('gemma2', 'stacked'),
    ('gemma1_7b', 'flat'),
  ],
)
def test_what_the_library_writes(name, layout, tmp_path):
  """In every layout, image parameters beside the text; onto 8 devices and 4."""
  config, params = tiny(name)
  tree = nested(config, params)
  tree['embedder'] = {
    **tree['embedder'],
    'mm_input_projection': {'w': np.ones((2, 3), np.float32)},
    'mm_soft_embedding_norm': {'scale': np.ones((2,), np.float32)},
  }
  tree['vision_encoder'] = {'siglip_encoder': {'pos': np.ones((2, 2))}}
  if layout == 'flat':
    tree = _checkpoint._nested_to_flat(tree)
  elif layout == 'stacked':
    tree = _checkpoint._nested_to_stacked(tree, len(config.pattern))
  path = tmp_path / 'official'
  gm.ckpts.save_params(tree, path, wait_until_finished=True)
  same(load(path, config, 4, 2), params)
  if layout == 'stacked':
    same(load(path, config, 4, 1), params)


@pytest.mark.parametrize('name', ['gemma3', 'gemma2', 'gemma1_2b'])
def test_there_and_back(name, tmp_path):
  """Official, ours, official: no bit changes, and the library reads it."""
  config, params = tiny(name)
  official = nested(config, params)
  gm.ckpts.save_params(official, tmp_path / 'a', wait_until_finished=True)
  weights.save_official(
    load(tmp_path / 'a', config, 4, 2), config, str(tmp_path / 'b')
  )
  alone = gm.ckpts.load_params(tmp_path / 'b')
  same(alone, official)
  assert {x.dtype.name for x in jax.tree.leaves(alone)} == {'bfloat16'}
  model = library(config)
  init = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2), np.int32))
  like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init['params'])
  same(gm.ckpts.load_params(tmp_path / 'b', params=like), official)


@pytest.mark.parametrize('name', MODELS)
def test_full_size_trees(name):
  """Every name and shape of the library's own model."""
  model = text_model(name)
  theirs = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 2), np.int32))['params']
  )
  assert stacks.shapes(gemma.CONFIGS[name]) == {
    name: x.shape for name, x in flatten(theirs).items()
  }


@pytest.mark.parametrize('name', MODELS)
def test_constants(name):
  """What no shape shows: patterns, windows, scales, caps, frequencies."""
  ours, theirs = gemma.CONFIGS[name], text_model(name).config
  kinds = [ours.pattern[i % len(ours.pattern)] for i in range(ours.layers)]
  assert [_KIND[kind] for kind in kinds] == list(theirs.attention_types)
  assert ours.window == theirs.sliding_window_size
  scale = ours.query_scale or ours.head_size**-0.5
  assert np.isclose(scale, theirs.query_pre_attn_scalar(), rtol=1e-12)
  assert ours.attention_softcap == theirs.attn_logits_soft_cap
  assert ours.final_softcap == theirs.final_logit_softcap
  assert ours.local_rope_base == theirs.local_base_frequency
  assert ours.global_rope_base == theirs.global_base_frequency
  assert ours.global_rope_scale == theirs.global_scale_factor
  assert theirs.local_scale_factor == 1


def test_addresses():
  theirs = {p.name.lower(): p.value for p in gm.ckpts.CheckpointPath}
  assert theirs == weights.RELEASES
