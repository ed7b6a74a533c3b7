"""SPPO: the log-ratio to the last policy is regressed on the win rate.

Wu et al., "Self-Play Preference Optimization for Language Model Alignment"
(arXiv 2405.00675). Each iteration draws K completions of pi_t, the anchor, and
descends, averaged over the trained rows y,

    (log(pi(y) / pi_t(y)) - eta (P(y) - 1/2))^2

where eta is `step_size` and P(y) the share of the K that y beats. It is
step_size^2 times WIND's squared risk with constant 1/2 and no reference, and
`wind.regress` computes it.

The published code trains on the best and the worst of the K and counts y's
comparison with itself into P: rows 'extremes'. Where nothing is tied the best
wins all others, so that its P is 1 - 1 / (2 K) be it good or bad, and the
minimum is not the step that the paper derives, pi_t exp(eta P) / Z. Rows 'all'
are unselected and compared with the others alone: the expected gradient is
that of the loss above at the true P.
"""

import jax.numpy as jnp

from bond_jax.algorithms import wind
from bond_jax.types import Algorithm

ROWS = ('extremes', 'all')


def make(*, step_size: float, num_anchor: int, rows: str) -> Algorithm:
  """Builds SPPO.

  Args:
    step_size: eta > 0, 1000 in the paper's runs.
    num_anchor: K, 2 or more, 5 in the paper's runs.
    rows: 'extremes', as published, or 'all'.

  A ValueError for any other.
  """
  if rows not in ROWS:
    raise ValueError(f'rows must be one of {ROWS}, got {rows!r}')
  extremes = rows == 'extremes'

  def select(reward, win):
    del reward  # as it orders the completions, so do the wins it induces
    won = win.sum(-1)
    if extremes:
      return jnp.stack([won.argmax(-1), won.argmin(-1)], -1)
    return jnp.broadcast_to(jnp.arange(num_anchor)[None], won.shape)

  squared = wind.regress(
    select,
    rows=2 if extremes else num_anchor,
    num_anchor=num_anchor,
    kl_weight=0.0,
    step_size=step_size,
    risk='squared',
    constant='half',
    with_self=extremes,
  )
  return squared._replace(
    loss=lambda log_policy, rows: step_size**2 * squared.loss(log_policy, rows)
  )
