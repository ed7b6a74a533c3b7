"""LoRA as a tree split: a frozen base, and small adapters that are trained.

`base` holds the weights of a model and no step changes it. Policy, anchor and
reference are trees of adapters, A and B in float32. `join` puts the two
together where a model is called: gradients, optimizer and checkpoints see
adapters alone. With full weights the base is {}. Leading axes of a weight
(layer) lead its adapter:

    attn/q_einsum/w [N, D, H]           lora_a [D, r]     lora_b [r, N, H]
    attn/kv_einsum/w [2, K, D, H]       lora_a [2, D, r]  lora_b [2, r, K, H]
    attn/qkv_einsum/w [3, N, D, H]      lora_a [3, D, r]  lora_b [3, r, N, H]
    attn/attn_vec_einsum/w [N, H, D]    lora_a [N, H, r]  lora_b [r, D]
    mlp/gating_einsum [2, F, D]         gating_einsum_lora_a [2, D, r]
                      or [2, D, F]      gating_einsum_lora_b [2, r, F]
    mlp/linear [F, D]                   linear_lora_a [F, r]
                                        linear_lora_b [r, D]

The adapter of `X/w` is in `X`; that of a weight `mlp/X` is beside it, with its
name in front. The model computes x W + scale (x A) B with a scale of alpha /
rank, `Config.lora_scale`.

An anchor averages A and B apart by default: as small as the policy, but off by
the covariance of A and B over the window of the average. With `dense` it
averages the products and is exact. That costs a float32 copy of every adapted
weight (`lora_delta`), and a second product with each of them.
"""

import dataclasses
import functools
import math
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from bond_jax.errors import UserError
from bond_jax.models.gemma import configs
from bond_jax.models.gemma import layers as gemma_layers
from bond_jax.models.gemma import model as gemma
from bond_jax.types import Array, Params, Policy


def make(
  config: gemma.Config, *, rank: int, alpha: float, targets: str, **kwargs: Any
) -> Policy:
  """A Gemma whose parameters are adapters; see `over` for what calls it.

  `kwargs` are those of `gemma.make`. A UserError for a rank or alpha that is
  not positive, and for targets that name no weight.
  """
  if not isinstance(rank, int) or rank < 1 or not alpha > 0:
    raise UserError(
      f'LoRA needs a whole rank of 1 or more and alpha > 0; got rank {rank!r}'
      f' and alpha {alpha!r}. Without LoRA all weights are trained.'
    )
  _chosen(config, targets)
  config = dataclasses.replace(config, lora_scale=alpha / rank)
  return gemma.make(config, **kwargs)._replace(
    init=lambda key: init(config, key, rank=rank, targets=targets)
  )


def init(
  config: gemma.Config, key: Array, *, rank: int, targets: str
) -> Params:
  """Float32 adapters that change nothing yet: A random, B zero.

  Args:
    config: of the model.
    key: consumed.
    rank: r.
    targets: a regular expression, found in the names of the weights to adapt,
      such as 'attn/.*|mlp/linear'; the same weights in every layer.
  """
  weights = sorted(_chosen(config, targets).items())
  adapters = {}
  for i, (path, w) in enumerate(weights):
    axes, inputs = configs.axes(config, _name(path))
    size = dict(zip(axes, w.shape[-len(axes) :], strict=True), r=rank)
    layers = w.shape[: -len(axes)]
    a, b = (
      layers + tuple(size[i] for i in part)
      for part in gemma_layers.lora_axes(inputs, axes)
    )
    fan_in = math.prod(size[i] for i in inputs)
    adapters[_beside(path, 'a')] = (
      jax.random.normal(jax.random.fold_in(key, i), a, jnp.float32)
      * fan_in**-0.5
    )
    adapters[_beside(path, 'b')] = jnp.zeros(b, jnp.float32)
  return traverse_util.unflatten_dict(adapters)


def join(base: Params, tree: Params) -> Params:
  """The union of two nested dicts; the tree itself where the base is {}.

  A ValueError for a leaf that is in both.
  """
  if isinstance(base, dict) and not base:
    return tree
  if not (isinstance(base, dict) and isinstance(tree, dict)):
    raise ValueError('a weight of the base is also in the tree joined to it')
  both = dict(base)
  for name, part in tree.items():
    both[name] = join(base[name], part) if name in base else part
  return both


