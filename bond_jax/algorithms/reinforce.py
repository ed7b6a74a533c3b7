"""REINFORCE: raise the reward of the policy's completions, near a reference.

With c = `kl_weight` and y from the policy, each step ascends

    E[r(y)] - c KL(pi || ref)

along the estimate grad log pi(y) (R - B), where R = r(y) - c log(pi(y) /
ref(y)) and B is the mean of the other prompts' R, as in `bond`.

At a position of y the log-ratio of what came before could be left out of R: it
does not depend on what is drawn there. It stays, since it takes noise away: the
policy tends to ref exp(r / c) / Z, where R is the same for every y. Where there
is no reward for it to meet, it is noise (`to_go`). `policy_gradient` is the
body of `rloo`, `tilt` and `on_policy_distillation` as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bond_jax.algorithms.parts import anchors, ops
from bond_jax.types import Algorithm, Array, Scores


class Rows(NamedTuple):
  """What the loss needs of each prompt, without gradient."""

  reward: Array  # f32[B, K]
  log_reference: Array  # f32[B, K, T]
  baseline: Array  # f32[B, K, 1 or T], of the signal, at each position


def make(*, kl_weight: float) -> Algorithm:
  """Builds REINFORCE on one completion per prompt.

  Args:
    kl_weight: >= 0, nats of KL weigh this much reward each.

  A ValueError for any other.
  """
  return policy_gradient(num_policy=1, kl_weight=kl_weight, peers='batch')


def policy_gradient(
  *,
  num_policy: int,
  kl_weight: float,
  num_anchor: int = 0,
  reward: Callable[[Scores], Array] = lambda scores: scores.reward,
  peers: str = 'prompt',
  to_go: bool = False,
) -> Algorithm:
  """REINFORCE on K = num_policy completions of each prompt, 1 or more.

  The baseline is the mean signal of a completion's peers.

  Args:
    num_policy: K.
    kl_weight: >= 0, or a ValueError.
    num_anchor: completions of the reference, that are compared with.
    reward: Scores -> f32[B, K], of the policy's completions.
    peers: 'prompt', the prompt's other completions, or 'batch', those of the
      other prompts.
    to_go: at each position R has the log-ratio from there on.
  """
  if not kl_weight >= 0:
    raise ValueError(f'kl_weight must be >= 0, got {kl_weight}')
  own = tuple(range(num_policy))

  def signal(reward, log_ratio):
    """R, without its baseline: [B, K], [B, K, T] -> [B, K, 1 or T]."""
    whole = ops.sum_to_go(log_ratio)
    return reward[..., None] - kl_weight * (whole if to_go else whole[..., :1])

  def select(reward, win):
    del win
    return jnp.broadcast_to(jnp.array([own]), (len(reward), num_policy))

  def weigh(scores: Scores):
    # The sampler's log-probs enter the baseline alone: it may be anything
    # that does not depend on the row's own draw.
    log_ratio = scores.log_sampled - scores.log_reference
    mine = reward(scores)
    whole = signal(mine, log_ratio)
    weight = jnp.broadcast_to(scores.weight[:, None], mine.shape)
    if peers == 'prompt':
      baseline = jax.vmap(ops.leave_one_out_mean)(whole, weight)
      differ = _differ(mine, weight)
    else:
      others = ops.leave_one_out_mean(whole.mean(1), scores.weight)
      baseline = jnp.broadcast_to(others[:, None], whole.shape)
      differ = _differ(mine.reshape(1, -1), weight.reshape(1, -1))
      differ = jnp.broadcast_to(differ, scores.weight.shape)
    kl = log_ratio.sum(-1).mean(-1)
    metrics = {
      'signal/fires': ops.weighted_mean(differ * 1.0, scores.weight),
      'kl/policy_reference': ops.weighted_mean(kl, scores.weight),
    }
    return Rows(mine, scores.log_reference, baseline), metrics

  def loss(log_policy, rows: Rows):
    log_ratio = jax.lax.stop_gradient(log_policy) - rows.log_reference
    advantage = signal(rows.reward, log_ratio) - rows.baseline
    return -(log_policy * advantage).sum(-1).mean(-1)

  return Algorithm(
    num_policy=num_policy,
    num_anchor=num_anchor,
    select=select,
    anchor_rows=(),
    reference_rows=own,
    quantile_rows=(),
    weigh=weigh,
    loss=loss,
    anchor=anchors.fixed(),
  )


def _differ(reward: Array, weight: Array) -> Array:
  """Whether rewards f32[groups, N] of a group are not all one: bool[groups]."""
  most = jnp.where(weight > 0, reward, -jnp.inf).max(1)
  least = jnp.where(weight > 0, reward, jnp.inf).min(1)
  return most > least
