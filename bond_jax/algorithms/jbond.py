"""J-BOND: one policy completion against two anchor completions.

Sessa et al., "BOND: Aligning LLMs with Best-of-N Distillation"
(arXiv 2407.14622), Algorithm 2. With y from the policy, y1 and y2 from the
anchor and all gradients with respect to the policy, each step descends

    (1 - b) G_forward + b G_backward + g G_drift

    G_forward  = - grad log pi(best of y1, y2)
    G_backward = - grad log pi(y) (R - B)
    R          = r_J(y) - log(pi(y) / anchor(y))
    r_J(y)     = -log 16 if r(y) < min(r(y1), r(y2)), else 0       (17)
    G_drift    = + grad log pi(y) log(pi(y) / anchor(y))

where b is `backward_weight` (the paper's Jeffreys beta), g `drift_weight`
(gamma), and B the mean of the other prompts' signals. The factor
(N - 1) of the backward gradient is 1, since N = 2. -log 16 makes the expected
r_J of a median completion equal to its log-quantile, log(1/2).

The sign of G_drift is that of grad KL(pi || anchor), so that descending
shrinks the drift. The floor is strict: a completion as good as the worse
anchor's is not punished, which matters wherever rewards repeat. The two
anchors' tie goes to the first drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bond_jax import anchors, ops
from bond_jax.types import Algorithm, Array, Scores


class Rows(NamedTuple):
  """What the loss needs of each prompt, without gradient."""

  floor: Array  # f32[B], r_J
  log_anchor: Array  # f32[B, T], of the policy's row
  baseline: Array  # f32[B, T], of the signal at each position


def floor(reward: Array) -> Array:
  """r_J, equation (17): reward f32[B, 3] = (y, y1, y2) -> f32[B]."""
  below_both = reward[:, 0] < reward[:, 1:].min(-1)
  return jnp.where(below_both, -math.log(16.0), 0.0)


def make(
  *, backward_weight: float, anchor_rate: float, drift_weight: float
) -> Algorithm:
  """Builds J-BOND; backward_weight in [0, 1], drift_weight >= 0."""
  if not 0 <= backward_weight <= 1:
    raise ValueError(
      f'backward_weight must lie in [0, 1], got {backward_weight}'
    )
  if drift_weight < 0:
    raise ValueError(f'drift_weight must be >= 0, got {drift_weight}')

  def signal(floor_, log_ratio):
    """What multiplies grad log pi(y_t): f32[B], f32[B, T] -> f32[B, T].

    The log-ratio is summed from t on: what was drawn before t cannot depend
    on y_t, so leaving it out changes the variance and not the expectation.
    """
    ratio_weight = backward_weight + drift_weight
    return backward_weight * floor_[:, None] - ratio_weight * ops.sum_to_go(
      log_ratio
    )

  def select(reward, win):
    del win
    best = 1 + reward[:, 1:].argmax(-1)  # the first of a tie
    return jnp.stack([jnp.zeros_like(best), best], -1)

  def weigh(scores: Scores):
    floor_ = floor(scores.reward)
    log_anchor = scores.log_anchor[:, 0]
    # The sampler's log-probs enter the baseline alone: it may be anything
    # that does not depend on the row's own draw.
    log_ratio = scores.log_sampled[:, 0] - log_anchor
    baseline = ops.leave_one_out_mean(signal(floor_, log_ratio), scores.weight)
    metrics = {
      'signal/fires': ops.weighted_mean((floor_ < 0) * 1.0, scores.weight),
      'kl/policy_anchor': ops.weighted_mean(log_ratio.sum(-1), scores.weight),
    }
    return Rows(floor_, log_anchor, baseline), metrics

  def loss(log_policy, rows: Rows):
    own, best = log_policy[:, 0], log_policy[:, 1]  # f32[b, T]
    log_ratio = jax.lax.stop_gradient(own) - rows.log_anchor
    advantage = signal(rows.floor, log_ratio) - rows.baseline
    backward = -(own * advantage).sum(-1)
    forward = -best.sum(-1)
    return (1 - backward_weight) * forward + backward

  return Algorithm(
    num_policy=1,
    num_anchor=2,
    select=select,
    anchor_rows=(0,),
    reference_rows=(),
    weigh=weigh,
    loss=loss,
    anchor=anchors.ema(anchor_rate),
  )
