"""How far a learnt reward can be trusted: proxy against gold as the KL grows.

    make overoptimisation

One start (sft, and the reward model that people's ratings taught), then J-BOND
with gamma 0 and 1 and RLOO, all driven far by configs/overoptimisation.py, and
Best-of-N of the reference. On the way of each run 256 openings of the test
split show what the learnt reward (the proxy) and VADER (gold, which nothing is
trained on) say: the win rate against the reference, ties half. Best-of-N is
counted on the reference completions that the runs' evaluations drew. A run to a
core, under 20 minutes on two; finished stages are not repeated.
"""

import argparse
from concurrent import futures
import functools
import json
import os

import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np

from benchmarks import compare
from bond_jax.evaluation import plotting
from bond_jax.measures import aggregate, curves
from bond_jax.runs import files, log, paths
from bond_jax.runs.settings import configs
from configs import demo_learned_reward, overoptimisation

LABELS = {
  'jbond_0': 'J-BOND, gamma 0',
  'jbond_1': 'J-BOND, gamma 1',
  'rloo': 'RLOO',
}
NS = (1, 2, 4, 8, 16, 32, 64)
TICKS = (0, 0.2, 0.5, 1, 2, 3, 4, 6, 8, 10, 13, 17)
KLS = (0.5, 1.0, 2.0, 3.0, 5.0)  # at which the table reads the curves
# Of a probe of the train stage -> of a curve.
KEYS = {
  'kl/reference': 'kl',
  'win_rate/reference': 'proxy',
  'win_rate/gold': 'gold',
  'gold/validation': 'gold_mean',
}


def start(out: str, pool: futures.Executor) -> None:
  """The two stages before training, side by side: neither needs the other."""
  config = demo_learned_reward.get_config()
  configs.claim_workdir(os.path.join(out, 'start'), config)
  stages = ('sft', 'reward_model')
  run_one = lambda name: compare.stage(
    name, os.path.join(out, 'start'), 'demo_learned_reward.py'
  )
  list(pool.map(run_one, stages))


def run(out: str, name: str) -> list[dict[str, float]]:
  """Trains and evaluates one run; the points of its way, the first at 0."""
  workdir = os.path.join(out, name)
  flag = f'--config.reference={os.path.join(out, "start")}'
  for stage in ('train', 'evaluate'):
    compare.stage(stage, workdir, f'overoptimisation.py:run={name}', flag)
  rows = log.read_rows(os.path.join(workdir, 'train', 'metrics.jsonl'))
  return [dict(kl=0.0, proxy=0.5, gold=0.5)] + [
    {ours: row[theirs] for theirs, ours in KEYS.items()}
    for row in rows
    if 'win_rate/gold' in row
  ]


def references(out: str) -> tuple[np.ndarray, np.ndarray]:
  """Rewards and golds of the pooled reference completions, f64[X, S] each.

  The runs draw with seeds of their own, on the same openings.
  """
  sides = []
  for name in overoptimisation.RUNS:
    with open(os.path.join(out, name, 'completions.jsonl')) as f:
      sides.append(aggregate.grid(map(json.loads, f), 'reference'))
  if any(side['id'] != sides[0]['id'] for side in sides):
    raise ValueError('the runs were evaluated on different openings')
  join = lambda key: np.concatenate([side[key] for side in sides], 1)
  return join('reward'), join('gold')


def chances(rewards: np.ndarray, n: int) -> np.ndarray:
  """How often each sample is the best of n of them, all drawn alike.

  The mean over all subsets of n, so without bias; of tied ones each is the best
  as often as the others.

  Args:
    rewards: f64[X, S].
    n: S at most.

  Returns:
    f64[X, S], the sum over S being 1.
  """
  size = rewards.shape[1]
  a, b = rewards[:, :, None], rewards[:, None, :]
  below, up_to = (a > b).sum(-1), (a >= b).sum(-1)

  def within(count):  # C(count, n) / C(S, n): all n are among so many
    place = np.arange(n)
    return (np.maximum(count[..., None] - place, 0) / (size - place)).prod(-1)

  return (within(up_to) - within(below)) / (up_to - below)


