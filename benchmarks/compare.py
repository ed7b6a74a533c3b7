"""All algorithms on the demo's task, on one budget of sampled completions.

    python benchmarks/compare.py --out=runs/compare --seeds=3

For each seed one start (sft and reward stages), then a train and an evaluate
stage per algorithm, each on 92,160 completions; `configs/demo.py:algorithm=...`
holds the settings. Each policy is judged as it is and extrapolated, which gives
its front. As many runs at a time as there are cores, each on a core of its own,
which takes half the time of each in turn on all of them: some eight minutes a
run. Every stage is resumed where it was stopped. Prints and writes tables, each
cell the mean over seeds and the range: of the end, on held-out prompts, of the
efficiency at given win rates, between two factors, and of the KL on the way,
where the validation prompts first show a win rate; and draws front.png.
"""

import argparse
from concurrent import futures
import functools
import itertools
import json
import os
import queue
import subprocess
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

# What the demo's tilt and QRPO have beside their quantile.
SMALL_STEPS = ('train.optimizer.decay_to=0', 'train.optimizer.layer_rate=0.3')
ON_POLICY = tuple(
  f'algorithm.args.{key}=6' for key in ('num_policy', 'num_anchor', 'rows')
)
# 92,158 completions, drawn once: 11 of each of 8,378 prompts, of which 6 are
# trained on, 1.9 times.
OFFLINE = (
  'data.stored={start}/draw/completions.jsonl', 'algorithm.args.num_anchor=11',
  'algorithm.args.rows=6', 'algorithm.args.kl_weight=0.22', 'train.steps=1000',
  'train.save_every=100',
)  # fmt: skip
# Label -> algorithm of the demo's config, and settings.
RUNS = {
  'J-BOND': ('jbond', ()),
  'J-BOND, small steps': ('jbond', SMALL_STEPS),
  'BOND': ('bond', ()),
  'Best-of-4 SFT': ('best_of_n', ()),
  'QRPO': ('qrpo', ()),
  'QRPO, on-policy': ('qrpo', ON_POLICY),
  'QRPO, offline': ('qrpo', OFFLINE),
  'WIND squared': ('wind', ()),
  'WIND, small steps': ('wind', SMALL_STEPS),
  'WIND KL': ('wind', ('algorithm.args.risk=kl',)),
  'WIND NCE': ('wind', ('algorithm.args.risk=nce',)),
  'SPPO': ('sppo', ()),
  'RLOO': ('rloo', ()),
  'RLOO, small steps': ('rloo', SMALL_STEPS),
  'online DPO': ('online_dpo', ()),
  'tilt': ('tilt', ()),
  'tilt, large steps': (
    'tilt', ('train.optimizer.decay_to=0.1', 'train.optimizer.layer_rate=1'),
  ),
}  # fmt: skip
FACTORS = (0.4, 0.6, 0.8, 1.2, 1.4, 1.6)  # and 1
SHOWN = ('win_rate', 'kl', 'frontier_efficiency', 'effective_n',
         'gold_win_rate', 'signal_fires', 'seconds')  # fmt: skip
ON_THE_WAY = (0.65, 0.7, 0.75, 0.8)
FRONT = (*ON_THE_WAY, 0.85)
CORES = queue.SimpleQueue()
for _core in sorted(os.sched_getaffinity(0)):
  CORES.put(_core)


def stage(name: str, workdir: str, config: str, *flags: str) -> None:
  """Runs one stage as a user would, on a free core; it logs in the workdir."""
  os.makedirs(workdir, exist_ok=True)
  command = [
    sys.executable, '-m', f'bond_jax.{name}', f'--workdir={workdir}',
    f'--config=configs/{config}', *flags,
  ]  # fmt: skip
  core = CORES.get()
  pin = functools.partial(os.sched_setaffinity, 0, {core})
  try:
    with open(os.path.join(workdir, f'{name}.log'), 'a') as log:
      subprocess.run(
        command, check=True, stdout=log, stderr=log, preexec_fn=pin
      )
  finally:
    CORES.put(core)


def start(out: str, offline: bool, seed: int) -> None:
  """The start, the reward and the stored completions of a seed's runs."""
  workdir = os.path.join(out, f'start_{seed}')
  for name in ('sft', 'reward_model'):
    stage(name, workdir, 'demo.py', f'--config.seed={seed}')
  if offline:
    drawn = ('--n=11', '--prompts=8378')
    stage('draw', workdir, 'demo.py', f'--config.seed={seed}', *drawn)


