"""The anchor follows the policy: direction, precision, and where it leads."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax import anchors


def test_ema_moves_a_small_step_towards_the_policy():
  anchor, params = {'w': np.float32([0, 10])}, {'w': np.float32([1, 0])}
  out = jax.jit(anchors.ema(0.02).update)(anchor, params, 0)
  np.testing.assert_allclose(out['w'], [0.02, 9.8], rtol=1e-6)
  assert anchors.ema(0.02).moves


def test_ema_rate_0_stays_and_rate_1_jumps():
  anchor, params = np.float32([0.1, -3]), np.float32([7, 0.3])
  np.testing.assert_array_equal(
    anchors.ema(0.0).update(anchor, params, 0), anchor
  )
  np.testing.assert_array_equal(
    anchors.ema(1.0).update(anchor, params, 0), params
  )


def test_ema_keeps_float32_under_a_bfloat16_policy():
  """A bfloat16 anchor would not move: its steps are below half a unit of 1."""

  def run(anchor):
    params = jnp.full((), 1.03125, jnp.bfloat16)
    update = anchors.ema(0.02).update
    return jax.lax.fori_loop(0, 100, lambda t, a: update(a, params, t), anchor)

  out = jax.jit(run)(jnp.float32(1))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, 1 + 0.03125 * (1 - 0.98**100), rtol=1e-6)


def test_ema_refuses_a_rate_outside_0_1():
  for rate in (-0.1, 1.5):
    with pytest.raises(ValueError, match='rate'):
      anchors.ema(rate)


def test_fixed_stays_and_shares_no_copy():
  anchor, params = {'w': jnp.ones(2)}, {'w': jnp.zeros(2)}
  rule = anchors.fixed()
  assert not rule.moves
  assert rule.update(anchor, params, 0) is anchor


def test_ema_of_logits_follows_the_closed_form_dynamics(x64):
  """A policy that is Best-of-2 of its anchor is Best-of-2(1 + rate)^t of the
  start, t moves of the anchor later."""
  size, rate, steps = 4000, 0.05, 40
  reward = jnp.arange(size, dtype=float)
  update = anchors.ema(rate).update

  def best_of_two(anchor):
    # Rewards rise with the index: quantiles are cumulative sums.
    p = jax.nn.softmax(anchor)
    at_most = jnp.cumsum(p)
    return jnp.log(p * (2 * at_most - p))

  small = jnp.array([0.3, -1.0, 0.2])
  np.testing.assert_allclose(
    jnp.exp(best_of_two(small)),
    oracle.best_of_n(jax.nn.softmax(small), reward[:3], 2),
    rtol=1e-12,
  )

  @jax.jit
  def policy(start):
    move = lambda t, a: update(a, best_of_two(a), t)
    return best_of_two(jax.lax.fori_loop(0, steps, move, start))

  log_p = policy(jnp.zeros(size))
  apart = (jnp.exp(log_p) * (log_p + np.log(size))).sum()
  m = 2 * (1 + rate) ** steps
  np.testing.assert_allclose(apart, np.log(m) - (m - 1) / m, atol=2e-3)