def best_of_n(rewards: np.ndarray, golds: np.ndarray) -> list[dict]:
  """What Best-of-N by the proxy makes of both scores, for each of NS.

  A third of the completions are the opponents, the others are chosen from. The
  KL is that of `curves.best_of_n_curve`, ties and all.
  """
  third = rewards.shape[1] // 3
  kl = curves.best_of_n_curve(rewards, np.array(NS)).kl
  beats = lambda x: (
    (
      (x[:, third:, None] > x[:, None, :third]).mean(-1)
      + (x[:, third:, None] >= x[:, None, :third]).mean(-1)
    )
    / 2
  )
  points = []
  for i, n in enumerate(NS):
    chance = chances(rewards[:, third:], n)
    mean = lambda x, chance=chance: (chance * x).sum(-1)
    gold = mean(beats(golds))
    points.append(dict(
      n=n, kl=float(kl[i]), proxy=float(mean(beats(rewards)).mean()),
      gold=float(gold.mean()), gold_mean=float(mean(golds[:, third:]).mean()),
      gold_interval=curves.interval(curves.resampled(len(gold)) @ gold),
    ))  # fmt: skip
  return points


def at(points: list[dict], kl: float, key: str) -> float | None:
  """What a curve says at a KL, between two points; None beyond its end."""
  points = sorted(points, key=lambda point: point['kl'])
  x = [point['kl'] for point in points]
  if not x[0] <= kl <= x[-1]:
    return None
  return float(np.interp(kl, x, [point[key] for point in points]))


def draw(curves: dict[str, list[dict]], path: str) -> None:
  """Proxy and gold against KL, side by side."""
  look = plotting.LIGHT
  titles = {'proxy': 'the learnt reward (proxy)', 'gold': 'VADER (gold)'}
  with mpl.rc_context(plotting.style(look)):
    figure = Figure(figsize=(9, 3.8), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
      for (label, points), colour in zip(
        curves.items(), (*look['colours'][:3], look['ink']), strict=True
      ):
        style = 'o:' if label == 'Best-of-N' else 'o-'
        ax.plot(
            [max(p['kl'], 0) ** 0.5 for p in points], [p[key] for p in points],
            style, color=colour, ms=2.5, lw=1.3, label=label,
        )  # fmt: skip
        for p in points:
          if p.get('n') in (2, 8, 64):
            place = max(p['kl'], 0) ** 0.5, p[key]
            ax.annotate(f'N = {p["n"]}', place, (-4, 3), fontsize=7, ha='right',
                        textcoords='offset points')  # fmt: skip
      ax.axhline(0.5, color=look['faint'], lw=0.8)
      # A root, as Gao et al. (2023) have it: what is far takes less of it.
      ax.set_xticks(np.sqrt(TICKS), labels=[f'{kl:g}' for kl in TICKS])
      ax.set(xlabel='KL to the reference, nats per completion', title=title)
    axes[0].set_ylabel('win rate against the reference')
    axes[1].legend(loc='upper left')
    figure.savefig(path, dpi=160)


def table(curves: dict[str, list[dict]]) -> str:
  """Markdown: proxy and gold at some KLs, gold's height, and the end."""
  two = lambda p: f'{p["proxy"]:.3f} / {p["gold"]:.3f}'
  lines = [
    '| | ' + ' | '.join(f'at {kl:g} nats' for kl in KLS)
    + ' | where gold is highest | at the end |',
    '|---' * (len(KLS) + 3) + '|',
  ]  # fmt: skip
  for label, points in curves.items():
    cells = []
    for kl in KLS:
      found = {key: at(points, kl, key) for key in ('proxy', 'gold')}
      cells.append('' if found['gold'] is None else two(found))
    for point in (max(points, key=lambda p: p['gold']), points[-1]):
      cells.append(f'{two(point)} at {point["kl"]:.2f}')
    lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=paths.expanded, required=True)
  out = parser.parse_args().out
  with futures.ThreadPoolExecutor(compare.CORES.qsize()) as pool:
    start(out, pool)
    found = pool.map(functools.partial(run, out), overoptimisation.RUNS)
    curves = dict(zip(LABELS.values(), found, strict=True))
  curves['Best-of-N'] = best_of_n(*references(out))
  ends = {}
  for name, label in LABELS.items():
    summary = files.read_json(os.path.join(out, name, 'summary.json'))
    keys = ('win_rate', 'gold_win_rate', 'kl', 'distinct_2', 'length')
    ends[label] = {k: v for k, v in summary.items() if k.startswith(keys)}
  draw(curves, os.path.join(out, 'figure.png'))
  files.write_json(
    os.path.join(out, 'summary.json'), {'curves': curves, 'ends': ends}
  )
  print(table(curves))
  print('ends, on fresh completions, with their intervals:')
  print(json.dumps(ends, indent=2))


if __name__ == '__main__':
  main()
