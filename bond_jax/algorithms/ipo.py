"""Online IPO: regress the difference of log-ratios on the preference.

IPO (Azar et al., arXiv 2310.12036) on pairs that the policy has just drawn
(Calandriello et al., arXiv 2403.08635). With w = P(y beats y') and
c = `kl_weight`, each step descends

    (h - (w - 1/2) / c)^2,  h = log(pi(y) / ref(y)) - log(pi(y') / ref(y'))

A label of 0 or 1, drawn with chance w, has the regression target -1/(2 c) or
1/(2 c) as in the paper; the mean of that loss over the label is the one above
plus w (1 - w) / c^2, which has no gradient. A tie draws the two log-ratios
together. Pairs, h and w are those of `online_dpo`.
"""

from bond_jax.algorithms import online_dpo
from bond_jax.types import Algorithm


def make(*, kl_weight: float) -> Algorithm:
  """Builds online IPO.

  Args:
    kl_weight: > 0, IPO's tau: the larger, the nearer to the reference; a
      ValueError for others.
  """

  def risk(h, win):
    return (h - (win - 0.5) / kl_weight) ** 2

  return online_dpo.on_pairs(risk, kl_weight=kl_weight)
