"""A figure of a paper, at laptop scale: several train runs, one drawing.

    python -m benchmarks.papers.reproduce --config=configs/figures.py:bond_2 \
      --workdir=runs/figures/bond_2

Runs every config of `config.runs` on the enumerable language, each in its own
folder below the workdir, and draws the panels of `config.figure` from the
exact measures that the runs have logged, beside those of exact Best-of-N.
Writes figure.png, figure.json (every series that is drawn) and summary.json.
A run that has finished is not repeated.
"""

from __future__ import annotations

import os
import re
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
import ml_collections
import numpy as np

from bond_jax.algorithms.parts import quantiles
from bond_jax.devices import hosts, sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import plotting
from bond_jax.measures import exact, tables
from bond_jax.runs import command, environment, files, log, show, stages
from bond_jax.runs.settings import fields
from bond_jax.training import checks, distil, setups
from bond_jax.training.tasks import enumerable

LABELS = {
  'step': 'step',
  'completions': 'completions drawn',
  'seconds': 'seconds of training',
  'backward_kl': 'KL(policy || Best-of-N), nats',
  'forward_kl': 'KL(Best-of-N || policy), nats',
  'log_quantile': 'mean log-quantile',
  'kl/reference': 'KL to the reference, nats',
  'reward/validation': 'mean reward',
  'win_rate/reference': 'win rate against the reference',
  'log_n': 'log of the effective N',
  'quantile': 'quantile p of a completion',
  'quantile_reward': 'mean reward, nats',
}
Series = dict[str, list[float]]


