"""All algorithms on the demo's task, on one budget of sampled completions.

    python benchmarks/compare.py --out=runs/compare --seeds=3

For each seed one start (sft and reward stages), then a train and an evaluate
stage per algorithm, each on 92,160 completions; `configs/demo.py:algorithm=...`
holds the settings. Every stage is resumed where it was stopped. Prints and
writes the table, the mean and the spread over seeds.
"""

import argparse
import json
import os
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


def stage(name: str, workdir: str, algorithm: str, seed: int, *flags: str):
  """Runs one stage as a user would; its output goes into the workdir."""
  os.makedirs(workdir, exist_ok=True)
  with open(os.path.join(workdir, f'{name}.log'), 'a') as log:
    subprocess.run(
      [
        sys.executable, '-m', f'bond_jax.{name}', f'--workdir={workdir}',
        f'--config=configs/demo.py:algorithm={algorithm}',
        f'--config.seed={seed}', *flags,
      ],
      check=True, stdout=log, stderr=log,
    )  # fmt: skip


def run(out: str, label: str, seed: int) -> dict:
  """One algorithm, one seed: the summary of its evaluation."""
  start = os.path.join(out, f'start_{seed}')
  for name in ('sft', 'reward_model'):
    stage(name, start, 'jbond', seed)
  algorithm, args = ALGORITHMS[label]
  workdir = os.path.join(out, f'{label.replace(" ", "_")}_{seed}')
  flags = [f'--config.algorithm.args.{k}={v}' for k, v in args.items()]
  for name in ('train', 'evaluate'):
    stage(name, workdir, algorithm, seed, f'--config.reference={start}', *flags)
  with open(os.path.join(workdir, 'summary.json')) as f:
    return json.load(f)


def table(rows: dict[str, list[dict]]) -> str:
  """Markdown: mean over seeds, and the range."""
  lines = [
    '| algorithm | ' + ' | '.join(SHOWN) + ' |',
    '|---' * (len(SHOWN) + 1) + '|',
  ]
  for label, found in rows.items():
    cells = []
    for key in SHOWN:
      values = [row[key] for row in found if row[key] is not None]
      if not values:
        cells.append('n/a')
        continue
      mean = sum(values) / len(values)
      low, high = min(values), max(values)
      cells.append(f'{mean:.3f} ({low:.3f} to {high:.3f})')
    lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--only', nargs='*', default=list(ALGORITHMS))
  args = parser.parse_args()
  rows = {label: [] for label in args.only}
  for seed in range(args.seeds):
    for label in args.only:
      rows[label].append(run(args.out, label, seed))
      print(seed, label, *(f'{k} {rows[label][-1][k]}' for k in SHOWN))
      with open(os.path.join(args.out, 'table.json'), 'w') as f:
        json.dump(rows, f, indent=2)
  print(table(rows))


if __name__ == '__main__':
  main()
