"""A supervised step: parts add up, and what is not finite changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bond_jax.devices import sharding
from bond_jax.training import supervised
from bond_jax.types import TrainState

ROWS, SIZE = 8, 3


def loss(params, part, total):
  """Squared error of a linear model, over all weighted rows of a batch."""
  x, y, weight = part
  return (weight * (x @ params['w'] - y) ** 2).sum() / total


def batch_of(seed):
  rng = np.random.default_rng(seed)
  return (
    rng.standard_normal((ROWS, SIZE)).astype(np.float32),
    rng.standard_normal(ROWS).astype(np.float32),
    rng.integers(1, 5, ROWS).astype(np.float32),
  )


def step(parts, batch):
  optimizer, params = optax.sgd(0.1), {'w': jnp.ones(SIZE)}
  state = TrainState(jnp.int32(0), params, {}, optimizer.init(params), {})
  update = supervised.make_update(
    loss, lambda x: x[2].sum(), optimizer, parts,
    sharding.make_mesh(1, 1), jax.device_put(state, jax.devices()[0]),
  )  # fmt: skip
  return jax.device_get(update(state, batch))


@pytest.mark.parametrize('parts', [1, 2, 8])
def test_parts_add_up_to_the_gradient_of_the_batch(parts):
  """Although their rows weigh more or less than those of others."""
  x, y, weight = batch = batch_of(0)
  error = x @ np.ones(SIZE) - y
  gradient = 2 * (weight * error) @ x / weight.sum()
  state, row = step(parts, batch)
  np.testing.assert_allclose(state.params['w'], 1 - 0.1 * gradient, rtol=1e-5)
  assert row['loss'] == pytest.approx((weight * error**2).sum() / weight.sum())
  assert row['gradient_norm'] == pytest.approx(np.linalg.norm(gradient))
  assert (state.step, row['skipped']) == (1, 0)


@pytest.mark.parametrize('parts', [1, 4])
def test_a_step_that_is_not_finite_changes_nothing(parts):
  x, y, weight = batch_of(0)
  y[5] = np.inf
  state, row = step(parts, (x, y, weight))
  np.testing.assert_array_equal(state.params['w'], np.ones(SIZE))
  assert (state.step, row['skipped']) == (1, 1)
