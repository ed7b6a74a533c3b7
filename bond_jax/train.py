"""The third stage: Best-of-N distillation of the reference.

`python -m bond_jax.train --config=configs/demo.py --workdir=runs/demo`. What a
step computes is in `step.py`; this is the loop around it: data, rewards,
checkpoints, metrics. Killed at any moment and started again, it goes on from
the last checkpoint and ends with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
import os
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from bond_jax import (
  build,
  checkpoint,
  command,
  data,
  measures,
  metrics,
  rewards,
  sharding,
)
from bond_jax import optimizer as optimizer_lib
from bond_jax import step as step_lib
from bond_jax.errors import UserError
from bond_jax.log_probs import log_probs
from bond_jax.sampling import sample
from bond_jax.types import Frozen, Prompts, TrainState


class Programs(NamedTuple):
  """The compiled functions of a run; `state` is donated to `update`."""

  rollout: Callable[..., Any]
  update: Callable[..., Any]
  probe: Callable[..., Any]


def make_programs(setup: step_lib.Setup, mesh, state, completions: int):
  """Jits the step over the mesh; state stays in its shards throughout."""
  rows = sharding.by_row(mesh)
  shards = jax.tree.map(lambda x: x.sharding, state)

  def rollout(state, frozen, prompts, key):
    return step_lib.rollout(setup, state, frozen, prompts, key)

  def update(state, frozen, prompts, drawn, reward):
    return step_lib.update(setup, state, frozen, prompts, drawn, reward)

  def probe(params, frozen, prompts, key):
    """Completions of fixed prompts, and their log-ratio to the reference."""
    drawn = sample(
        setup.policy, params, prompts, key, num=completions,
        length=setup.length, stop_ids=setup.stop_ids,
    )  # fmt: skip
    log_reference = log_probs(
        setup.policy, frozen.reference, prompts, drawn.completion, drawn.mask,
        chunk=setup.chunk,
    )  # fmt: skip
    return drawn, (drawn.log_prob - log_reference).sum(-1)

  replicated = sharding.replicated(mesh)
  return Programs(
    jax.jit(rollout, out_shardings=rows),
    jax.jit(update, out_shardings=(shards, replicated), donate_argnums=(0,)),
    jax.jit(probe, out_shardings=rows),
  )


def make_probe(draw, prompts: Prompts, reference):
  """How the policy does against the reference on fixed validation prompts.

  The reference's completions are drawn once, with a key of their own, so that
  the curve moves with the policy alone.
  """
  reference_rewards, _ = draw(reference, prompts, 1)

  def probe(params) -> dict[str, float]:
    rewards, log_ratio = draw(params, prompts, 2)
    return {
      'win_rate/reference': measures.win_rate(rewards, reference_rewards),
      'kl/reference': float(log_ratio.mean()),
      'reward/validation': float(rewards.mean()),
    }

  return probe


def run_step(
  programs: Programs,
  state: TrainState,
  frozen: Frozen,
  prompts: Prompts,
  reward_of,
  key,
  mesh,
  phase,
) -> tuple[TrainState, dict[str, Any]]:
  """One step and its metrics; waits for the device, so that phases are true."""
  with phase('sample'):
    on_mesh = sharding.put_batch(prompts, mesh)
    drawn = programs.rollout(state, frozen, on_mesh, key)
    on_host = jax.device_get(drawn)
  with phase('reward'):
    reward = reward_of(prompts, on_host)
  with phase('update'):
    reward = sharding.put_batch(reward, mesh)
    state, row = programs.update(state, frozen, on_mesh, drawn, reward)
    row = jax.device_get(row)
  return state, row


def check_finite(row: dict[str, Any], step: int, folder: str) -> None:
  """Stops the run before a broken state can be saved.

  The loss is of the parameters before the step; those that are about to be
  saved are in the validation numbers, which are there when they are saved.
  """
  for name in ('loss', 'gradient_norm', 'validation_loss', 'kl/reference'):
    if name in row and not np.isfinite(row[name]):
      raise UserError(
        f'step {step}: {name} is {row[name]}. Nothing was saved after the'
        f' last checkpoint in {folder}; a lower learning rate is the usual'
        ' remedy.'
      )


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Runs the stage to its end, from its last checkpoint if it has one."""
  settings, folder = config.train, os.path.join(workdir, 'train')
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = build.load_tokenizer(workdir)
  reward = build.make_reward(config.reward, workdir)
  setup = step_lib.Setup(
    policy=build.make_policy(config),
    algorithm=build.make_algorithm(config),
    optimizer=optimizer_lib.adam(steps=settings.steps, **settings.optimizer),
    length=config.length,
    stop_ids=(tokenizer.eos_id,),
    micro_batches=settings.micro_batches,
    chunk=config.chunk,
  )
  frozen = Frozen(build.load_params(setup.policy, workdir, 'sft', 'last', mesh))
  state = init_state(setup, frozen, mesh)
  batches = data.openings(
      build.rows(config, 'train'), tokenizer, opening=config.opening,
      batch=settings.batch, seed=config.seed,
  )  # fmt: skip
  checkpoints = checkpoint.manager(os.path.join(folder, 'checkpoints'))
  start = checkpoints.latest_step()
  if start is not None:
    state, position = checkpoint.restore(checkpoints, state)
    batches.set_state(position)
    print(f'train: goes on after step {start}')
  programs = make_programs(setup, mesh, state, settings.probe_completions)
  key = jax.random.key(config.seed)
  probe_key = jax.random.key(config.seed + 1)

  def reward_of(prompts, drawn):
    return rewards.call(reward, *build.texts(tokenizer, prompts, drawn))

  def draw(params, prompts, stream):
    on_mesh = sharding.put_batch(prompts, mesh)
    key = jax.random.fold_in(probe_key, stream)
    drawn, log_ratio = jax.device_get(
      programs.probe(params, frozen, on_mesh, key)
    )
    return reward_of(prompts, drawn), log_ratio

  show = ('reward/policy', 'signal/fires', 'win_rate/reference', 'kl/reference')
  writer = metrics.Writer(folder, 'train', settings.steps, start, show)
  compiled = []  # programs of the step compiled so far, after each step
  with writer, checkpoints:
    with writer.phase('evaluate'):
      prompts = data.fixed_openings(
          build.rows(config, 'validation'), tokenizer, opening=config.opening,
          count=settings.probe_prompts,
      )  # fmt: skip
      probe = make_probe(draw, prompts, frozen.reference)
    for step in range((start or 0) + 1, settings.steps + 1):
      state, row = run_step(
          programs, state, frozen, next(batches), reward_of, key, mesh,
          writer.phase,
      )  # fmt: skip
      compiled.append(metrics.compilations('rollout', 'update'))
      save = step % settings.save_every == 0 or step == settings.steps
      if save:
        with writer.phase('evaluate'):
          row |= probe(state.params)
      check_finite(row, step, checkpoints.directory)
      writer.write(step, row)
      if save:
        with writer.phase('save'):
          checkpoint.save(
              checkpoints, step, state, batches.get_state(),
              row['win_rate/reference'],
          )  # fmt: skip
  rows = metrics.read_rows(os.path.join(folder, 'metrics.jsonl'))
  return summarise(rows, compiled[-1] - compiled[0] if compiled else 0)


def init_state(setup, frozen: Frozen, mesh) -> TrainState:
  """The state before the first step, created in its shards."""
  init = lambda reference: step_lib.init_state(setup, reference)
  shapes = jax.eval_shape(init, frozen.reference)
  shards = sharding.tree_shardings(shapes, mesh)
  return jax.jit(init, out_shardings=shards)(frozen.reference)


def summarise(rows: list[dict[str, Any]], compilations: int) -> dict[str, Any]:
  """The numbers of the stage, from its metrics."""
  last = rows[-1]
  phases = metrics.phase_seconds(rows)
  return {
    'steps': last['step'],
    'win_rate_validation': last['win_rate/reference'],
    'kl_validation': last['kl/reference'],
    'anchor_drift': last['anchor/drift'],
    'signal_fires': float(np.mean([row['signal/fires'] for row in rows])),
    'compilations_after_first_step': compilations,
    'seconds': round(sum(phases.values()), 3),
    'phase_seconds': {k: round(v, 3) for k, v in phases.items()},
  }


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  build.stage('train', train, config, workdir, folder='train')


if __name__ == '__main__':
  command.run(main, __doc__)
