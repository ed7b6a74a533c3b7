"""Does a long run leak? 20,000 steps of J-BOND, watched from outside.

    python -m benchmarks.soak --out=runs/soak

Trains on the enumerable language with a tiny model, in a process of its own,
and reads of that process, once a second: resident memory, open files, threads.
Compares the last tenth of the run with the third (the first two are warm-up):
memory may grow by 5 % at most, files and threads by two (pools start theirs
when they are first needed; one lost per save would be seventy), and the median
step may not be slower by a quarter. Writes soak.png and summary.json; ends with
status 1 if something grew. Ten minutes on a quiet machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from absl import app, flags
import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np

from bond_jax.evaluation import plotting
from bond_jax.runs import files, log, paths, show

_OUT = paths.flag('out', None, 'Of the run.', required=True)
_STEPS = flags.DEFINE_integer('steps', 20_000, 'Of the run.')

SETTINGS = {
  'train.batch': 16,
  'train.save_every': 200,
  'enumerable.prompts': 4,
  'enumerable.vocab': 4,
  'model.sizes.features': 16,
  'model.sizes.layers': 1,
  'model.sizes.heads': 2,
  'model.sizes.kv_heads': 1,
  'model.sizes.head_size': 8,
  'model.sizes.feed_forward': 32,
}
# What is watched -> how much there may be at the end, of what there was.
LIMITS = {
  'megabytes': lambda x: 1.05 * x,
  'files': lambda x: x + 2,
  'threads': lambda x: x + 2,
  'step_ms': lambda x: 1.25 * x,
}


def look(pid: int) -> tuple[float, int, int]:
  """Resident megabytes, open files and threads of a process."""
  with open(f'/proc/{pid}/status') as f:
    told = dict(line.split(':', 1) for line in f)
  megabytes = int(told['VmRSS'].split()[0]) / 1024
  files = len(os.listdir(f'/proc/{pid}/fd'))
  return megabytes, files, int(told['Threads'])


def run(workdir: str) -> np.ndarray:
  """Trains; what was seen each second: f64[N, 4], steps done first."""
  settings = {**SETTINGS, 'train.steps': _STEPS.value}
  args = [f'--config.{key}={value}' for key, value in settings.items()]
  process = subprocess.Popen(
    [sys.executable, '-m', 'bond_jax.train',
     '--config=configs/enumerable.py:algorithm=jbond', f'--workdir={workdir}',
     *args],
    stderr=subprocess.DEVNULL,
  )  # fmt: skip
  path, seen = os.path.join(workdir, 'train', 'metrics.jsonl'), []
  steps, place = 0, 0
  while process.poll() is None:
    time.sleep(1)
    if os.path.exists(path):
      with open(path, 'rb') as f:
        f.seek(place)
        new = f.read()
      place += len(new)
      steps += new.count(b'\n')
    try:
      seen.append((steps, *look(process.pid)))
    except (OSError, KeyError):  # it has just ended
      break
  if process.wait():
    raise SystemExit(f'the run ended with status {process.returncode}')
  return np.array(seen, np.float64)


def parts(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
  """Medians of the third and of the last tenth of the run."""
  third = (steps > 0.2 * _STEPS.value) & (steps <= 0.3 * _STEPS.value)
  last = steps > 0.9 * _STEPS.value
  return float(np.median(values[third])), float(np.median(values[last]))


def draw(series, path: str) -> None:
  look = plotting.LIGHT
  with mpl.rc_context(plotting.style(look)):
    figure = Figure(figsize=(8.4, 5.2), layout='constrained')
    for ax, (name, (x, y)) in zip(
      figure.subplots(2, 2).flat, series.items(), strict=True
    ):
      ax.plot(x, y, color=look['colours'][0], lw=1)
      ax.set(xlabel='step', ylabel=name.replace('_', ' '))
      ax.set_ylim(0, 1.3 * float(np.percentile(y, 99)))
    figure.savefig(path, dpi=160)


def main(_) -> None:
  workdir = os.path.join(_OUT.value, 'run')
  if os.path.exists(workdir):
    raise SystemExit(f'{workdir} exists: a soak is one run from start to end')
  seen = run(workdir)
  rows = log.read_rows(os.path.join(workdir, 'train', 'metrics.jsonl'))
  phases = 'seconds/sample', 'seconds/reward', 'seconds/update'
  took = np.array([1e3 * sum(row[k] for k in phases) for row in rows])
  numbers = np.arange(1, len(rows) + 1)
  block = max(1, len(rows) // 200)
  whole = len(rows) // block * block
  blocks = np.median(took[:whole].reshape(-1, block), 1)
  series = {
    name: (seen[:, 0], seen[:, i + 1])
    for i, name in enumerate(('megabytes', 'files', 'threads'))
  } | {'step_ms': (numbers[:whole:block], blocks)}
  result, table, grew = {}, [('', 'after warm-up', 'at the end', 'limit')], []
  for name, (steps, values) in series.items():
    before, after = parts(steps, values)
    result[name] = {'before': before, 'after': after}
    table.append((name, before, after, LIMITS[name](before)))
    if after > LIMITS[name](before):
      grew.append(name)
  draw(series, os.path.join(_OUT.value, 'soak.png'))
  path = os.path.join(_OUT.value, 'summary.json')
  files.write_json(path, {'steps': len(rows), 'grew': grew, **result})
  show.table(table, f'soak: {len(rows):,} steps, see {path}')
  if grew:
    raise SystemExit(f'grew beyond its limit: {", ".join(grew)}')


if __name__ == '__main__':
  app.run(main)
