"""vBoN: variational Best-of-n, BOND's backward part alone.

Amini et al., "Variational Best-of-N Alignment" (arXiv 2407.06057), maximise

    E log F(r(y)) - KL(pi || ref) / (n - 1),  F(r) = P(r(y') <= r), y' from ref,

which without ties is - KL(pi || Best-of-n of ref) / (n - 1), up to a constant.
It is `bond` with backward weight 1, no drift term, the reference as anchor,
and F from k reference completions of which s are no better than y:
(s + 1) / (k + 1), the smoothing of the authors' code. As in `bond`, what is
ascended is n - 1 times the above.

That is the reward `l1` of the authors' code (github.com/rycolab/vbon). Its
default in the sentiment task is another one, `exact`:
log(((F + q)^n - F^n) / q) / n with q = ref(y). Of long completions q is next to
nothing, and `exact` is then (n - 1) / n times `l1`, plus log(n) / n.

Choices of ours: the authors keep some hundreds of rewards per prompt, drawn
once, where we draw k in every step; and their code counts the completions
that are strictly worse, which makes no difference without ties. With ours a
group that is all tied has no signal, log F = 0.
"""

from bond_jax.algorithms import bond
from bond_jax.algorithms.parts import anchors, quantiles
from bond_jax.types import Algorithm, Array, Scores


def make(*, n: int, num_quantile: int) -> Algorithm:
  """Builds vBoN.

  Args:
    n: of Best-of-n, 2 or more; 1 + 1 / (weight of the KL) in the paper.
    num_quantile: k, completions of the reference that y is compared with.

  A ValueError unless n >= 2 and num_quantile >= 1.
  """
  if num_quantile < 1:
    raise ValueError(f'num_quantile must be 1 or more, got {num_quantile}')

  def quantile_reward(scores: Scores) -> Array:
    own, reference = scores.reward[:, :1], scores.reward[:, 1:]
    log_f = quantiles.monte_carlo(own, reference, zero='smooth')
    return (n - 1) * log_f

  return bond.distil(
    quantile_reward,
    n=n,
    backward_weight=1.0,
    drift_weight=0.0,
    num_policy=1,
    num_anchor=num_quantile,
    learned=False,
    anchor=anchors.fixed(),
  )
