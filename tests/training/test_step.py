"""The step: micro-batches, devices, filler rows, the anchor, donation."""

import dataclasses
import functools

from conftest import core, random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bond_jax.algorithms import bond, jbond
from bond_jax.algorithms.parts import anchors
from bond_jax.devices import sharding
from bond_jax.models import scalar_head
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.training import guard, step_metrics
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Prompts

STOPS, BATCH, RATE = (1, 4, 8), 8, 0.05
# One layer: what the step adds to the model does not depend on the depth.
CONFIG = dataclasses.replace(TINY['gemma2'], layers=1)


@pytest.fixture(scope='module')
def setup():
  algorithm = jbond.make(
    num_anchor=2, backward_weight=0.5, anchor_rate=RATE, drift_weight=0.3
  )

  def weigh(scores):
    """An algorithm may leave anything in the rows of fillers."""
    rows, metrics = algorithm.weigh(scores)
    some = scores.weight[:, None] > 0
    reward = jnp.where(some, rows.quantile_reward, jnp.nan)
    return rows._replace(quantile_reward=reward), metrics

  return step_lib.Setup(
    policy=gemma.make(
      CONFIG, temperature=1.0, dtype='float32', scan=False, remat='none'
    ),
    algorithm=algorithm._replace(weigh=weigh),
    optimizer=optax.sgd(0.1),
    length=5,
    stop=Stop(STOPS),
    rollouts=1,
    epochs=1,
    micro_batches=1,
    chunk=3,
  )


@pytest.fixture(scope='module')
def frozen():
  return Frozen(jax.tree.map(jnp.asarray, random_params(CONFIG, 0)), {})


@pytest.fixture(scope='module')
def prompts():
  rng = np.random.default_rng(0)
  mask = np.arange(4)[None] >= rng.integers(0, 4, BATCH)[:, None]
  return Prompts(
    rng.integers(2, 17, mask.shape),
    mask,
    np.arange(BATCH, dtype=np.int32),
    np.ones(BATCH, np.float32),
  )


@pytest.fixture(scope='module')
def draw(setup):
  return jax.jit(functools.partial(step_lib.rollout, setup, index=0))


def whole_step(setup, state, frozen, prompts, drawn, reward):
  """Weighs, updates and moves the anchor; all metrics together."""
  batch, weighed = step_lib.weigh(setup, state, frozen, prompts, drawn, reward)
  state, updated = step_lib.update(setup, state, frozen, batch)
  state, moved = step_lib.move_anchor(setup, state, frozen)
  return state, weighed | updated | moved


@pytest.fixture(scope='module')
def update(setup):
  """micro_batches -> the compiled update, which donates the state."""

  @functools.cache
  def program(micro_batches):
    f = setup._replace(micro_batches=micro_batches)
    return jax.jit(functools.partial(whole_step, f), donate_argnums=(0,))

  return program


@pytest.fixture(scope='module')
def drawn(setup, draw, frozen, prompts):
  """A rollout of a policy that is its own anchor, on the host, rewarded.

  The policy's is the worst of the first prompt's completions, the best of the
  second's and between the anchor's of the third.
  """
  state = step_lib.init_state(setup, frozen)
  drawn = jax.device_get(draw(state, frozen, prompts, jax.random.key(3)))
  reward = reward_of(drawn)
  reward[0], reward[1], reward[2] = (-2, 0.5, 1), (2, -1, 0.3), (0.2, -1, 1)
  return drawn, reward


def reward_of(drawn):
  """Some function of the tokens of a completion: f32[B, K]."""
  weight = np.sin(1 + np.arange(drawn.completion.shape[-1]))
  tokens = np.cos(np.asarray(drawn.completion)) * np.asarray(drawn.mask)
  return (tokens @ weight).astype(np.float32)


def start(setup, frozen, mix=0.0):
  """A fresh state; its policy is `mix` of the way to another one."""
  state = step_lib.init_state(setup, frozen)
  other = jax.tree.map(lambda x: x[::-1], state.params)
  move = lambda x, y: (1 - mix) * x + mix * y
  return state._replace(params=jax.tree.map(move, state.params, other))