def run(out: str, seed: int, label: str) -> dict:
  """One algorithm, one seed: the summary of its evaluation."""
  algorithm, settings = RUNS[label]
  folder = label.replace(',', '').replace(' ', '_')
  workdir = os.path.join(out, f'{folder}_{seed}')
  begun = os.path.join(out, f'start_{seed}')
  flags = [f'--config.{x.format(start=begun)}' for x in settings]
  flags.append(f'--config.reference={begun}')
  flags.append(f'--config.seed={seed}')
  config = f'demo.py:algorithm={algorithm}'
  stage('train', workdir, config, *flags)
  factors = ','.join(f'{x:g}' for x in FACTORS)
  stage('evaluate', workdir, config, *flags, f'--extrapolate={factors}')
  with open(os.path.join(workdir, 'summary.json')) as f:
    found = json.load(f)
  with open(os.path.join(workdir, 'train', 'summary.json')) as f:
    found['seconds'] = json.load(f)['seconds']
  if settings is OFFLINE:
    with open(os.path.join(begun, 'draw', 'metrics.jsonl')) as f:
      rows = [json.loads(line) for line in f]
    found['seconds'] += sum(
      row[key] for row in rows for key in row if key.startswith('seconds/')
    )
  print(seed, label, *(f'{k} {found[k]}' for k in SHOWN), flush=True)
  with open(os.path.join(workdir, 'train', 'metrics.jsonl')) as f:
    found |= kl_on_the_way([json.loads(line) for line in f])
  return found | efficiency_at(front(found))


def front(found: dict) -> list[tuple[float, float]]:
  """Win rate and frontier efficiency of a policy at each factor, in order."""
  rows = [found, *found['extrapolated'].values()]
  pairs = [(row['win_rate'], row['frontier_efficiency']) for row in rows]
  return sorted(pair for pair in pairs if pair[1] is not None)


def efficiency_at(points) -> dict[str, float | None]:
  """The efficiency at each win rate of FRONT, between two points."""
  found = dict.fromkeys(f'efficiency at {rate}' for rate in FRONT)
  for rate in FRONT:
    for (w0, e0), (w1, e1) in itertools.pairwise(points):
      if w0 <= rate <= w1:
        share = (rate - w0) / max(w1 - w0, 1e-9)
        found[f'efficiency at {rate}'] = e0 + (e1 - e0) * share
        break
  return found


def draw(rows: dict[str, list[dict]], path: str) -> None:
  """front.png: efficiency against win rate, a line for each run."""
  fig, axis = plt.subplots(figsize=(8, 5))
  colours = plt.get_cmap('tab10' if len(rows) <= 10 else 'tab20').colors
  for i, (label, found) in enumerate(rows.items()):
    for j, row in enumerate(found):
      x, y = zip(*front(row), strict=True)
      axis.plot(
        x,
        y,
        color=colours[i % len(colours)],
        linewidth=1,
        label=label if not j else None,
      )
      axis.plot(
        row['win_rate'],
        row['frontier_efficiency'],
        'o',
        color=colours[i % len(colours)],
      )
  axis.axhline(1, color='grey', linewidth=0.8, linestyle=':')
  axis.set(
    xlabel='win rate against the reference',
    ylabel='frontier efficiency (Best-of-N is 1)',
    ylim=(0, 1.05),
  )
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(frameon=False, fontsize=8, ncols=2)
  fig.tight_layout()
  fig.savefig(path, dpi=120)
  plt.close(fig)


def kl_on_the_way(rows: list[dict]) -> dict[str, float | None]:
  """The KL where a run first passes each win rate, between two probes."""
  keys = 'win_rate/reference', 'kl/reference'
  points = [tuple(row[k] for k in keys) for row in rows if keys[0] in row]
  found = dict.fromkeys(f'kl at {rate}' for rate in ON_THE_WAY)
  for rate in ON_THE_WAY:
    for (w0, kl0), (w1, kl1) in itertools.pairwise(points):
      if w0 <= rate <= w1:
        found[f'kl at {rate}'] = kl0 + (kl1 - kl0) * (rate - w0) / (w1 - w0)
        break
  return found


def table(rows: dict[str, list[dict]], keys) -> str:
  """Markdown: mean over the seeds that have a number, and the range."""
  lines = [
    '| algorithm | ' + ' | '.join(keys) + ' |',
    '|---' * (1 + len(keys)) + '|',
  ]
  for label, found in rows.items():
    cells = []
    for key in keys:
      values = [row[key] for row in found if row[key] is not None]
      cell = 'n/a'
      if values:
        mean, low, high = sum(values) / len(values), min(values), max(values)
        cell = f'{mean:.3f} ({low:.3f} to {high:.3f})'
      if 0 < len(values) < len(found):
        cell += f', {len(values)} of {len(found)} runs'
      cells.append(cell)
    lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=os.path.expanduser, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--only', nargs='*', default=list(RUNS))
  args = parser.parse_args()
  seeds = range(args.seeds)
  with futures.ThreadPoolExecutor(CORES.qsize()) as pool:
    offline = any('offline' in label for label in args.only)
    list(pool.map(functools.partial(start, args.out, offline), seeds))
    pairs = list(itertools.product(seeds, args.only))
    found = pool.map(
      functools.partial(run, args.out), *zip(*pairs, strict=True)
    )
    rows = {label: [] for label in args.only}
    for (_, label), row in zip(pairs, found, strict=True):
      rows[label].append(row)
  with open(os.path.join(args.out, 'table.json'), 'w') as f:
    json.dump(rows, f, indent=2)
  print(table(rows, SHOWN))
  print(table(rows, [f'efficiency at {rate}' for rate in FRONT]))
  print(table(rows, [f'kl at {rate}' for rate in ON_THE_WAY]))
  draw(rows, os.path.join(args.out, 'front.png'))


if __name__ == '__main__':
  main()
