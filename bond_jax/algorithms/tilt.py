"""Quantile tilt: the policy that wins most against the reference for its KL.

With c = `kl_weight` and u(y) = P(y beats y'), y' from the reference, ties one
half, each step ascends

    E[u(y)] - c KL(pi || ref),    y from pi

whose optimum, ref exp(u / c) / Z, has the highest win rate that any policy has
at its KL: it is the front itself, where no reward ties `tilt_frontier` in
measures/curves.py. RLOO on the raw reward tilts by that reward instead, and
WIND's equilibrium by the win rate over itself: both pay more for a win.

The estimate is `reinforce.policy_gradient`, whose reward is, by `quantile`,

    'own'     the share of the prompt's k completions of the reference that y
              beats: its mean is u(y) whatever k is. All K share these k, so
              that a prompt's other completions are a baseline that knows how
              good the k are, and still not what y is.
    'pooled'  `quantiles.pooled`, by the residuals of all prompts: a model of
              the rewards, and far less noise. For rewards that are numbers; a
              judge of pairs takes 'own'. The baseline is the mean of the other
              prompts: at the optimum it is the same for all of them, and a
              high reward lowers the quantiles of its own prompt's others.
"""

import jax.numpy as jnp

from bond_jax.algorithms import reinforce
from bond_jax.algorithms.parts import quantiles
from bond_jax.types import Algorithm, Array, Scores

QUANTILES = ('own', 'pooled')


def make(
  *, num_policy: int, num_anchor: int, kl_weight: float, quantile: str
) -> Algorithm:
  """Builds the quantile tilt of the reference.

  Args:
    num_policy: K, completions of the policy per prompt, 2 or more.
    num_anchor: k, completions of the reference, 1 or more.
    kl_weight: > 0, the win rate that a nat of KL weighs.
    quantile: 'own' or 'pooled'.

  A ValueError for any other.
  """
  if num_policy < 2:
    raise ValueError(
      f'num_policy must be 2 or more, got {num_policy}: the baseline is the'
      " prompt's other completions"
    )
  if num_anchor < 1:
    raise ValueError(
      f'num_anchor must be 1 or more, got {num_anchor}: a quantile needs'
      ' completions of the reference'
    )
  if not kl_weight > 0:
    raise ValueError(f'kl_weight must be > 0, got {kl_weight}')

  if quantile not in QUANTILES:
    raise ValueError(f'quantile must be one of {QUANTILES}, got {quantile!r}')

  def reward(scores: Scores) -> Array:
    if quantile == 'own':
      return scores.win[:, :num_policy, num_policy:].mean(-1)
    own, anchor = jnp.split(scores.reward, [num_policy], -1)
    return quantiles.pooled(own, anchor, scores.weight)

  return reinforce.policy_gradient(
    num_policy=num_policy,
    kl_weight=kl_weight,
    num_anchor=num_anchor,
    reward=reward,
    peers='prompt' if quantile == 'own' else 'batch',
  )