def close(a, b, **tolerance):
  f = functools.partial(np.testing.assert_allclose, **tolerance)
  jax.tree.map(f, jax.device_get(a), jax.device_get(b))


def test_rollout_is_the_policy_s_and_then_the_anchor_s(
  draw, frozen, setup, prompts, drawn
):
  """With streams of their own, though policy = anchor; new ones every step."""
  (one, _) = drawn
  assert one.completion.shape == (BATCH, 3, 5)
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert (one.completion[:, i] != one.completion[:, j]).any()
  state = start(setup, frozen, mix=0.5)
  two = draw(state, frozen, prompts, jax.random.key(3))
  assert (two.completion[:, 0] != one.completion[:, 0]).any()
  np.testing.assert_array_equal(two.completion[:, 1:], one.completion[:, 1:])
  later = state._replace(step=jnp.int32(1))
  three = draw(later, frozen, prompts, jax.random.key(3))
  assert (three.completion != two.completion).any((1, 2)).all()


def test_micro_batches_change_nothing(setup, update, frozen, prompts, drawn):
  prompts = prompts._replace(weight=np.float32([1, 1, 0, 1, 1, 1, 1, 1]))
  runs = [
    update(n)(start(setup, frozen), frozen, prompts, *drawn) for n in (1, 2)
  ]
  (state, metrics), (other, other_metrics) = jax.device_get(runs)
  assert metrics['gradient_norm'] > 0.1
  close(other, state, rtol=0, atol=1e-6)
  close(other_metrics, metrics, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('parts', core(1, [1, 4]))
def test_buckets_change_nothing_but_the_order(
  setup, update, frozen, prompts, drawn, parts
):
  """Rows of like lengths together, cut to what they need."""
  sizes = []

  def hidden(params, tokens, mask):
    jax.debug.callback(lambda: sizes.append(tokens.shape))
    return setup.policy.hidden(params, tokens, mask)

  short = np.arange(BATCH) % 2 == 0
  mask = drawn[0].mask & ~(
    short[:, None, None] & (np.arange(5) > 1)[None, None]
  )
  drawn = (
    drawn[0]._replace(
      mask=mask,
      completion=drawn[0].completion * mask,
      log_prob=drawn[0].log_prob * mask,
    ),
    drawn[1],
  )
  prompts = prompts._replace(
    mask=prompts.mask & ~(short[:, None] & (np.arange(4) < 2)[None]),
    weight=np.float32([1, 1, 0, 1, 1, 1, 1, 1]),
  )
  changed = setup._replace(
    buckets=3,
    micro_batches=2,
    mesh=sharding.make_mesh(parts, 1),
    policy=setup.policy._replace(hidden=hidden),
  )
  runs = [
    program(start(setup, frozen, 0.3), frozen, prompts, *drawn)
    for program in (update(1), jax.jit(functools.partial(whole_step, changed)))
  ]
  (state, metrics), (other, other_metrics) = jax.device_get(runs)
  jax.effects_barrier()
  close(other, state, rtol=0, atol=1e-6)
  close(other_metrics, metrics, rtol=1e-4, atol=1e-6)
  # One anchor row and two of the policy, per prompt and micro-batch.
  assert [rows for rows, _ in sizes] == [4, 4, 8, 8]
  # P' + T' - 1: 2 + 2 - 1, of a third of both, and 4 + 5 - 1.
  assert sorted(size for _, size in sizes) == [3, 3, 8, 8]


def test_the_anchor_takes_its_step_after_the_policy(
  setup, update, frozen, prompts, drawn
):
  before = jax.device_get(start(setup, frozen))
  state, metrics = update(1)(start(setup, frozen), frozen, prompts, *drawn)
  expected = jax.tree.map(
      lambda a, p: (1 - RATE) * a + RATE * np.asarray(p),
      before.anchor, state.params,
  )  # fmt: skip
  close(state.anchor, expected, rtol=1e-6, atol=1e-7)
  moved = jax.tree.map(np.subtract, expected, before.anchor)
  np.testing.assert_allclose(
    metrics['anchor/drift'],
    optax.tree.norm(moved) / optax.tree.norm(before.anchor),
    rtol=1e-3,
  )
  assert metrics['anchor/drift'] > 1e-5
  assert int(state.step) == 1


def test_the_gradient_is_that_of_the_formula(
  setup, update, frozen, prompts, drawn
):
  """The trained rows, coefficients and baselines, written out once more."""
  one, reward = drawn
  b, b_drift = 0.5, 0.3
  best = 1 + reward[:, 1:].argmax(-1)
  rows = np.stack([np.zeros_like(best), best], -1)[..., None]
  pick = lambda x: np.take_along_axis(x, rows, 1)
  completion, mask = pick(one.completion), pick(one.mask)
  floor = -np.log(16) * (reward[:, 0] < reward[:, 1:].min(-1))
  weight = np.float32([1, 0.5, 2, 1, 1, 0, 1, 3])
  w, total = weight[:, None], weight.sum()
  state = start(setup, frozen, mix=0.3)

  @jax.jit
  def gradient(params, anchor):
    score = lambda p: step_lib.log_probs(
      setup.policy, p, prompts, completion, mask, chunk=5
    )
    log_p, log_q = score(params), score(anchor)
    to_go = jnp.cumsum((log_p - log_q)[:, 0, ::-1], -1)[:, ::-1]
    signal = b * floor[:, None] - (b + b_drift) * to_go
    sampled = jnp.cumsum((pick(one.log_prob) - log_q)[:, 0, ::-1], -1)[:, ::-1]
    others = b * floor[:, None] - (b + b_drift) * sampled
    others = ((w * others).sum(0, keepdims=True) - w * others) / (total - w)

    def loss(params):
      own, best = jnp.moveaxis(score(params), 1, 0)
      forward = -(1 - b) * (w * best).sum()
      return (forward - (w * own * (signal - others)).sum()) / total

    return jax.grad(loss)(params)

  expected = jax.device_get(gradient(state.params, state.anchor))
  before = jax.device_get(state.params)
  prompts = prompts._replace(weight=weight)
  state, _ = update(1)(state, frozen, prompts, one, reward)
  change = jax.tree.map(lambda p, q: (q - p) / 0.1, state.params, before)
  close(change, expected, rtol=1e-3, atol=1e-5)


def test_filler_rows_do_not_matter(setup, update, frozen, prompts, drawn):
  """Whatever they hold: tokens, masks, NaN rewards and log-probs."""
  one, reward = drawn
  prompts = prompts._replace(weight=np.float32([1] * 6 + [0] * 2))
  plain = update(1)(start(setup, frozen), frozen, prompts, one, reward)
  assert np.isfinite(plain[1]['gradient_norm'])

  def spoil(x, value):
    x = np.array(x)
    x[6:] = value
    return x

  garbage = prompts._replace(
    tokens=spoil(prompts.tokens, 0), mask=spoil(prompts.mask, False)
  )
  spoiled = one._replace(
    completion=spoil(one.completion, 16),
    mask=spoil(one.mask, True),
    log_prob=spoil(one.log_prob, np.nan),
  )
  other = update(1)(
    start(setup, frozen), frozen, garbage, spoiled, spoil(reward, np.nan)
  )
  close(other, plain, rtol=0, atol=1e-6)
  full = update(1)(
      start(setup, frozen), frozen,
      prompts._replace(weight=np.ones(BATCH, np.float32)), one, reward,
  )  # fmt: skip
  assert abs(full[1]['loss'] - plain[1]['loss']) > 1e-3


def test_the_sampler_gap_of_a_step(setup, draw, update, frozen, prompts):
  """The anchor's completions are of another law, and have no part in it."""
  state = start(setup, frozen, mix=0.3)
  two = jax.device_get(draw(state, frozen, prompts, jax.random.key(3)))
  state = start(setup, frozen, mix=0.3)
  _, metrics = update(1)(state, frozen, prompts, two, reward_of(two))
  assert metrics['sampler_gap'] < 1e-4


def test_metrics_say_what_was_drawn(setup, update, frozen, prompts, drawn):
  one, reward = drawn
  _, metrics = jax.device_get(
    update(1)(start(setup, frozen), frozen, prompts, one, reward)
  )
  assert metrics['sampler_gap'] < 1e-4
  ends = np.isin(one.completion, STOPS).any(-1)
  expected = {
      'reward/policy': reward[:, 0].mean(),
      'reward/anchor': reward[:, 1:].mean(),
      'truncated': 1 - ends.mean(),
      'length/completion': one.mask.sum(-1).mean(),
      'tie_rate': np.mean([
          reward[:, i] == reward[:, j]
          for i in range(3) for j in range(3) if i != j
      ]),
      'signal/fires': (reward[:, 0] < reward[:, 1:].min(-1)).mean(),
      'kl/policy_anchor': 0,
      'entropy/token': -one.log_prob.sum() / one.mask.sum(),
      'skipped': 0,
  }  # fmt: skip
  assert 0 < expected['truncated'] < 1 and 0 < expected['signal/fires'] < 1
  for name, value in expected.items():
    np.testing.assert_allclose(
      metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  # Scored by another policy than the one that drew, the gap is wide.
  _, metrics = update(1)(
    start(setup, frozen, mix=0.3), frozen, prompts, one, reward
  )
  assert metrics['sampler_gap'] > 0.1


def test_the_sampler_gap_is_of_the_policy_s_rows():
  """By their weight; whatever the anchor's rows and the fillers hold."""
  gaps = np.float32([[[1, 0], [9, 9]], [[-3, 1], [9, 9]], [[np.nan, 0]] * 2])
  weight = np.float32([[1, 0], [3, 0], [0, 0]])
  gap = step_metrics.sampler_gap(weight, -gaps, jnp.zeros((3, 2, 2)))
  np.testing.assert_allclose(gap, (1 * 1 + 3 * 2) / 4)


def weighed(setup, state, frozen, prompts, drawn, reward):
  weigh = jax.jit(step_lib.weigh, static_argnums=0)
  return weigh(setup, state, frozen, prompts, drawn, reward)[0]


def poisoned(batch, prompt, part):
  """A batch with a NaN in a part of what it knows of one prompt."""
  if part == 'rows':
    name = batch.rows._fields[0]
    value = getattr(batch.rows, name)
    rows = batch.rows._replace(**{name: value.at[prompt].set(jnp.nan)})
    return batch._replace(rows=rows), f'rows/{name}'
  value = getattr(batch, part)
  return batch._replace(**{part: value.at[prompt].set(jnp.nan)}), part


@pytest.mark.long
def test_a_step_that_is_not_finite_changes_nothing(
  setup, frozen, prompts, drawn
):
  """But the step; the next one goes on as if it had not been."""
  setup = setup._replace(optimizer=optax.adam(1e-3))
  step = jax.jit(step_lib.update, static_argnums=0)
  state = start(setup, frozen)
  batch = weighed(setup, state, frozen, prompts, *drawn)
  assert guard.find(setup, state, frozen, batch) == []
  state, row = step(setup, state, frozen, batch)
  assert row['skipped'] == 0
  bad, _ = poisoned(batch, 1, 'rows')
  same, row = step(setup, state, frozen, bad)
  assert row['skipped'] == 1 and not np.isfinite(row['loss'])
  assert same.step == state.step + 1
  kept = lambda s: jax.tree.leaves((s.params, s.opt_state, s.anchor, s.aux))
  for a, b in zip(kept(state), kept(same), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(
    kept(step(setup, state, frozen, batch)[0]),
    kept(step(setup, same, frozen, batch)[0]),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too(
  setup, frozen, prompts, drawn
):
  def loss(log_policy, rows):
    flat = jnp.sqrt(0 * jnp.abs(log_policy).sum((1, 2)))  # slope inf at 0
    return setup.algorithm.loss(log_policy, rows) + flat

  algorithm = setup.algorithm._replace(loss=loss)
  steep = setup._replace(algorithm=algorithm, optimizer=optax.adam(1e-3))
  state = start(steep, frozen)
  batch = weighed(steep, state, frozen, prompts, *drawn)
  step = jax.jit(step_lib.update, static_argnums=0)
  same, row = step(steep, state, frozen, batch)
  assert np.isfinite(row['loss']) and row['skipped'] == 1
  jax.tree.map(np.testing.assert_array_equal, same.params, state.params)
  found = guard.find(steep, state, frozen, batch)
  assert found and all(x.startswith('gradient/') for x in found)


def test_what_is_not_finite_is_named(setup, frozen, prompts, drawn):
  state = start(setup, frozen)
  batch = weighed(setup, state, frozen, prompts, *drawn)
  ids = np.asarray(prompts.id)
  bad, name = poisoned(batch, 1, 'rows')
  found = guard.find(setup, state, frozen, bad)
  assert found[0] == f'{name} of prompts {ids[1]}'
  assert all(x.startswith('gradient/') for x in found[1:]) and found[1:]
  # A filler is not accused; `weigh` keeps what it holds out of the gradient.
  weight = np.array(prompts.weight)
  weight[1] = 0
  filler = bad._replace(prompts=bad.prompts._replace(weight=weight))
  found = guard.find(setup, state, frozen, filler)
  assert all(x.startswith('gradient/') for x in found)
  scale = state.params['final_norm']['scale'].at[0].set(jnp.nan)
  params = state.params | {'final_norm': {'scale': scale}}
  found = guard.find(setup, state._replace(params=params), frozen, batch)
  assert found[0] == 'params/final_norm/scale'
  assert found[1].startswith(f'log_policy of prompts {ids[0]}, {ids[1]}')
  assert checkpoint.broken(params) == ['final_norm/scale']
  assert checkpoint.broken(state.params) == []


def test_donated_state_shares_no_buffer(setup, update, frozen, prompts, drawn):
  adam = setup._replace(optimizer=optax.adam(1e-3))
  for init in (
    step_lib.init_state,
    jax.jit(step_lib.init_state, static_argnums=0),
  ):
    state = init(adam, frozen)
    leaves = jax.tree.leaves((state, frozen))
    pointers = {x.unsafe_buffer_pointer() for x in leaves}
    assert len(pointers) == len(leaves)
  state = start(setup, frozen)
  update(1)(state, frozen, prompts, *drawn)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.anchor))
  assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))


