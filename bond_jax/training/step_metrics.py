"""What a step says of itself beside its loss: scalars, all of them."""

import functools

import jax.numpy as jnp

from bond_jax.algorithms.parts import ops
from bond_jax.types import Array, Prompts, Rollout


def of_rollout(
  prompts: Prompts,
  drawn: Rollout,
  reward: Array,
  win: Array,
  split: int,
  cut: Array,
) -> dict[str, Array]:
  """What K completions of each prompt look like.

  The first `split` of them are the policy's, the others the anchor's. Rewards
  f32[B, K], wins f32[B, K, K]; `cut` bool[B, K]: those without an end.
  """
  mean = functools.partial(ops.weighted_mean, weight=prompts.weight)
  k = reward.shape[1]
  tied = ((win == 0.5).sum((-2, -1)) - k) / max(1, k * (k - 1))
  metrics = {
    'length/completion': mean(drawn.mask.sum(-1).mean(-1)),
    'truncated': mean(cut.mean(-1)),
    # The share of the sampler's slots that drew a token.
    'slots/busy': mean(drawn.mask.sum((-2, -1)))
    / mean(drawn.slot_steps.sum(-1)),
    # Of those of policy and anchor alike, in nats.
    'entropy/token': -mean(drawn.log_prob.sum((-2, -1)))
    / mean(drawn.mask.sum((-2, -1))),
    'tie_rate': mean(tied),
  }
  if split:
    metrics['reward/policy'] = mean(reward[:, :split].mean(-1))
  if split < k:
    metrics['reward/anchor'] = mean(reward[:, split:].mean(-1))
  return metrics


def sampler_gap(weight: Array, log_sampled: Array, log_policy: Array) -> Array:
  """Mean |log pi(y)| difference, nats per completion, sampler against trainer.

  Over rows with a weight f32[B, M], those of the policy's own completions;
  log-probs are f32[B, M, T]. Rounding alone should be left.
  """
  gap = jnp.abs((log_policy - log_sampled).sum(-1))
  gap = jnp.where(weight > 0, weight * gap, 0.0)  # a filler row may hold NaN
  return gap.sum() / jnp.maximum(weight.sum(), 1e-9)
