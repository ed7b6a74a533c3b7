"""Any mesh, any number of micro-batches: the numbers of one device."""

import dataclasses
import functools
import itertools

from conftest import random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bond_jax.algorithms import jbond
from bond_jax.devices import sharding
from bond_jax.models import lora
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.training import distil
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Prompts

BATCH, STEPS, RATE = 32, 5, 0.05
# Layers in a loop; every dimension is divided by some mesh.
CONFIG = dataclasses.replace(
  TINY['gemma2'], vocab_size=24, used_vocab=17, heads=8, kv_heads=2,
)  # fmt: skip
MODEL = dict(temperature=1.0, dtype='float32', scan=True, remat='all')
OPTIMIZERS = {'sgd': optax.sgd(RATE), 'adam': optax.adam(1e-3)}


@functools.cache
def frozen_of(kind):
  """Full weights, or adapters, none of them zero, over a base."""
  full = random_params(CONFIG, 0)
  if kind == 'full':
    return gemma.make(CONFIG, **MODEL), Frozen(full, {})
  policy = lora.make(CONFIG, rank=2, alpha=4.0, targets='attn|mlp', **MODEL)
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(
    lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32),
    jax.eval_shape(policy.init, jax.random.key(0)),
  )
  return policy, Frozen(adapters, full)


def prompts():
  rng = np.random.default_rng(0)
  mask = np.arange(4)[None] >= rng.integers(0, 4, BATCH)[:, None]
  weight = np.ones(BATCH, np.float32)
  weight[5] = 0
  return Prompts(
    rng.integers(2, 17, mask.shape),
    mask,
    np.arange(BATCH, dtype=np.int32),
    weight,
  )


def reward_of(drawn):
  """Some function of the tokens of a completion: f32[B, K]."""
  weight = np.sin(1 + np.arange(drawn.completion.shape[-1]))
  value = np.cos(drawn.completion) * drawn.mask @ weight
  return value.astype(np.float32)


@functools.cache
def run(kind, optimizer, mesh, micro_batches, sampling=None):
  """Five steps: tokens, losses and parameters of each, on the host."""
  mesh = sharding.make_mesh(*mesh)
  policy, frozen = frozen_of(kind)
  setup = step_lib.Setup(
    policy=policy,
    algorithm=jbond.make(
      num_anchor=2, backward_weight=0.5, anchor_rate=RATE, drift_weight=0.3
    ),
    optimizer=OPTIMIZERS[optimizer],
    length=5,
    stop=Stop((1, 4, 8)),
    rollouts=1,
    epochs=1,
    micro_batches=micro_batches,
    chunk=3,
    mesh=mesh,
    sampling_mesh=sharding.reshaped(mesh, *(sampling or mesh.devices.shape)),
  )
  frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
  state = distil.init_state(setup, frozen, mesh)
  programs = distil.make_programs(setup, mesh, state)
  on_mesh = sharding.put_batch(prompts(), mesh)
  tokens, losses, params = [], [], [jax.device_get(state.params)]
  for _ in range(STEPS):
    drawn = programs.rollout(state, frozen, on_mesh, jax.random.key(5), 0)
    host = jax.device_get(drawn)
    tokens.append(host.completion)
    reward = sharding.put_batch(reward_of(host), mesh)
    batch, _ = programs.weigh(state, frozen, on_mesh, drawn, reward)
    state, row = programs.update(state, frozen, batch)
    state, _ = programs.move_anchor(state, frozen)
    losses.append(float(row['loss']))
    params.append(jax.device_get(state.params))
  return tokens, losses, params


def distance(a, b):
  """Between trees, against the norm of the second."""
  off = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
  return float(off / optax.tree.norm(b))


# Enough to see every axis and either kind: `make test-long` has these, and
# `make test-meshes` the others.
QUICK = {('full', (2, 4), 4), ('lora', (4, 2), 2)}
CASES = [
  pytest.param(
    *case, marks=pytest.mark.long if case in QUICK else pytest.mark.slow
  )
  for case in itertools.product(
    ('full', 'lora'), [(1, 1), (8, 1), (4, 2), (2, 4), (1, 8)], (1, 2, 4)
  )
]


@pytest.mark.parametrize('kind, mesh, micro_batches', CASES)
def test_a_mesh_changes_no_number(kind, mesh, micro_batches):
  tokens, losses, params = run(kind, 'sgd', mesh, micro_batches)
  tokens1, losses1, params1 = run(kind, 'sgd', (1, 1), 1)
  np.testing.assert_array_equal(tokens, tokens1)
  np.testing.assert_allclose(losses, losses1, rtol=1e-5)
  step = lambda p: jax.tree.map(lambda x, y: (x - y) / RATE, p[0], p[1])
  assert distance(step(params), step(params1)) < 1e-5  # the first gradient
  assert distance(params[-1], params1[-1]) < 1e-5
  assert distance(params1[-1], params1[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_adam_turns_rounding_into_little(mesh):
  """But where a gradient is nothing but rounding: there it is +- the rate."""
  rate = 1e-3
  _, _, params = run('full', 'adam', mesh, 2)
  _, _, params1 = run('full', 'adam', (1, 1), 1)
  _, _, by_sgd = run('full', 'sgd', (1, 1), 1)

  def outside(a, b, before, after):
    gradient = np.abs(before - after) / RATE
    off = np.abs(a - b)
    assert off.max() < 2 * rate * STEPS
    some = gradient > 1e-6 * gradient.max()
    assert (off[some] < 0.1 * rate * STEPS).all()
    return (~some).sum(), off.size

  counts = jax.tree.map(outside, params[-1], params1[-1], *by_sgd[:2])
  exempt, size = np.array(jax.tree.leaves(counts)).reshape(-1, 2).sum(0)
  print(f'{exempt} of {size} numbers have no gradient but rounding')
  tokens = set(range(24)) - set(range(17))
  assert exempt - len(tokens) * 16 < 0.01 * size