def test_a_fixed_anchor_is_the_reference_and_no_copy(setup, frozen):
  fixed = setup._replace(
    algorithm=setup.algorithm._replace(anchor=anchors.fixed())
  )
  assert step_lib.init_state(fixed, frozen).anchor == {}


@pytest.mark.long
def test_eight_devices_are_one(setup, draw, update, frozen, prompts):
  """Three steps on a 4 x 2 mesh: the same tokens, the same parameters."""

  def run(state, frozen, put, program):
    tokens = []
    for _ in range(3):
      drawn = draw(state, frozen, put(prompts), jax.random.key(5))
      host = jax.device_get(drawn)
      tokens.append(host.completion)
      state, _ = program(
        state, frozen, put(prompts), drawn, put(reward_of(host))
      )
    return tokens, state

  tokens, state = run(start(setup, frozen), frozen, lambda x: x, update(2))
  mesh = sharding.make_mesh(4, 2)
  shards = sharding.tree_shardings(start(setup, frozen), mesh)
  on_mesh = jax.device_put(start(setup, frozen), shards)
  f = setup._replace(micro_batches=2)
  program = jax.jit(
      functools.partial(whole_step, f), donate_argnums=(0,),
      out_shardings=(shards, sharding.replicated(mesh)),
  )  # fmt: skip
  tokens8, state8 = run(
    on_mesh,
    Frozen(jax.device_put(frozen.reference, shards.params), {}),
    functools.partial(sharding.put_batch, mesh=mesh),
    program,
  )
  for one, eight in zip(tokens, tokens8, strict=True):
    np.testing.assert_array_equal(eight, one)
  close(state8, state, rtol=1e-5, atol=1e-6)
  assert program._cache_size() == 1  # nothing is compiled after step one
  embedding = state8.params['embedder']['input_embedding']
  assert embedding.sharding.shard_shape(embedding.shape) == (11, 4)


