"""What limits J-BOND's frontier efficiency: noise, step size, lag, or class?

    PYTHONPATH=. python benchmarks/limits.py --out=runs/limits

On the enumerable language, where the KL that Best-of-N pays for the same win
rate is known exactly. One thing is changed at a time: gradients are exact or
sampled from batches of several sizes; the learning rate; whether the policy
solves its problem before the anchor moves; the width of the model. Prints the
frontier efficiency where each run passes a win rate of 0.7, 0.8 and 0.9, and
draws win rate against KL. Writes figure.png and summary.json. About fifteen
minutes on two cores; finished runs are not repeated.
"""

import argparse
import itertools
import os

import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np
import optax

from benchmarks import exact_gradients
from bond_jax.evaluation import plotting
from bond_jax.runs import environment, files, log, paths, show, stages
from bond_jax.training import checks, distil
from configs import enumerable as config_file

RATES = (0.7, 0.8, 0.9)
STEPS, EVERY = 400, 20
# label -> learning rate, batch (None: exact), features
RUNS = {
  'batch 64': (1e-3, 64, 64),
  'batch 256': (1e-3, 256, 64),
  'batch 1024': (1e-3, 1024, 64),
  'batch 4096': (1e-3, 4096, 64),
  'batch 256, rate / 3': (3e-4, 256, 64),
  'batch 256, 2 x width': (1e-3, 256, 128),
  'exact': (1e-3, None, 64),
  'exact, rate / 3': (3e-4, None, 64),
  'exact, 2 x width': (1e-3, None, 128),
}
SOLVED = 'exact, solved before each move'
Points = list[tuple[float, float, float]]


def get_config(learning_rate: float, batch: int | None, features: int):
  config = config_file.get_config('algorithm=jbond')
  config.enumerable.prompts = 4
  config.train.steps, config.train.save_every = STEPS, EVERY
  config.train.optimizer.update(learning_rate=learning_rate, decay_to=1.0)
  config.train.batch = batch or 4
  config.model.sizes.update(features=features, feed_forward=4 * features)
  return config


def points(rows) -> Points:
  """(win rate, KL, efficiency) of the probes that have all three."""
  keys = 'win_rate/reference', 'kl/reference', 'frontier_efficiency'
  return [tuple(r[k] for k in keys) for r in rows if keys[-1] in r]


def sampled(config, workdir: str) -> Points:
  stages.stage(
    'train',
    distil.train,
    config,
    workdir,
    folder='train',
    open_run=checks.open_run,
  )
  path = os.path.join(workdir, 'train', 'metrics.jsonl')
  return points(log.read_rows(path))


def without_noise(config, *, solved: bool) -> Points:
  rate = 0.1 if solved else config.algorithm.args.anchor_rate
  pairs = exact_gradients.descend(
    config,
    backward_weight=0.5,
    rate=rate,
    moves=24 if solved else STEPS,
    first=600 if solved else 1,
    inner=60 if solved else 1,
    optimizer=optax.adam(
      config.train.optimizer.learning_rate,
      b1=config.train.optimizer.b1,
      b2=config.train.optimizer.b2,
    ),
  )
  # Before the first solution there is no point on the policy's way.
  every = 1 if solved else EVERY
  return points([row for i, (_, row) in enumerate(pairs) if i % every == 0])


def efficiency_at(rate: float, found: Points) -> float | None:
  """Where the run first passes a win rate, between two probes."""
  for (w0, _, f0), (w1, _, f1) in itertools.pairwise(found):
    if w0 <= rate <= w1:
      return f0 + (f1 - f0) * (rate - w0) / (w1 - w0)
  return None


def draw(curves: dict[str, Points], path: str) -> None:
  look = plotting.LIGHT
  with mpl.rc_context(plotting.style(look)):
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    ax = figure.add_subplot()
    blue, orange, *_ = look['colours']
    for label, found in curves.items():
      rate, _, efficiency = np.array(found).T
      _, _, change = label.partition(', ')
      dashes = {'rate / 3': ':', '2 x width': '--'}.get(change, '-')
      colour, alpha = orange if label == SOLVED else look['ink'], 1.0
      if batch := RUNS.get(label, (0, None, 0))[1]:
        colour, alpha = blue, 0.25 * np.log2(batch / 32) / 2 + 0.12
      ax.plot(rate, efficiency, dashes, color=colour, alpha=alpha, label=label)
    ax.set(xlabel='win rate against the reference', xlim=(0.65, 0.97))
    ax.set(ylabel='frontier efficiency', ylim=(0.5, 1.0))
    ax.legend(ncols=2, loc='lower left')
    figure.savefig(path, dpi=160)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=paths.expanded, required=True)
  out = parser.parse_args().out
  environment.configure_jax()
  os.makedirs(out, exist_ok=True)
  curves = {}
  for label, (rate, batch, features) in RUNS.items():
    config = get_config(rate, batch, features)
    if batch:
      folder = ''.join(c if c.isalnum() else '_' for c in label)
      curves[label] = sampled(config, os.path.join(out, folder))
    else:
      curves[label] = without_noise(config, solved=False)
    print(label, [efficiency_at(w, curves[label]) for w in RATES], flush=True)
  curves[SOLVED] = without_noise(get_config(1e-3, None, 64), solved=True)
  table = [
    (label, *(efficiency_at(w, found) for w in RATES))
    for label, found in curves.items()
  ]
  draw(curves, os.path.join(out, 'figure.png'))
  files.write_json(
    os.path.join(out, 'summary.json'),
    {'win_rates': RATES, 'efficiency': table, 'curves': curves},
  )
  show.table([('', *(f'at {w}' for w in RATES)), *table], f'in {out}')


if __name__ == '__main__':
  main()
