"""Best-of-n by supervised training: imitate the best of n anchor completions.

With y_1 ... y_n from the anchor, each step descends

    - log pi(best of y_1 ... y_n),

whose mean is the cross-entropy, and up to a constant the KL divergence, from
the Best-of-n law of the anchor to the policy. It is the forward part of BOND
alone (arXiv 2407.14622, equation 13), and with the anchor 'periodic:1', the
policy before the current iteration, it is RAFT (arXiv 2304.06767), also known
as rejection-sampling fine-tuning. Best-of-1 is supervised training on the
anchor's own completions, whatever the reward.

A tie for best goes to the first drawn, which has the law of a random pick.
"""

from bond_jax.algorithms.parts import anchors, ops
from bond_jax.types import Algorithm, Scores


def make(*, n: int, anchor: str) -> Algorithm:
  """Builds supervised training on the best of n.

  Args:
    n: completions of the anchor per prompt, 1 or more.
    anchor: 'fixed', 'periodic:ITERATIONS' or 'ema:RATE'.

  A ValueError for any other.
  """
  if n < 1:
    raise ValueError(f'n must be 1 or more, got {n}')

  def select(reward, win):
    del win
    return reward.argmax(-1)[:, None]

  def weigh(scores: Scores):
    differ = scores.reward.max(-1) > scores.reward.min(-1)
    return (), {'signal/fires': ops.weighted_mean(differ * 1.0, scores.weight)}

  def loss(log_policy, rows):
    del rows
    return -log_policy[:, 0].sum(-1)

  return Algorithm(
    num_policy=0,
    num_anchor=n,
    select=select,
    anchor_rows=(),
    reference_rows=(),
    quantile_rows=(),
    weigh=weigh,
    loss=loss,
    anchor=anchors.named(anchor),
  )