# -- the learned quantile -----------------------------------------------------


@pytest.fixture(scope='module')
def learned(setup):
  """BOND of the same three completions, its quantile a network's."""
  algorithm = bond.make(
      n=2, backward_weight=0.5, drift_weight=0.0, num_policy=1,
      quantile='learned', num_quantile=2, zero='half', second_term=False,
      anchor='fixed',
  )  # fmt: skip
  return setup._replace(algorithm=algorithm)


@pytest.fixture(scope='module')
def learned_update(learned):
  return jax.jit(functools.partial(whole_step, learned))


def start_learned(learned, frozen):
  """A fresh state; the head is not at 0, so that all of its model learns."""
  state = start(learned, frozen, mix=0.3)
  head = {
    'w': jnp.sin(jnp.arange(1.0 * CONFIG.features)),
    'b': jnp.float32(0.2),
  }
  params = {**state.aux['params'], 'scalar_head': head}
  return state._replace(aux={**state.aux, 'params': params})


@pytest.mark.long
def test_the_quantile_learns_by_its_cross_entropy(
  learned, learned_update, frozen, prompts, drawn
):
  """Of the policy's row alone, against the share of the anchor's two."""
  one, reward = drawn
  weight = np.float32([1, 0.5, 2, 1, 1, 0, 1, 3])
  target = (reward[:, 1:] <= reward[:, :1]).mean(-1)
  assert {0.0, 0.5, 1.0} == set(target.tolist())
  state = start_learned(learned, frozen)
  before = jax.device_get(state.aux['params'])

  def loss(params):
    logit = scalar_head.logits(
      learned.policy, params, prompts, one.completion[:, :1], one.mask[:, :1]
    )[:, 0]
    p = jax.nn.sigmoid(logit)
    entropy = target * jnp.log(p) + (1 - target) * jnp.log(1 - p)
    return -(weight * entropy).sum() / weight.sum(), p

  (expected_loss, p), gradient = jax.jit(
    jax.value_and_grad(loss, has_aux=True)
  )(before)
  state, metrics = learned_update(
    state, frozen, prompts._replace(weight=weight), one, reward
  )
  change = jax.tree.map(
    lambda a, b: (a - b) / 0.1, before, jax.device_get(state.aux['params'])
  )
  close(change, gradient, rtol=1e-3, atol=1e-5)
  assert optax.tree.norm(gradient['model']) > 0.1
  np.testing.assert_allclose(metrics['quantile/loss'], expected_loss, rtol=1e-4)
  # What it says is the reward: n - 1 = 1 times log p.
  mean = (weight * np.log(p)).sum() / weight.sum()
  np.testing.assert_allclose(metrics['signal/mean'], mean, rtol=1e-4)


