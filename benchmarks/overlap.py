"""How much of a slow reward hides behind the next rollout.

    PYTHONPATH=. python benchmarks/overlap.py --out=runs/overlap

WIND's outer iterations, sixteen rollouts each, of the demo's model with random
weights: 16 completions of 24 tokens for each of 16 prompts, of which two are
trained on, so that most of the time goes into sampling, as it does on
accelerators. The reward sleeps as long as a rollout takes, as a remote scorer
may. Runs the same iterations with rewards given in turn, as if there were no
thread, and overlapped, alternating; checks that both give the same numbers, and
prints the median of the ratios of their times. Three minutes. Writes
summary.json.
"""

import argparse
from concurrent import futures
import contextlib
import itertools
import os
import statistics
import time

import jax
import numpy as np

from bond_jax.algorithms import wind
from bond_jax.devices import sharding
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.rewards import calling
from bond_jax.runs import environment, files, paths, show
from bond_jax.runs.settings import defaults
from bond_jax.training import distil
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Prompts

ROLLOUTS, ROUNDS, BATCH, K = 16, 3, 16, 16


def make_setup() -> step_lib.Setup:
  optimizer = dict(defaults.make('text').train.optimizer)
  optimizer.update(learning_rate=3e-4, decay_to=1.0)
  return step_lib.Setup(
    policy=gemma.make(
      gemma.CONFIGS['gemma3_tiny'],
      temperature=1.0,
      dtype='float32',
      scan=False,
      remat='none',
    ),
    algorithm=wind.make(
      kl_weight=0.2,
      step_size=1.0,
      risk='squared',
      constant='fitted',
      num_anchor=K,
      rows=2,
    ),
    optimizer=optimizer_lib.adam(steps=100, **optimizer),
    length=24,
    stop=Stop((1,)),
    rollouts=ROLLOUTS,
    epochs=1,
    micro_batches=1,
    chunk=8192,
  )


def batches():
  """The same prompts of five random tokens, again and again."""
  tokens = np.random.default_rng(0).integers(2, 1000, (BATCH, 5))
  mask, ids = np.ones((BATCH, 5), bool), np.arange(BATCH, dtype=np.int32)
  weight = np.ones(BATCH, np.float32)
  return itertools.repeat(Prompts(tokens.astype(np.int32), mask, ids, weight))


def reward(prompts, drawn) -> calling.Scored:
  """Counts tokens of even number."""
  value = ((drawn.completion % 2 == 0) & drawn.mask).sum(-1)
  return calling.Scored(value.astype(np.float32), prompts.weight, {})


def in_turn(f, *args) -> futures.Future:
  """Makes the call at once: what `calling.worker` is compared with."""
  future = futures.Future()
  future.set_result(f(*args))
  return future


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=paths.expanded, required=True)
  out = parser.parse_args().out
  environment.configure_jax()
  setup, mesh = make_setup(), sharding.make_mesh(data=1, model=1)
  params = jax.jit(setup.policy.init)(jax.random.key(0))
  frozen, key = Frozen(params, {}), jax.random.key(1)
  state = distil.init_state(setup, frozen, mesh)
  programs = distil.make_programs(setup, mesh, state)

  def iterate(reward, submit):
    """One iteration from the start: its metrics and its seconds."""
    state = distil.init_state(setup, frozen, mesh)
    start = time.perf_counter()
    each = distil.Distillation(
        setup, programs, batches(), reward, frozen, lambda: frozen, key, key,
        mesh, lambda name: contextlib.nullcontext(), submit, lambda *_: None,
    )  # fmt: skip
    rows = [row for _, row in distil.iterate(each, state)]
    return rows, time.perf_counter() - start

  iterate(reward, in_turn)  # compiles
  prompts, times = sharding.put_batch(next(batches()), mesh), []
  for i in range(8):
    start = time.perf_counter()
    jax.device_get(programs.rollout(state, frozen, prompts, key, i))
    times.append(time.perf_counter() - start)
  pause = statistics.median(times)

  def slow(*args):
    time.sleep(pause)
    return reward(*args)

  pairs = []
  for i in range(ROUNDS):
    ways = [in_turn, calling.worker()]
    found = {}
    for way in ways if i % 2 else ways[::-1]:
      found[way is in_turn] = iterate(slow, way)
    (rows, serial), (others, overlapped) = found[True], found[False]
    for a, b in zip(rows, others, strict=True):
      for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    pairs.append((serial, overlapped))
  ratio = statistics.median(b / a for a, b in pairs)
  os.makedirs(out, exist_ok=True)
  summary = dict(rollout_seconds=pause, pairs=pairs, ratio=ratio)
  files.write_json(os.path.join(out, 'summary.json'), summary)
  serial, overlapped = (statistics.median(x) for x in zip(*pairs, strict=True))
  show.table(
    [
      ('seconds', 'value'),
      ('a rollout, and the reward of one', pause),
      ('an iteration, rewards in turn', serial),
      ('an iteration, rewards overlapped', overlapped),
      ('median of the ratios', ratio),
    ],
    f'in {out}',
  )


if __name__ == '__main__':
  main()
