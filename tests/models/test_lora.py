"""LoRA: a model of merged weights, what is drawn, the average of products."""

import dataclasses
import functools

from conftest import core, random_params, TINY
from flax import traverse_util
import jax
import jax.numpy as jnp
from low_rank import (
  close,
  FAMILIES,
  merged_by_hand,
  MODEL,
  random_adapters,
  RANK,
  SETTINGS,
  shapes_of,
)
import numpy as np
import optax
import oracle
import pytest

from bond_jax.algorithms.parts import anchors
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora
from bond_jax.models.gemma import layers as gemma_layers
from bond_jax.models.gemma import model as gemma

# -- the model ----------------------------------------------------------------


@pytest.mark.parametrize('name', core(1, sorted(FAMILIES)))
def test_adapters_are_the_merged_weights(name):
  """Scanned, decoded from a cache, unrolled; by A and B or their product.

  Two rows, one padded, against the plain numpy model of W + scale A B.
  """
  config = FAMILIES[name]
  params, adapters = random_params(config, 0), random_adapters(config)
  tokens = np.random.default_rng(5).integers(0, 11, (2, 7))
  mask = np.ones_like(tokens, bool)
  mask[1, :2] = False

  def decoded(policy, tree):
    return oracle.forced(policy, tree, tokens, mask, 1)

  def whole(policy, tree):
    return policy.logits(tree, policy.hidden(tree, tokens, mask))

  @jax.jit
  def forward(base, adapters):
    unrolled, scanned = (
      lora.over(gemma.make(config, **{**MODEL, 'scan': scan}), base)
      for scan in (False, True)
    )
    merged = lora.merge(config, base, adapters)
    delta = lora.dense(config, adapters)
    outs = [whole(scanned, adapters), decoded(unrolled, adapters)]
    if name == 'gemma3':  # nothing in these differs between families
      outs += [whole(unrolled, adapters), whole(scanned, delta)]
    outs.append(decoded(unrolled, delta))
    return merged, lora.merge(config, base, delta), outs

  merged, again, outs = forward(params, adapters)
  by_hand = merged_by_hand(config, params, adapters)
  close(merged, by_hand, rtol=1e-6, atol=1e-6)
  close(again, by_hand, rtol=1e-6, atol=1e-6)
  plain = oracle.gemma_logits(config, params, tokens[0])
  for row, m in zip(range(2), mask, strict=True):
    expected = oracle.gemma_logits(config, by_hand, tokens[row][m])
    for out in outs:
      mine = np.asarray(out[row, m])[:, : config.used_vocab]
      tolerance = 1e-5 * np.abs(expected).max()
      np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=tolerance)
  assert (
    np.abs(plain - np.asarray(outs[0][0])[:, : config.used_vocab]).max() > 1
  )


def test_fresh_adapters_change_no_bit():
  config = dataclasses.replace(FAMILIES['gemma1_multi_query'], layers=1)
  tokens = np.arange(6)[None]

  @jax.jit
  def both(base, adapters):
    outs = []
    for dtype in ('float32', 'bfloat16'):
      policy = gemma.make(config, **{**MODEL, 'dtype': dtype})
      for tree in (base, lora.join(base, adapters)):
        hidden = policy.hidden(tree, tokens, tokens >= 0)
        outs.append(policy.logits(tree, hidden))
    return outs

  adapters = lora.init(config, jax.random.key(0), rank=RANK, targets='.*')
  f32, f32_lora, bf16, bf16_lora = both(random_params(config, 0), adapters)
  np.testing.assert_array_equal(f32_lora, f32)
  np.testing.assert_array_equal(bf16_lora, bf16)
  assert (f32 != bf16).any()


def test_the_gradient_is_that_of_the_merged_weights():
  """By the chain rule, through scan and remat."""
  config = FAMILIES['gemma1_multi_head']
  policy = gemma.make(config, **{**MODEL, 'scan': True, 'remat': 'all'})
  base, adapters = random_params(config, 0), random_adapters(config)
  tokens = np.arange(6)[None]

  def loss(params):
    hidden = policy.hidden(params, tokens, tokens >= 0)
    return (policy.logits(params, hidden) ** 2).mean()

  @jax.jit
  def both(base, adapters):
    ours = jax.grad(lambda tree: loss(lora.join(base, tree)))(adapters)
    merge = functools.partial(lora.merge, config, base)
    merged, back = jax.vjp(merge, adapters)
    return ours, *back(jax.grad(loss)(merged))

  ours, expected = both(base, adapters)
  assert jax.tree.structure(ours) == jax.tree.structure(adapters)
  size = optax.tree.norm(expected)
  assert size > 1
  close(ours, expected, rtol=1e-4, atol=1e-5 * float(size))


