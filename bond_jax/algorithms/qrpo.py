"""QRPO: regress the log-ratio on a log-density that the quantile gives.

Matrenok, Moalla and Gulcehre, "Quantile Reward Policy Optimization: Alignment
with Pointwise Regression and Exact Partition Functions" (arXiv 2507.08068).
With c = `kl_weight`, F(y) the quantile of y among completions of the reference
and g = log(pi(y) / ref(y)), each step descends

    (T(F(y)) - c log Z - c g(y))^2

whose minimum is ref exp(T(F) / c) / Z, the policy that maximises E[T(F)] - c
KL. As F is uniform, Z is known, and one completion of a prompt is enough:

    'identity'   T = F        Z = c (e^(1/c) - 1)    the optimum of `tilt`
    'log'        T = log F    Z = c / (1 + c)        c = 1/(n - 1): Best-of-n

Ties make F not uniform, and the published Z wrong: for Best-of-8 of a reward
of five levels the target's probabilities sum to 2.1. Here exp(T / c) is its
mean over the quantiles from P(r(y') < r(y)) to P(r(y') <= r(y)), which all
that tie with y share: Z is right for every reward, and 'log' is Best-of-n with
its ties, as equation (8) of BOND has them.

Where y was drawn does not matter to the minimum, if all of the law can be
represented: it may be the policy's, or, off-policy, the reference's, which are
compared with each other and can be drawn once for all.

The quantiles are counted. With T = F the mean of the target is then right for
any number of comparisons, but for ties that few comparisons do not show; with
T = log F it is not, see `quantiles.monte_carlo`, 'half' of which is taken.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bond_jax.algorithms.parts import anchors, ops, quantiles
from bond_jax.types import Algorithm, Array, Scores

TRANSFORMS = ('identity', 'log')


class Rows(NamedTuple):
  """What the loss needs of each prompt, without gradient."""

  log_reference: Array  # f32[B, M, T]
  log_density: Array  # f32[B, M], nats, that the log-ratio is regressed on


def make(
  *, num_policy: int, num_anchor: int, rows: int, transform: str,
  kl_weight: float,
) -> Algorithm:  # fmt: skip
  """Builds QRPO.

  Args:
    num_policy: completions of the policy per prompt, which are trained on;
      with 0 the reference's are.
    num_anchor: k, completions of the reference per prompt, 1 or more; 2 or
      more without the policy's: then each is compared with the others.
    rows: M, that are trained on: those whose quantile is farthest from 1/2, of
      the policy's or, where there are none, of the reference's. The others say
      little: 6 of 11 hold nine tenths of the squares of F - 1/2. Fewer than all
      make T on the mean a steeper function of the true quantile, that still
      rises (without ties); so 'log', whose optimum is Best-of-n, takes all.
    transform: 'identity' or 'log'.
    kl_weight: c > 0; 1 / (n - 1) with 'log' is Best-of-n.

  A ValueError for any other.
  """
  _check(num_policy, num_anchor, rows, transform, kl_weight)
  drawn = num_policy or num_anchor
  own = tuple(range(rows))
  compared = num_anchor - (not num_policy)

  def share(win, index):
    """[B, M]: the mean of win over the reference's, but for a row itself."""
    columns = num_policy + jnp.arange(num_anchor)[None, None]
    others = (index[..., None] != columns).astype(float)
    return (win[..., num_policy:] * others).sum(-1) / compared

  def select(reward, win):
    del reward
    every = jnp.arange(drawn)[None]
    far = jnp.abs(share(win[:, :drawn], every) - 0.5)
    return jnp.sort(jax.lax.top_k(far, rows)[1])

  def weigh(scores: Scores):
    win = ops.take_rows(scores.win, scores.index)
    # The quantiles from `less` to `at_most` are y's: of a judge's probability
    # too, whose indecision is a tie in part. Their middle is always `win`.
    less = share(jnp.maximum(2 * win - 1, 0.0), scores.index)
    at_most = share(jnp.minimum(2 * win, 1.0), scores.index)
    if transform == 'identity':
      target = tilt_density(less, at_most, kl_weight)
    else:
      n, least = 1 + 1 / kl_weight, 0.5 / compared
      target = best_of_n_density(less, at_most, n, least)
    fires = ops.weighted_mean((at_most - less < 1).any(-1) * 1.0, scores.weight)
    return Rows(scores.log_reference, target), {'signal/fires': fires}

  def loss(log_policy, known: Rows):
    log_ratio = (log_policy - known.log_reference).sum(-1)
    return ((kl_weight * (known.log_density - log_ratio)) ** 2).mean(-1)

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


def _check(num_policy, num_anchor, rows, transform, kl_weight) -> None:
  if num_policy < 0:
    raise ValueError(f'num_policy must be 0 or more, got {num_policy}')
  least = 1 if num_policy else 2
  if num_anchor < least:
    raise ValueError(
      f'num_anchor must be {least} or more, got {num_anchor}: a quantile needs'
      ' completions of the reference to compare with'
    )
  drawn = num_policy or num_anchor
  if rows not in range(1, drawn + 1):
    raise ValueError(
      f'rows must be an integer from 1 to {drawn}, the completions of'
      f' {"the policy" if num_policy else "the reference"}, got {rows}'
    )
  if transform not in TRANSFORMS:
    raise ValueError(
      f'transform must be one of {TRANSFORMS}, got {transform!r}'
    )
  if transform == 'log' and rows != drawn:
    raise ValueError(
      f"rows must be {drawn}, all of them, with transform 'log', got {rows}:"
      ' fewer would end at another law than Best-of-n'
    )
  if not kl_weight > 0:
    raise ValueError(f'kl_weight must be > 0, got {kl_weight}')


def tilt_density(less: Array, at_most: Array, kl_weight: float) -> Array:
  """log of the mean of exp(t / c) / Z over the quantiles t of y.

  Args:
    less, at_most: f32[...], where these begin and end, in [0, 1].
    kl_weight: c.

  Returns:
    f32[...], nats. 0 where all tie:

  >>> float(tilt_density(jnp.float32(0), jnp.float32(1), 0.1))
  0.0
  """

  def mean_below(x):
    """log of the mean of exp(-s) over s in [0, x]."""
    safe = jnp.where(x > 0, x, 1.0)
    return jnp.where(x > 0, jnp.log(-jnp.expm1(-safe) / safe), 0.0)

  top = (at_most - 1) / kl_weight + mean_below((at_most - less) / kl_weight)
  return top - mean_below(jnp.asarray(1 / kl_weight))


def best_of_n_density(
  less: Array, at_most: Array, n: float, least: float
) -> Array:
  """log of the mean of n t^(n - 1) over the quantiles t of y: of Best-of-n.

  Args:
    less, at_most: f32[...], where these begin and end, in [0, 1].
    n: more than 1, whole or not.
    least: what `at_most` is taken for where it is 0, and shows no tie.

  Returns:
    f32[...], nats. Of one that beats half and ties with none, and with all:

  >>> at_most = jnp.array([0.5, 1])
  >>> density = best_of_n_density(jnp.array([0.5, 0]), at_most, 4, 0.1)
  >>> jnp.exp(density).round(5).tolist()
  [0.5, 1.0]
  """
  ratio = jnp.where(at_most > 0, less / jnp.maximum(at_most, least), 1.0)
  second = quantiles.log_powers(ratio, n)
  return (n - 1) * jnp.log(jnp.maximum(at_most, least)) + second
