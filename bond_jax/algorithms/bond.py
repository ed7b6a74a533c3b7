"""BOND: distil Best-of-n of the anchor, with any mixture of two KLs.

Sessa et al., "BOND: Aligning LLMs with Best-of-N Distillation"
(arXiv 2407.14622). With y from the policy, y_1 ... from the anchor and all
gradients with respect to the policy, each step descends

    (1 - b) G_forward + b G_backward + g G_drift                          (11)

    G_forward  = - grad log pi(best of y_1 ... y_n)                       (13)
    G_backward = - grad log pi(y) (R - B)                                 (15)
    R          = (n - 1) r_BOND(y) - log(pi(y) / anchor(y))
    r_BOND(y)  = log p(y) [+ log sum_i (p_< / p)^(i - 1) / (n - 1)]    (7), (8)
    G_drift    = + grad log pi(y) log(pi(y) / anchor(y))

where b is `backward_weight` (the paper's Jeffreys beta), g `drift_weight`
(gamma), p = p_<= the quantile of y among the anchor's completions, and B the
mean of the other prompts' R. The anchor is the reference (BOND), a policy of
some iterations ago (iterative BOND, Algorithm 1), or a moving average.

Choices where the paper is silent: the factor n - 1 is kept, so that b weighs
the two KLs themselves. The first n of the anchor's completions compete for
best, and the first k are compared with y: shared draws bias nothing, for the
two enter different terms of a sum. A tie for best goes to the first drawn. The
mean over M draws of y is taken. G_drift has a baseline as G_backward has. As in
the paper's runs the term in brackets is left out unless `second_term` asks.

The sign of G_drift is that of grad KL(pi || anchor), so that descending
shrinks the drift.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bond_jax.algorithms.parts import anchors, ops, quantiles
from bond_jax.types import Algorithm, AnchorRule, Array, Scores


class Rows(NamedTuple):
  """What the loss needs of each prompt, without gradient."""

  quantile_reward: Array  # f32[B, M], (n - 1) r_BOND
  log_anchor: Array  # f32[B, M, T], of the policy's rows
  baseline: Array  # f32[B, M, T], of the signal at each position


def make(
  *,
  n: int,
  backward_weight: float,
  drift_weight: float,
  num_policy: int,
  quantile: str,
  num_quantile: int,
  zero: str,
  second_term: bool,
  anchor: str,
) -> Algorithm:
  """Builds BOND.

  Args:
    n: of Best-of-n, 2 or more.
    backward_weight: in [0, 1]. At 1 the best is neither drawn nor trained on;
      at 0, without drift, `best_of_n` does the same without the policy's rows.
    drift_weight: >= 0.
    num_policy: M, completions of the policy per prompt, 1 or more.
    quantile: 'monte_carlo', 'floor' (see `quantiles`) or 'learned'.
    num_quantile: k, completions of the anchor that y is compared with.
    zero: what p is where k comparisons are all lost; see
      `quantiles.monte_carlo`, which alone looks at it.
    second_term: adds the term in brackets; with 'monte_carlo' alone.
    anchor: 'fixed', 'periodic:ITERATIONS' or 'ema:RATE'.

  A ValueError for any other.
  """
  known = ('monte_carlo', 'floor', 'learned')
  if quantile not in known:
    raise ValueError(f'quantile must be one of {known}, got {quantile!r}')
  if zero not in quantiles.ZEROS:
    raise ValueError(f'zero must be one of {quantiles.ZEROS}, got {zero!r}')
  if second_term and quantile != 'monte_carlo':
    raise ValueError(
      f"second_term needs quantile 'monte_carlo', got {quantile!r}"
    )
  _check_positive(num_quantile=num_quantile)

  def quantile_reward(scores: Scores) -> Array:
    own = scores.reward[:, :num_policy]
    anchor_reward = scores.reward[:, num_policy : num_policy + num_quantile]
    if quantile == 'learned':
      reward = scores.log_quantile
    elif quantile == 'floor':
      reward = quantiles.floor(own, anchor_reward)
    else:
      reward = quantiles.monte_carlo(own, anchor_reward, zero=zero)
    reward *= n - 1
    if second_term:
      reward += quantiles.second_term(own, anchor_reward, n)
    return reward

  return distil(
    quantile_reward,
    n=n,
    backward_weight=backward_weight,
    drift_weight=drift_weight,
    num_policy=num_policy,
    num_anchor=num_quantile if backward_weight == 1 else max(n, num_quantile),
    learned=quantile == 'learned',
    anchor=anchors.named(anchor),
  )


def distil(
  quantile_reward: Callable[[Scores], Array],
  *,
  n: int,
  backward_weight: float,
  drift_weight: float,
  num_policy: int,
  num_anchor: int,
  learned: bool,
  anchor: AnchorRule,
) -> Algorithm:
  """BOND for any (n - 1) r_BOND, a function from Scores to f32[B, M] in nats.

  Rows: the policy's, then the best of the anchor's first n, unless b = 1. Where
  it is `learned` the reward reads `Scores.log_quantile`. A ValueError as in
  `make`.
  """
  if n < 2:
    raise ValueError(f'n must be 2 or more, got {n}')
  if not 0 <= backward_weight <= 1:
    raise ValueError(
      f'backward_weight must lie in [0, 1], got {backward_weight}'
    )
  if not drift_weight >= 0:
    raise ValueError(f'drift_weight must be >= 0, got {drift_weight}')
  _check_positive(num_policy=num_policy)
  own = tuple(range(num_policy))

  def signal(reward, log_ratio):
    """What multiplies grad log pi(y_t): [B, M], [B, M, T] -> [B, M, T].

    The log-ratio is summed from t on: what was drawn before t cannot depend
    on y_t, so leaving it out changes the variance and not the expectation.
    """
    ratio_weight = backward_weight + drift_weight
    to_go = ops.sum_to_go(log_ratio)
    return backward_weight * reward[..., None] - ratio_weight * to_go

  def select(reward, win):
    del win
    best = num_policy + reward[:, num_policy : num_policy + n].argmax(-1)
    mine = jnp.broadcast_to(jnp.array([own]), (len(best), num_policy))
    return mine if backward_weight == 1 else jnp.column_stack([mine, best])

  def weigh(scores: Scores):
    reward = quantile_reward(scores)
    # The sampler's log-probs enter the baseline alone: it may be anything
    # that does not depend on the row's own draw.
    log_ratio = scores.log_sampled[:, :num_policy] - scores.log_anchor
    mean = signal(reward, log_ratio).mean(1)  # of a prompt's own draws
    others = ops.leave_one_out_mean(mean, scores.weight)
    baseline = jnp.broadcast_to(others[:, None], log_ratio.shape)
    average = functools.partial(ops.weighted_mean, weight=scores.weight)
    metrics = {
      # 0 is what a group that is all tied gets; a network's p is never 1.
      'signal/fires': average((reward != 0).any(-1) * 1.0),
      'signal/mean': average(reward.mean(-1)),
      'kl/policy_anchor': average(log_ratio.sum(-1).mean(-1)),
    }
    return Rows(reward, scores.log_anchor, baseline), metrics

  def loss(log_policy, rows: Rows):
    mine, best = jnp.split(log_policy, [num_policy], 1)
    log_ratio = jax.lax.stop_gradient(mine) - rows.log_anchor
    advantage = signal(rows.quantile_reward, log_ratio) - rows.baseline
    backward = -(mine * advantage).sum(-1).mean(-1)
    forward = -best.sum((1, 2))
    return (1 - backward_weight) * forward + backward

  return Algorithm(
    num_policy=num_policy,
    num_anchor=num_anchor,
    select=select,
    anchor_rows=own,
    reference_rows=(),
    quantile_rows=own if learned else (),
    weigh=weigh,
    loss=loss,
    anchor=anchor,
  )


def _check_positive(**numbers: int) -> None:
  for name, number in numbers.items():
    if number < 1:
      raise ValueError(f'{name} must be 1 or more, got {number}')
