"""The quantile of a completion among the anchor's, from few comparisons.

With p(y) = P(r(y') <= r(y)) for y' from the anchor, Best-of-n of the anchor is
the law that maximises E[log p(y)] - KL / (n - 1), up to a second term that is
the same for every y where nothing ties (BOND, arXiv 2407.14622, equations 7
and 8). Three estimates of log p:

- `monte_carlo`: the share of k anchor completions that y equals or beats (10);
- `floor`: 0, or a penalty when all k beat y (17 for k = 2, J-BOND's reward);
- a network that has learnt p (appendix B.1); here is its loss alone.

`pooled` estimates P(y beats y') itself, by the completions of all prompts.

Axes: B prompts, M rows whose quantile is asked for, k anchor completions.
"""

import math

import jax
import jax.numpy as jnp

from bond_jax.types import Array

# What p is taken for when s of k comparisons are won, by `zero`.
ZEROS = ('half', 'one', 'smooth')


def monte_carlo(own: Array, anchor: Array, *, zero: str) -> Array:
  """log p, BOND's equation (10), finite where no comparison is won.

  With s of k comparisons won, the estimate of p is

    'half':    max(s, 1/2) / k     closest to log p where p is small
    'one':     max(s, 1) / k       never below 1 / k
    'smooth':  (s + 1) / (k + 1)   y counts as one more draw; vBoN's

  The paper does not say which it takes. At k = 16 the mean error of log p
  is, in nats, for p = 0.05, 0.2 and 0.5: +0.07, -0.14, -0.03 for 'half';
  +0.37, -0.12, -0.03 for 'one'; +0.64, +0.13, +0.03 for 'smooth'.

  Args:
    own: f32[B, M], rewards of the rows.
    anchor: f32[B, k], rewards of the anchor's completions.
    zero: one of ZEROS; a KeyError for another.

  Returns:
    f32[B, M], nats, at most 0.

  Rows that equal or beat none, two and all of four anchor completions:

  >>> anchor = jnp.array([[1.0, 2, 3, 4]])
  >>> log_p = monte_carlo(jnp.array([[0.0, 2, 9]]), anchor, zero='half')
  >>> jnp.exp(log_p).tolist()
  [[0.125, 0.5, 1.0]]
  """
  wins, k = at_most(own, anchor).sum(-1), anchor.shape[-1]  # s, whole numbers
  if zero == 'smooth':
    return jnp.log((wins + 1) / (k + 1))
  return jnp.log(jnp.maximum(wins, {'half': 0.5, 'one': 1}[zero]) / k)


def at_most(own: Array, anchor: Array) -> Array:
  """r(y') <= r(y): rewards f32[B, M], f32[B, k] -> bool[B, M, k]."""
  return anchor[:, None, :] <= own[:, :, None]


def floor(own: Array, anchor: Array) -> Array:
  """-2^k log 2 where all k anchor completions beat y, else 0.

  For k = 2 this is J-BOND's -log 16, equation (17). The scale makes the
  expected value of a median completion its log-quantile, log(1/2); the
  comparison is strict, so that a completion as good as the worst of the
  anchor's is not punished.

  Args:
    own: f32[B, M], rewards of the rows.
    anchor: f32[B, k], rewards of the anchor's completions.

  Returns:
    f32[B, M], nats.

  >>> jnp.exp(floor(jnp.array([[0.0, 1, 2]]), jnp.array([[1.0, 5]]))).tolist()
  [[0.0625, 1.0, 1.0]]
  """
  k = anchor.shape[-1]
  below_all = own < anchor.min(-1, keepdims=True)
  return jnp.where(below_all, -(2.0**k) * math.log(2), 0.0)


