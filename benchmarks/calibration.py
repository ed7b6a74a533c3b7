"""Is the yardstick straight? Policies that are Best-of-N, judged as any other.

    python -m benchmarks.calibration --run=runs/demo --out=runs/calibration

From a finished run of configs/demo.py: draws completions of the reference, lets
the best of each N of them be a policy's completion, for N = 1, 2, 4 and 8, and
computes its summary as `bond_jax.evaluate` would. Its effective N should be N,
and its frontier efficiency 1, within their intervals. Once with the demo's
reward, which hardly ties, and once with that reward rounded so that 40 % of the
pairs tie. N = 1 is the reference itself, which must get no number.

The log-ratio of such a policy is not a model's. It is that of Best-of-N,
log (p_<=^N - p_<^N) / (p_<= - p_<), with p from other draws of the reference,
512 of each prompt; the KL is its mean over the policy's completions. Takes
three minutes on two quiet cores.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from absl import app, logging
import jax
import numpy as np

from bond_jax.data import examples, sources
from bond_jax.devices import sharding
from bond_jax.evaluation import completions
from bond_jax.measures import aggregate
from bond_jax.models import policies, stops
from bond_jax.rewards import make
from bond_jax.runs import environment, files, log, paths, show
from bond_jax.runs.settings import configs
from bond_jax.training.tasks import text_task
from bond_jax.weights import load

_RUN = paths.flag('run', 'runs/demo', 'Finished, of configs/demo.py.')
_OUT = paths.flag('out', None, 'Of the results.', required=True)

NS = (1, 2, 4, 8)
REFERENCE, CHOSEN_FROM, DENSITY = 64, 128, 512  # draws of each prompt
TIES = 0.4
SHOWN = ('win_rate', 'effective_n', 'effective_n_interval', 'kl',
         'frontier_efficiency', 'frontier_efficiency_interval')  # fmt: skip


def draw_rewards(run: str) -> np.ndarray:
  """The rewards of draws of the reference f64[X, draws]."""
  config = configs.read_config(run)
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = load.load_tokenizer(config, run)
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  frozen = load.load_frozen(config, policy, run, mesh)
  reference = completions.Model(policy, *frozen)
  rows = sources.rows(config, 'test')
  encode = load.make_encoder(config, tokenizer)
  prompts = examples.fixed_prompts(
    rows, encode, length=config.prompt.length, count=config.evaluate.prompts
  )
  reward = make.make_reward(config, config.reward, run)
  stop = stops.of(tokenizer, config.stop)
  draw = completions.make_draw(config, stop, mesh)
  key, num = configs.key(config.seed, 'calibration'), 16
  read = functools.partial(text_task.texts, config, tokenizer, rows)
  found, total = [], REFERENCE + CHOSEN_FROM + DENSITY
  with log.Writer(_OUT.value, 'calibrate', total) as writer:
    for first in range(0, total, num):
      drawn, _, _ = draw(reference, reference, prompts, key, first, num)
      found.append(reward(*read(prompts, drawn)))
      writer.write(first + num, {})
  return np.concatenate(found, 1).astype(np.float64)


def rounded(rewards: np.ndarray, ties: float) -> np.ndarray:
  """The rewards in steps so wide that this share of pairs ties."""
  low, high = 0.0, float(np.ptp(rewards))
  for _ in range(40):
    step = (low + high) / 2
    rate = aggregate.comparisons.tie_rate(np.round(rewards / step))
    low, high = (step, high) if rate < ties else (low, step)
  return np.round(rewards / step)


def best_of(n: int, rewards: np.ndarray) -> np.ndarray:
  """The best of each n draws, f64[X, draws / n]."""
  return rewards.reshape(len(rewards), -1, n).max(-1)


def log_ratio(n: int, chosen: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """Of Best-of-n to the reference; each completion is one more draw."""
  below = (draws[:, None, :] < chosen[:, :, None]).sum(-1)
  at_most = (draws[:, None, :] <= chosen[:, :, None]).sum(-1) + 1
  p, q = (x / (draws.shape[1] + 1) for x in (below, at_most))
  return np.log((q**n - p**n) / (q - p))


def summary(n: int, rewards: np.ndarray) -> dict[str, Any]:
  """What is said of a policy that is Best-of-n of the reference."""
  reference, rest = np.split(rewards, [REFERENCE], 1)
  some, draws = np.split(rest, [CHOSEN_FROM], 1)
  chosen = best_of(n, some)
  ratio = log_ratio(n, chosen, draws)

  def row(who, x, value, ratio):
    return dict(
      id=x, prompt='', completion='', reward=value, gold=value, who=who,
      log_policy=ratio, log_reference=0.0, length=1, truncated=False,
    )  # fmt: skip

  rows = [row('policy', x, float(v), float(r))
          for x in range(len(rewards))
          for v, r in zip(chosen[x], ratio[x], strict=True)]  # fmt: skip
  rows += [row('reference', x, float(v), 0.0)
           for x in range(len(rewards)) for v in reference[x]]  # fmt: skip
  told = aggregate.summarise(rows)
  told['comparisons'] = chosen.size * REFERENCE
  return told


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  environment.configure_jax()
  os.makedirs(_OUT.value, exist_ok=True)
  path = os.path.join(_OUT.value, 'rewards.npy')
  if not os.path.exists(path):
    np.save(path, draw_rewards(_RUN.value))
  rewards = np.load(path)
  results, table = {}, [('reward', 'ties', 'N', *SHOWN)]
  for name, values in (
    ('as it is', rewards), ('rounded', rounded(rewards, TIES))
  ):  # fmt: skip
    for n in NS:
      told = summary(n, values)
      results[f'{name}, {n}'] = told
      table.append((name, told['tie_rate'], n, *(told[k] for k in SHOWN)))
      if told['frontier_reason']:
        print(f'{name}, N = {n}: no number, because {told["frontier_reason"]}')
  out = os.path.join(_OUT.value, 'summary.json')
  files.write_json(out, {**results, 'versions': environment.versions(),
                           'device': jax.devices()[0].device_kind})  # fmt: skip
  show.table(table, f'calibration: done, see {out}')


if __name__ == '__main__':
  app.run(main)
