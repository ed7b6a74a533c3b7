"""Tiny models with adapters, and what they add up to by hand."""

import dataclasses
import functools

from conftest import TINY
from flax import traverse_util
import jax
import numpy as np

from bond_jax.models import lora

RANK, SCALE = 3, 0.7
SETTINGS = dict(rank=RANK, alpha=RANK * SCALE, targets='.*')
MODEL = dict(temperature=1.0, dtype='float32', scan=False, remat='none')


def config_of(name, **sizes):
  return dataclasses.replace(TINY[name], lora_scale=SCALE, **sizes)


# Of every family few layers: one of a full pattern, and one that is left over.
FAMILIES = {
  'gemma3': config_of('gemma3', layers=3, pattern=('local', 'global')),
  **{name: config_of(name) for name in TINY if name != 'gemma3'},
}


# A B of each weight, spelt out; `f` comes first where the gates are transposed.
PRODUCTS = {
  'q_einsum': '...dr,...rnh->...ndh',
  'kv_einsum': '...cdr,...crkh->...ckdh',
  'qkv_einsum': '...cdr,...crkh->...ckdh',
  'attn_vec_einsum': '...nhr,...rd->...nhd',
  'linear': '...fr,...rd->...fd',
}


def shapes_of(config, rank=RANK, targets='.*'):
  init = functools.partial(lora.init, config, rank=rank, targets=targets)
  return jax.eval_shape(init, jax.random.key(0))


def random_adapters(config, seed=1):
  """Adapters of which none is zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (0.4 * rng.standard_normal(x.shape)).astype(np.float32),
    shapes_of(config),
  )


def products(config, adapters, scale=SCALE):
  """scale A B in float64, by the name that begins an adapter's leaves."""
  flat = traverse_util.flatten_dict(adapters, sep='/')
  gates = 'fd' if config.gating_transposed else 'df'
  einsums = {**PRODUCTS, 'gating_einsum': f'...cdr,...crf->...c{gates}'}
  stems = sorted({name[: -len('lora_a')] for name in flat})
  out = {}
  for stem in stems:
    a, b = (np.float64(flat.pop(f'{stem}lora_{x}')) for x in 'ab')
    kind = stem[:-1].rsplit('/', 1)[-1]
    out[stem] = scale * np.einsum(einsums[kind], a, b)
  assert not flat
  return out


def merged_by_hand(config, params, adapters):
  """W + scale A B in float64, weight by weight; all weights must have one."""
  flat = traverse_util.flatten_dict(params, sep='/')
  deltas = products(config, adapters)
  for name, w in flat.items():
    kind = name.removesuffix('/w').rsplit('/', 1)[-1]
    if kind in (*PRODUCTS, 'gating_einsum'):
      stem = name[:-1] if name.endswith('/w') else f'{name}_'
      flat[name] = w + deltas.pop(stem)
  assert not deltas
  return traverse_util.unflatten_dict(flat, sep='/')


def close(a, b, **tolerance):
  f = functools.partial(np.testing.assert_allclose, **tolerance)
  jax.tree.map(f, jax.device_get(a), jax.device_get(b))
