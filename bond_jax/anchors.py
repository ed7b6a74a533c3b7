"""How the anchor follows the policy.

The anchor is float32 whatever the compute dtype: at rate 0.02 a bfloat16
anchor loses most increments to rounding and does not move.
"""

from __future__ import annotations

import jax
import optax

from bond_jax.types import AnchorRule


def fixed() -> AnchorRule:
  """The anchor is the reference for the whole run."""
  return AnchorRule(update=lambda anchor, params, step: anchor, moves=False)


def ema(rate: float) -> AnchorRule:
  """anchor <- (1 - rate) anchor + rate params, after every optimizer step.

  BOND, equation (18): the exponential moving average of J-BOND, whose eta is
  `rate`. A ValueError unless 0 <= rate <= 1.
  """
  if not 0 <= rate <= 1:
    raise ValueError(f'anchor rate must lie in [0, 1], got {rate}')

  def update(anchor, params, step):
    del step
    # Else rate * params is rounded before it is added, and the limit is off.
    params = jax.tree.map(lambda p, a: p.astype(a.dtype), params, anchor)
    return optax.incremental_update(params, anchor, rate)

  return AnchorRule(update=update, moves=True)