@pytest.mark.long
def test_the_quantile_sees_no_split_and_no_filler(
  learned, learned_update, frozen, prompts, drawn
):
  """Eight devices, two micro-batches and NaN in the fillers against none."""
  one, reward = drawn
  prompts = prompts._replace(weight=np.float32([1] * 6 + [0] * 2))
  state = start_learned(learned, frozen)
  plain = learned_update(state, frozen, prompts, one, reward)
  spoil = lambda x: np.where(np.arange(BATCH) < 6, x.T, np.nan).T
  mesh = sharding.make_mesh(4, 2)
  shards = sharding.tree_shardings(state, mesh)
  program = jax.jit(
      functools.partial(whole_step, learned._replace(micro_batches=2)),
      out_shardings=(shards, sharding.replicated(mesh)),
  )  # fmt: skip
  put = functools.partial(sharding.put_batch, mesh=mesh)
  other = program(
    jax.device_put(state, shards),
    Frozen(jax.device_put(frozen.reference, shards.params), {}),
    put(prompts),
    put(one._replace(log_prob=spoil(one.log_prob))),
    put(spoil(reward)),
  )
  close(other, plain, rtol=1e-4, atol=1e-6)
  assert np.isfinite(plain[1]['quantile/loss'])
  model = other[0].aux['params']['model']  # sharded as the policy is
  embedding = model['embedder']['input_embedding']
  assert embedding.sharding.shard_shape(embedding.shape) == (11, 4)


def test_only_a_learned_quantile_is_kept(setup, learned, frozen):
  state = step_lib.init_state(setup, frozen)
  assert state.aux == {}
  adam = learned._replace(optimizer=optax.adam(1e-3))
  state = step_lib.init_state(adam, frozen)
  assert set(state.aux) == {'params', 'opt_state'}
  leaves = jax.tree.leaves((state, frozen))
  pointers = {x.unsafe_buffer_pointer() for x in leaves}
  assert len(pointers) == len(leaves)  # donated, it may share none
