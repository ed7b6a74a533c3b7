"""Distillation: the loop around a step.

What a step computes is in `step.py`; here are prompts, rewards, checkpoints and
metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
import os
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from bond_jax.devices import hosts, sharding, shares
from bond_jax.rewards import calling
from bond_jax.runs import (
  configs,
  log,
  progress,
  provenance,
  saving,
  stages,
  stopping,
)
from bond_jax.training import checks, costs, setups, tasks
from bond_jax.training import guard as guard_lib
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, TrainState


class Programs(NamedTuple):
  """The compiled functions of a run; `state` is donated to the last two."""

  rollout: Callable[..., Any]
  weigh: Callable[..., Any]
  update: Callable[..., Any]
  move_anchor: Callable[..., Any]


def make_programs(setup: step_lib.Setup, mesh, state) -> Programs:
  """Jits the step over the mesh; state stays in its shards throughout."""
  rows = sharding.by_row(mesh)
  kept = (jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh))

  def rollout(state, frozen, prompts, key, index):
    return step_lib.rollout(setup, state, frozen, prompts, key, index)

  def weigh(state, frozen, prompts, drawn, reward):
    batch, row = step_lib.weigh(setup, state, frozen, prompts, drawn, reward)
    return batch, row | {'tokens/decoded': drawn.mask.sum()}

  def update(state, frozen, batch):
    state, row = step_lib.update(setup, state, frozen, batch)
    # Of completions, as those decoded; `costs` counts their prompts too.
    return state, row | {'tokens/trained': batch.mask.sum()}

  def move_anchor(state, frozen):
    return step_lib.move_anchor(setup, state, frozen)

  return Programs(
    jax.jit(rollout, out_shardings=rows),
    jax.jit(weigh, out_shardings=(rows, sharding.replicated(mesh))),
    jax.jit(update, out_shardings=kept, donate_argnums=(0,)),
    jax.jit(move_anchor, out_shardings=kept, donate_argnums=(0,)),
  )


def run_iteration(
  programs: Programs,
  setup: step_lib.Setup,
  task: tasks.Task,
  state: TrainState,
  frozen: Frozen,
  whole: Callable[[], Frozen],
  key,
  order,
  mesh,
  phase,
  submit: Callable[..., futures.Future],
  broken: Callable[[TrainState, Frozen, step_lib.Batch], None],
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
  """Yields the state and the metrics after every step of one iteration.

  Draws and weighs `rollouts` batches, updates on each of them once in each of
  `epochs`, in an order that the key `order` draws, then moves the anchor. While
  one batch is drawn, those before it are rewarded, by the thread that `submit`
  hands them to. `frozen` has what these look at, `whole()` all of it, which the
  last needs. Waits for the device, so that phases are true. Of several hosts
  each rewards rows of its own, and all learn of all rewards, and of a signal
  that one of them got. A step that was skipped is shown to `broken`.
  """
  order = jax.random.fold_in(order, int(state.step))
  drawn, batches, weighed = [], [], []
  for index in range(setup.rollouts):
    with phase('sample'):
      prompts = next(task.batches)
      on_mesh = sharding.put_batch(prompts, mesh)
      rollout = programs.rollout(state, frozen, on_mesh, key, index)
      own = shares.own(mesh, len(prompts.id))
      part = shares.take((prompts, rollout), own)
      scored = submit(task.reward, *part) if len(own) else None
      drawn.append((on_mesh, rollout, own, scored))
  while drawn:
    on_mesh, rollout, own, scored = drawn.pop(0)
    with phase('reward'):
      scored = scored and scored.result()
      told = hosts.gather((own, scored, stopping.asked()))
      scored = calling.join([part[:2] for part in told])
      stopping.hear(part[2] for part in told)
    with phase('update'):
      # A prompt on which the reward failed is a filler row from here on.
      on_mesh = on_mesh._replace(
        weight=on_mesh.weight * sharding.put_batch(scored.weight, mesh)
      )
      judged = sharding.put_batch(scored.value, mesh)
      batch, row = programs.weigh(state, frozen, on_mesh, rollout, judged)
      batches.append(batch)
      # On the device: the update need not wait for it.
      weighed.append(row | scored.metrics)
  for epoch in range(setup.epochs):
    places = np.arange(setup.rollouts)
    if setup.rollouts > 1:
      places = jax.random.permutation(jax.random.fold_in(order, epoch), places)
    for i, place in enumerate(places):
      last = epoch == setup.epochs - 1 and i == setup.rollouts - 1
      with phase('update'):
        batch = batches[int(place)]
        state, row = programs.update(state, frozen, batch)
        if last:
          state, moved = programs.move_anchor(state, whole())
          row |= moved
        rows, row = jax.device_get((weighed, row))
      if row['skipped']:
        broken(state, frozen, batch)
      yield state, {k: np.mean([r[k] for r in rows]) for k in rows[0]} | row


def rest_reference(
  setup: step_lib.Setup, frozen: Frozen
) -> tuple[Frozen, Callable[[], Frozen]]:
  """Moves the reference to the hosts, where the step does not look at it.

  Returns what is left on the devices, and a function that gives all of it
  again: the caller lets go of that, and of `frozen`, when it is done.
  """
  if step_lib.reads_reference(setup.algorithm):
    return frozen, lambda: frozen
  there = sharding.to_host(frozen.reference)
  left = frozen._replace(reference={})
  return left, lambda: left._replace(reference=sharding.to_device(there))


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Runs the stage to its end, from its last checkpoint if it has one."""
  settings, folder = config.train, os.path.join(workdir, 'train')
  mesh = sharding.make_mesh(**config.mesh)
  # Before anything large is loaded: it sees whether the inputs have changed.
  saver = saving.Saver(
    os.path.join(folder, 'checkpoints'), 'train', config.save_failure,
    provenance.of(config, mesh),
    lambda: provenance.inputs(config, workdir, 'train'),
  )  # fmt: skip
  task = setups.task(config).make(config, workdir, mesh)
  setup = setups.make_setup(config, task.policy, task.stop, mesh)
  cost = costs.of_config(config, setup.algorithm, task.policy.vocab_size)
  hosts.say(f'train: {costs.line(cost)}')
  guard = guard_lib.Guard(config, setup)
  start = saver.start
  show = ('reward/policy', 'signal/fires', 'win_rate/reference', 'kl/reference')
  writer = log.Writer(folder, 'train', settings.steps, start, show)
  key = configs.key(config.seed, 'train')
  order = configs.key(config.seed, 'order')
  compiled = []  # programs of the step compiled so far, after each iteration
  step = start or 0
  submit = calling.worker()
  with stopping.deferred(), writer, saver:
    # The reference draws for it, while there is nothing else on the devices.
    with writer.phase('evaluate'):
      probe = task.make_probe(task.frozen)
    if start is None:
      state = init_state(setup, task.frozen, mesh)
    else:  # into shapes: two states at one time may be too much for a device
      like = state_like(setup, task.frozen, mesh)
      state, position = saver.restore(like)
      task.batches.set_state(position)
      guard.catch_up(folder)
    frozen, whole = rest_reference(setup, task.frozen)
    task = task._replace(frozen=None)  # all of it is nowhere else
    programs = make_programs(setup, mesh, state)
    while step < settings.steps:
      steps = run_iteration(
        programs, setup, task, state, frozen, whole, key, order, mesh,
        writer.phase, submit, guard.broken,
      )  # fmt: skip
      for state, row in steps:
        step += 1
        stop = step % (setup.rollouts * setup.epochs) == 0 and stopping.due()
        due = step % settings.save_every == 0 or step == settings.steps
        if due:
          with writer.phase('evaluate'):
            row |= probe(state.params, whole)
          row |= guard.look(step, row)
        ends = bool(stop or guard.stops) or step == settings.steps
        guard.check(row, step, saver.folder)
        if not row['skipped']:
          guard_lib.check_finite(row, step, saver.folder)
        guard.keep(writer.write(step, row))
        saver.look()
        if due or stop:  # the latter without a probe: rows stay as they are
          with writer.phase('save'):
            saver.save(
                step, state, task.batches.get_state(),
                row.get('win_rate/reference'), writer.sync, must=ends,
            )  # fmt: skip
        if ends and step < settings.steps:
          raise guard.stops or stopping.stopped('train', step)
      compiled.append(progress.compilations(*Programs._fields))
  path = os.path.join(folder, 'metrics.jsonl')
  rows = hosts.once(lambda: log.read_rows(path))
  compilations = compiled[-1] - compiled[0] if compiled else 0
  moves = setup.algorithm.anchor.moves
  summary = summarise(rows, compilations, moves)
  return summary | dict(task.facts, cost=cost._asdict())