def test_a_small_change_of_a_bfloat16_weight_is_not_lost():
  """Of W + A B in bfloat16 nothing would be left."""
  w = jnp.ones((2, 1), jnp.bfloat16)
  a, b = jnp.float32([[1], [0]]), jnp.float32([[1e-3]])
  x = jnp.array([[1, -1]], jnp.bfloat16)
  assert ((w + 2 * a @ b).astype(w.dtype) == w).all()
  out = gemma_layers.product('ND,DF->NF', x, w, {'a': a, 'b': b}, 2.0)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(out), [[2e-3]], rtol=1e-2)
  out = gemma_layers.product('ND,DF->NF', x, w, {'delta': a @ b}, 2.0)
  np.testing.assert_allclose(np.float32(out), [[1e-3]], rtol=1e-2)


def test_merged_weights_are_rounded_once_to_the_base_s_dtype():
  config = FAMILIES['gemma1_multi_head']
  f32 = functools.partial(np.asarray, dtype=np.float32)
  base = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), random_params(config, 0)
  )
  adapters = random_adapters(config)
  merged = jax.jit(functools.partial(lora.merge, config))(base, adapters)
  exact = merged_by_hand(config, jax.tree.map(f32, base), adapters)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
  # One unit in the last place, where the exact sum is a tie.
  close(
    jax.tree.map(f32, merged), jax.tree.map(f32, rounded), rtol=2**-7, atol=0
  )
  same = np.concatenate([
      (x == y).ravel() for x, y in zip(
          jax.tree.leaves(merged), jax.tree.leaves(rounded), strict=True)
  ])  # fmt: skip
  assert same.mean() > 0.99
  assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype('bfloat16')}


def test_full_weights_over_no_base_are_their_own_merge():
  params = random_params(TINY['gemma2'], 0)
  merged = lora.merge(TINY['gemma2'], {}, params)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, merged, params)))
  assert lora.join({}, params) is params


def test_join_takes_nothing_twice_and_changes_neither():
  base, tree = {'x': {'w': 1}, 'y': 2}, {'x': {'lora_a': 3}, 'z': 4}
  both = lora.join(base, tree)
  assert both == {'x': {'w': 1, 'lora_a': 3}, 'y': 2, 'z': 4}
  assert base == {'x': {'w': 1}, 'y': 2}
  assert tree == {'x': {'lora_a': 3}, 'z': 4}
  for clash in ({'y': 5}, {'x': 5}, {'x': {'w': 5}}):
    with pytest.raises(ValueError, match='also in the tree'):
      lora.join(base, clash)


def test_adapters_without_a_scale_are_refused():
  x, w = np.ones((1, 2)), np.ones((2, 1))
  with pytest.raises(ValueError, match='lora_scale'):
    gemma_layers.product('ND,DF->NF', x, w, {'a': 0}, None)


# -- what init draws ----------------------------------------------------------


def test_shapes_are_those_of_the_table():
  """Grouped queries and one stacked projection, with 2 layers in front."""
  config = TINY['gemma1_multi_query']
  (layer,) = shapes_of(config)['stacked_layers'].values()
  assert jax.tree.map(lambda x: x.shape, layer) == {
      'attn': {
          'q_einsum': {'lora_a': (2, 16, 3), 'lora_b': (2, 3, 4, 4)},
          'kv_einsum': {'lora_a': (2, 2, 16, 3), 'lora_b': (2, 2, 3, 1, 4)},
          'attn_vec_einsum': {'lora_a': (2, 4, 4, 3), 'lora_b': (2, 3, 16)},
      },
      'mlp': {
          'gating_einsum_lora_a': (2, 2, 16, 3),
          'gating_einsum_lora_b': (2, 2, 3, 24),
          'linear_lora_a': (2, 24, 3), 'linear_lora_b': (2, 3, 16),
      },
  }  # fmt: skip
  (layer,) = shapes_of(TINY['gemma1_multi_head'])['stacked_layers'].values()
  assert jax.tree.map(lambda x: x.shape, layer['attn']['qkv_einsum']) == {
    'lora_a': (2, 3, 16, 3),
    'lora_b': (2, 3, 3, 2, 8),
  }
  gates = shapes_of(TINY['gemma2'])['stacked_layers']['attention_type_0']['mlp']
  assert gates['gating_einsum_lora_a'].shape == (1, 2, 16, 3)
  assert gates['gating_einsum_lora_b'].shape == (1, 2, 3, 24)
  assert set(shapes_of(FAMILIES['gemma3'])) == {'stacked_layers', 'layer_2'}


