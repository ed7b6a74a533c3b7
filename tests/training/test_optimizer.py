"""The rate of each weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bond_jax.errors import UserError
from bond_jax.training import optimizer, setups
from configs import demo

ARGS = dict(
  steps=9, learning_rate=0.1, warmup_steps=0, decay_to=1.0, b1=0.9, b2=0.99,
  epsilon=1e-8, weight_decay=0.0, clip=1e9,
)  # fmt: skip


def test_the_embedding_has_a_rate_of_its_own():
  params = {
    'embedder': {'input_embedding': jnp.ones(3)},
    'layer_0': {'mlp': {'linear': jnp.ones(2)}},
  }
  adam = optimizer.adam(**ARGS, layer_rate=0.25)
  # Adam's first step is the rate itself, whatever the gradient.
  gradient = jax.tree.map(lambda x: 7 * x, params)
  new, _, _ = optimizer.descend(
    adam, params, adam.init(params), gradient, jnp.float32(0)
  )
  moved = jax.tree.map(lambda x, y: np.asarray(x - y), params, new)
  np.testing.assert_allclose(moved['embedder']['input_embedding'], 0.1, 1e-5)
  np.testing.assert_allclose(moved['layer_0']['mlp']['linear'], 0.025, 1e-5)


@pytest.mark.parametrize(
  'decay, rates',
  [
    ('linear', [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.5]),
    ('cosine', [0, 0.5, 1, 0.927, 0.75, 0.573, 0.5, 0.5]),
  ],
)
def test_the_rate_rises_and_falls(decay, rates):
  how = {**ARGS, 'steps': 6, 'warmup_steps': 2, 'decay_to': 0.5}
  adam = optimizer.adam(**{**how, 'learning_rate': 1.0}, decay=decay)
  params = jnp.zeros(1)
  state, seen = adam.init(params), []
  for _ in rates:
    # Of a gradient that stays the same Adam's step is the rate.
    change, state = adam.update(jnp.ones(1), state, params)
    seen.append(-float(change[0]))
  np.testing.assert_allclose(seen, rates, atol=1e-3)


def test_adapters_have_one_rate():
  config = demo.get_config()
  config.model.lora.rank = 4
  config.train.optimizer.layer_rate = 0.5
  with pytest.raises(UserError, match='^train.optimizer.layer_rate '):
    setups.make_setup(config, None, None, None)
