"""Many runs in one figure: the win rate of each against the KL it pays.

    python -m bond_jax.evaluate --sweep='runs/*' --out=runs/sweep

Draws no completions: it reads the metrics and summaries of the runs. A point is
a checkpoint on the validation prompts, as training measured it, or an
evaluation on the test prompts. Writes sweep.png and summary.json; as BOND's
Figures 5 to 7.
"""

import glob
import os
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np

from bond_jax.errors import UserError
from bond_jax.evaluation import plotting
from bond_jax.measures import curves
from bond_jax.runs import files, log, show

_LARGEST = 1e100  # sums and squares of numbers as large are still finite
KEYS = 'step', 'kl/reference', 'win_rate/reference', 'reward/validation'
# Of an evaluation: what must be a number, and what the table repeats.
_NUMBERS = 'kl', 'kl_stderr', 'win_rate', 'reward_policy'
_MAYBE = 'effective_n', 'frontier_efficiency'
_REPEATED = (
  'checkpoint', 'kl', 'kl_stderr', 'win_rate', 'win_rate_interval',
  'reward_policy', *_MAYBE, 'frontier_reason',
)  # fmt: skip


class Points(NamedTuple):
  """Checkpoints of one run, [P] each."""

  step: np.ndarray
  kl: np.ndarray  # to the reference, nats per completion
  win_rate: np.ndarray
  reward: np.ndarray


def sweep(pattern: str, out: str | None) -> None:
  """Reads all runs that a pattern matches, and writes figure and table."""
  folders = [
    os.path.normpath(path)
    for path in sorted(glob.glob(pattern))
    if os.path.exists(os.path.join(path, 'config.json'))
  ]
  found = {path: checkpoints(path) for path in folders}
  runs = {path: points for path, points in found.items() if len(points.step)}
  why = 'it has no checkpoint with a win rate and a KL'
  skipped = {path: why for path in folders if path not in runs}
  if not runs:
    got = f'{len(skipped)} without checkpoints' if skipped else 'no runs'
    raise UserError(
      f'--sweep={pattern} names {got}; it needs folders in which the train'
      ' stage has saved a checkpoint, and quotes around a pattern.'
    )
  summary = summarise(runs) | {'pattern': pattern, 'skipped': skipped}
  out = out or os.path.join(os.path.dirname(folders[0]), 'sweep')
  os.makedirs(out, exist_ok=True)
  path = os.path.join(out, 'sweep.png')
  draw(runs, summary, path)
  files.write_json(os.path.join(out, 'summary.json'), summary)
  for folder in skipped:
    print(f'sweep: {folder} is left out, because {why}')
  show.table(table(summary), f'sweep: done, see {path}')


def checkpoints(folder: str) -> Points:
  """The measures of each saved checkpoint, from the metrics of training.

  A checkpoint with a null, that is a number that was not finite, is left out.
  """
  path = os.path.join(folder, 'train', 'metrics.jsonl')
  rows = log.read_rows(path) if os.path.exists(path) else []
  found = [[row.get(k) for k in KEYS] for row in rows]
  kept = [values for values in found if None not in values]
  for values in kept:
    _check_numbers(path, dict(zip(KEYS, values)))
  return Points(*np.array(kept, np.float64).reshape(-1, len(KEYS)).T)


def evaluations(folder: str) -> list[dict[str, Any]]:
  """The summaries of a run's evaluations against its reference."""
  names = glob.glob('summary.json', root_dir=folder)
  names += sorted(glob.glob('evaluate/*/summary.json', root_dir=folder))
  found = []
  for path in (os.path.join(folder, name) for name in names):
    summary = files.read_json(path)
    if summary.get('against', 'reference') == 'reference':
      _check_evaluation(path, summary)
      found.append(summary)
  return found


def _check_evaluation(path: str, summary: dict[str, Any]) -> None:
  """A UserError unless a summary has the numbers that are drawn of it."""
  interval = summary.get('win_rate_interval')
  if not isinstance(interval, list) or len(interval) != 2:
    interval = [None, None]
  numbers = {key: summary.get(key) for key in _NUMBERS}
  numbers |= {f'win_rate_interval[{i}]': x for i, x in enumerate(interval)}
  numbers |= {k: summary[k] for k in _MAYBE if summary.get(k) is not None}
  _check_numbers(path, numbers)


def _check_numbers(path: str, values: dict[str, Any]) -> None:
  for key, value in values.items():
    if not log.is_number(value) or abs(value) > _LARGEST:
      raise UserError(
        f'{path}: {key} is {value!r:.60}, expected a number; the file was'
        ' changed or is of another version: restore it, or move it away.'
      )


