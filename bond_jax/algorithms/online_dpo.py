"""Online DPO: a preference loss on fresh pairs of the policy's completions.

Guo et al., "Direct Language Model Alignment from Online AI Feedback"
(arXiv 2402.04792): DPO (arXiv 2305.18290) on two completions y, y' that the
policy has just drawn, compared as they come. With w = P(y beats y') and
c = `kl_weight`, each step descends

    - w log sigmoid(c h) - (1 - w) log sigmoid(-c h)
    h = log(pi(y) / ref(y)) - log(pi(y') / ref(y'))

The gradient is that of the loss at given pairs; how the pairs are drawn has
none. The label w in [0, 1] in place of 0 or 1 is the mean of the loss over a
label drawn with that chance; a tie, w = 1/2, draws the two ratios together.
`on_pairs` is the body of `ipo` as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bond_jax.algorithms.parts import anchors, ops
from bond_jax.types import Algorithm, Array, Scores


class Rows(NamedTuple):
  """What the loss needs of each prompt, without gradient."""

  log_reference: Array  # f32[B, 2, T]
  win: Array  # f32[B], P(the first beats the second)


def make(*, kl_weight: float) -> Algorithm:
  """Builds online DPO.

  Args:
    kl_weight: > 0, DPO's beta: the larger, the nearer to the reference; a
      ValueError for others.
  """

  def risk(h, win):
    yes = jax.nn.log_sigmoid(kl_weight * h)
    no = jax.nn.log_sigmoid(-kl_weight * h)
    return -(win * yes + (1 - win) * no)

  return on_pairs(risk, kl_weight=kl_weight)


def on_pairs(
  risk: Callable[[Array, Array], Array], *, kl_weight: float
) -> Algorithm:
  """Descends risk(h f32[B], win f32[B]) -> f32[B] on pairs of the policy's.

  A ValueError unless kl_weight > 0: at 0, DPO has no gradient and IPO no
  finite target.
  """
  if not kl_weight > 0:
    raise ValueError(f'kl_weight must be > 0, got {kl_weight}')

  def select(reward, win):
    del win
    return jnp.broadcast_to(jnp.array([[0, 1]]), reward.shape)

  def weigh(scores: Scores):
    win = scores.win[:, 0, 1]
    log_ratio = scores.log_sampled - scores.log_reference
    kl = log_ratio.sum(-1).mean(-1)
    metrics = {
      'signal/fires': ops.weighted_mean((win != 0.5) * 1.0, scores.weight),
      'kl/policy_reference': ops.weighted_mean(kl, scores.weight),
    }
    return Rows(scores.log_reference, win), metrics

  def loss(log_policy, rows: Rows):
    first, second = jnp.moveaxis(log_policy - rows.log_reference, 1, 0)
    return risk((first - second).sum(-1), rows.win)

  return Algorithm(
    num_policy=2,
    num_anchor=0,
    select=select,
    anchor_rows=(),
    reference_rows=(0, 1),
    quantile_rows=(),
    weigh=weigh,
    loss=loss,
    anchor=anchors.fixed(),
  )
