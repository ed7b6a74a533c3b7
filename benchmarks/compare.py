"""All algorithms on the demo's task, on one budget of sampled completions.

    python benchmarks/compare.py --out=runs/compare --seeds=3

For each seed one start (sft and reward stages), then a train and an evaluate
stage per algorithm, each on 92,160 completions; `configs/demo.py:algorithm=...`
holds the settings. As many runs at a time as there are cores, each on a core of
its own, which takes half the time of each in turn on all of them: about 80
minutes on two cores. Every stage is resumed where it was stopped. Prints and
writes two tables, each cell the mean over seeds and the range: of the end, on
held-out prompts, and of the KL on the way, where the validation prompts first
show a win rate.
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

ALGORITHMS = {
  'J-BOND': ('jbond', {}),
  'BOND': ('bond', {}),
  'Best-of-4 SFT': ('best_of_n', {}),
  'WIND squared': ('wind', {}),
  'WIND KL': ('wind', {'risk': 'kl'}),
  'WIND NCE': ('wind', {'risk': 'nce'}),
  'SPPO': ('sppo', {}),
  'RLOO': ('rloo', {}),
  'online DPO': ('online_dpo', {}),
}
SHOWN = ('win_rate', 'kl', 'frontier_efficiency', 'effective_n',
         'gold_win_rate', 'signal_fires')  # fmt: skip
ON_THE_WAY = (0.65, 0.7, 0.75, 0.8)
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


def start(out: str, seed: int) -> str:
  """The start and the reward that a seed's algorithms share: their folder."""
  workdir = os.path.join(out, f'start_{seed}')
  for name in ('sft', 'reward_model'):
    stage(name, workdir, 'demo.py', f'--config.seed={seed}')
  return workdir


def run(out: str, seed: int, label: str) -> dict:
  """One algorithm, one seed: the summary of its evaluation."""
  algorithm, args = ALGORITHMS[label]
  workdir = os.path.join(out, f'{label.replace(" ", "_")}_{seed}')
  flags = [f'--config.algorithm.args.{k}={v}' for k, v in args.items()]
  flags.append(f'--config.reference={os.path.join(out, f"start_{seed}")}')
  flags.append(f'--config.seed={seed}')
  for name in ('train', 'evaluate'):
    stage(name, workdir, f'demo.py:algorithm={algorithm}', *flags)
  with open(os.path.join(workdir, 'summary.json')) as f:
    found = json.load(f)
  print(seed, label, *(f'{k} {found[k]}' for k in SHOWN), flush=True)
  with open(os.path.join(workdir, 'train', 'metrics.jsonl')) as f:
    found |= kl_on_the_way([json.loads(line) for line in f])
  return found


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
  parser.add_argument('--only', nargs='*', default=list(ALGORITHMS))
  args = parser.parse_args()
  seeds = range(args.seeds)
  with futures.ThreadPoolExecutor(CORES.qsize()) as pool:
    list(pool.map(functools.partial(start, args.out), seeds))
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
  print(table(rows, [f'kl at {rate}' for rate in ON_THE_WAY]))


if __name__ == '__main__':
  main()
