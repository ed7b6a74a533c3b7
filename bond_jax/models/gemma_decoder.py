"""Decoding with Gemma: prompts are read once, then a token a row at a time.

The cache has two parts. The *prefix* holds keys and values of the prompts, and
all rows that complete one prompt read the same. The *suffix* holds those of the
tokens drawn, in a ring: a step writes one column for all rows, whatever each
has reached, so a row that is given another prompt moves nothing. Positions
alone say what may be seen: a column that is another completion's has none.
Local layers keep no more than their window of either part.

Axes: B prompts, W rows of each, R = B W rows, P prompt length, L columns of a
ring; the others as in gemma_layers.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bond_jax.models import gemma_layers
from bond_jax.models.gemma_configs import Config
from bond_jax.types import Array, Decoder, Params


class Prefix(NamedTuple):
  kv: tuple[tuple[Array, Array], ...]  # of each layer, [B, K, P or less, H]
  position: Array  # i32[B, P]; -1 = padding


class Cache(NamedTuple):
  prefix: Prefix
  kv: tuple[tuple[Array, Array], ...]  # of each layer, [R, K, L, H]
  position: dict[str, Array]  # of each kind of layer, i32[R, L]; -1 = nothing
  next: Array  # i32[R], the position of each row's next token
  steps: Array  # i32[], steps so far


def make(config: Config, logits, dtype: str, params: Params) -> Decoder:
  """The functions of one sampling, over what `prepare` returned."""
  return Decoder(
    prefill=functools.partial(prefill, config, params, dtype),
    start=functools.partial(start, config),
    step=functools.partial(step, config, params, dtype),
    refill=refill,
    logits=functools.partial(logits, params),
  )


def prepare(config: Config, dtype: str, params: Params) -> Params:
  """The layers apart, and matrices as the loop uses them.

  In its dtype, with the axis that is summed first, those of a pair apart: a
  loop would slice, cast and transpose its weights again for every token.
  """
  cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)

  def turn(p, name):
    axes, inputs = gemma_layers.AXES[name]
    if name == 'mlp/gating_einsum' and config.gating_transposed:
      axes = 'CFD'
    into = [i for i, axis in enumerate(axes) if axis in inputs]
    rest = [i for i, axis in enumerate(axes) if axis not in inputs]
    return cast(p).transpose(*into, *rest)

  def projection(part, name):
    """One of attention's: w, and a product of adapters beside it, turned."""
    part = dict(part)
    if 'w' in part:  # else a norm
      part['turned'] = turn(part.pop('w'), name)
    if 'lora_delta' in part:
      part['lora_delta'] = turn(part['lora_delta'], name)
    return part

  def feed_forward(mlp):
    mlp, name = dict(mlp), 'mlp/gating_einsum'
    pair = turn(mlp.pop('gating_einsum'), name)
    if 'gating_einsum_lora_delta' in mlp:
      delta = turn(mlp['gating_einsum_lora_delta'], name)
      mlp['gating_einsum_lora_delta'] = delta.swapaxes(0, 1)
    return {**mlp, 'turned': (pair[:, 0], pair[:, 1]),
            'linear': cast(mlp['linear'])}  # fmt: skip

  def layer(p):
    attn = {k: projection(x, f'attn/{k}/w') for k, x in p['attn'].items()}
    return {**p, 'attn': attn, 'mlp': feed_forward(p['mlp'])}

  return {
    'embedder': cast(params['embedder']),
    'final_norm': params['final_norm'],
    'layers': [layer(p) for _, p in gemma_layers.layers(config, params)],
  }


def _kinds(config: Config) -> list[str]:
  """'local' or 'global' of every layer, bottom up."""
  return [config.pattern[j % len(config.pattern)] for j in range(config.layers)]


def _kept(config: Config, kind: str, columns: int) -> int:
  return min(columns, config.window) if kind == 'local' else columns


def prefill(
  config: Config, params: Params, dtype, tokens: Array, mask: Array
) -> tuple[Array, Prefix]:
  """Reads left-padded prompts, i32[B, P]: the last hidden states [B, D], and
  all that decoding has to know of them."""
  position = jnp.where(mask, jnp.cumsum(mask, -1) - 1, -1).astype(jnp.int32)
  x = gemma_layers.embed(config, params, tokens, dtype)
  kv = []
  for kind, p in zip(_kinds(config), params['layers'], strict=True):
    local = kind == 'local'
    attend = functools.partial(gemma_layers.within, config, local, position)
    x, new = gemma_layers.Block(config, local).apply(
      {'params': p}, x, position, attend
    )
    first = tokens.shape[1] - _kept(config, kind, tokens.shape[1])
    kv.append(tuple(a[:, first:].swapaxes(1, 2) for a in new))
  x = gemma_layers.RMSNorm().apply({'params': params['final_norm']}, x[:, -1])
  return x, Prefix(tuple(kv), position)


