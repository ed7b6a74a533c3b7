"""LoRA in a run: a base that never changes, two anchors, a stop in between."""

import contextlib
import dataclasses
import functools
import itertools
import json

from conftest import random_params, TINY
from flax import traverse_util
import jax
import jax.numpy as jnp
from low_rank import (
  close,
  merged_by_hand,
  MODEL,
  products,
  random_adapters,
  SCALE,
  SETTINGS,
  shapes_of,
)
import ml_dtypes
import numpy as np
import optax
import pytest
import toy

from bond_jax.algorithms import bond, jbond
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora, policies
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.rewards import calling
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.training import distil
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Prompts, Rollout
from bond_jax.weights import load as origin

# -- the step -----------------------------------------------------------------

STOPS, BATCH, RATE = (1, 4, 8), 8, 0.05
# One layer, yet a stacked one.
ONE = dataclasses.replace(TINY['gemma1_multi_query'], layers=1)


def make_setup(algorithm=None):
  return step_lib.Setup(
    policy=lora.make(ONE, **SETTINGS, **MODEL),
    algorithm=algorithm
    or jbond.make(
      num_anchor=2, backward_weight=0.5, anchor_rate=RATE, drift_weight=0.3
    ),
    optimizer=optax.sgd(0.5),
    length=5,
    stop=Stop(STOPS),
    rollouts=1,
    epochs=1,
    micro_batches=2,
    chunk=3,
  )


def make_frozen(setup, mesh):
  """Fresh adapters over a bfloat16 base, in their shards."""
  base = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), random_params(ONE, 0)
  )
  key = jax.random.key(1)
  shards = sharding.tree_shardings(jax.eval_shape(setup.policy.init, key), mesh)
  return Frozen(
    reference=jax.jit(setup.policy.init, out_shardings=shards)(key),
    base=jax.device_put(base, sharding.tree_shardings(base, mesh)),
  )


def batches():
  rng = np.random.default_rng(0)
  while True:
    mask = np.arange(4)[None] >= rng.integers(0, 4, BATCH)[:, None]
    yield Prompts(
      rng.integers(2, 13, mask.shape),
      mask,
      np.arange(BATCH, dtype=np.int32),
      np.ones(BATCH, np.float32),
    )


def run(mesh, steps=3):
  """The loop of the train stage: tokens drawn, metrics, states, the base."""
  setup, tokens, rows, states = make_setup(), [], [], []
  frozen = make_frozen(setup, mesh)

  def reward(prompts, drawn):
    tokens.append(drawn.completion)
    weight = np.sin(1 + np.arange(drawn.completion.shape[-1]))
    value = (np.cos(drawn.completion) * drawn.mask @ weight).astype(np.float32)
    return calling.Scored(value, np.ones(len(value), np.float32), {})

  state = distil.init_state(setup, frozen, mesh)
  programs, submit = distil.make_programs(setup, mesh, state), calling.worker()
  states.append(jax.device_get(state))
  key = jax.random.key(7)
  each = distil.Distillation(
      setup, programs, batches(), reward, frozen, lambda: frozen, key, key,
      mesh, lambda name: contextlib.nullcontext(), submit, None,
  )  # fmt: skip
  for _ in range(steps):
    ((state, row),) = distil.iterate(each, state)
    rows.append(row)
    states.append(jax.device_get(state))
  assert programs.update._cache_size() == 1
  return tokens, rows, states, frozen, state


@pytest.fixture(scope='module')
def one_device():
  return run(sharding.make_mesh(1, 1))


def test_training_moves_adapters_and_nothing_else(one_device):
  _, rows, states, frozen, _ = one_device
  first, *_, last = states
  reference = jax.device_get(frozen.reference)
  structure = jax.tree.structure(reference)
  close(first.params, reference, rtol=0, atol=0)
  close(first.anchor, reference, rtol=0, atol=0)
  for tree in (last.params, last.anchor):
    assert jax.tree.structure(tree) == structure
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype('float32')}
    for a, b in zip(
      jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True
    ):
      assert (a != b).mean() > 0.5
  for before, after in itertools.pairwise(states):
    expected = jax.tree.map(
      lambda a, p: (1 - RATE) * a + RATE * p, before.anchor, after.params
    )
    close(after.anchor, expected, rtol=1e-5, atol=1e-7)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(
      np.asarray(x), np.asarray(y).astype(x.dtype)
    ),
    frozen.base,
    random_params(ONE, 0),
  )
  assert rows[0]['sampler_gap'] < 1e-4
  assert rows[0]['kl/policy_anchor'] == pytest.approx(0, abs=1e-5)
  assert rows[-1]['kl/policy_anchor'] != pytest.approx(0, abs=1e-5)
  assert 0 < rows[-1]['anchor/drift'] < 1


