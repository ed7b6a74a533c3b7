"""Students of a teacher with 3.7 times the parameters, three ways.

    PYTHONPATH=. python benchmarks/teacher.py --out=runs/teacher

On the demo's task and on one budget of sampled completions, 92,160. All are
judged against the teacher: win rate and KL of each, of the start that they
share, and of the gold reward. A run at a time on each core; stages are resumed.
"""

import argparse
from concurrent import futures
import functools
import json
import os

from benchmarks import compare

LARGE = (
  'model.sizes={"features":256,"heads":8,"kv_heads":4,"feed_forward":1280}',
  'sft.optimizer.learning_rate=1e-2',
)
# Label -> algorithm of the demo's config, and settings.
STUDENTS = {
  'Best-of-4 of the teacher': ('best_of_n', ()),
  "supervised, the teacher's completions": (
    'best_of_n', ('algorithm.args.n=1', 'train.steps=720'),
  ),
  'on-policy distillation': ('on_policy_distillation', ()),
}  # fmt: skip
SHOWN = ('win_rate', 'kl', 'effective_n', 'gold_win_rate', 'reward_policy',
         'reward_reference', 'seconds')  # fmt: skip


def sft(out: str, name: str, settings=()) -> None:
  flags = [f'--config.{x}' for x in settings]
  compare.stage('sft', os.path.join(out, name), 'demo.py', *flags)


def start(out: str) -> None:
  sft(out, 'start')
  compare.stage('reward_model', os.path.join(out, 'start'), 'demo.py')


def student(out: str, label: str) -> dict:
  """The summary of a student's evaluation, and its start's as the factor 0."""
  algorithm, settings = STUDENTS[label]
  workdir = os.path.join(out, algorithm + '_'.join(('', *settings)))
  flags = [f'--config.{x}' for x in settings]
  flags.append(f'--config.reference={os.path.join(out, "start")}')
  flags.append(f'--config.teacher={os.path.join(out, "large", "sft")}')
  config = f'demo.py:algorithm={algorithm}'
  compare.stage('train', workdir, config, *flags)
  compare.stage('evaluate', workdir, config, *flags, '--extrapolate=0')
  with open(os.path.join(workdir, 'summary.json')) as f:
    found = json.load(f)
  with open(os.path.join(workdir, 'train', 'summary.json')) as f:
    found['seconds'] = json.load(f)['seconds']
  print(label, found, flush=True)
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=os.path.expanduser, required=True)
  out = parser.parse_args().out
  with futures.ThreadPoolExecutor(compare.CORES.qsize()) as pool:
    begun = [pool.submit(sft, out, 'large', LARGE), pool.submit(start, out)]
    for each in begun:
      each.result()
    found = list(pool.map(functools.partial(student, out), STUDENTS))
  rows = {label: [row] for label, row in zip(STUDENTS, found, strict=True)}
  first = found[0]['extrapolated']['0']
  keys = [key for key in SHOWN if key in found[0]]
  rows['their start'] = [{key: first.get(key) for key in keys}]
  print(compare.table(rows, keys))


if __name__ == '__main__':
  main()