def start(config: Config, prefix: Prefix, width: int, length: int) -> Cache:
  """A cache of `width` rows after each prompt, `length` tokens long."""
  rows = width * len(prefix.position)
  columns = {k: _kept(config, k, length) for k in set(config.pattern)}

  def ring(kind, like):
    shape = (rows, config.kv_heads, columns[kind], config.head_size)
    return jnp.zeros(shape, like.dtype)

  return Cache(
    prefix=prefix,
    kv=tuple(
      tuple(ring(kind, a) for a in kv)
      for kind, kv in zip(_kinds(config), prefix.kv, strict=True)
    ),
    position={k: jnp.full((rows, n), -1) for k, n in columns.items()},
    next=jnp.repeat(prefix.position.max(-1) + 1, width),
    steps=jnp.int32(0),
  )


def step(
  config: Config,
  params: Params,
  dtype,
  token: Array,
  alive: Array,
  cache: Cache,
) -> tuple[Array, Cache]:
  """Reads one token of each row, i32[R]: hidden [R, D] and the next cache.

  Rows that are not alive, bool[R], read nothing, and theirs means nothing.
  """
  put = jax.lax.dynamic_update_slice_in_dim
  mine = jnp.where(alive, cache.next, -1)[:, None]
  slot = {k: cache.steps % p.shape[1] for k, p in cache.position.items()}
  position = {k: put(p, mine, slot[k], 1) for k, p in cache.position.items()}
  x = gemma_layers.embed(config, params, token[:, None], dtype)
  kv = []
  for i, (kind, p) in enumerate(
    zip(_kinds(config), params['layers'], strict=True)
  ):
    local = kind == 'local'
    before = cache.prefix.position[:, -cache.prefix.kv[i][0].shape[2] :]
    width = len(mine) // len(before)
    sees = functools.partial(gemma_layers.sees, config, local, mine)
    seen = jnp.concatenate(
      [sees(jnp.repeat(before, width, 0)), sees(position[kind])], -1
    )

    def attend(q, k, v, i=i, kind=kind, seen=seen):
      new = tuple(
        put(old, a.swapaxes(1, 2), slot[kind], 2)
        for old, a in zip(cache.kv[i], (k, v), strict=True)
      )
      return _attend(config, q[:, 0], cache.prefix.kv[i], new, seen), new

    x, new = gemma_layers.Block(config, local).apply(
      {'params': p}, x, mine, attend
    )
    kv.append(new)
  x = gemma_layers.RMSNorm().apply({'params': params['final_norm']}, x[:, 0])
  return x, Cache(
    cache.prefix, tuple(kv), position, cache.next + alive, cache.steps + 1
  )


def _attend(config: Config, q, prefix, suffix, seen) -> Array:
  """Attention of q [R, K, G, H] to both parts, seen bool[R, 1, P + L]."""
  r, k, g, _ = q.shape
  b, _, p, _ = prefix[0].shape
  # The W rows of a prompt are W G queries to the same keys.
  grouped = lambda x: jnp.moveaxis(
    x.reshape(b, r // b, k, g, -1), 2, 1
  ).reshape(b, k, r // b * g, -1)
  apart = lambda x: jnp.moveaxis(x.reshape(b, k, r // b, g, -1), 1, 2).reshape(
    r, k, g, -1
  )
  of_prefix = jnp.einsum('BKMH,BKPH->BKMP', grouped(q), prefix[0])
  of_suffix = jnp.einsum('RKGH,RKLH->RKGL', q, suffix[0])
  scores = jnp.concatenate([apart(of_prefix), of_suffix], -1)
  weights = gemma_layers.weigh(config, scores, seen[:, None], q.dtype)
  out = apart(
    jnp.einsum('BKMP,BKPH->BKMH', grouped(weights[..., :p]), prefix[1])
  )
  return out + jnp.einsum('RKGL,RKLH->RKGH', weights[..., p:], suffix[1])


def refill(cache: Cache, row: Array, prefix: Prefix, i: Array) -> Cache:
  """The cache, its row `row` emptied and put after prompt i of `prefix`.

  Every row has a prefix of its own: W = 1.
  """
  take = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, 0)
  put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, 0)
  before = take(prefix.position)
  return cache._replace(
    prefix=jax.tree.map(lambda x, y: put(x, take(y)), cache.prefix, prefix),
    position={
      k: put(p, jnp.full((1, p.shape[1]), -1))
      for k, p in cache.position.items()
    },
    next=put(cache.next, before.max(-1) + 1),
  )