@pytest.mark.long
def test_eight_devices_are_one(one_device):
  tokens, _, states, *_ = one_device
  tokens8, _, states8, frozen, state = run(sharding.make_mesh(4, 2))
  for one, eight in zip(tokens, tokens8, strict=True):
    np.testing.assert_array_equal(eight, one)
  close(states8, states, rtol=1e-4, atol=1e-6)
  (layer,) = state.params['stacked_layers'].values()
  linear = layer['mlp']['linear_lora_a']
  assert linear.sharding.shard_shape(linear.shape) == (1, 12, 3)
  linear = frozen.base['stacked_layers']['attention_type_0']['mlp']['linear']
  assert linear.sharding.shard_shape(linear.shape) == (1, 12, 4)


def test_an_exact_anchor_follows_the_products():
  """It starts at the reference and moves by the rate, in the weights."""
  config = dataclasses.replace(ONE, lora_scale=SCALE)
  setup = make_setup()
  rule = setup.algorithm.anchor._replace(
    view=functools.partial(lora.dense, config)
  )
  setup = setup._replace(algorithm=setup.algorithm._replace(anchor=rule))
  base, adapters = random_params(ONE, 0), random_adapters(ONE)

  @jax.jit
  def move(frozen, adapters):
    before = step_lib.init_state(setup, frozen)
    moved = before._replace(params=adapters)
    after, metrics = step_lib.move_anchor(setup, moved, frozen)
    return before, after, metrics, lora.merge(config, base, after.anchor)

  fresh = jax.tree.map(np.copy, adapters)
  for path, x in traverse_util.flatten_dict(fresh).items():
    if path[-1].endswith('lora_b'):
      x[:] = 0
  frozen = Frozen(fresh, base)
  before, after, metrics, merged = move(frozen, adapters)
  assert not any(x.any() for x in jax.tree.leaves(before.anchor))
  full = merged_by_hand(config, base, adapters)
  moved = jax.tree.map(lambda w, x: RATE * (x - w), base, full)
  expected = jax.tree.map(np.add, base, moved)
  close(merged, expected, rtol=1e-6, atol=1e-6)
  drift = optax.tree.norm(moved) / optax.tree.norm(base)
  np.testing.assert_allclose(metrics['anchor/drift'], drift, rtol=1e-4)
  drawn = jax.eval_shape(
      functools.partial(step_lib.rollout, setup, index=0),
      after, frozen, next(batches()), jax.random.key(0),
  )  # fmt: skip
  assert drawn.completion.shape == (BATCH, 3, 5)


def test_a_learned_quantile_is_adapters_too():
  algorithm = bond.make(
      n=2, backward_weight=0.5, drift_weight=0.0, num_policy=1,
      quantile='learned', num_quantile=2, zero='half', second_term=False,
      anchor='fixed',
  )  # fmt: skip
  setup = make_setup(algorithm)
  reference = shapes_of(ONE)

  def step(frozen):
    state = step_lib.init_state(setup, frozen)
    reward = jnp.zeros((BATCH, algorithm.num_policy + algorithm.num_anchor))
    tokens = jnp.zeros((*reward.shape, 5), jnp.int32)
    drawn = Rollout(
      tokens, tokens == 0, jnp.zeros(tokens.shape), jnp.ones(tokens.shape[:2])
    )
    batch, _ = step_lib.weigh(
      setup, state, frozen, next(batches()), drawn, reward
    )
    return step_lib.update(setup, state, frozen, batch)

  base = jax.eval_shape(lambda: gemma.init(ONE, jax.random.key(0)))
  state, metrics = jax.eval_shape(step, Frozen(reference, base))
  model = state.aux['params']['model']
  assert jax.tree.structure(model) == jax.tree.structure(reference)
  assert state.aux['params']['scalar_head']['w'].shape == (ONE.features,)
  assert 'quantile/loss' in metrics and state.anchor == {}


# -- the stages ---------------------------------------------------------------

STEPS, ALPHA = 4, 3.0
# The reward's call in step 3: the probe's reference, two steps, two saves.
CALL_OF_STEP_3 = 6


def toy_config(exact):
  """Of a run of one layer that saves after every step."""
  config = toy.get_config(toy.folder())
  config.model.sizes = dict(layers=1)
  config.model.lora.update(
    dict(rank=2, alpha=ALPHA, targets='q_einsum|linear', exact_anchor=exact)
  )
  config.train.update(dict(steps=STEPS, save_every=1))
  config.train.optimizer.warmup_steps = 1  # the rate of the first step is 0
  return config


