"""One step of J-BOND as `train` runs it, whole and in its parts."""

import contextlib
import functools
import itertools

import jax
import numpy as np

from benchmarks import workloads
from bond_jax.algorithms import jbond
from bond_jax.devices import sharding
from bond_jax.models.stops import Stop
from bond_jax.rewards import calling
from bond_jax.runs.settings import defaults
from bond_jax.training import distil
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Prompts

PARTS = ('rollout', 'weigh', 'update', 'move_anchor')


def make_setup(
  policy, length: int, micro_batches: int, chunk: int
) -> step_lib.Setup:
  # So small a rate that the policy stays what it is.
  optimizer = dict(defaults.make('text').train.optimizer)
  optimizer.update(learning_rate=1e-7, decay_to=1.0)
  return step_lib.Setup(
    policy=policy,
    algorithm=jbond.make(
      num_anchor=2, backward_weight=0.5, anchor_rate=0.02, drift_weight=0.0
    ),
    optimizer=optimizer_lib.adam(steps=10**6, **optimizer),
    length=length,
    stop=Stop(()),
    rollouts=1,
    epochs=1,
    micro_batches=micro_batches,
    chunk=chunk,
  )


def prompts_of(rows: np.ndarray) -> Prompts:
  ids = np.arange(len(rows), dtype=np.int32)
  return Prompts(
    rows, np.ones_like(rows, bool), ids, np.ones(len(rows), np.float32)
  )


def reward(prompts, drawn) -> calling.Scored:
  """Counts tokens of even number."""
  value = ((drawn.completion % 2 == 0) & drawn.mask).sum(-1)
  return calling.Scored(value.astype(np.float32), prompts.weight, {})


def open_step(
  setup: step_lib.Setup, frozen: Frozen, workload: workloads.Workload
):
  """(part or 'step') -> a function that runs it once and waits for it."""
  mesh = sharding.make_mesh(data=1, model=1)
  prompts = prompts_of(workloads.tokens(workload, setup.policy.vocab_size))
  held = [distil.init_state(setup, frozen, mesh)]
  programs = distil.make_programs(setup, mesh, held[0])
  submit = calling.worker()
  key = jax.random.key(1)
  quiet = lambda name: contextlib.nullcontext()

  def whole(seed):
    each = distil.Distillation(
        setup, programs, itertools.repeat(prompts), reward, frozen,
        lambda: frozen, jax.random.fold_in(key, seed), key, mesh, quiet,
        submit, lambda *_: None,
    )  # fmt: skip
    for state, _ in distil.iterate(each, held[0]):
      held[0] = jax.block_until_ready(state)

  @functools.cache
  def inputs():
    """What the parts are given, made once."""
    on_mesh = sharding.put_batch(prompts, mesh)
    drawn = programs.rollout(held[0], frozen, on_mesh, key, 0)
    judged = sharding.put_batch(
      reward(prompts, jax.device_get(drawn)).value, mesh
    )
    batch, _ = programs.weigh(held[0], frozen, on_mesh, drawn, judged)
    return on_mesh, drawn, judged, batch

  def part(name, seed):
    on_mesh, drawn, judged, batch = inputs()
    if name == 'rollout':
      key_ = jax.random.fold_in(key, seed)
      out = programs.rollout(held[0], frozen, on_mesh, key_, 0)
    elif name == 'weigh':
      out = programs.weigh(held[0], frozen, on_mesh, drawn, judged)
    elif name == 'update':
      out = programs.update(held[0], frozen, batch)
      held[0] = out[0]
    else:
      out = programs.move_anchor(held[0], frozen)
      held[0] = out[0]
    jax.block_until_ready(out)

  runs = {name: functools.partial(part, name) for name in PARTS}
  return runs | {'step': whole}


def calls(policy, frozen: Frozen, chunk: int) -> dict:
  """As `serve.Call`s: the step and each of its parts."""

  @functools.cache
  def opened(workload):
    length = workload.new_tokens
    setup = make_setup(policy, length, 1, chunk)
    return open_step(setup, frozen, workload)

  def call(name, workload, seed):
    opened(workload)[name](seed)
    return [workload.new_tokens] * (workload.prompts * workload.n)

  return {x: functools.partial(call, x) for x in ('step', *PARTS)}