def test_init_draws_a_and_leaves_b_zero():
  """A has variance 1 / fan_in, B is zero; every A has draws of its own."""
  init = functools.partial(
    lora.init, TINY['gemma1_multi_head'], rank=64, targets='.*'
  )
  (layer,) = jax.jit(init)(jax.random.key(0))['stacked_layers'].values()
  flat = traverse_util.flatten_dict(layer, sep='/')
  fan_in = {
      'attn/qkv_einsum/lora_a': 16, 'attn/attn_vec_einsum/lora_a': 16,
      'mlp/gating_einsum_lora_a': 16, 'mlp/linear_lora_a': 24,
  }  # fmt: skip
  for name, x in flat.items():
    assert x.dtype == jnp.float32
    if name in fan_in:
      np.testing.assert_allclose(np.std(x), fan_in[name] ** -0.5, rtol=0.1)
    else:
      assert name.endswith('lora_b') and not x.any()
  drawn = np.concatenate([flat[name].reshape(-1) for name in fan_in])
  assert len(np.unique(drawn)) > 0.999 * drawn.size


def test_targets_choose_weights_in_every_layer():
  config = FAMILIES['gemma3']
  for targets, expected in (
    ('attn/.*', {'attn'}),
    ('linear', {'mlp'}),
    ('q_einsum|mlp/linear', {'attn', 'mlp'}),
  ):
    shapes = shapes_of(config, targets=targets)
    layers = [*shapes['stacked_layers'].values(), shapes['layer_2']]
    assert [set(layer) for layer in layers] == [expected] * 3
  assert set(layers[0]['attn']) == {'q_einsum'}
  assert set(layers[0]['mlp']) == {'linear_lora_a', 'linear_lora_b'}


@pytest.mark.parametrize(
  'settings, says',
  [
    (dict(rank=0), 'rank 0 and alpha'),
    (dict(rank=2.0), 'rank 2.0'),
    (dict(alpha=0), 'alpha 0'),
    (dict(targets='('), 'no regular expression: .*; names are attn/attn_vec'),
    (dict(targets='embedder'), 'none of the names .* mlp/linear'),
  ],
)
def test_settings_that_make_no_adapter_are_refused(settings, says):
  with pytest.raises(UserError, match=says) as e:
    lora.make(TINY['gemma2'], **{**SETTINGS, **settings}, **MODEL)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['gemma3_tiny', 'gemma1_multi_head'])
def test_adapters_are_split_as_their_weights_are(name):
  """A dense anchor exactly so; Adam's copies follow."""
  config = {**gemma.CONFIGS, **TINY}[name]
  config = dataclasses.replace(config, lora_scale=1.0)
  shapes = shapes_of(config, rank=16)
  adam = jax.eval_shape(optax.adam(1.0).init, shapes)
  delta = jax.eval_shape(functools.partial(lora.dense, config), shapes)
  full = jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))
  for mesh in ((8, 1), (4, 2), (2, 4)):
    mesh = sharding.make_mesh(*mesh)
    of = lambda tree, mesh=mesh: sharding.tree_shardings(tree, mesh)
    shards = of(shapes)
    size = lambda s, x: (np.prod(s.shard_shape(x.shape)), x.size)
    sizes = np.array([
        size(s, x) for s, x in zip(
            jax.tree.leaves(shards), jax.tree.leaves(shapes), strict=True)
    ])  # fmt: skip
    assert (sizes[:, 0] * mesh.shape['data'] <= sizes[:, 1]).all()
    held, whole = sizes.sum(0)
    if mesh.shape['model'] > 1:  # F, and N where it can be
      assert held < 0.8 * whole / mesh.shape['data']
    assert of(adam)[0].mu == shards
    weights = traverse_util.flatten_dict(of(full), sep='/')
    for leaf, shard in traverse_util.flatten_dict(of(delta), sep='/').items():
      weight = leaf.replace('_lora_delta', '').replace('lora_delta', 'w')
      assert shard == weights[weight]


# -- the anchor ---------------------------------------------------------------


def test_the_average_of_products_is_exact_and_that_of_factors_is_not(x64):
  config, rule = FAMILIES['gemma1_multi_head'], anchors.ema(0.3)
  base = jax.tree.map(np.float64, random_params(config, 0))
  trees = [
    jax.tree.map(np.float64, random_adapters(config, seed)) for seed in range(4)
  ]
  merge = functools.partial(lora.merge, config, base)
  view = functools.partial(lora.dense, config)

  def follow(trees):
    anchor = trees[0]
    for i, tree in enumerate(trees[1:]):
      anchor = rule.update(anchor, tree, i)
    return anchor

  @jax.jit
  def ends(trees):
    expected = follow([merge(tree) for tree in trees])
    return (
      expected,
      merge(follow([view(t) for t in trees])),
      merge(follow(trees)),
    )

  expected, exact, factored = ends(trees)
  close(exact, expected, rtol=1e-12, atol=1e-12)
  apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), factored, expected)
  (layer,) = apart['stacked_layers'].values()
  assert min(
    layer['attn']['qkv_einsum']['w'],
    layer['attn']['attn_vec_einsum']['w'],
    layer['mlp']['gating_einsum'],
    layer['mlp']['linear'],
  ) > 0.05  # fmt: skip