def summarise(runs: dict[str, Points]) -> dict[str, Any]:
  """The table: of each run its last and its best checkpoint, and front_area.

  front_area is the mean over KLs from 0 to kl_limit of the highest win rate
  that a run has reached at or below that KL; before its first checkpoint it is
  one half. kl_limit is the largest KL of all runs: a run that stops early keeps
  its win rate. Best-of-N without ties has the area best_of_n_area.
  """
  limit = float(max(run.kl.max() for run in runs.values()))
  free_rate, free_kl = curves.closed_form(np.geomspace(1, 1e6, 20_000))
  grid = np.linspace(0, limit, 2001)
  rows = {}
  for name, run in runs.items():
    rows[name] = {
      'checkpoints': len(run.step),
      'last': _point(run, -1),
      'best': _point(run, int(run.win_rate.argmax())),
      'front_area': front_area(run.kl, run.win_rate, limit),
      'front': [int(i) for i in run.step[on_front(run.kl, run.win_rate)]],
      'evaluations': [
        {key: x[key] for key in _REPEATED if key in x}
        for x in evaluations(name)
      ],
    }
  return {
    'kl_limit': limit,
    'best_of_n_area': float(np.interp(grid, free_kl, free_rate).mean()),
    'runs': rows,
  }


def _point(run: Points, i: int) -> dict[str, float]:
  return {key: float(values[i]) for key, values in run._asdict().items()}


def on_front(kl: np.ndarray, win_rate: np.ndarray) -> np.ndarray:
  """Points that no other beats in both, in order of KL: indices."""
  order = np.lexsort((-win_rate, kl))
  highest = np.maximum.accumulate(win_rate[order])
  rises = np.concatenate([[True], highest[1:] > highest[:-1]])
  return order[rises]


def front_area(kl: np.ndarray, win_rate: np.ndarray, limit: float) -> float:
  """The mean win rate of the staircase under the front, from KL 0 to limit."""
  front = on_front(kl, win_rate)
  # An estimated KL may be a little below 0; a win rate below 1/2 counts as 1/2.
  starts = np.clip([0, *kl[front], limit], 0, limit)
  heights = np.maximum.accumulate([0.5, *win_rate[front]])
  if not limit:
    return float(heights[-1])
  return float(np.diff(starts) @ heights / limit)


def table(summary: dict[str, Any]) -> list[tuple]:
  """Runs, the best front first."""
  head = ('run', 'saved', 'front area', 'best win rate', 'at KL', 'effective N',
          'efficiency')  # fmt: skip
  rows = []
  by_area = lambda item: -item[1]['front_area']
  for name, row in sorted(summary['runs'].items(), key=by_area):
    evaluation = row['evaluations'][0] if row['evaluations'] else {}
    rows.append(
      (name, row['checkpoints'], row['front_area'], row['best']['win_rate'],
       row['best']['kl'], *(evaluation.get(key) for key in _MAYBE))
    )  # fmt: skip
  free = ('Best-of-N, no ties', '', summary['best_of_n_area'], *[''] * 4)
  return [head, *rows, free]


def draw(runs: dict[str, Points], summary: dict[str, Any], path: str) -> None:
  """Win rate and reward against KL, side by side, with all evaluations."""
  look = plotting.LIGHT
  with mpl.rc_context(plotting.style(look)):
    figure = Figure(figsize=(9.2, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    rate, kl = curves.closed_form(np.geomspace(1, 1e4, 400))
    left.plot(kl, rate, '--', color=look['ink'], lw=1,
              label='Best-of-N, no ties')  # fmt: skip
    markers = 'osD^vP'
    for i, (name, run) in enumerate(runs.items()):
      turn, place = divmod(i, len(look['colours']))
      marker, colour = markers[turn % len(markers)], look['colours'][place]
      line = dict(color=colour, marker=marker, ms=3, lw=1)
      order = np.argsort(run.kl)
      left.plot(run.kl[order], run.win_rate[order], label=name, **line)
      right.plot(run.kl[order], run.reward[order], **line)
      star = dict(fmt='*', ms=9, color=colour, elinewidth=1)
      for x in summary['runs'][name]['evaluations']:
        bars = plotting.error_bars(x['win_rate'], *x['win_rate_interval'])
        left.errorbar(x['kl'], x['win_rate'], xerr=1.96 * abs(x['kl_stderr']),
                      yerr=bars[:, None], **star)  # fmt: skip
        right.errorbar(x['kl'], x['reward_policy'], **star)
    edge = 1.06 * summary['kl_limit'] or 1.0
    for ax in (left, right):
      ax.set(xlabel='KL to the reference, nats per completion',
             xlim=(-0.02 * edge, edge))  # fmt: skip
    left.set(ylabel='win rate against the reference')
    right.set(ylabel='reward')
    lowest = min(run.win_rate.min() for run in runs.values())
    left.set_ylim(min(0.48, lowest - 0.02), 1.005)
    figure.legend(loc='outside lower center', ncols=min(3, len(runs) + 1))
    right.set_title('dots: validation, while training; stars: evaluations',
                    fontsize=8, loc='right')  # fmt: skip
    figure.savefig(path, dpi=160)