def over(policy: Policy, base: Params) -> Policy:
  """The policy as a function of what is trained: every call joins the base.

  To be made inside of a jitted function, of which the base is an argument: as
  a constant it would be compiled into the program.
  """
  return policy._replace(
    hidden=lambda tree, *args: policy.hidden(join(base, tree), *args),
    logits=lambda tree, hidden: policy.logits(join(base, tree), hidden),
    prepare=lambda tree: policy.prepare(join(base, tree)),
    frozen_head=bool(base),  # embeddings have no adapters
  )


def merge(config: gemma.Config, base: Params, tree: Params) -> Params:
  """Full weights in the base's dtypes, W + scale A B; no adapters are left.

  The sum is taken in float32 and rounded once: in bfloat16, to nothing where
  it is below 1/512 of W. Full weights over a base of {} are returned as is.
  """
  flat = traverse_util.flatten_dict(join(base, tree))
  full = {k: v for k, v in flat.items() if 'lora_' not in k[-1]}
  for path, delta in _deltas(config, flat).items():
    w = full[path]
    full[path] = (w + delta).astype(w.dtype)
  return traverse_util.unflatten_dict(full)


def dense(config: gemma.Config, adapters: Params) -> Params:
  """scale A B, float32, of each adapted weight, in its shape: `lora_delta`.

  The `view` of an anchor that is to average products exactly.
  """
  flat = traverse_util.flatten_dict(adapters)
  return traverse_util.unflatten_dict(
    {
      _beside(path, 'delta'): delta
      for path, delta in _deltas(config, flat).items()
    }
  )


@functools.cache
def _weights(config: gemma.Config) -> dict[tuple, Any]:
  """path -> shape of every weight that can have an adapter."""
  shapes = jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))
  flat = traverse_util.flatten_dict(shapes)
  return {path: w for path, w in flat.items() if _name(path) in configs.WEIGHTS}


def _chosen(config: gemma.Config, targets: str) -> dict[tuple, Any]:
  """Those of the weights that the targets name."""
  weights = _weights(config)
  known = ', '.join(sorted({_name(path) for path in weights}))
  try:
    chosen = {p: w for p, w in weights.items() if re.search(targets, _name(p))}
  except re.error as e:
    raise UserError(
      f'LoRA targets {targets!r} is no regular expression: {e}; names are'
      f' {known}.'
    ) from e
  if not chosen:
    raise UserError(
      f'LoRA targets {targets!r} is found in none of the names {known}.'
    )
  return chosen


def _name(path: tuple[str, ...]) -> str:
  """A leaf's name within its layer: 'attn/q_einsum/w'."""
  return '/'.join(path[2 if path[0] == 'stacked_layers' else 1 :])


def _beside(path: tuple[str, ...], leaf: str) -> tuple[str, ...]:
  """The path of an adapter's leaf, from that of its weight."""
  weight = '' if path[-1] == 'w' else f'{path[-1]}_'
  return (*path[:-1], f'{weight}lora_{leaf}')


def _deltas(config: gemma.Config, flat: dict[tuple, Array]) -> dict:
  """path of a weight -> what its adapter adds to it, of a flat tree."""
  adapters = {}
  for (*parents, last), x in flat.items():
    weight, found, leaf = last.rpartition('lora_')
    if found:
      path = (*parents, weight[:-1] or 'w')
      adapters.setdefault(path, {})[leaf] = x
  deltas = {}
  for path, adapter in adapters.items():
    if 'delta' in adapter:
      deltas[path] = adapter['delta']
      continue
    axes, inputs = configs.axes(config, _name(path))
    a, b = gemma_layers.lora_axes(inputs, axes)
    # Accelerators would round the factors of a float32 product.
    deltas[path] = config.lora_scale * jnp.einsum(
      f'...{a},...{b}->...{axes}',
      adapter['a'],
      adapter['b'],
      precision=jax.lax.Precision.HIGHEST,
    )
  return deltas
