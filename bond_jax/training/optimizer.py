"""Adam as every stage uses it."""

from __future__ import annotations

import optax


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
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global norm.

  The rate rises linearly to `learning_rate` in `warmup_steps`, then follows a
  cosine down to `decay_to` times that at `steps` (1 = no decay).
  """
  schedule = optax.join_schedules(
    [
      optax.linear_schedule(0.0, learning_rate, warmup_steps),
      optax.cosine_decay_schedule(
        learning_rate, max(1, steps - warmup_steps), decay_to
      ),
    ],
    [warmup_steps],
  )
  return optax.chain(
    optax.clip_by_global_norm(clip),
    optax.adamw(schedule, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay),
  )