def train_low(config, workdir):
  """Trains, keeps every checkpoint, and returns the Frozen it trained with."""
  found, load = [], origin.load_frozen

  def load_frozen(*args):
    found.append(load(*args))
    return found[-1]

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(checkpoint, '_KEEP', STEPS)
    monkeypatch.setattr(origin, 'load_frozen', load_frozen)
    toy.run('train', config, workdir)
  (frozen,) = found
  return frozen


@pytest.fixture(scope='module')
def started(tmp_path_factory):
  """A run whose first two stages have finished, and what sft left."""
  workdir = str(tmp_path_factory.mktemp('low') / 'run')
  for stage in ('sft', 'reward_model'):
    toy.run(stage, toy_config(exact=False), workdir)
  return workdir, toy.saved(workdir, 'sft', 6)['params']


@pytest.fixture(scope='module')
def whole(started):
  """exact -> a run of four steps in one go, its config and its Frozen.

  Adapters are averaged in the folder of the first stages, their products in
  another that starts from there.
  """

  @functools.cache
  def run(exact):
    workdir, config = started[0], toy_config(exact)
    if exact:
      config.reference, workdir = workdir, f'{workdir}_exact'
    return workdir, config, train_low(config, workdir)

  return run


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.long
@pytest.mark.parametrize('exact', [False, True])
def test_a_stop_in_between_changes_no_bit(started, whole, tmp_path, exact):
  config = toy_config(exact)
  config.reference, stopped = started[0], str(tmp_path / 'stopped')
  toy.light(str(tmp_path), CALL_OF_STEP_3, 'raise')
  config.reward.args.fuse = f'{tmp_path}/fuse'
  with pytest.raises(UserError, match='RuntimeError: the fuse has'):
    train_low(config, stopped)
  assert toy.steps(stopped, 'train') == [1, 2]
  train_low(config, stopped)
  toy.same_end(stopped, whole(exact)[0], 'train', STEPS)


@pytest.mark.long
def test_the_base_is_what_sft_left(started):
  """In the computation's dtype; fresh adapters over it change no bit."""
  workdir, left = started
  assert {x.dtype for x in jax.tree.leaves(left)} == {np.dtype('float32')}
  config = toy_config(exact=False)
  config.model.dtype = 'bfloat16'
  low, full = (
    policies.make_policy(config.model, 96, full=full) for full in (False, True)
  )
  frozen = origin.load_frozen(config, low, workdir, sharding.make_mesh(1, 1))
  cast = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), left)
  same(jax.device_get(frozen.base), cast)
  tokens = np.arange(6)[None]

  @jax.jit
  def both(frozen, cast):
    outs = []
    sides = (lora.over(low, frozen.base), frozen.reference), (full, cast)
    for policy, tree in sides:
      hidden = policy.hidden(tree, tokens, tokens >= 0)
      outs.append(policy.logits(tree, hidden))
    return outs

  same(*jax.device_get(both(frozen, cast)))


@pytest.mark.long
def test_the_late_stages_leave_the_base_alone(started, whole):
  workdir, config, frozen = whole(False)
  same(jax.device_get(frozen.base), started[1])
  saved = toy.saved(workdir, 'train', STEPS)['params']
  for a, b in zip(
    jax.tree.leaves(saved), jax.tree.leaves(frozen.reference), strict=True
  ):
    assert (a != b).mean() > 0.5
  toy.run('evaluate', config, workdir)
  same(toy.saved(workdir, 'sft', 6)['params'], started[1])
  summary = toy.summary(workdir)
  assert summary['steps'] == STEPS and 'sft_validation_loss' in summary
  with open(f'{workdir}/completions.jsonl') as f:
    rows = [json.loads(line) for line in f]
  assert len(rows) == 16 * (4 + 8)
  assert all(row['log_policy'] != row['log_reference'] for row in rows)


@pytest.mark.long
def test_a_saved_anchor_is_the_exact_average(whole):
  """Of all products so far, and from B = 0, hence 0, on."""
  workdir, config, _ = whole(True)
  rate, expected = config.algorithm.args.anchor_rate, {}
  for step in range(1, STEPS + 1):
    saved = toy.saved(workdir, 'train', step)
    now = products(toy.MODEL, saved['params'], ALPHA / 2)
    for stem, product in now.items():
      name = f'{stem}lora_delta'
      expected[name] = (1 - rate) * expected.get(name, 0) + rate * product
    anchor = traverse_util.flatten_dict(saved['rest']['anchor'], sep='/')
    assert anchor.keys() == expected.keys()
    for name, x in anchor.items():
      size = np.abs(expected[name]).max()
      assert (size > 0) == (step > 1)
      np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6 * size)