def second_term(own: Array, anchor: Array, n: int) -> Array:
  """log sum_{i=1..n} (p_< / p_<=)^(i - 1), the term that BOND leaves out.

  Equation (8)'s second term times n - 1. It lies between 0 and log n; without
  ties it is log n for every y, and makes no difference. The ratio is taken
  from the comparisons; where y wins none, they show no tie, and it is 1.

  Args:
    own: f32[B, M], rewards of the rows.
    anchor: f32[B, k], rewards of the anchor's completions.
    n: of Best-of-n, 1 or more.

  Returns:
    f32[B, M], nats.

  Without a tie n; where half of what y does not lose to ties with it, 1 + 1/2:

  >>> both = jnp.array([[2.0], [2]]), jnp.array([[0.0, 1], [1, 2]])
  >>> [round(x, 4) for x in jnp.exp(second_term(*both, n=2))[:, 0].tolist()]
  [2.0, 1.5]
  """
  less = (anchor[:, None, :] < own[:, :, None]).sum(-1)
  wins = at_most(own, anchor).sum(-1)
  ratio = jnp.where(wins > 0, less / jnp.maximum(wins, 1), 1.0)
  return log_powers(ratio, n)


def log_powers(ratio: Array, n: float) -> Array:
  """log(1 + x + ... + x^(n - 1)), log n at x = 1, for n >= 1, whole or not.

  >>> jnp.exp(log_powers(jnp.array([0.0, 0.5, 1]), 3)).tolist()
  [1.0, 1.75, 3.0]
  """
  below = jnp.where(ratio < 1, ratio, 0.0)
  return jnp.where(
    ratio < 1, jnp.log((1 - below**n) / (1 - below)), jnp.log(1.0 * n)
  )


def pooled(own: Array, anchor: Array, weight: Array) -> Array:
  """P(y beats y'), ties one half, where a prompt has one or two y' of its own.

  Against these alone a quantile is mostly noise. Here a reward is taken for a
  place of its prompt plus a residual whose law all prompts share:

      P = mean of 1{r(y) - place > residual} over the anchor's residuals
          of the other prompts

  The place, for each row, is what the prompt's other rows are above the means
  of their side, policy or anchor, on average, shrunk by the share of the
  variance that is between prompts, plus the anchor's mean. Exact for rewards
  that are such sums and many prompts; what does not fit is smoothed.

  Args:
    own: f32[B, M], rewards of the policy's completions, M >= 2.
    anchor: f32[B, k], rewards of the anchor's completions, k >= 1.
    weight: f32[B]; rows of weight 0 are fillers and may hold anything.

  Returns:
    f32[B, M] in [0, 1]; 1/2 where no other prompt has weight.
  """
  w = jnp.where(weight > 0, weight, 0.0)[:, None]
  own, anchor = (jnp.where(w > 0, x, 0.0) for x in (own, anchor))
  mean = lambda x: (w * x).mean(-1).sum() / jnp.maximum(w.sum(), 1e-9)
  m, n = own.shape[-1], own.shape[-1] + anchor.shape[-1]
  above = jnp.concatenate([own - mean(own), anchor - mean(anchor)], -1)
  within = mean((own - own.mean(-1, keepdims=True)) ** 2) * m / (m - 1)
  between = mean(above.mean(-1, keepdims=True) ** 2) - within / n
  between = jnp.maximum(between, 0.0)
  shrink = between / jnp.maximum(between + within / (n - 1), 1e-30)
  others = (above.sum(-1, keepdims=True) - above) / (n - 1)
  residual = above - shrink * others
  # The means of both sides: as the policy rises, so do its residuals.
  mine = residual[:, :m] + mean(own) - mean(anchor)
  mine, theirs = mine[:, :, None, None], residual[:, m:][None, None]
  beats = 0.5 * (mine > theirs) + 0.5 * (mine >= theirs)
  share = (1 - jnp.eye(len(w))) * w.T  # of the other prompts
  total = share.sum(-1, keepdims=True)
  won = jnp.einsum('bmc,bc->bm', beats.mean(-1), share)
  return jnp.where(total > 0, won / jnp.where(total > 0, total, 1.0), 0.5)


def learned_loss(logit: Array, target: Array) -> Array:
  """Cross-entropy of a learned quantile, appendix B.1.

  Args:
    logit: f32[B, M], of p.
    target: f32[B, M], the share of comparisons 1{r(y') <= r(y)} won; its mean
      given y is p, the minimiser.

  Returns:
    f32[B], nats, the sum over the rows.
  """
  yes, no = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
  return -(target * yes + (1 - target) * no).sum(-1)
