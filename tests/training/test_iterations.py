"""Several rollouts, several epochs, one move of the anchor: the outer loop."""

import collections
import contextlib
import threading

import jax
import jax.numpy as jnp
import language
import numpy as np
import optax
import pytest
import toy

from bond_jax.algorithms import best_of_n
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models.stops import Stop
from bond_jax.rewards import calling
from bond_jax.training import checks, distil, setups
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Prompts, TrainState

ROLLOUTS, EPOCHS, STEPS = 2, 2, 8
Call = collections.namedtuple('Call', 'name state batch out')


def make_algorithm(config):
  """Best-of-n that also keeps what its rows scored under anchor and reference.

  The loss does not look at it.
  """
  algorithm = best_of_n.make(**config.algorithm.args)

  def weigh(scores):
    _, metrics = algorithm.weigh(scores)
    return (scores.log_anchor, scores.log_reference), metrics

  return algorithm._replace(anchor_rows=(0,), reference_rows=(0,), weigh=weigh)


def get_config(rollouts=ROLLOUTS, epochs=EPOCHS):
  config = language.get_config('best_of_n', n=2, anchor='periodic:1')
  config.train.update(dict(rollouts=rollouts, epochs=epochs, steps=STEPS))
  config.train.optimizer.warmup_steps = 0
  return config


@pytest.fixture(autouse=True)
def _algorithm(monkeypatch):
  monkeypatch.setattr(setups, 'make_algorithm', make_algorithm)


