"""J-BOND: one policy completion against k anchor completions, k = 2 as a rule.

Sessa et al., "BOND: Aligning LLMs with Best-of-N Distillation"
(arXiv 2407.14622), Algorithm 2. It is BOND with n = k, an anchor that follows
the policy as a moving average, and the crudest quantile there is. With y from
the policy, y1 and y2 from the anchor and all gradients with respect to the
policy, each step descends

    (1 - b) G_forward + b G_backward + g G_drift

    G_forward  = - grad log pi(best of y1, y2)
    G_backward = - grad log pi(y) (R - B)
    R          = r_J(y) - log(pi(y) / anchor(y))
    r_J(y)     = -log 16 if r(y) < min(r(y1), r(y2)), else 0             (17)
    G_drift    = + grad log pi(y) log(pi(y) / anchor(y))

where b is `backward_weight` (the paper's Jeffreys beta), g `drift_weight`
(gamma), and B the mean of the other prompts' R. -log 16 makes the expected r_J
of a median completion equal to its log-quantile, log(1/2).

For k anchor completions, which the paper does not run, the target is
Best-of-k, the floor -2^k log 2, and R the Best-of-k signal
(k - 1) r_J(y) - log(pi(y) / anchor(y)).
"""

from bond_jax.algorithms import bond
from bond_jax.algorithms.parts import anchors, quantiles
from bond_jax.types import Algorithm, Array, Scores


def make(
  *,
  num_anchor: int,
  backward_weight: float,
  anchor_rate: float,
  drift_weight: float,
) -> Algorithm:
  """Builds J-BOND.

  Args:
    num_anchor: k, 2 or more; 2 in the paper.
    backward_weight: in [0, 1].
    anchor_rate: of the moving average, the paper's eta, in [0, 1].
    drift_weight: >= 0.

  A ValueError for any other.
  """
  if num_anchor < 2:
    raise ValueError(f'num_anchor must be 2 or more, got {num_anchor}')

  def quantile_reward(scores: Scores) -> Array:  # (17), times k - 1
    own, anchor = scores.reward[:, :1], scores.reward[:, 1:]
    return (num_anchor - 1) * quantiles.floor(own, anchor)

  return bond.distil(
    quantile_reward,
    n=num_anchor,
    backward_weight=backward_weight,
    drift_weight=drift_weight,
    num_policy=1,
    num_anchor=num_anchor,
    learned=False,
    anchor=anchors.ema(anchor_rate),
  )
