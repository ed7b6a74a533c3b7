"""Adapters as peft's folders: in as they went out, or one error."""

import dataclasses
import json
import sys

from conftest import core, TINY
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import test_load
import toy

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora, policies
from bond_jax.models.gemma import configs
from bond_jax.weights import load as origin
from bond_jax.weights.huggingface import adapter, layout

RANK, ALPHA = 4, 6.0
TENSORS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
release = test_load.release


def sizes_of(name):
  return dataclasses.replace(TINY[name], lora_scale=ALPHA / RANK)


def shapes_of(config, targets='attn|mlp', rank=RANK):
  return jax.eval_shape(
    lambda: lora.init(config, jax.random.key(0), rank=rank, targets=targets)
  )


def adapters_of(config, targets='attn|mlp', rank=RANK):
  """Adapters of which neither half is zero."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32),
    shapes_of(config, targets, rank),
  )


def like_of(config, data, model, targets='attn|mlp'):
  mesh = sharding.make_mesh(data=data, model=model)
  return sharding.tree_structs(shapes_of(config, targets), mesh)


def load(folder, config, targets='attn|mlp'):
  return adapter.load_adapter(
    str(folder), config, like_of(config, 4, 2, targets)
  )


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def change(folder, **values):
  """Says other things in the adapter's config; None takes a key away."""
  raw = {**json.loads((folder / CONFIG).read_text()), **values}
  said = {k: v for k, v in raw.items() if v is not None}
  (folder / CONFIG).write_text(json.dumps(said))


def rewrite(folder, function):
  """Puts other tensors, a dict made from the dict that is there."""
  tensors = function(load_file(folder / TENSORS))
  save_file(tensors, folder / TENSORS)


# -- Round trips


# Each model once, then the other targets.
CASES = [
  (name, ('attn|mlp', 'q.*_einsum|linear')[(i + j) % 2])
  for j in range(2)
  for i, name in enumerate(TINY)
]


@pytest.mark.parametrize('name, targets', core(1, CASES))
def test_out_and_in_bit_for_bit(tmp_path, name, targets):
  """Onto 8 devices and onto 1, and the same folder again from there."""
  config = sizes_of(name)
  adapters = adapters_of(config, targets)
  path = str(tmp_path / 'a')
  adapter.export_adapter(adapters, config, path, base='someone/base')
  for mesh in ((4, 2), (1, 1)):
    like = like_of(config, *mesh, targets)
    loaded = adapter.load_adapter(path, config, like)
    same(loaded, adapters)
    for x, struct in zip(*map(jax.tree.leaves, (loaded, like)), strict=True):
      assert x.sharding == struct.sharding and x.dtype == np.float32
    split = [
      len({str(s.index) for s in x.addressable_shards})
      for x in jax.tree.leaves(loaded)
    ]
    assert max(split) == mesh[0] * mesh[1]
    again = str(tmp_path / f'b{mesh[0]}')
    adapter.export_adapter(loaded, config, again, base='someone/base')
    assert toy.listing(again) == toy.listing(path)


@pytest.mark.parametrize(
  'base, name, commit',
  [
    ('someone/base', 'someone/base', None),
    ('someone/base@' + 'a' * 40, 'someone/base', 'a' * 40),
    ('{here}/me@home', '{here}/me@home', None),
  ],
)
def test_the_base_is_named_with_its_commit(tmp_path, base, name, commit):
  (tmp_path / 'me@home').mkdir()
  base, name = (x.format(here=tmp_path) for x in (base, name))
  config, low = sizes_of('gemma2'), tmp_path / 'low'
  adapter.export_adapter(adapters_of(config), config, str(low), base=base)
  raw = json.loads((low / CONFIG).read_text())
  assert (raw['base_model_name_or_path'], raw['revision']) == (name, commit)


def test_halves_are_cast_once(tmp_path):
  config = sizes_of('gemma2')
  adapters = adapters_of(config)
  low = tmp_path / 'low'
  adapter.export_adapter(adapters, config, str(low), base='someone/base')
  for dtype in (np.float16, ml_dtypes.bfloat16):
    rewrite(low, lambda x, d=dtype: {k: v.astype(d) for k, v in x.items()})
    loaded = load(low, config)
    same(
      loaded,
      jax.tree.map(lambda x, d=dtype: x.astype(d).astype('f4'), adapters),
    )
    adapters = jax.device_get(loaded)


@pytest.mark.parametrize('prefix', layout.PREFIXES)
def test_what_reads_images_is_left_out(tmp_path, prefix):
  """Under every name that the text model has had beside an encoder."""
  config = sizes_of('gemma3')
  adapters = adapters_of(config)
  low = tmp_path / 'low'
  adapter.export_adapter(adapters, config, str(low), base='someone/base')

  def renamed(tensors):
    found = {
      k.replace('model.model.layers', f'model.{prefix}layers'): v
      for k, v in tensors.items()
    }
    encoder = 'base_model.model.model.vision_tower.vision_model.encoder.layers'
    name = f'{encoder}.0.self_attn.out_proj.lora_A.weight'
    return {**found, name: np.ones((RANK, 3), np.float32)}

  rewrite(low, renamed)
  name = f'base_model.model.{prefix}layers.4.mlp.up_proj.lora_B.weight'
  assert name in load_file(low / TENSORS)
  same(load(low, config), adapters)


