"""What limits J-BOND's frontier efficiency on the demo's task.

    PYTHONPATH=. python benchmarks/limits_demo.py --out=runs/limits_demo

benchmarks/limits.py asks this of a language whose gradients are exact; here
they are sampled, and one thing at a time is changed in configs/demo.py: sixteen
times the prompts per step, a third of the learning rate, four times the
parameters, with a start of their own. About 100 minutes on one core, more than
half of it the batch of 2,048; finished stages are not repeated. Prints and
writes the KL where the validation prompts first show a win rate, beside what
Best-of-N pays there (no ties), and the end on held-out prompts; draws win rate
against KL.
"""

import argparse
import os

import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np

from benchmarks import compare
from bond_jax.evaluation import evaluate, plotting
from bond_jax.measures import curves
from bond_jax.reward_models import stage
from bond_jax.runs import files, log, paths, show, stages
from bond_jax.training import checks, distil, sft
from configs import demo

WIDER = dict(features=256, heads=8, kv_heads=4, feed_forward=1280)
# label -> the start it shares with others, what is changed
RUNS = {
  'as configured': ('start', {}),
  'rate / 3': ('start', {'train.optimizer.learning_rate': 1.7e-4}),
  'model x 4': ('wide_start', {'model.sizes': WIDER}),
  'batch x 16': ('start', {'train.batch': 2048, 'train.micro_batches': 16}),
}
END = 'win_rate', 'kl', 'frontier_efficiency'


def run(out: str, label: str) -> tuple[list[dict], dict]:
  """The rows of a run's training, and its summary on held-out prompts."""
  start, changes = RUNS[label]
  config = demo.get_config()
  if 'model.sizes' in changes:
    config.model.sizes = changes['model.sizes']
  workdir = os.path.join(out, start)
  stages.stage(
    'sft', sft.train, config, workdir, folder='sft', open_run=checks.open_run
  )
  stage.main(config, workdir)
  config = demo.get_config()
  config.reference = workdir
  config.update_from_flattened_dict(changes)
  workdir = os.path.join(out, label.replace(' ', '_').replace('/', 'over'))
  distil.main(config, workdir)
  stages.stage(
      'evaluate', evaluate.evaluate, config, workdir, folder='.',
      open_run=checks.open_run, table=evaluate.headlines, checkpoint='last',
  )  # fmt: skip
  rows = log.read_rows(os.path.join(workdir, 'train', 'metrics.jsonl'))
  return (
    [row for row in rows if 'kl/reference' in row],
    files.read_json(os.path.join(workdir, 'summary.json')),
  )


def draw(found: dict[str, tuple[list[dict], dict]], path: str) -> None:
  look = plotting.LIGHT
  with mpl.rc_context(plotting.style(look)):
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    ax = figure.add_subplot()
    rate, kl = curves.closed_form(np.geomspace(1, 20))
    ax.plot(kl, rate, ':', color=look['ink'], label='Best-of-N')
    for (label, (rows, _)), colour in zip(
      found.items(), look['colours'], strict=False
    ):
      points = [(r['kl/reference'], r['win_rate/reference']) for r in rows]
      ax.plot(*np.array(points).T, 'o-', color=colour, ms=2.5, label=label)
    ax.set(xlabel='KL to the reference, nats per completion', xlim=(0, 2))
    ax.set(ylabel='win rate on validation prompts', ylim=(0.5, 0.9))
    ax.legend(loc='lower right')
    figure.savefig(path, dpi=160)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=paths.expanded, required=True)
  parser.add_argument('--only', nargs='*', default=list(RUNS), choices=RUNS)
  args = parser.parse_args()
  found = {label: run(args.out, label) for label in args.only}
  rates = compare.ON_THE_WAY
  paid = [float(curves.closed_form(w / (1 - w))[1]) for w in rates]
  table = [('Best-of-N', *paid, *('' for _ in END))]
  for label, (rows, summary) in found.items():
    way = compare.kl_on_the_way(rows).values()
    table.append((label, *way, *(summary[key] for key in END)))
  draw(found, os.path.join(args.out, 'figure.png'))
  files.write_json(os.path.join(args.out, 'summary.json'), table)
  show.table(
    [('', *(f'kl at {w}' for w in rates), *END), *table], f'in {args.out}'
  )


if __name__ == '__main__':
  main()
