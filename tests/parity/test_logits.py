"""Our logits equal those of the gemma library, on its own parameter trees."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from gemma import gm
from gemma.gm.nn import _config as library_config
from gemma.gm.nn import _modules as library_modules
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.models.gemma import model as gemma

_KIND = {
  'local': library_modules.AttentionType.LOCAL_SLIDING,
  'global': library_modules.AttentionType.GLOBAL,
}
_BY_FEATURES = (
  'BY_ONE_OVER_SQRT_HEAD_DIM',
  'BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS',
)
_SIZES = dict(vocab_size=37, features=24, head_size=8, feed_forward=40)
CONFIGS = {
    'gemma3': gemma.Config(
        **_SIZES, layers=5, heads=4, kv_heads=2,
        pattern=('local', 'local', 'global'), window=4, qk_norm=True,
        post_norms=True, global_rope_base=1_000_000.0, global_rope_scale=8.0,
        gating_transposed=True,
    ),
    'gemma3_one_kv_head': gemma.Config(
        **_SIZES, layers=2, heads=4, kv_heads=1, pattern=('local', 'global'),
        window=4, qk_norm=True, post_norms=True, gating_transposed=True,
    ),
    'gemma2': gemma.Config(
        **_SIZES, layers=4, heads=4, kv_heads=2, pattern=('local', 'global'),
        window=4, post_norms=True, attention_softcap=5.0, final_softcap=3.0,
        gating_transposed=True, query_scale=(24 / 4) ** -0.5,
    ),
    'gemma2_2b': gemma.Config(
        **_SIZES, layers=3, heads=4, kv_heads=2, pattern=('local', 'global'),
        window=4, post_norms=True, attention_softcap=5.0, final_softcap=3.0,
    ),
    'gemma1_2b': gemma.Config(**_SIZES, layers=3, heads=3, kv_heads=1),
    'gemma1_7b': gemma.Config(**_SIZES, layers=3, heads=3, kv_heads=3),
}  # fmt: skip


def library(config: gemma.Config) -> gm.nn.Transformer:
  """The library's model of the same sizes."""
  kinds = [
    _KIND[config.pattern[i % len(config.pattern)]] for i in range(config.layers)
  ]
  norms = library_config.QueryPreAttentionNormalisation
  return gm.nn.Transformer(
    config=library_config.TransformerConfig(
      num_embed=config.vocab_size,
      embed_dim=config.features,
      hidden_dim=config.feed_forward,
      num_heads=config.heads,
      head_dim=config.head_size,
      num_kv_heads=config.kv_heads,
      final_logit_softcap=config.final_softcap,
      attn_logits_soft_cap=config.attention_softcap,
      use_post_attn_norm=config.post_norms,
      use_post_ffw_norm=config.post_norms,
      attention_types=kinds,
      query_pre_attn_norm=norms[_BY_FEATURES[config.query_scale is not None]],
      sliding_window_size=config.window or None,
      transpose_gating_einsum=config.gating_transposed,
      use_qk_norm=config.qk_norm,
      local_base_frequency=int(config.local_rope_base),
      global_base_frequency=int(config.global_rope_base),
      global_scale_factor=config.global_rope_scale,
    ),
    dtype=jnp.float32,
  )


def nested(config: gemma.Config, params):
  """Our stacked tree as the library's nested one."""
  tree = {k: params[k] for k in ('embedder', 'final_norm')}
  for i, (_, layer) in enumerate(gemma.layers(config, params)):
    tree[f'layer_{i}'] = layer
  return tree


def random_params(config: gemma.Config):
  """No parameter is at its initial zero, norm scales included."""
  shapes = jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes
  )


def mask_of(lengths, width, side):
  column = np.arange(width)[None]
  lengths = np.array(lengths)[:, None]
  return column < lengths if side == 'right' else column >= width - lengths


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('side', ['left', 'right'])
def test_logits_with_padding_and_long_sequences(name, side):
  """Twelve positions, three windows long, padded on either side."""
  config = CONFIGS[name]
  params = random_params(config)
  rng = np.random.default_rng(1)
  tokens = rng.integers(4, config.vocab_size, (3, 12)).astype(np.int32)
  mask = mask_of([12, 9, 5], 12, side)
  policy = gemma.make(
    config, temperature=1.0, dtype='float32', scan=True, remat='none'
  )
  hidden = policy.hidden(params, tokens, mask)
  ours = policy.logits(params, hidden)

  positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
  causal = np.tril(np.ones((12, 12), bool))[None] & mask[:, None, :]
  theirs = (
    library(config)
    .apply(
      {'params': nested(config, params)},
      tokens,
      positions=positions,
      attention_mask=causal,
    )
    .logits
  )
  scale = np.abs(theirs[mask]).max()
  np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-5 * scale)


@pytest.mark.parametrize('name', CONFIGS)
def test_parameter_trees_are_the_same(name):
  config = CONFIGS[name]
  ours = nested(config, random_params(config))
  theirs = jax.eval_shape(
    lambda: library(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))[
      'params'
    ]
  )
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize('name', ['gemma3', 'gemma2', 'gemma1_2b'])
def test_cached_decoding_token_by_token(name):
  """Three prompts of mixed lengths in one batch, then nine tokens each.

  Thirteen positions are three windows. The library shares one slot among the
  rows, as we do; prompts are padded on the left.
  """
  config = CONFIGS[name]
  params = jax.tree.map(jnp.asarray, random_params(config))
  width, prompt = 13, 4
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, config.vocab_size, (3, width)).astype(np.int32)
  mask = mask_of([13, 12, 10], width, 'left')
  policy = gemma.make(
    config, temperature=1.0, dtype='float32', scan=True, remat='none'
  )
  model, their_params = library(config), {'params': nested(config, params)}
  positions = np.maximum(np.cumsum(mask, -1) - 1, 0).astype(np.int32)
  causal = np.tril(np.ones((width, width), bool))[None] & mask[:, None, :]

  ours = jax.jit(
    lambda params: oracle.forced(policy, params, tokens, mask, prompt)
  )(params)

  @jax.jit
  def theirs(cache, tokens, positions, seen):
    out = model.apply(
      their_params,
      tokens,
      positions=positions,
      attention_mask=seen,
      cache=cache,
    )
    return out.logits, out.cache

  other = model.init_cache(batch_size=3, dtype=jnp.float32, cache_length=width)
  for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, width))]:
    new = slice(start, end)
    b, other = theirs(other, tokens[:, new], positions[:, new], causal[:, new])
    assert mask[:, end - 1].all()
    a, b = ours[:, end - prompt], b[:, -1]
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