def test_an_adapter_of_a_release_that_sees_images(tmp_path):
  """By its sizes; peft is to leave the encoder's modules alone."""
  config = dataclasses.replace(
    configs.CONFIGS['gemma3_4b'], lora_scale=ALPHA / RANK
  )
  adapters = adapters_of(config, 'q_einsum')
  low = tmp_path / 'low'
  adapter.export_adapter(adapters, config, str(low), base=str(tmp_path))
  names = list(load_file(low / TENSORS))
  assert len(names) == 2 * config.layers
  assert all('.model.language_model.layers.' in name for name in names)
  same(load(low, config, 'q_einsum'), adapters)


def test_the_name_of_the_first_adapter_is_none(tmp_path):
  """As peft reads it; and of two files it reads this one."""
  config = sizes_of('gemma2')
  adapters = adapters_of(config)
  low = tmp_path / 'low'
  adapter.export_adapter(adapters, config, str(low), base='someone/base')
  rewrite(low, lambda x: named(x, 'default'))
  (low / 'adapter_model.bin').write_bytes(b'of an earlier save')
  same(load(low, config), adapters)


# -- A run


@pytest.mark.long
def test_an_adapter_is_the_law_of_merged_weights(release, tmp_path):
  """As a run reads it; test_load trains one."""
  folder, params = release
  config = test_load.gemma_config(folder, rank=RANK)
  config.model.lora.alpha = ALPHA
  sizes = policies.make_sizes(config.model, test_load.VOCAB)
  adapters = jax.tree.map(lambda x: 0.3 * x, adapters_of(sizes))
  low = str(tmp_path / 'low')
  adapter.export_adapter(adapters, sizes, low, base=folder)
  config.model.lora.weights = low
  config.mesh.data = 1
  workdir = str(tmp_path / 'run')
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.make_policy(config.model, test_load.VOCAB)
  frozen = origin.load_frozen(config, policy, workdir, mesh)
  same(frozen.reference, adapters)
  same(frozen.base, params)
  whole = policies.make_policy(config.model, test_load.VOCAB, full=True)
  tokens = np.arange(12).reshape(2, 6)

  def logits(policy, tree):
    hidden = policy.hidden(tree, tokens, tokens >= 0)
    return np.asarray(policy.logits(tree, hidden))[..., : test_load.VOCAB]

  ours = logits(lora.over(policy, frozen.base), frozen.reference)
  merged = logits(whole, lora.merge(sizes, frozen.base, frozen.reference))
  scale = np.abs(merged).max()
  np.testing.assert_allclose(ours, merged, atol=1e-5 * scale)
  assert np.abs(merged - logits(whole, params)).max() > 0.1 * scale


@pytest.mark.parametrize('name', ['toy', 'Gemma3_1B'])
def test_an_adapter_needs_a_rank(name):
  config = test_load.gemma_config()
  config.model.name = name
  config.model.lora.weights = '/somewhere'
  with pytest.raises(UserError, match='lora.weights is /somewhere and .* 0'):
    policies.make_policy(config.model, test_load.VOCAB)


# -- Folders that cannot be read

Q = 'base_model.model.model.layers.1.self_attn.q_proj.lora_'
EMBEDDING = 'base_model.model.model.embed_tokens.weight'


def named(tensors, name):
  """As the state of a model has them, under the name of the adapter."""
  return {
    k.replace('.weight', f'.{name}.weight'): v for k, v in tensors.items()
  }


def cut(folder):
  path = folder / TENSORS
  path.write_bytes(path.read_bytes()[:-8])


