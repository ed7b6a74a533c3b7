"""Gemma 1, 2 and 3 (text): our forward pass over the official parameters.

The tree is the official *stacked* layout. Layers repeat an attention pattern;
`stacked_layers/attention_type_i` holds the i-th layer of every full pattern
with a leading axis, and the layers left over keep their own names `layer_j`:

    embedder/input_embedding                        [V, D]
    stacked_layers/attention_type_i/attn/...        [G, ...]
    layer_j/attn/...                                (remainder)
    final_norm/scale                                [D]

Beside a weight its LoRA adapter may lie, which adds to its product: lora.py.
Training scans over the G patterns, or unrolls them; decoding always unrolls,
so that each layer's cache is updated in place.

Axes: R rows, S new positions, L cache length, N heads, K key-value heads,
G query heads per key-value head, H head size, F feed-forward size, D features.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bond_jax.models.gemma_configs import Config
from bond_jax.models.gemma_configs import CONFIGS as CONFIGS
from bond_jax.types import Array, Params, Policy

_MASKED = -2.3819763e38  # finite: a row without any valid key must not be NaN


class RMSNorm(nn.Module):
  """x / rms(x) * (1 + scale), in float32."""

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.zeros_init(), (x.shape[-1],))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * (1 + scale)).astype(x.dtype)


def lora_axes(inputs: str, w: str) -> tuple[str, str]:
  """The axes of A and B beside a weight's; its copies C have one pair each."""
  copies = 'C' if 'C' in w else ''
  into = ''.join(i for i in w if i in inputs)
  out = ''.join(i for i in w if i not in inputs + copies)
  return f'{copies}{into}r', f'{copies}r{out}'


def product(equation, x, w, lora, scale):
  """The einsum of x and w, in the dtype of x, plus what w's adapter adds.

  x W + scale (x A) B where `lora` is {'a': A, 'b': B}, x W + x delta where it
  is {'delta': delta}, x W where it is {}. Never x (W + scale A B): W + scale
  A B in bfloat16 is W wherever the change is below 1/512 of it.
  """
  out = jnp.einsum(equation, x, w.astype(x.dtype))
  if 'delta' in lora:
    return out + jnp.einsum(equation, x, lora['delta'].astype(x.dtype))
  if not lora:
    return out
  if scale is None:
    raise ValueError('a tree with LoRA adapters, a Config without lora_scale')
  of_x, of_w, of_out = re.split(',|->', equation)
  a, b = lora_axes(of_x, of_w)
  inner = a[: a.startswith('C')] + ''.join(i for i in of_x if i not in a) + 'r'
  low = jnp.einsum(f'{of_x},{a}->{inner}', x, lora['a'].astype(x.dtype))
  b_scaled = (scale * lora['b']).astype(x.dtype)
  return out + jnp.einsum(f'{inner},{b}->{of_out}', low, b_scaled)


def _lora(module: nn.Module, weight: str = '') -> dict[str, Array]:
  """The adapter beside a weight of a module, {} if it has none; see lora.py."""
  names = {k: f'{weight}lora_{k}' for k in ('a', 'b', 'delta')}
  return {
    k: module.get_variable('params', name)
    for k, name in names.items()
    if module.has_variable('params', name)
  }


class Einsum(nn.Module):
  """A parameter `w` and the product with it, in the dtype of x."""

  shape: tuple[int, ...]
  fan_in: int
  lora_scale: float | None

  @nn.compact
  def __call__(self, equation, x):
    init = nn.initializers.normal(self.fan_in**-0.5)
    w = self.param('w', init, self.shape)
    return product(equation, x, w, _lora(self), self.lora_scale)


def rope(x: Array, position: Array, base: float, scale: float) -> Array:
  """Rotates x [R, S, N, H] by its positions i32[R, S]."""
  half = x.shape[-1] // 2
  frequency = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
  angle = position[..., None].astype(jnp.float32) * frequency[None, None]
  angle = angle[:, :, None] / scale  # [R, S, 1, H / 2]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return out.astype(x.dtype)


