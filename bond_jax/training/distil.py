"""Distillation: prompts, rewards, checkpoints and metrics around `step.py`."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import functools
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from bond_jax.devices import hosts, sharding, shares
from bond_jax.rewards import calling
from bond_jax.runs import log, progress, provenance, stages, stopping
from bond_jax.runs.checkpoints import saving
from bond_jax.runs.settings import configs
from bond_jax.training import checks, costs, loop, setups, watch
from bond_jax.training import guard as guard_lib
from bond_jax.training import step as step_lib
from bond_jax.types import Array, Frozen, Params, Prompts, Rollout, TrainState

# Metrics of a rollout that say nothing of completions that were stored.
OF_SAMPLER = 'entropy/token', 'slots/busy', 'tokens/decoded'


class Programs(NamedTuple):
  """The compiled functions of a run; `state` is donated to the last two."""

  rollout: Callable[..., Any]
  weigh: Callable[..., Any]
  update: Callable[..., Any]
  move_anchor: Callable[..., Any]


def make_programs(setup: step_lib.Setup, mesh, state) -> Programs:
  """Jits the step over the mesh; state stays in its shards throughout."""
  rows, whole = sharding.by_row(mesh), sharding.replicated(mesh)
  kept = (jax.tree.map(lambda x: x.sharding, state), whole)

  def weigh(setup, state, frozen, prompts, drawn, reward):
    batch, row = step_lib.weigh(setup, state, frozen, prompts, drawn, reward)
    return batch, row | {'tokens/decoded': drawn.mask.sum()}

  def update(setup, state, frozen, batch):
    state, row = step_lib.update(setup, state, frozen, batch)
    # Of completions, as those decoded; `costs` counts their prompts too.
    return state, row | {'tokens/trained': batch.mask.sum()}

  jit = lambda f, **how: jax.jit(functools.partial(f, setup), **how)
  return Programs(
    jit(step_lib.rollout, out_shardings=rows),
    jit(weigh, out_shardings=(rows, whole)),
    jit(update, out_shardings=kept, donate_argnums=(0,)),
    jit(step_lib.move_anchor, out_shardings=kept, donate_argnums=(0,)),
  )


class Distillation(NamedTuple):
  """What every iteration of a run uses."""

  setup: step_lib.Setup
  programs: Programs
  batches: Iterator[Prompts]
  reward: Callable[[Prompts, Rollout], calling.Scored]  # on the host
  frozen: Frozen  # what a step looks at
  whole: Callable[[], Frozen]  # all of it, which the anchor's move needs
  key: Array  # of the draws
  order: Array  # of the updates
  mesh: Mesh
  phase: Callable[[str], contextlib.AbstractContextManager]
  submit: Callable[..., futures.Future]  # hands a call to the reward's thread
  broken: Callable[[TrainState, step_lib.Batch], None]  # sees a skipped step
  # In the place of a sampler and `reward`, see `Task`.
  stored: Callable[..., Any] | None = None


def iterate(
  run: Distillation, state: TrainState
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
  """Yields the state and the metrics after every step of one iteration.

  Draws and weighs `rollouts` batches, updates on each of them once in each of
  `epochs`, in a drawn order, then moves the anchor. While one batch is drawn,
  those before it are rewarded. Waits for the device, so that phases are true.
  """
  setup, rollouts = run.setup, run.setup.rollouts
  order = jax.random.fold_in(run.order, int(state.step))
  drawn = [_draw(run, state, index) for index in range(rollouts)]
  batches, weighed = [], []
  while drawn:
    batch, row = _weigh(run, state, *drawn.pop(0))
    batches.append(batch)
    weighed.append(row)
  for epoch in range(setup.epochs):
    places = np.arange(rollouts)
    if rollouts > 1:
      places = jax.random.permutation(jax.random.fold_in(order, epoch), places)
    for i, place in enumerate(places):
      last = epoch == setup.epochs - 1 and i == rollouts - 1
      with run.phase('update'):
        batch = batches[int(place)]
        state, row = run.programs.update(state, run.frozen, batch)
        if last:
          state, moved = run.programs.move_anchor(state, run.whole())
          row |= moved
        rows, row = jax.device_get((weighed, row))
      if row['skipped']:
        run.broken(state, batch)
      yield state, {k: np.mean([r[k] for r in rows]) for k in rows[0]} | row


def _draw(run: Distillation, state: TrainState, index: int):
  """A rollout, whose reward is under way; of several hosts, of its own rows."""
  with run.phase('sample'):
    prompts = next(run.batches)
    on_mesh = sharding.put_batch(prompts, run.mesh)
    own = shares.own(run.mesh, len(prompts.id))
    if run.stored:
      drawn, reward = run.stored(prompts, visit=int(state.step) + index)
      rollout = sharding.put_batch(drawn, run.mesh)
      ask, part = calling.known, (reward[own],)
    else:
      rollout = run.programs.rollout(state, run.frozen, on_mesh, run.key, index)
      ask, part = run.reward, shares.take((prompts, rollout), own)
    scored = run.submit(ask, *part) if len(own) else None
  return on_mesh, rollout, own, scored


def _weigh(run: Distillation, state: TrainState, on_mesh, rollout, own, scored):
  """A rollout with its reward as a batch to train on; metrics of it.

  All hosts learn of all rewards, and of a signal that one of them got.
  """
  with run.phase('reward'):
    scored = scored and scored.result()
    told = hosts.gather((own, scored, stopping.asked()))
    scored = calling.join([part[:2] for part in told])
    stopping.hear(part[2] for part in told)
  with run.phase('update'):
    # A prompt on which the reward failed is a filler row from here on.
    on_mesh = on_mesh._replace(
      weight=on_mesh.weight * sharding.put_batch(scored.weight, run.mesh)
    )
    judged = sharding.put_batch(scored.value, run.mesh)
    batch, row = run.programs.weigh(state, run.frozen, on_mesh, rollout, judged)
  if run.stored:
    row = {k: x for k, x in row.items() if k not in OF_SAMPLER}
  # On the device: the update need not wait for it.
  return batch, row | scored.metrics


def rest_reference(
  setup: step_lib.Setup, frozen: Frozen
) -> tuple[Frozen, Callable[[], Frozen]]:
  """Moves the reference to the hosts, where the step does not look at it.

  Returns what is left on the devices, and a function that gives all of it: the
  caller lets go of that, and of `frozen`.
  """
  if step_lib.reads_reference(setup.algorithm):
    return frozen, lambda: frozen
  there = sharding.to_host(frozen.reference)
  left = frozen._replace(reference={})
  return left, lambda: left._replace(reference=sharding.to_device(there))


def train(run: stages.Run) -> dict[str, Any]:
  """Runs the stage to its end, from its last checkpoint if it has one."""
  config, workdir, mesh, _ = run
  settings, folder = config.train, os.path.join(workdir, 'train')
  # Before anything large is loaded: it sees whether the inputs have changed.
  saver = saving.Saver(
    os.path.join(folder, 'checkpoints'), 'train', config.save_failure,
    provenance.of(config, mesh),
    lambda: provenance.inputs(config, workdir, 'train'),
  )  # fmt: skip
  task = checks.task(config).make(run)
  setup = setups.make_setup(config, task.policy, task.stop, mesh, task.teacher)
  cost = costs.of_config(config, setup.algorithm)
  hosts.say(f'train: {costs.line(cost)}')
  limits = settings.watch.to_dict()
  stop_at = limits.pop('stop')
  moves = setup.algorithm.anchor.moves
  look = functools.partial(watch.look, moves=moves, **limits)
  guard = guard_lib.Guard('train', settings.skip_limit, look, stop_at)
  show = ('reward/policy', 'signal/fires', 'win_rate/reference', 'kl/reference')
  writer = log.Writer(folder, 'train', settings.steps, saver.start, show)
  compiled = []  # programs of the step compiled so far, after each iteration
  with stopping.deferred(), writer, saver:
    # The reference draws for it, while there is nothing else on the devices.
    with writer.phase('evaluate'):
      probe = task.make_probe(task.frozen)
    if saver.start is None:
      state = init_state(setup, task.frozen, mesh, task.start)
    else:  # into shapes: two states at one time may be too much for a device
      like = state_like(setup, task.frozen, mesh, task.start)
      state, position = saver.restore(like)
      task.batches.set_state(position)
      guard.catch_up(folder)
    frozen, whole = rest_reference(setup, task.frozen)
    task = task._replace(frozen=None, start=None)  # it is nowhere else

    def broken(state, batch):
      guard.broken = guard_lib.find(setup, state, frozen, batch)

    each = Distillation(
        setup, make_programs(setup, mesh, state), task.batches, task.reward,
        frozen, whole, configs.key(config.seed, 'train'),
        configs.key(config.seed, 'order'), mesh, writer.phase,
        calling.worker(), broken, task.stored,
    )  # fmt: skip

    def iteration(state):
      yield from iterate(each, state)
      compiled.append(progress.compilations(*Programs._fields))

    job = loop.Job(
      name='train',
      iterate=iteration,
      measure=lambda state: probe(state.params, whole),
      position=task.batches.get_state,
      score=lambda row: row['win_rate/reference'],
      period=setup.rollouts * setup.epochs,
    )
    loop.run(
      job, state, settings.steps, settings.save_every, saver, writer, guard
    )
  rows, times = loop.times(folder)
  last, compiled = rows[-1], compiled or [0]
  return {
    'steps': last['step'],
    'win_rate_validation': last['win_rate/reference'],
    'kl_validation': last['kl/reference'],
    'anchor_drift': last.get('anchor/drift') if moves else None,
    'signal_fires': float(np.mean([row['signal/fires'] for row in rows])),
    'compilations_after_first_step': compiled[-1] - compiled[0],
    **times,
    **task.facts,
    'cost': cost._asdict(),
  }


def init_state(
  setup, frozen: Frozen, mesh, start: Params | None = None
) -> TrainState:
  """The state before the first step, created in its shards."""
  like = state_like(setup, frozen, mesh, start)
  shards = jax.tree.map(lambda x: x.sharding, like)
  init = functools.partial(step_lib.init_state, setup)
  return jax.jit(init, out_shardings=shards)(frozen, start)


def state_like(
  setup, frozen: Frozen, mesh, start: Params | None = None
) -> TrainState:
  """The shapes of a state in their shards; what it is made of may be shapes.

  A UserError if a large parameter would be whole on every device.
  """
  sharding.check_split(frozen, mesh)
  init = functools.partial(step_lib.init_state, setup)
  return sharding.tree_structs(jax.eval_shape(init, frozen, start), mesh)


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  stages.stage(
    'train', train, config, workdir, folder='train', open_run=checks.open_run
  )