DAMAGE = {
  'no config': (
    lambda f: (f / CONFIG).unlink(),
    'cannot read .*adapter_config.json .No such file.*no folder of a peft',
  ),
  'no JSON': (
    lambda f: (f / CONFIG).write_text('{'),
    'cannot read .*adapter_config.json .it is not a JSON',
  ),
  'no tensors': (
    lambda f: (f / TENSORS).unlink(),
    'has no adapter_model.safetensors; .* save_pretrained',
  ),
  'truncated': (
    cut,
    'adapter_model.safetensors is absent, truncated or corrupt',
  ),
  'one lost': (
    lambda f: rewrite(
      f, lambda x: {k: v for k, v in x.items() if k != f'{Q}A.weight'}
    ),
    'layers.1.self_attn.q_proj.lora_A.weight: found absent, wanted',
  ),
  'one too many': (
    lambda f: rewrite(f, lambda x: {**x, f'{Q}B.bias': np.ones(2)}),
    'holds .*q_proj.lora_B.bias, which is no lora_A.weight',
  ),
  'quantised': (
    lambda f: rewrite(f, lambda x: {k: v.astype('i1') for k, v in x.items()}),
    'is of dtype I8, readable are F32',
  ),
  'elsewhere': (
    lambda f: rewrite(f, lambda x: {k[17:]: v for k, v in x.items()}),
    'is of another model .*layers.0.*found absent',
  ),
  'the head too': (
    lambda f: rewrite(
      f,
      lambda x: {
        **x,
        'base_model.model.lm_head.lora_A.weight': np.ones((4, 9)),
      },
    ),
    'adapts down_proj, gate_proj, k_proj, lm_head, o_proj.* choose down_proj,'
    ' gate_proj, k_proj, o_proj',
  ),
  'the embedding too': (
    lambda f: rewrite(
      f, lambda x: {**x, EMBEDDING: np.ones((20, 16), np.float32)}
    ),
    'holds .*embed_tokens.weight, which is no lora_A.weight .* merge it',
  ),
  'another name': (
    lambda f: rewrite(f, lambda x: named(x, 'mine')),
    'holds .*lora_A.mine.weight, which is no lora_A.weight',
  ),
  'both with a name and without': (
    lambda f: rewrite(f, lambda x: {**x, **named(x, 'default')}),
    'is there twice',
  ),
  'some layers': (
    lambda f: rewrite(f, lambda x: {k: v for k, v in x.items() if '.1.' in k}),
    'not of all its layers .layers_to_transform.; layers.0.*found absent',
  ),
  'another kind': (
    lambda f: change(f, peft_type='LOHA'),
    "says peft_type 'LOHA'; only .* A can be loaded; merge it",
  ),
  'no rank': (lambda f: change(f, r=None), 'says r None, the config .* 4;'),
}


@pytest.fixture(scope='module')
def low(tmp_path_factory):
  config = sizes_of('gemma2')
  path = tmp_path_factory.mktemp('low') / 'low'
  adapter.export_adapter(
    adapters_of(config), config, str(path), base='someone/base'
  )
  return path


def copy(low, to):
  to.mkdir()
  for name, content in toy.listing(low).items():
    (to / name).write_bytes(content)
  return to


def refused(folder, config, why, targets='attn|mlp'):
  with pytest.raises(UserError, match=why) as e:
    load(folder, config, targets)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('what', DAMAGE)
def test_a_damaged_folder_is_one_line(low, tmp_path, what):
  damage, why = DAMAGE[what]
  folder = copy(low, tmp_path / 'x')
  load(folder, sizes_of('gemma2'))
  damage(folder)
  refused(folder, sizes_of('gemma2'), why)


@pytest.mark.parametrize(
  'key, value',
  [
    ('use_rslora', True),
    ('use_dora', True),
    ('bias', 'lora_only'),
    ('modules_to_save', ['embed_tokens']),
    ('lora_bias', True),
    ('alpha_pattern', {'q_proj': 3}),
    ('rank_pattern', {'q_proj': 3}),
    ('init_lora_weights', 'pissa_niter_4'),
    ('alora_invocation_tokens', [3, 4]),
  ],
)
def test_what_is_no_low_rank_sum_is_refused(low, tmp_path, key, value):
  folder = copy(low, tmp_path / 'x')
  change(folder, init_lora_weights=True, lora_dropout=0.1, alpha_pattern={})
  load(folder, sizes_of('gemma2'))
  change(folder, **{key: value})
  refused(folder, sizes_of('gemma2'), f'says {key} .* merge it into its model')


def test_an_adapter_of_another_config_is_refused(low):
  """Of each the two values are named."""
  config = sizes_of('gemma2')
  like = shapes_of(config, rank=2)
  mesh = sharding.make_mesh(data=1, model=1)
  with pytest.raises(UserError, match='says r 4, the config model.lora.rank 2'):
    adapter.load_adapter(str(low), config, sharding.tree_structs(like, mesh))
  other = dataclasses.replace
  refused(
    low,
    other(config, lora_scale=2.0),
    'says lora_alpha 6, the config model.lora.alpha 8;',
  )
  refused(
    low,
    config,
    'adapts down_proj, gate_proj, .* choose k_proj, o_proj, q_proj, v_proj,',
    targets='attn',
  )
  refused(
    low,
    other(config, feed_forward=40),
    "for 'someone/base', is of another model .*; "
    r'layers.0.mlp.down_proj.lora_A.weight: found \(4, 24\), wanted \(4, 40\)',
  )
  refused(
    low,
    other(config, layers=4),
    r'layers.2.* found absent, .*; and 18 more; ',
  )
  refused(
    low, other(config, layers=1), r'layers.1.\S*: found .*, wanted absent'
  )


@pytest.mark.parametrize(
  'path, why',
  [
    ('/nowhere', '/nowhere is no folder here, and no Hugging Face repository'),
    ('google/adapter@main', 'and 40 hexadecimal digits'),
    ('google/adapter@' + 'a' * 40, 'huggingface_hub: pip install'),
  ],
)
def test_a_place_that_is_none(monkeypatch, path, why):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  refused(path, sizes_of('gemma2'), why)