class Attention(nn.Module):
  config: Config
  local: bool

  @nn.compact
  def __call__(self, x, position, cache):
    """x [R, S, D], position i32[R, S] (-1 = padding) -> same, new cache.

    `cache` is None or (k, v [R, L, K, H], positions i32[R, L] with the new
    ones already written, the slot of the first new one).
    """
    c = self.config
    einsum = functools.partial(Einsum, lora_scale=c.lora_scale)
    if c.kv_heads == c.heads:
      qkv = einsum((3, c.heads, c.features, c.head_size), c.features,
                   name='qkv_einsum')  # fmt: skip
      q, k, v = qkv('RSD,CNDH->CRSNH', x)
    else:
      q = einsum((c.heads, c.features, c.head_size), c.features,
                 name='q_einsum')('RSD,NDH->RSNH', x)  # fmt: skip
      k, v = einsum((2, c.kv_heads, c.features, c.head_size), c.features,
                    name='kv_einsum')('RSD,CKDH->CRSKH', x)  # fmt: skip
    if c.qk_norm:
      q = RMSNorm(name='_query_norm')(q)
      k = RMSNorm(name='_key_norm')(k)
    base = c.local_rope_base if self.local else c.global_rope_base
    scale = 1.0 if self.local else c.global_rope_scale
    q, k = rope(q, position, base, scale), rope(k, position, base, scale)
    q *= c.query_scale or c.head_size**-0.5

    key_position, new_cache = position, None
    if cache is not None:
      old_k, old_v, key_position, slot = cache
      put = jax.lax.dynamic_update_slice_in_dim
      k = put(old_k, k.astype(old_k.dtype), slot, 1)
      v = put(old_v, v.astype(old_v.dtype), slot, 1)
      new_cache = (k, v)

    # Positions alone decide what is seen: padding has none (-1).
    mine, theirs = position[:, :, None], key_position[:, None, :]
    seen = (theirs >= 0) & (theirs <= mine)
    if self.local:
      seen &= theirs > mine - c.window
    r, s = position.shape
    q = q.reshape(r, s, c.kv_heads, -1, c.head_size)
    logits = jnp.einsum('RSKGH,RLKH->RKGSL', q, k).astype(jnp.float32)
    if c.attention_softcap:
      logits = jnp.tanh(logits / c.attention_softcap) * c.attention_softcap
    logits = jnp.where(seen[:, None, None], logits, _MASKED)
    probs = jax.nn.softmax(logits, -1).astype(x.dtype)
    out = jnp.einsum('RKGSL,RLKH->RSKGH', probs, v)
    out = out.reshape(r, s, c.heads, c.head_size)
    shape = (c.heads, c.head_size, c.features)
    out = einsum(shape, c.heads * c.head_size, name='attn_vec_einsum')(
      'RSNH,NHD->RSD', out
    )
    return out, new_cache


class FeedForward(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x):
    c = self.config
    shape = (c.feed_forward, c.features)
    if not c.gating_transposed:
      shape = shape[::-1]
    w = self.param(
      'gating_einsum', nn.initializers.normal(c.features**-0.5), (2, *shape)
    ).astype(x.dtype)
    lora = _lora(self, 'gating_einsum_')
    rows = x.reshape(-1, c.features)  # one long axis: faster on CPU
    equation = 'ND,FD->NF' if c.gating_transposed else 'ND,DF->NF'
    gate, value = (
      product(
        equation, rows, w[i], {k: v[i] for k, v in lora.items()}, c.lora_scale
      )
      for i in (0, 1)
    )
    init = nn.initializers.normal(c.feed_forward**-0.5)
    w = self.param('linear', init, (c.feed_forward, c.features))
    lora = _lora(self, 'linear_')
    out = product('NF,FD->ND', nn.gelu(gate) * value, w, lora, c.lora_scale)
    return out.reshape(x.shape)


class Block(nn.Module):
  config: Config
  local: bool

  @nn.compact
  def __call__(self, x, position, cache=None):
    """See Attention: x [R, S, D] -> x, new (k, v)."""
    post = self.config.post_norms
    y = RMSNorm(name='pre_attention_norm')(x)
    y, cache = Attention(self.config, self.local, name='attn')(
      y, position, cache
    )
    x += RMSNorm(name='post_attention_norm')(y) if post else y
    y = RMSNorm(name='pre_ffw_norm')(x)
    y = FeedForward(self.config, name='mlp')(y)
    x += RMSNorm(name='post_ffw_norm')(y) if post else y
    return x, cache


def init(config: Config, key: Array) -> Params:
  """Random float32 parameters in the official stacked layout."""
  groups, rest = divmod(config.layers, len(config.pattern))

  def block(key, kind):
    x, position = jnp.zeros((1, 1, config.features)), jnp.zeros((1, 1), int)
    module = Block(config, kind == 'local')
    return module.init(key, x, position)['params']

  keys = jax.random.split(key, config.layers + 1)
  embedding = jax.random.normal(keys[-1], (config.vocab_size, config.features))
  params = {
    'embedder': {'input_embedding': embedding * config.features**-0.5},
    'final_norm': {'scale': jnp.zeros((config.features,))},
  }
  if groups:
    stacked = keys[: groups * len(config.pattern)].reshape(groups, -1)
    params['stacked_layers'] = {
      f'attention_type_{i}': jax.vmap(lambda k, kind=kind: block(k, kind))(
        stacked[:, i]
      )
      for i, kind in enumerate(config.pattern)
    }
  for i in range(rest):
    j = config.layers - rest + i
    params[f'layer_{j}'] = block(keys[j], config.pattern[i])
  return params


