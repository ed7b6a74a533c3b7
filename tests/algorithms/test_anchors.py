"""The anchor follows the policy: direction, precision, and where it leads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from bond_jax.algorithms import best_of_n
from bond_jax.algorithms.parts import anchors
from bond_jax.models.stops import Stop
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen


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


def test_the_anchor_starts_in_float32_whatever_the_parameters_are():
  setup = step_lib.Setup(
      policy=None, algorithm=best_of_n.make(n=2, anchor='ema:0.02'),
      optimizer=optax.sgd(0.1), length=1, stop=Stop(()), rollouts=1, epochs=1,
      micro_batches=1, chunk=1,
  )  # fmt: skip
  params = {'w': jnp.full(2, 1.03125, jnp.bfloat16)}
  state = step_lib.init_state(setup, Frozen(params, {}))
  assert state.anchor['w'].dtype == jnp.float32
  assert state.params['w'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(state.anchor['w'], 1.03125)


def test_ema_refuses_a_rate_outside_0_1():
  for rate in (-0.1, 1.5):
    with pytest.raises(ValueError, match='rate'):
      anchors.ema(rate)


def test_fixed_stays_and_shares_no_copy():
  anchor, params = {'w': jnp.ones(2)}, {'w': jnp.zeros(2)}
  rule = anchors.fixed()
  assert not rule.moves
  assert rule.update(anchor, params, 0) is anchor


def test_periodic_moves_at_its_multiples_alone():
  """Iterations count from 1: the first move ends the third of them."""
  policies = np.float32([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
  update = jax.jit(anchors.periodic(3).update)
  anchor, way = np.float32(-1), []
  for iteration, params in enumerate(policies, 1):
    anchor = update(anchor, params, iteration)
    way.append(anchor)
  np.testing.assert_array_equal(
    way, np.float32([-1, -1, 0.3, 0.3, 0.3, 0.6, 0.6])
  )
  assert anchors.periodic(3).moves


def test_periodic_of_1_is_the_policy_before_the_iteration():
  update = anchors.periodic(1).update
  for iteration in (1, 2, 3):
    assert update(np.float32(7), np.float32(0.1), iteration) == np.float32(0.1)


def test_periodic_keeps_float32_under_a_bfloat16_policy():
  anchor = {'w': np.float32([0.1, 1e-30]), 'b': np.float32(1 / 3)}
  params = jax.tree.map(lambda x: jnp.asarray(x + 1, jnp.bfloat16), anchor)
  update = jax.jit(anchors.periodic(2).update)
  still, moved = (update(anchor, params, iteration) for iteration in (1, 2))
  jax.tree.map(np.testing.assert_array_equal, still, anchor)
  jax.tree.map(np.testing.assert_array_equal, moved, params)
  for leaf in jax.tree.leaves((still, moved)):
    assert leaf.dtype == jnp.float32


def test_periodic_refuses_less_than_every_iteration():
  for every in (0, -2):
    with pytest.raises(ValueError, match=f'anchor moves every .*{every}'):
      anchors.periodic(every)


def test_a_name_is_its_rule():
  anchor, params = np.float32(1), np.float32(3)
  for name, rule in (
    ('fixed', anchors.fixed()),
    ('periodic:2', anchors.periodic(2)),
    ('ema:0.25', anchors.ema(0.25)),
    ('ema:1e-2', anchors.ema(0.01)),
  ):
    mine = anchors.named(name)
    assert mine.moves == rule.moves
    for iteration in (1, 2):
      moved = (r.update(anchor, params, iteration) for r in (mine, rule))
      np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize(
  'name',
  [
    'hourly', '', 'fixed:1', 'ema', 'ema:', 'ema:2', 'ema:nan', 'ema:often',
    'periodic', 'periodic:0', 'periodic:2.5', 'Periodic:2',
  ],
)  # fmt: skip
def test_another_name_is_refused(name):
  with pytest.raises(ValueError, match=f"^anchor .*'{name}'"):
    anchors.named(name)


# -- where it leads -----------------------------------------------------------


def best_of_two(anchor, drift=0.0):
  """Logits of the policy that BOND with n = 2 seeks at these of the anchor.

  Rewards rise with the index, so that quantiles are cumulative sums. A drift
  weight g, backward part alone, weakens it to anchor P(y > anchor)^(1/(1+g)).
  """
  p = jax.nn.softmax(anchor)
  return jnp.log(p) + jnp.log(2 * jnp.cumsum(p) - p) / (1 + drift)


def test_best_of_two_is_best_of_two(x64):
  anchor = jnp.array([0.3, -1.0, 0.2])
  law = oracle.best_of_n(jax.nn.softmax(anchor), jnp.arange(3.0), 2)
  np.testing.assert_allclose(jnp.exp(best_of_two(anchor)), law, rtol=1e-12)


@pytest.mark.parametrize(
  ('rate', 'drift'), [(0.02, 0.0), (0.05, 0.0), (0.05, 1.0)]
)
def test_ema_of_logits_follows_the_closed_form_dynamics(x64, rate, drift):
  """Where the policy solves each problem, the anchor of BOND with n = 2 is
  Best-of-(1 + rate)^t of the start t moves later, the policy Best-of-m with
  m = 2 (1 + rate)^t, and log m grows by log(1 + rate) per move."""
  size, steps = 4000, 40
  update = anchors.ema(rate).update

  @jax.jit
  def after_all(start):
    move = lambda t, a: update(a, best_of_two(a, drift), t)
    anchor = jax.lax.fori_loop(0, steps, move, start)
    return [jax.nn.log_softmax(x) for x in (anchor, best_of_two(anchor, drift))]

  log_anchor, log_policy = after_all(jnp.zeros(size))
  u = np.arange(1, size + 1) / size
  grown = (1 + rate / (1 + drift)) ** steps
  m = (1 + 1 / (1 + drift)) * grown
  for log_p, n in ((log_anchor, grown), (log_policy, m)):
    np.testing.assert_allclose(np.cumsum(np.exp(log_p)), u**n, atol=2e-5)
  apart = (jnp.exp(log_policy) * (log_policy + np.log(size))).sum()
  np.testing.assert_allclose(apart, np.log(m) - (m - 1) / m, atol=2e-3)


def test_hard_moves_multiply_best_of_n(x64):
  """Iterative BOND: Best-of-2 of Best-of-4 is Best-of-8, exactly."""
  start = 0.5 * jax.random.normal(jax.random.key(0), (20,))
  update = anchors.periodic(5).update
  anchor = start
  for iteration in range(1, 13):
    anchor = update(anchor, best_of_two(anchor), iteration)
  p, reward = jax.nn.softmax(start), jnp.arange(20.0)
  for logits, n in ((anchor, 4), (best_of_two(anchor), 8)):
    law = oracle.best_of_n(p, reward, n)
    np.testing.assert_allclose(jax.nn.softmax(logits), law, rtol=1e-10)
