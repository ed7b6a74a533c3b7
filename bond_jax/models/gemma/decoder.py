"""Decoding with Gemma: prompts are read once, then a token a row at a time.

The cache has two parts. The *prefix* holds keys and values of the prompts, and
all rows that complete one prompt read the same. The *suffix* holds those of the
tokens drawn, in a ring: a step writes one column for all rows, whatever each
has reached, so a row that is given another prompt moves nothing. Positions
alone say what may be seen: a column that is another completion's has none.
Local layers keep no more than their window of either part.

Layers are one after the other in the program, which is fast, or a loop over
the G groups of an attention pattern, which compiles in a time that does not
depend on the depth; then their arrays have an axis G after the first.

Axes: B prompts, W rows of each, R = B W rows, P prompt length, L columns of a
ring; the others as in layers.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bond_jax.models.gemma import configs
from bond_jax.models.gemma import layers as gemma_layers
from bond_jax.models.gemma.configs import Config
from bond_jax.types import Array, Decoder, Params


class Layers(NamedTuple):
  """One entry per layer, or per place in the pattern where they are a loop."""

  grouped: tuple[Any, ...]  # G layers each, in a loop; or ()
  single: tuple[Any, ...]  # those after the loop; or all


class Prefix(NamedTuple):
  kv: Layers  # of keys and values, [B, K, P or less, H]
  position: Array  # i32[B, P]; -1 = padding


class Cache(NamedTuple):
  prefix: Prefix
  kv: Layers  # of keys and values, [R, K, L, H]
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


def prepare(config: Config, dtype: str, scan: bool, params: Params) -> Params:
  """The layers apart, or by groups, and matrices as the loop uses them.

  In its dtype, with the axis that is summed first, those of a pair apart: a
  loop would slice, cast and transpose its weights again for every token.
  """
  cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)

  def turn(p, name):
    axes, inputs = configs.axes(config, name)
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

  every = list(gemma_layers.layers(config, params))
  if scan and 'stacked_layers' in params:
    stacked = params['stacked_layers']
    grouped = [stacked[f'attention_type_{i}'] for i in range(len(stacked))]
    found = Layers(
      tuple(jax.vmap(layer)(p) for p in grouped),
      tuple(layer(p) for _, p in every[configs.in_patterns(config) :]),
    )
  else:
    found = Layers((), tuple(layer(p) for _, p in every))
  return {
    'embedder': cast(params['embedder']),
    'final_norm': params['final_norm'],
    'layers': found._asdict(),
  }


def _single(config: Config, layers: Layers) -> list[str]:
  """'local' or 'global' of the layers that are in no loop, bottom up."""
  return configs.kinds(config)[config.layers - len(layers.single) :]


def _kept(config: Config, kind: str, columns: int) -> int:
  return min(columns, config.window) if kind == 'local' else columns


def prefill(
  config: Config, params: Params, dtype, tokens: Array, mask: Array
) -> tuple[Array, Prefix]:
  """Reads left-padded prompts, i32[B, P]: the last hidden states [B, D], and
  all that decoding has to know of them."""
  position = jnp.where(mask, jnp.cumsum(mask, -1) - 1, -1).astype(jnp.int32)
  x = gemma_layers.embed(config, params, tokens, dtype)
  layers = Layers(**params['layers'])

  def block(kind, p, x):
    local = kind == 'local'
    attend = functools.partial(gemma_layers.within, config, local, position)
    x, new = gemma_layers.Block(config, local).apply(
      {'params': p}, x, position, attend
    )
    first = tokens.shape[1] - _kept(config, kind, tokens.shape[1])
    return x, tuple(a[:, first:].swapaxes(1, 2) for a in new)

  def group(x, ps):
    kv = []
    for kind, p in zip(config.pattern, ps, strict=True):
      x, new = block(kind, p, x)
      kv.append(new)
    return x, tuple(kv)

  grouped, single = (), []
  if layers.grouped:
    x, grouped = jax.lax.scan(group, x, layers.grouped)
    grouped = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), grouped)
  for kind, p in zip(_single(config, layers), layers.single, strict=True):
    x, new = block(kind, p, x)
    single.append(new)
  x = gemma_layers.RMSNorm().apply({'params': params['final_norm']}, x[:, -1])
  return x, Prefix(Layers(grouped, tuple(single)), position)


def start(config: Config, prefix: Prefix, width: int, length: int) -> Cache:
  """A cache of `width` rows after each prompt, `length` tokens long."""
  rows = width * len(prefix.position)
  columns = {k: _kept(config, k, length) for k in set(config.pattern)}

  def ring(kind, like):
    *middle, _, size = like.shape[1:]
    return jnp.zeros((rows, *middle, columns[kind], size), like.dtype)

  def rings(kinds, kv):
    return tuple(
      tuple(ring(kind, a) for a in pair)
      for kind, pair in zip(kinds, kv, strict=True)
    )

  grouped, single = prefix.kv
  return Cache(
    prefix=prefix,
    kv=Layers(
      rings(config.pattern[: len(grouped)], grouped),
      rings(_single(config, prefix.kv), single),
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

  Rows that are not alive, bool[R], read nothing; ignore their hidden states.
  """
  put = jax.lax.dynamic_update_slice_in_dim
  query = jnp.where(alive, cache.next, -1)[:, None]
  slot = {k: cache.steps % p.shape[1] for k, p in cache.position.items()}
  position = {k: put(p, query, slot[k], 1) for k, p in cache.position.items()}
  x = gemma_layers.embed(config, params, token[:, None], dtype)
  layers = Layers(**params['layers'])

  def block(kind, p, x, before, kv, g=None):
    """Layer g of those whose arrays have an axis G; None, they have none."""
    local = kind == 'local'
    before = tuple(_layer(a, g) for a in before)
    known = cache.prefix.position[:, -before[0].shape[2] :]
    width = len(query) // len(known)
    sees = functools.partial(gemma_layers.sees, config, local, query)
    seen = jnp.concatenate(
      [sees(jnp.repeat(known, width, 0)), sees(position[kind])], -1
    )

    def attend(q, k, v):
      new = tuple(
        _put_column(old, a.swapaxes(1, 2), slot[kind], g)
        for old, a in zip(kv, (k, v), strict=True)
      )
      suffix = tuple(_layer(a, g) for a in new)
      return _attend(config, q[:, 0], before, suffix, seen), new

    return gemma_layers.Block(config, local).apply(
      {'params': p}, x, query, attend
    )

  def group(g, carry):
    x, kv = carry
    new = []
    for i, kind in enumerate(config.pattern):
      p = jax.tree.map(lambda w: w[g], layers.grouped[i])
      x, pair = block(kind, p, x, cache.prefix.kv.grouped[i], kv[i], g)
      new.append(pair)
    return x, tuple(new)

  grouped, single = cache.kv.grouped, []
  if grouped:
    groups = grouped[0][0].shape[1]
    x, grouped = jax.lax.fori_loop(0, groups, group, (x, grouped))
  for kind, *of_layer in zip(
    _single(config, layers),
    layers.single,
    cache.prefix.kv.single,
    cache.kv.single,
    strict=True,
  ):
    p, before, kv = of_layer
    x, pair = block(kind, p, x, before, kv)
    single.append(pair)
  x = gemma_layers.RMSNorm().apply({'params': params['final_norm']}, x[:, 0])
  kv = Layers(grouped, tuple(single))
  return x, Cache(cache.prefix, kv, position, cache.next + alive,
                  cache.steps + 1)  # fmt: skip


def _layer(x: Array, g) -> Array:
  """Of layer g: x [R, G, ...] -> [R, ...]; x itself where g is None."""
  if g is None:
    return x
  return jax.lax.dynamic_index_in_dim(x, g, 1, keepdims=False)


def _put_column(ring: Array, column: Array, slot, g) -> Array:
  """A ring [R, K, L, H], or layer g of [R, G, K, L, H], with a new column."""
  if g is None:
    return jax.lax.dynamic_update_slice_in_dim(ring, column, slot, 2)
  at = (0, g, 0, slot, 0)
  return jax.lax.dynamic_update_slice(ring, column[:, None], at)


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
