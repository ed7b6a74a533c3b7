"""BoNBoN: imitate the best of n, and hold it a margin above the worst.

Gui et al., "BoNBoN Alignment for Large Language Models and the Sweetness of
Best-of-n Sampling" (arXiv 2406.00832). With y_1 ... y_n from the reference,
each step descends

    - a log pi(best) + (1 - a) (g(best) - g(worst) - 1 / (2 beta_n))^2
    g(y)        = log(pi(y) / ref(y))
    1 / beta_n  = 2 (n - 1) (1 + 1/2 + ... + 1/(n - 1))

where a is `sft_weight`. The margin 1 / (2 beta_n) is what the difference of
log-ratios is on average where pi is Best-of-n of ref and rewards are
continuous: then g(y) = log n + (n - 1) log F(y), and over n uniform draws F
the mean of log F is -1/n at the largest, -(1 + 1/2 + ... + 1/n) at the
smallest. The paper takes n = 8, a margin of 18.15, and a = 0.005.

Ties are our choice. The best is the first drawn of the best, the worst the
last drawn of the worst: two draws, always. Where all n are tied the margin is
0, since Best-of-n weighs completions of one reward alike. The two draws have
one law then, so that a margin would add nothing to the mean gradient but noise.
"""

from typing import NamedTuple

import jax.numpy as jnp

from bond_jax.algorithms.parts import anchors, ops
from bond_jax.types import Algorithm, Array, Scores


class Rows(NamedTuple):
  """What the loss needs of each prompt, without gradient."""

  log_reference: Array  # f32[B, 2, T], of the best and the worst
  margin: Array  # f32[B], nats


def make(*, n: int, sft_weight: float) -> Algorithm:
  """Builds BoNBoN.

  Args:
    n: completions of the reference per prompt, 2 or more.
    sft_weight: in [0, 1], the paper's alpha; 1 is `best_of_n`.

  A ValueError for any other.
  """
  if n < 2:
    raise ValueError(f'n must be 2 or more, got {n}')
  if not 0 <= sft_weight <= 1:
    raise ValueError(f'sft_weight must lie in [0, 1], got {sft_weight}')

  def select(reward, win):
    del win
    worst = n - 1 - jnp.flip(reward, -1).argmin(-1)
    return jnp.stack([reward.argmax(-1), worst], -1)

  def weigh(scores: Scores):
    differ = scores.reward.max(-1) > scores.reward.min(-1)
    rows = Rows(scores.log_reference, jnp.where(differ, margin(n), 0.0))
    fires = ops.weighted_mean(differ * 1.0, scores.weight)
    return rows, {'signal/fires': fires}

  def loss(log_policy, rows: Rows):
    best, worst = jnp.moveaxis((log_policy - rows.log_reference).sum(-1), 1, 0)
    apart = (best - worst - rows.margin) ** 2
    return -sft_weight * log_policy[:, 0].sum(-1) + (1 - sft_weight) * apart

  return Algorithm(
    num_policy=0,
    num_anchor=n,
    select=select,
    anchor_rows=(),
    reference_rows=(0, 1),
    quantile_rows=(),
    weigh=weigh,
    loss=loss,
    anchor=anchors.fixed(),
  )


def margin(n: int) -> float:
  """1 / (2 beta_n), nats: what best and worst of n are apart on average.

  >>> round(margin(8), 2)  # the paper's
  18.15
  """
  return (n - 1) * sum(1 / k for k in range(1, n))