def record(monkeypatch, fail_at=None):
  """The calls of a run's programs, on the host; `fail_at` names the last.

  It is a pair of the program's name and the number of its call, from 1.
  """
  calls, make = [], distil.make_programs
  count = collections.Counter()

  def wrap(name, program):
    def recorded(state, *args):
      count[name] += 1
      if (name, count[name]) == fail_at:
        raise UserError('out of order')
      before = jax.device_get(state)  # it may be donated
      out = program(state, *args)
      batch = {'weigh': out[0], 'update': args[-1]}.get(name)
      calls.append(Call(name, before, batch, jax.device_get(out)))
      return out

    return recorded

  def recording(*args):
    programs = make(*args)
    return distil.Programs(*map(wrap, programs._fields, programs))

  monkeypatch.setattr(distil, 'make_programs', recording)
  return calls


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of two iterations, and the calls of its programs."""
  workdir = str(tmp_path_factory.mktemp('iterations') / 'run')
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(setups, 'make_algorithm', make_algorithm)
    calls = record(monkeypatch)
    toy.run('train', get_config(), workdir)
  size = len(calls) // 2
  return workdir, (calls[:size], calls[size:])


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def of(calls, name):
  return [call for call in calls if call.name == name]


def test_the_order_of_an_iteration(finished):
  drawn = ['rollout'] * ROLLOUTS + ['weigh'] * ROLLOUTS
  expected = drawn + ['update'] * ROLLOUTS * EPOCHS + ['move_anchor']
  for calls in finished[1]:
    assert [call.name for call in calls] == expected
    # One anchor and one step for all that is drawn ...
    first = calls[0].state
    for call in calls[: len(drawn)]:
      same(call.state, first)
    # ... and yet other completions of the same prompts.
    one, other = (call.out.completion for call in of(calls, 'rollout'))
    assert (one != other).any()


def test_every_batch_is_updated_on_once_per_epoch(finished):
  for calls in finished[1]:
    batches = [id(call.batch) for call in of(calls, 'weigh')]
    updates = of(calls, 'update')
    seen = [id(call.batch) for call in updates]  # weighed once
    for epoch in range(EPOCHS):
      found = seen[epoch * ROLLOUTS : (epoch + 1) * ROLLOUTS]
      assert sorted(found) == sorted(batches) and len(set(found)) == ROLLOUTS
    steps = [int(u.state.step) for u in updates]
    assert steps == list(range(steps[0], steps[0] + ROLLOUTS * EPOCHS))


def test_the_anchor_moves_after_the_last_update(finished):
  for calls in finished[1]:
    anchor, params = calls[0].state.anchor, calls[0].state.params
    same(anchor, params)
    for call in of(calls, 'update'):
      same(call.state.anchor, anchor)
      same(call.out[0].anchor, anchor)
    state, _ = calls[-1].out
    same(state.anchor, state.params)
    same(state.params, of(calls, 'update')[-1].out[0].params)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), anchor, state.anchor)
    assert max(jax.tree.leaves(gap)) > 1e-3


def test_rows_are_scored_by_the_anchor_that_drew_them(finished):
  first, second = (of(calls, 'update') for calls in finished[1])
  for call in first + second:
    log_anchor, _ = call.batch.rows
    close = dict(rtol=0, atol=1e-5)
    np.testing.assert_allclose(log_anchor, call.batch.log_sampled, **close)
    assert not call.batch.own.any()
  log_anchor, log_reference = second[0].batch.rows
  assert np.abs(log_anchor - log_reference).max() > 0.01
  same(*first[0].batch.rows)  # the anchor starts as the reference


def test_rows_say_when_the_anchor_moved(finished):
  rows = toy.rows(finished[0], 'train')
  assert [row['step'] for row in rows if 'anchor/drift' in row] == [4, 8]
  for name in ('signal/fires', 'reward/anchor'):  # the means of both rollouts
    assert len({row[name] for row in rows[:4]}) == 1
    weighed = [c.out[1][name] for c in of(finished[1][0], 'weigh')]
    np.testing.assert_allclose(rows[0][name], np.mean(weighed), rtol=1e-6)
  assert toy.summary(finished[0], 'train')['anchor_drift'] > 1e-3


@pytest.mark.long
@pytest.mark.parametrize('where', [('update', 7), ('rollout', 4)])
def test_a_run_goes_on_from_its_last_whole_iteration(
  finished, tmp_path, monkeypatch, where
):
  workdir = str(tmp_path / 'run')
  with monkeypatch.context() as m:
    record(m, fail_at=where)
    with pytest.raises(UserError, match='out of order'):
      toy.run('train', get_config(), workdir)
  assert toy.steps(workdir, 'train') == [4]
  toy.run('train', get_config(), workdir)
  toy.same_end(workdir, finished[0], 'train', STEPS)


def test_an_iteration_may_begin_with_a_new_optimizer(monkeypatch, tmp_path):
  config = get_config()
  config.train.restart = True
  calls = record(monkeypatch)
  toy.run('train', config, str(tmp_path / 'run'))
  states = [call.out[0].opt_state for call in calls if call.name == 'update']
  counts = [optax.tree.get_all_with_path(x, 'count') for x in states]
  assert [{int(n) for _, n in found} for found in counts] == 2 * [
    {1}, {2}, {3}, {4},
  ]  # fmt: skip
  # After one step the mean squared is the mean square, as b2 = 1 - (1 - b1)^2.
  for state, new in zip(states, 2 * [True, False, False, False], strict=True):
    mean, square = (
      np.concatenate([x.ravel() for x in jax.tree.leaves(found)])
      for found in (optax.tree.get(state, name) for name in ('mu', 'nu'))
    )
    assert np.allclose(mean**2, square, rtol=1e-4, atol=1e-30) == new


@pytest.mark.parametrize('restart, rates', [(True, [4, 0]), (False, [6, 4])])
def test_an_iteration_has_a_schedule_of_its_own(restart, rates):
  config = get_config()
  config.train.restart = restart
  config.train.optimizer.update(
    learning_rate=8.0, decay='linear', decay_to=0.0, warmup_steps=0, clip=1e9
  )
  mesh = sharding.make_mesh(1, 1)
  optimizer = setups.make_setup(config, None, None, mesh).optimizer
  params = jnp.zeros(1)
  state, seen = optimizer.init(params), []
  for _ in range(STEPS + 1):
    change, state = optimizer.update(jnp.ones(1), state, params)
    seen.append(-float(change[0]))
  np.testing.assert_allclose([seen[2], seen[4]], rates, atol=1e-3)


def test_the_anchor_counts_iterations():
  setup = step_lib.Setup(
      policy=None, algorithm=best_of_n.make(n=2, anchor='periodic:2'),
      optimizer=None, length=1, stop=Stop(()), rollouts=2, epochs=3,
      micro_batches=1, chunk=1,
  )  # fmt: skip
  for step, moves in ((6, False), (12, True), (18, False), (24, True)):
    state = TrainState(
      jnp.int32(step), {'x': jnp.ones(2)}, {'x': jnp.zeros(2)}, {}, {}
    )
    frozen = Frozen({'x': jnp.full(2, 0.5)}, {})
    state, metrics = step_lib.move_anchor(setup, state, frozen)
    np.testing.assert_array_equal(state.anchor['x'], float(moves))
    assert metrics['anchor/drift'] == 1  # 1/2 against 1/2


@pytest.mark.parametrize('name, value', [('steps', 10), ('save_every', 2)])
def test_a_run_of_half_iterations_is_refused(name, value):
  config = get_config()
  checks.check(config)
  config.train[name] = value
  says = rf'train.{name} \({value}\) must be a multiple of .* = 4:'
  with pytest.raises(UserError, match=says):
    checks.check(config)


ONE_SCORED = calling.Scored(np.zeros(1), np.ones(1, np.float32), {})


def dry_run(
  key, rollouts, epochs, step=0, reward=lambda *_: ONE_SCORED,
  on_rollout=lambda index: None,
):  # fmt: skip
  """The names of the calls of one iteration, and which batch each update saw.

  The programs do nothing but count.
  """
  called, drawn = [], []

  def rollout(state, frozen, prompts, key, index):
    called.append(('rollout', index))
    on_rollout(index)
    return np.zeros(1)  # of one prompt

  def weigh(state, frozen, prompts, *_):
    drawn.append(None)
    return len(drawn) - 1, {'signal/fires': np.float32(len(drawn))}

  def update(state, frozen, batch):
    called.append(('update', batch))
    return state, {'skipped': np.float32(0)}

  def move_anchor(state, frozen):
    called.append(('move_anchor', None))
    return state, {'anchor/drift': 0.0}

  each = distil.Distillation(
    step_lib.Setup(*(None,) * 5, rollouts, epochs, 1, 1),
    distil.Programs(rollout, weigh, update, move_anchor),
    iter([Prompts(*[np.zeros(1, np.float32)] * 4)] * rollouts),
    reward,
    None,
    lambda: None,
    key,
    key,
    sharding.make_mesh(1, 1),
    lambda name: contextlib.nullcontext(),
    calling.worker(),
    None,
  )
  state = TrainState(jnp.int32(step), {}, {}, {}, {})
  assert len(list(distil.iterate(each, state))) == rollouts * epochs
  return called, [batch for name, batch in called if name == 'update']


def test_one_rollout_and_one_epoch_are_the_plain_loop():
  called, _ = dry_run(jax.random.key(0), 1, 1)
  assert called == [('rollout', 0), ('update', 0), ('move_anchor', None)]


def test_rewards_are_given_while_the_next_batch_is_drawn():
  """Each call waits for the next draw, the last for none."""
  begun = [threading.Event() for _ in range(4)]
  waited = []

  def reward(*_):
    waited.append(begun[min(len(waited) + 1, 3)].wait(timeout=30))
    return ONE_SCORED

  called, _ = dry_run(
    jax.random.key(0), 4, 1, reward=reward, on_rollout=lambda i: begun[i].set()
  )
  assert waited == [True] * 4
  assert [i for name, i in called if name == 'rollout'] == [0, 1, 2, 3]


def test_the_order_depends_on_key_step_and_epoch():
  runs = [
    dry_run(jax.random.key(seed), 8, 2, step)[1]
    for seed, step in ((0, 0), (1, 0), (0, 16))
  ]
  orders = [tuple(x) for run in runs for x in (run[:8], run[8:])]
  for order in orders:
    assert sorted(order) == list(range(8))
  assert len(set(orders)) == 6 and tuple(range(8)) not in orders
  assert dry_run(jax.random.key(0), 8, 2)[1] == runs[0]
