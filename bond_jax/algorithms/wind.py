"""WIND: log-ratios are regressed on win rates, by one of three risks.

Yang et al., "Faster WIND: Accelerating Iterative Best-of-N Distillation for
LLM Alignment" (arXiv 2410.20727). With b = `kl_weight`, e = `step_size` and
P(y) the probability that y beats a completion of pi_t, the exact step (mirror
descent with a magnet, Sokota et al., arXiv 2206.05825) is

    pi_{t+1} = (pi_t ref^(b e) exp(e P))^(1 / (1 + b e)) / Z

and its fixed point, ref exp(P / b) / Z, wins half the time or more against
every policy as close to the reference. The logarithm of a step says P = f for

    f(y) = c + g(y),    g(y) = log(pi(y) / pi_t(y)) / e + b log(pi(y) / ref(y))

where c = (1 + b e) / e log Z belongs to the prompt. So an iteration draws K
completions of pi_t, which is the anchor, takes as z the share of the K that y
beats, and fits f to z by a Bregman divergence:

    'squared'   (f - z)^2                             phi''(f) = 2
    'kl'        -z log f - (1 - z) log(1 - f)         1 / (f (1 - f))
    'nce'       -z log(f / (1 + f)) + log(1 + f)      1 / (f (1 + f))

The gradient is phi''(f) (f - z) grad f, so that f = E[z | y] is the minimum.
Nothing keeps f in (0, 1): outside [EDGE, 1 - EDGE] ('kl') or [EDGE, 1] ('nce')
phi goes on as a parabola, and the minimum stays where it is, be it 0 or 1. A
sigmoid in the place of c + g would be another algorithm, whose fixed point is
ref (P / (1 - P))^(1 / b) / Z.

THE PRINTED FORM OF THE SAMPLED RISKS WAS NOT SEEN. What was: that the exact
step is this mirror descent, and the risks' names. These are the divergences
that commonly bear them; c, the opponents and EDGE are choices of ours. Verified
instead, by enumeration of every K-tuple: over free log pi each risk's minimum
is the exact step, and with 'half' (all risks) or 'squared' the expected
gradient is that of the risk at the true P.

The constant, which matters because a policy's probabilities sum to one:

    'half'     c = 1/2, as in SPPO. True where e and b KL(pi || ref) are small:
               for b = 0 and no ties c is log((exp(e) - 1) / e) / e, 0.504,
               0.541, 0.770, 0.954 for e = 0.1, 1, 10, 100. So the minimum is
               only near the exact step. With 'squared' the fixed point is the
               right one all the same, for at pi = pi_t E[grad log pi] is 0 and
               c drops out; with 'kl' and 'nce' it is not (0.01 and 0.15 nats
               away in the tests' example of four actions).
    'fitted'   c minimises the risk on the prompt's own rows. With 'squared'
               that is the regression of all differences, the mean over pairs
               of ((g_i - g_j) - (z_i - z_j))^2 / 2: its minimum is the exact
               step for any K. With 'kl' and 'nce' it is so for large K; in
               the example a step is off by some 6 % of its length at K = 2,
               and the fixed point at K = 3 by 0.002 and 0.001 nats.

The opponents of y_i are all K. With 'half' y_i itself is left out, so that
E[z_i | y_i] = P(y_i). With 'fitted' it is one of them: y_i and y_j share their
comparison, so that E[z_i - z_j | y_i] would be K / (K - 1) (P(y_i) - 1/2)
without it, and is P(y_i) - 1/2 with it.

The trained rows are the first by index, never chosen by reward: a row picked
because it won has z near 1, whatever its P.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bond_jax.algorithms.parts import anchors, ops
from bond_jax.types import Algorithm, Array, Scores

# Where phi goes on as a parabola. It bounds phi'', the weight of a row, by 21
# ('kl') and 19 ('nce'): 5 and 14 times what it is at f = 1/2.
EDGE = 0.05


def squared(f: Array, z: Array) -> Array:
  """(f - z)^2; f and z f32[...], the target z in [0, 1]."""
  return (f - z) ** 2


def kl(f: Array, z: Array) -> Array:
  """KL(z || f) of two coins but for the entropy of z, and its parabolas.

  Element by element, f any number, z in [0, 1]; finite everywhere.
  """
  near = jnp.clip(f, EDGE, 1 - EDGE)
  loss = -z * jnp.log(near) - (1 - z) * jnp.log1p(-near)
  return loss + _parabola(f, near, z) / (near * (1 - near))


def nce(f: Array, z: Array) -> Array:
  """The logistic loss with odds f of z against 1, and its parabolas.

  Element by element, f any number, z in [0, 1]; finite everywhere.
  """
  near = jnp.clip(f, EDGE, 1)
  loss = (1 + z) * jnp.log1p(near) - z * jnp.log(near)
  return loss + _parabola(f, near, z) / (near * (1 + near))


def _parabola(f: Array, near: Array, z: Array) -> Array:
  """What, times phi''(near), makes phi''(near) (f - z) the gradient."""
  return (f - near) * (near - z + (f - near) / 2)


RISKS = {'squared': squared, 'kl': kl, 'nce': nce}
CONSTANTS = ('half', 'fitted')


class Rows(NamedTuple):
  """What the loss needs of each prompt, without gradient."""

  log_fixed: Array  # f32[B, M, T], log pi_t / e + b log ref
  target: Array  # f32[B, M], z


def make(
  *,
  kl_weight: float,
  step_size: float,
  risk: str,
  constant: str,
  num_anchor: int,
  rows: int,
) -> Algorithm:
  """Builds WIND.

  Args:
    kl_weight: b >= 0; with 0 the reference is not looked at.
    step_size: e > 0; e <= 4 b converges for any preferences, and far larger
      ones do for those that a reward induces.
    risk: 'squared', 'kl' or 'nce'.
    constant: 'half' or 'fitted'.
    num_anchor: K, 2 or more, completions of pi_t per prompt.
    rows: M of K, those trained on; 2 or more with 'fitted'.

  A ValueError for any other.
  """

  def select(reward, win):
    del reward
    return jnp.broadcast_to(jnp.arange(rows)[None], (len(win), rows))

  return regress(
    select,
    rows=rows,
    num_anchor=num_anchor,
    kl_weight=kl_weight,
    step_size=step_size,
    risk=risk,
    constant=constant,
    with_self=constant == 'fitted',
  )


def regress(
  select: Callable[[Array, Array], Array],
  *,
  rows: int,
  num_anchor: int,
  kl_weight: float,
  step_size: float,
  risk: str,
  constant: str,
  with_self: bool,
) -> Algorithm:
  """The body of WIND and SPPO: `select` picks the `rows`; see `make`.

  `select` maps rewards f32[B, K] and win f32[B, K, K] to i32[B, M]; `with_self`
  counts a row's comparison with itself, 1/2, into its target. A ValueError as
  in `make`.
  """
  _check(rows, num_anchor, kl_weight, step_size, risk, constant)
  everything = tuple(range(rows))
  divergence = RISKS[risk]

  def weigh(scores: Scores):
    won = scores.win.sum(-1)
    mean = won / num_anchor if with_self else (won - 0.5) / (num_anchor - 1)
    target = ops.take_rows(mean, scores.index)
    log_fixed = scores.log_anchor / step_size
    if kl_weight:
      log_fixed += kl_weight * scores.log_reference
    away = jnp.abs(target - 0.5)
    average = functools.partial(ops.weighted_mean, weight=scores.weight)
    metrics = {
      'signal/fires': average((away > 0).any(-1) * 1.0),
      'signal/mean': average(away.mean(-1)),
    }
    return Rows(log_fixed, target), metrics

  def loss(log_policy, rows: Rows):
    scaled = (1 / step_size + kl_weight) * log_policy
    g, z = (scaled - rows.log_fixed).sum(-1), rows.target
    if constant == 'half':
      return divergence(0.5 + g, z).mean(-1)
    c = fit_constant(divergence, jax.lax.stop_gradient(g), z)
    # M - 1 for M, as in a sample variance: c has taken one degree of freedom.
    return divergence(c + g, z).sum(-1) / (g.shape[-1] - 1)

  return Algorithm(
    num_policy=0,
    num_anchor=num_anchor,
    select=select,
    anchor_rows=everything,
    reference_rows=everything if kl_weight else (),
    quantile_rows=(),
    weigh=weigh,
    loss=loss,
    anchor=anchors.periodic(1),
  )


def _check(rows, num_anchor, kl_weight, step_size, risk, constant) -> None:
  if not 0 <= kl_weight < math.inf:
    raise ValueError(f'kl_weight must be finite and >= 0, got {kl_weight}')
  if not 0 < step_size < math.inf:
    raise ValueError(f'step_size must be finite and > 0, got {step_size}')
  if risk not in RISKS:
    raise ValueError(f'risk must be one of {tuple(RISKS)}, got {risk!r}')
  if constant not in CONSTANTS:
    raise ValueError(f'constant must be one of {CONSTANTS}, got {constant!r}')
  if num_anchor < 2:
    raise ValueError(f'num_anchor must be 2 or more, got {num_anchor}')
  least = 2 if constant == 'fitted' else 1
  if rows not in range(least, num_anchor + 1):
    raise ValueError(
      f'rows must be an integer from {least} to num_anchor, {num_anchor}, got'
      f' {rows!r}'
    )


def fit_constant(
  risk: Callable[[Array, Array], Array], g: Array, z: Array
) -> Array:
  """The c that minimises the sum of risk(c + g, z), by bisection.

  At the smallest z - g no row's f is above its z, at the largest none is
  below: the slope changes sign in between. For 'nce', which is not convex, the
  minimum may be a local one. At a minimum the derivative with respect to c is
  0, so that the policy's gradient is right with c held fixed.

  Args:
    risk: of RISKS.
    g: f32[B, M], without gradient; log-ratios, see the head of the file.
    z: f32[B, M], win rates in [0, 1].

  Returns:
    f32[B, 1].
  """
  slope = jax.grad(lambda c: risk(c + g, z).sum())

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    rises = slope(middle) > 0
    return jnp.where(rises, low, middle), jnp.where(rises, middle, high)

  ends = (z - g).min(-1, keepdims=True), (z - g).max(-1, keepdims=True)
  low, high = jax.lax.fori_loop(0, 50, halve, ends)
  return (low + high) / 2
