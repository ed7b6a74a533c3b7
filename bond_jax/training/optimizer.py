"""Adam as every stage uses it, and one step of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bond_jax.types import Array, Params

_EMBEDDER = jax.tree_util.DictKey('embedder')


def adam(
  *,
  steps: int,
  learning_rate: float,
  warmup_steps: int,
  decay_to: float,
  b1: float,
  b2: float,
  epsilon: float,
  weight_decay: float,
  clip: float,
  decay: str = 'cosine',
  layer_rate: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global norm.

  The rate rises linearly to `learning_rate` in `warmup_steps`, then follows a
  cosine, or with `decay='linear'` a line, down to `decay_to` times that at
  `steps` (1 = no decay). All weights but the embedding, which is the output
  layer as well, have `layer_rate` times the rate.
  """
  end, steps = decay_to * learning_rate, max(steps, warmup_steps + 1)
  if decay == 'linear':
    rise, fall = (
      optax.linear_schedule(0.0, learning_rate, warmup_steps),
      optax.linear_schedule(learning_rate, end, steps - warmup_steps),
    )
    schedule = optax.join_schedules([rise, fall], [warmup_steps])
  else:
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, learning_rate, warmup_steps, steps, end
    )
  parts = [
    optax.clip_by_global_norm(clip),
    optax.adamw(schedule, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay),
  ]
  if layer_rate != 1:

    def slow(changes, params):
      del params
      return jax.tree_util.tree_map_with_path(
        lambda path, x: x if _EMBEDDER in path else layer_rate * x, changes
      )

    parts.append(optax.stateless(slow))
  return optax.chain(*parts)


def descend(
  optimizer: optax.GradientTransformation,
  params: Params,
  opt_state: Any,
  gradient: Params,
  loss: Array,
) -> tuple[Params, Any, dict[str, Array]]:
  """One step, or none if the loss or the gradient is not finite.

  Returns params, the optimizer's state, and metrics: `skipped` is 1 if none.
  """
  norm = optax.tree.norm(gradient)
  changes, moved = optimizer.update(gradient, opt_state, params)
  new = optax.apply_updates(params, changes), moved
  finite = jnp.isfinite(loss + norm)
  params, opt_state = jax.tree.map(
    functools.partial(jnp.where, finite), new, (params, opt_state)
  )
  row = {'loss': loss, 'gradient_norm': norm, 'skipped': 1.0 - finite}
  return params, opt_state, row