def run_all(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains what has not been trained: label -> the series of its probes."""
  out = {}
  for name in sorted(config.runs, key=in_order):
    run = config.runs[name]
    folder = os.path.join(workdir, 'runs', name)
    stages.stage(
      'train',
      distil.train,
      run,
      folder,
      folder='train',
      open_run=checks.open_run,
    )
    rows = log.read_rows(os.path.join(folder, 'train', 'metrics.jsonl'))
    out[config.labels[name]] = series(rows, run)
  return out


def in_order(name: str) -> list:
  """Sorts numbers in a name, 0_1 for 0.1, as numbers, not as text."""
  parts = re.split(r'(\d+(?:_\d+)?)', name)
  return [float(p.replace('_', '.')) if p[:1].isdigit() else p for p in parts]


def series(rows: list[dict[str, Any]], run) -> Series:
  """The probed rows, with what they had cost by then."""
  algorithm = setups.make_algorithm(run)
  per_step = (
    run.train.batch
    * (algorithm.num_policy + algorithm.num_anchor)
    / run.train.epochs
  )
  # The first step compiles; no probe is part of the training.
  times = [
    sum(v for k, v in row.items() if k.startswith('seconds/'))
    - row.get('seconds/evaluate', 0)
    for row in rows
  ]
  spent = np.cumsum([0.0, *times[1:]])
  probed = [i for i, row in enumerate(rows) if 'kl/reference' in row]
  keys = [k for k in LABELS if k in rows[probed[0]]]
  out = {key: [rows[i][key] for i in probed] for key in keys}
  out['step'] = [rows[i]['step'] for i in probed]
  out['completions'] = [per_step * step for step in out['step']]
  out['seconds'] = [float(spent[i]) for i in probed]
  ns = [rows[i].get('effective_n') for i in probed]
  out['log_n'] = [float(np.log(n)) if n else float('nan') for n in ns]
  return out


def best_of_n(run: ml_collections.ConfigDict, ns) -> Series:
  """The same measures of exact Best-of-N, for each N."""
  task = enumerable.make(
    stages.Run(run, '', sharding.make_mesh(data=1, model=1))
  )
  known = enumerable.know(run, task.policy, task.frozen)
  rows = [
    exact.measure(tables.best_of_n(known.log_reference, known.reward, n), known)
    for n in ns
  ]
  out = {k: [row[k] for row in rows] for k in rows[0] if k in LABELS}
  out['log_n'] = np.log(ns).tolist()
  return out


def quantile_curves() -> dict[str, Series]:
  """BOND's Figure 8: the mean of J-BOND's reward, and log p, against p."""
  p = np.linspace(0.005, 1, 200)
  curves = {'log p': np.log(p)}
  for k in (1, 2, 3):
    floor = quantiles.floor(np.zeros((1, 1)), np.ones((1, k))).item()
    curves[f'floor of {k} draws'] = floor * (1 - p) ** k
  return {
    label: {'quantile': p.tolist(), 'quantile_reward': y.tolist()}
    for label, y in curves.items()
  }


def draw(config, runs: dict[str, Series], beside: Series, path: str) -> None:
  """The panels, side by side."""
  look, panels = plotting.LIGHT, config.figure.panels
  with mpl.rc_context(plotting.style(look)):
    figure = Figure(figsize=(4.3 * len(panels), 3.6), layout='constrained')
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for ax, (x, y) in zip(axes, panels, strict=True):
      for i, (label, points) in enumerate(runs.items()):
        colour = look['colours'][i % len(look['colours'])]
        dashes = '--' if i >= len(look['colours']) else '-'
        ax.plot(points[x], points[y], dashes, color=colour, label=label)
      beside_best_of_n(ax, beside, x, y, config.figure.best_of, look)
      ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
      if x == 'completions':
        ax.xaxis.set_major_formatter(EngFormatter())
      if y in config.figure.log:
        ax.set_yscale('log')
    figure.suptitle(config.figure.title, fontsize=10)
    axes[-1].legend(loc='best')
    figure.text(0.005, -0.04, config.figure.note, fontsize=7)
    figure.savefig(path, dpi=160, bbox_inches='tight')


def beside_best_of_n(ax, beside: Series, x: str, y: str, ns, look) -> None:
  """Best-of-N as a curve where x is a measure, else as a level for each N."""
  if y not in beside or y.endswith('_kl'):
    return
  if x in beside:
    ax.plot(beside[x], beside[y], 'o:', color=look['ink'], ms=3,
            label='exact Best-of-N')  # fmt: skip
    return
  for n, level in zip(ns, beside[y], strict=True):
    ax.axhline(level, color=look['faint'], lw=1, ls=':')
    ax.annotate(f'N = {n:g}', (1, level), xycoords=('axes fraction', 'data'),
                fontsize=7, ha='right', va='bottom')  # fmt: skip


_NAMES = fields.several(fields.one_of(*LABELS))
_PANEL = fields.Rule(
  f'a pair of names of {", ".join(LABELS)}',
  lambda x: _NAMES.allows(x) and len(x) == 2,
)
# Of a config of several runs, but for the runs themselves.
RULES = dict(
  runs={'*': fields.TABLE}, labels={'*': fields.TEXT},
  figure=dict(
    title=fields.TEXT, panels=fields.several(_PANEL, 1), log=_NAMES,
    best_of=fields.several(fields.COUNT), reach=fields.several(fields.SHARE),
    note=fields.TEXT,
  ),
)  # fmt: skip


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses what would end the last of the runs, before the first."""
  fields.check(config.to_dict(), rules=RULES)
  if config.runs.keys() != config.labels.keys():
    raise UserError(
      f'config.labels has {", ".join(config.labels)}, and config.runs'
      f' {", ".join(config.runs)}; give each run a label.'
    )
  for run in config.runs.values():
    checks.check(run)


def reproduce(config: ml_collections.ConfigDict, workdir: str) -> None:
  hosts.start()
  check(config)
  os.makedirs(workdir, exist_ok=True)
  runs, beside = run_all(config, workdir), {}
  if runs:
    first = next(iter(config.runs.values()))
    beside = best_of_n(first, config.figure.best_of)
  else:
    runs = quantile_curves()
  draw(config, runs, beside, os.path.join(workdir, 'figure.png'))
  files.write_json(
    os.path.join(workdir, 'figure.json'), {'runs': runs, 'best_of_n': beside}
  )
  shown = [k for k in LABELS if k in next(iter(runs.values()))]
  last = {label: {k: r[k][-1] for k in shown} for label, r in runs.items()}
  for rate in config.figure.reach:
    for label, points in runs.items():
      last[label] |= what_it_took(points, rate)
  summary = {'title': config.figure.title, 'at_the_end': last}
  files.write_json(
    os.path.join(workdir, 'summary.json'),
    {**summary, 'versions': environment.versions()},
  )
  wanted = {key for panel in config.figure.panels for key in panel}
  head = [k for k in next(iter(last.values())) if k in wanted or ' to ' in k]
  table = [(label, *(row[k] for k in head)) for label, row in last.items()]
  show.table([('', *head), *table], f'{config.figure.title}: {workdir}')


def what_it_took(points: Series, rate: float) -> dict[str, float | None]:
  """Completions and seconds until a win rate is passed, between probes."""
  rates = points['win_rate/reference']
  out = {}
  for key in ('completions', 'seconds', 'kl/reference'):
    found = None
    for i in range(1, len(rates)):
      if rates[i - 1] <= rate <= rates[i]:
        found = float(np.interp(rate, rates[i - 1 : i + 1],
                                points[key][i - 1 : i + 1]))  # fmt: skip
        break
    if rates[0] > rate:
      found = points[key][0]  # before the first probe: an upper bound
    out[f'{key} to {rate:g}'] = found
  return out


if __name__ == '__main__':
  command.run(reproduce, __doc__)