def init_state(setup, frozen: Frozen, mesh) -> TrainState:
  """The state before the first step, created in its shards."""
  init = lambda frozen: step_lib.init_state(setup, frozen)
  like = state_like(setup, frozen, mesh)
  shards = jax.tree.map(lambda x: x.sharding, like)
  return jax.jit(init, out_shardings=shards)(frozen)


def state_like(setup, frozen: Frozen, mesh) -> TrainState:
  """The shapes of a state in their shards; `frozen` may be shapes too.

  A UserError if a large parameter would be whole on every device.
  """
  init = lambda frozen: step_lib.init_state(setup, frozen)
  sharding.check_split(frozen, mesh)
  return sharding.tree_structs(jax.eval_shape(init, frozen), mesh)


def summarise(
  rows: list[dict[str, Any]], compilations: int, moves: bool
) -> dict[str, Any]:
  """The numbers of the stage, from its metrics."""
  last = rows[-1]
  phases = log.phase_seconds(rows)
  return {
    'steps': last['step'],
    'win_rate_validation': last['win_rate/reference'],
    'kl_validation': last['kl/reference'],
    'anchor_drift': last['anchor/drift'] if moves else None,
    'signal_fires': float(np.mean([row['signal/fires'] for row in rows])),
    'compilations_after_first_step': compilations,
    'seconds': round(sum(phases.values()), 3),
    'phase_seconds': {k: round(v, 3) for k, v in phases.items()},
  }


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  stages.stage(
    'train', train, config, workdir, folder='train', check=checks.check
  )
