"""The layers of Gemma 1, 2 and 3: norms, attention, feed-forward.

A weight may have a LoRA adapter beside it, which adds to its product: lora.py.
The caller gives the attention: `within` a sequence, or, while decoding, to a
cache (decoder.py).

Axes: R rows, S new positions, L keys, N heads, K key-value heads, G query
heads per key-value head, H head size, F feed-forward size, D features.
"""

from collections.abc import Callable
import functools
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bond_jax.models.gemma.configs import axes, Config, kinds
from bond_jax.types import Array, Params

MASKED = -2.3819763e38  # finite: a row without any valid key must not be NaN


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


def turn(equation: str) -> str:
  """The equation of a product with the axes of w that meet x's put first."""
  of_x, of_w, of_out = re.split(',|->', equation)
  into = ''.join(i for i in of_w if i in of_x)
  rest = ''.join(i for i in of_w if i not in of_x)
  return f'{of_x},{into}{rest}->{of_out}'


class Einsum(nn.Module):
  """A parameter `w` and the product with it, in the dtype of x.

  While decoding it is `turned`, see decoder.prepare.
  """

  shape: tuple[int, ...]
  fan_in: int
  lora_scale: float | None

  @nn.compact
  def __call__(self, equation, x):
    if self.has_variable('params', 'turned'):
      equation, w = turn(equation), self.get_variable('params', 'turned')
    else:
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


def weigh(config: Config, scores: Array, seen: Array, dtype) -> Array:
  """Attention weights over the last axis, softmax in float32.

  `scores` are products of queries and keys; `seen` is False at keys that are
  not to be looked at, and of their shape or broadcast to it.
  """
  scores = scores.astype(jnp.float32)
  if config.attention_softcap:
    scores = jnp.tanh(scores / config.attention_softcap)
    scores *= config.attention_softcap
  return jax.nn.softmax(jnp.where(seen, scores, MASKED), -1).astype(dtype)


def sees(config: Config, local: bool, query: Array, key: Array) -> Array:
  """Which keys a query looks at: bool[R, S, L], from positions alone.

  `query` i32[R, S] and `key` i32[R, L]; padding has none (-1).
  """
  query, key = query[:, :, None], key[:, None, :]
  seen = (key >= 0) & (key <= query)
  return seen & (key > query - config.window) if local else seen


def within(config: Config, local: bool, position: Array, q, k, v):
  """Attention of a sequence to itself: out [R, S, K, G, H], and k, v."""
  seen = sees(config, local, position, position)[:, None, None]
  scores = jnp.einsum('RSKGH,RLKH->RKGSL', q, k)
  weights = weigh(config, scores, seen, q.dtype)
  return jnp.einsum('RKGSL,RLKH->RSKGH', weights, v), (k, v)


class Attention(nn.Module):
  config: Config
  local: bool

  @nn.compact
  def __call__(self, x, position, attend: Callable[..., Any]):
    """x [R, S, D], position i32[R, S] (-1 = padding) -> x, what was kept.

    `attend(q [R, S, K, G, H], k, v [R, S, K, H])`, rotated and scaled, returns
    the weighted values [R, S, K, G, H], and anything that the caller wants.
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
    r, s = position.shape
    q = q.reshape(r, s, c.kv_heads, -1, c.head_size)
    out, kept = attend(q, k, v)
    out = out.reshape(r, s, c.heads, c.head_size)
    shape = (c.heads, c.head_size, c.features)
    out = einsum(shape, c.heads * c.head_size, name='attn_vec_einsum')(
      'RSNH,NHD->RSD', out
    )
    return out, kept


class FeedForward(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x):
    c = self.config
    if self.has_variable('params', 'turned'):
      # Joined to one axis, rows and positions make libtpu abort: LOG.md.
      rows, of_rows, of_w = x, 'RS', 'DF'
      w = self.get_variable('params', 'turned')
    else:
      # Joined, their gradient takes half the time on CPU, or less.
      rows, of_rows = x.reshape(-1, c.features), 'N'
      of_w = axes(c, 'mlp/gating_einsum')[0][1:]
      sizes = {'D': c.features, 'F': c.feed_forward}
      init = nn.initializers.normal(c.features**-0.5)
      shape = 2, *(sizes[axis] for axis in of_w)
      w = self.param('gating_einsum', init, shape).astype(x.dtype)
    lora = _lora(self, 'gating_einsum_')
    equation = f'{of_rows}D,{of_w}->{of_rows}F'
    gate, value = (
      product(
        equation, rows, w[i], {k: v[i] for k, v in lora.items()}, c.lora_scale
      )
      for i in (0, 1)
    )
    init = nn.initializers.normal(c.feed_forward**-0.5)
    w = self.param('linear', init, (c.feed_forward, c.features))
    lora, inner = _lora(self, 'linear_'), nn.gelu(gate) * value
    equation = f'{of_rows}F,FD->{of_rows}D'
    out = product(equation, inner, w, lora, c.lora_scale)
    return out.reshape(x.shape)


class Block(nn.Module):
  config: Config
  local: bool

  @nn.compact
  def __call__(self, x, position, attend):
    """See Attention: x [R, S, D] -> x, what was kept."""
    post = self.config.post_norms
    y = RMSNorm(name='pre_attention_norm')(x)
    y, kept = Attention(self.config, self.local, name='attn')(
      y, position, attend
    )
    x += RMSNorm(name='post_attention_norm')(y) if post else y
    y = RMSNorm(name='pre_ffw_norm')(x)
    y = FeedForward(self.config, name='mlp')(y)
    x += RMSNorm(name='post_ffw_norm')(y) if post else y
    return x, kept


def embed(config: Config, params: Params, tokens: Array, dtype) -> Array:
  """What the first layer reads of tokens: [..., D]."""
  x = params['embedder']['input_embedding'].astype(dtype)[tokens]
  return x * jnp.sqrt(config.features).astype(dtype)


def logits(
  params: Params,
  hidden: Array,
  *,
  softcap: float | None,
  temperature: float,
  used_vocab: int | None,
) -> Array:
  """float32 logits [..., V] / temperature; rows no token uses are masked."""
  table = params['embedder']['input_embedding'].astype(hidden.dtype)
  out = jnp.einsum(
    '...D,VD->...V', hidden, table, preferred_element_type=jnp.float32
  )
  if softcap:
    out = jnp.tanh(out / softcap) * softcap
  if temperature:
    out /= temperature
  if used_vocab and used_vocab < len(table):
    used = jnp.arange(len(table)) < used_vocab
    out = jnp.where(used.reshape((1,) * (out.ndim - 1) + (-1,)), out, MASKED)
  if not temperature:
    out = jnp.where(out == out.max(-1, keepdims=True), 0.0, MASKED)
  return out


def layers(config: Config, params: Params):
  """Yields (kind, parameters) of every layer, bottom up."""
  size = len(config.pattern)
  for j, kind in enumerate(kinds(config)):
    if f'layer_{j}' in params:
      yield kind, params[f'layer_{j}']
    else:
      stacked = params['stacked_layers'][f'attention_type_{j % size}']
      yield kind, jax.tree.map(lambda w, g=j // size: w[g], stacked)
