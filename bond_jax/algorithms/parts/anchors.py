"""How the anchor follows the policy, after every iteration.

An iteration is one optimizer step, or all the steps on one set of rollouts
where an algorithm draws more than one batch at a time.

The anchor is float32 whatever the compute dtype: at rate 0.02 a bfloat16
anchor loses most increments to rounding and does not move.
"""

import jax
import jax.numpy as jnp
import optax

from bond_jax.types import AnchorRule


def fixed() -> AnchorRule:
  """The anchor is the reference for the whole run: no copy of it is kept."""
  return AnchorRule(
    update=lambda anchor, params, iteration: anchor, moves=False
  )


def ema(rate: float) -> AnchorRule:
  """anchor <- (1 - rate) anchor + rate params, after every iteration.

  BOND, equation (18): the exponential moving average of J-BOND, whose eta is
  `rate`. A ValueError unless 0 <= rate <= 1.

  Anchor and params are trees of one structure; the anchor keeps its dtype.

  >>> anchor, params = {'w': jnp.array([0.0])}, {'w': jnp.array([1.0])}
  >>> ema(0.25).update(anchor, params, 1)['w'].tolist()
  [0.25]
  """
  if not 0 <= rate <= 1:
    raise ValueError(f'anchor rate must lie in [0, 1], got {rate}')

  def update(anchor, params, iteration):
    del iteration
    # Else rate * params is rounded before it is added, and the limit is off.
    params = jax.tree.map(lambda p, a: p.astype(a.dtype), params, anchor)
    return optax.incremental_update(params, anchor, rate)

  return AnchorRule(update=update, moves=True)


def periodic(every: int) -> AnchorRule:
  """anchor <- params after every `every` iterations, and stays in between.

  Iterative BOND's hard update; with every = 1, the policy before the current
  iteration, as in SPPO and WIND. Iterations count from 1. A ValueError unless
  every >= 1.
  """
  if every < 1:
    raise ValueError(f'an anchor moves every 1 or more iterations, got {every}')

  def update(anchor, params, iteration):
    now = iteration % every == 0
    return jax.tree.map(lambda a, p: jnp.where(now, p, a), anchor, params)

  return AnchorRule(update=update, moves=True)


def named(name: str) -> AnchorRule:
  """The rule of a name: 'fixed', 'periodic:ITERATIONS' or 'ema:RATE'.

  A ValueError for another name, and for a number that the rule does not take.

  >>> [named(name).moves for name in ('fixed', 'ema:0.02', 'periodic:50')]
  [False, True, True]
  >>> named('ema:2')
  Traceback (most recent call last):
  ValueError: anchor 'ema:2': anchor rate must lie in [0, 1], got 2.0
  """
  kind, _, number = name.partition(':')
  try:
    if kind == 'periodic':
      return periodic(int(number))
    if kind == 'ema':
      return ema(float(number))
  except ValueError as e:
    raise ValueError(f'anchor {name!r}: {e}') from e
  if name != 'fixed':
    raise ValueError(
      "anchor must be 'fixed', 'periodic:ITERATIONS' or 'ema:RATE', got"
      f' {name!r}'
    )
  return fixed()