def layers(config: Config, params: Params):
  """Yields (kind, parameters) of every layer, bottom up."""
  size = len(config.pattern)
  for j in range(config.layers):
    kind = config.pattern[j % size]
    if f'layer_{j}' in params:
      yield kind, params[f'layer_{j}']
    else:
      stacked = params['stacked_layers'][f'attention_type_{j % size}']
      yield kind, jax.tree.map(lambda w, g=j // size: w[g], stacked)


def init_cache(config: Config, rows: int, length: int, dtype) -> Any:
  """An empty cache: k and v of every layer, the positions, the next slot."""
  shape = (rows, length, config.kv_heads, config.head_size)
  return dict(
    kv=tuple(
      (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
      for _ in range(config.layers)
    ),
    position=jnp.full((rows, length), -1, jnp.int32),
    slot=jnp.int32(0),
  )


def hidden(
  config: Config,
  params: Params,
  tokens: Array,
  mask: Array,
  cache: Any,
  *,
  dtype,
  scan: bool,
  remat: bool,
) -> tuple[Array, Any]:
  """The model up to its head.

  Args:
    config: sizes.
    params: the tree above, any float dtype.
    tokens: i32[R, S].
    mask: bool[R, S]; False = padding, anywhere: it takes no position.
    cache: None, or what `init_cache` or an earlier call returned.
    dtype: of the computation.
    scan: loop over the patterns instead of unrolling them: compiles in a time
      that does not depend on the depth; slower on CPU.
    remat: recompute each pattern (or layer) in the backward pass.

  Returns:
    [R, S, D] in `dtype`, after the final norm, and the advanced cache.
  """
  before = 0 if cache is None else cache['position'].max(-1, keepdims=True) + 1
  position = jnp.where(mask, before + jnp.cumsum(mask, -1) - 1, -1)
  x = params['embedder']['input_embedding'].astype(dtype)[tokens]
  x *= jnp.sqrt(config.features).astype(dtype)

  def block(kind, p, x, cache=None):
    return Block(config, kind == 'local').apply(
      {'params': p}, x, position, cache
    )

  if cache is not None:
    slot = cache['slot']
    positions = jax.lax.dynamic_update_slice_in_dim(
      cache['position'], position.astype(jnp.int32), slot, 1
    )
    kv = []
    for (kind, p), old in zip(layers(config, params), cache['kv'], strict=True):
      x, new = block(kind, p, x, (*old, positions, slot))
      kv.append(new)
    slot = slot + tokens.shape[1]
    cache = dict(kv=tuple(kv), position=positions, slot=slot)
  elif scan:

    def pattern(x, params):
      for i, kind in enumerate(config.pattern):
        x, _ = block(kind, params[f'attention_type_{i}'], x)
      return x, None

    if 'stacked_layers' in params:  # else fewer layers than the pattern has
      body = jax.checkpoint(pattern) if remat else pattern
      x, _ = jax.lax.scan(body, x, params['stacked_layers'])
    first = config.layers - config.layers % len(config.pattern)
    for i, j in enumerate(range(first, config.layers)):
      x, _ = block(config.pattern[i], params[f'layer_{j}'], x)
  else:
    for kind, p in layers(config, params):
      one = functools.partial(block, kind)
      x, _ = (jax.checkpoint(one) if remat else one)(p, x)
  x = RMSNorm().apply({'params': params['final_norm']}, x)
  return x, cache


def logits(
  config: Config, params: Params, hidden: Array, temperature: float
) -> Array:
  """float32 logits [..., V] / temperature; rows no token uses are masked."""
  table = params['embedder']['input_embedding'].astype(hidden.dtype)
  out = jnp.einsum(
    '...D,VD->...V', hidden, table, preferred_element_type=jnp.float32
  )
  if config.final_softcap:
    out = jnp.tanh(out / config.final_softcap) * config.final_softcap
  out /= temperature
  if config.used_vocab and config.used_vocab < config.vocab_size:
    used = jnp.arange(config.vocab_size) < config.used_vocab
    out = jnp.where(used.reshape((1,) * (out.ndim - 1) + (-1,)), out, _MASKED)
  return out


def make(
  config: Config, *, temperature: float, dtype: str, scan: bool, remat: bool
) -> Policy:
  """This model as a Policy; dtype 'float32' or 'bfloat16'."""
  if temperature <= 0:
    raise ValueError(f'temperature must be > 0, got {temperature}')
  return Policy(
    init=lambda key: init(config, key),
    init_cache=lambda rows, n: init_cache(config, rows, n, dtype),
    hidden=lambda params, tokens, mask, cache: hidden(
      config, params, tokens, mask, cache, dtype=dtype, scan=scan, remat=remat
    ),
    logits=lambda params, x: logits(config, params, x, temperature),
    vocab_size=config.vocab_size,
  )
