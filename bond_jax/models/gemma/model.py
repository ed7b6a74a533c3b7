"""Gemma 1, 2 and 3 (text): our forward pass over the official parameters.

The tree is the official *stacked* layout. Layers repeat an attention pattern;
`stacked_layers/attention_type_i` holds the i-th layer of every full pattern
with a leading axis, and the layers left over keep their own names `layer_j`:

    embedder/input_embedding                        [V, D]
    stacked_layers/attention_type_i/attn/...        [G, ...]
    layer_j/attn/...                                (remainder)
    final_norm/scale                                [D]

The layers are in layers.py, the cache of a sampler in decoder.py.
"""

import functools

import jax
import jax.numpy as jnp

from bond_jax.devices import sharding
from bond_jax.models.gemma import decoder
from bond_jax.models.gemma.configs import Config, in_patterns, kinds
from bond_jax.models.gemma.configs import CONFIGS as CONFIGS
from bond_jax.models.gemma.layers import (
  Block,
  embed,
  layers,
  logits,
  RMSNorm,
  within,
)
from bond_jax.types import Array, Params, Policy

# What a backward pass computes again of the layers: nothing; what is not a
# product with weights, which is what takes long; or everything but their input.
REMAT = {
  'none': lambda f: f,
  'products': functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
  'all': jax.checkpoint,
}


def init(config: Config, key: Array) -> Params:
  """Random float32 parameters in the official stacked layout."""
  stacked = in_patterns(config)

  def block(key, kind):
    x, position = jnp.zeros((1, 1, config.features)), jnp.zeros((1, 1), int)
    module = Block(config, kind == 'local')
    attend = functools.partial(within, config, kind == 'local', position)
    return module.init(key, x, position, attend)['params']

  keys = jax.random.split(key, config.layers + 1)
  embedding = jax.random.normal(keys[-1], (config.vocab_size, config.features))
  params = {
    'embedder': {'input_embedding': embedding * config.features**-0.5},
    'final_norm': {'scale': jnp.zeros((config.features,))},
  }
  if stacked:
    of_group = keys[:stacked].reshape(-1, len(config.pattern))
    params['stacked_layers'] = {
      f'attention_type_{i}': jax.vmap(lambda k, kind=kind: block(k, kind))(
        of_group[:, i]
      )
      for i, kind in enumerate(config.pattern)
    }
  for j in range(stacked, config.layers):
    params[f'layer_{j}'] = block(keys[j], kinds(config)[j])
  return params


def hidden(
  config: Config,
  params: Params,
  tokens: Array,
  mask: Array,
  *,
  dtype,
  scan: bool,
  remat: str,
) -> Array:
  """The model up to its head, on whole sequences.

  Args:
    config: sizes.
    params: the tree above, any float dtype.
    tokens: i32[R, S].
    mask: bool[R, S]; False = padding, anywhere: it takes no position.
    dtype: of the computation.
    scan: loop over the patterns instead of unrolling them: compiles in a time
      that does not depend on the depth; slower on CPU. So does the decoder.
    remat: what the backward pass of a pattern (or layer) computes again; see
      REMAT.

  Returns:
    [R, S, D] in `dtype`, after the final norm.
  """
  position = jnp.where(mask, jnp.cumsum(mask, -1) - 1, -1)
  x = sharding.split_rows(embed(config, params, tokens, dtype))

  def block(kind, p, x):
    local = kind == 'local'
    attend = functools.partial(within, config, local, position)
    x, _ = Block(config, local).apply({'params': p}, x, position, attend)
    return x

  if scan:

    def pattern(x, params):
      for i, kind in enumerate(config.pattern):
        x = block(kind, params[f'attention_type_{i}'], x)
      return x, None

    if 'stacked_layers' in params:  # else fewer layers than the pattern has
      x, _ = jax.lax.scan(REMAT[remat](pattern), x, params['stacked_layers'])
    for j in range(in_patterns(config), config.layers):
      x = block(kinds(config)[j], params[f'layer_{j}'], x)
  else:
    for kind, p in layers(config, params):
      one = functools.partial(block, kind)
      x = REMAT[remat](one)(p, x)
  return RMSNorm().apply({'params': params['final_norm']}, x)


def make(
  config: Config, *, temperature: float, dtype: str, scan: bool, remat: str
) -> Policy:
  """This model as a Policy; dtype 'float32' or 'bfloat16'.

  A temperature of 0 is the greedy law: all mass on the likeliest token.
  """
  if remat not in REMAT:
    raise ValueError(f'remat is {remat!r}; known are {", ".join(REMAT)}')
  if temperature < 0:
    raise ValueError(f'temperature must be >= 0, got {temperature}')
  head = functools.partial(
    logits, softcap=config.final_softcap, temperature=temperature,
    used_vocab=config.used_vocab,
  )  # fmt: skip
  return Policy(
    init=lambda key: init(config, key),
    hidden=functools.partial(
      hidden, config, dtype=dtype, scan=scan, remat=remat
    ),
    logits=head,
    prepare=functools.partial(decoder.prepare, config, dtype, scan),
    decoder=functools.partial(decoder.make, config, head, dtype),
    vocab_size=config.vocab_size,
  )
