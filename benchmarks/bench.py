"""Speed and memory beside other samplers and trainers, at the same tiny Gemma.

    make bench
    python -m benchmarks.bench --only=sampling,step --rounds=5 --out=runs/bench

sampling  tokens per second of bond_jax, gm.text.Sampler, Tunix's Sampler and
          transformers' generate: same weights, same prompts, temperature 1,
          nothing truncated, float32.
step      a J-BOND step beside Tunix's GRPO step, and beside its own parts.
head      memory and time of log-probs and their gradient at V = 262,144,
          beside the plain [B, T, V] computation. Needs 18 GB of memory.
real      Gemma 3 270M's released weights (`make gemma` fetches them), float32
          and bfloat16, beside transformers. Not part of the default.
real_step a J-BOND step of their adapters beside a step of TRL's RLOO; nor this.
large     Gemma 3 1B's shape in bfloat16, 256 x 256 tokens, for accelerators;
          not part of the default.

Each library is a process in an environment of its own (.bench-*, made here the
first time: 10 GB), started once and told what to time, one after another, in
turns. What cannot be installed or run is skipped with a word. Compilation is
not timed. Writes results.json and figures to --out, prints tables.
"""

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import time

from benchmarks import arithmetic, figures, peers, tables, workloads

SECTIONS = ('sampling', 'step', 'head')
MORE = ('real', 'real_step', 'large')  # not by default
# Idle threads of the last worker go to sleep before the next is asked.
PAUSE = 0.3


def rounds_of(
  workers: dict, calls: tuple[str, ...], workload, rounds: int
) -> dict:
  """Measures every call of every worker that has it, in turns, in each round.

  Returns:
    call -> worker -> seconds of a call in each round, tokens per second in each
    round, lengths of all completions that were seen; or why there are none.
  """
  found, repeats = {call: {} for call in calls}, {}
  for call, name in itertools.product(calls, workers):
    worker = workers[name]
    if call not in worker.hello['calls']:
      continue
    try:
      worker.measure(call, workload, 1, 0)  # compiles
      once = worker.measure(call, workload, 1, 1)['seconds']
    except peers.Unavailable as why:
      found[call][name] = dict(skipped=str(why))
      print(f'{peers.NAMES[name]}, {workload.name}: skipped: {why}')
      continue
    repeats[call, name] = arithmetic.repeats(once)
    found[call][name] = dict(seconds=[], rate=[], lengths=[])
  for i in range(rounds):
    for call, name in arithmetic.order(list(repeats), i):
      time.sleep(PAUSE)
      count, row = repeats[call, name], found[call][name]
      answer = workers[name].measure(call, workload, count, 1_000 * (i + 1))
      row['seconds'].append(answer['seconds'] / count)
      row['rate'].append(answer['tokens'] / answer['seconds'])
      row['lengths'].append(answer['lengths'])
  print(f'{", ".join(calls)}, {workload.name}: {rounds} rounds', flush=True)
  return found


def make_weights(*arguments: str) -> None:
  """In a process of its own, so that this one holds no device."""
  subprocess.run(
    [sys.executable, '-m', 'benchmarks.tiny', *arguments],
    cwd=peers.ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    check=True,
  )


def sampling(workers: dict, rounds: int) -> dict:
  """Workload -> what `rounds_of` found."""
  every = (*workloads.FIXED, *workloads.GROUPS, *workloads.SHARED,
           workloads.MIX)  # fmt: skip
  found = {}
  for x in every:
    found[x.name] = rounds_of(workers, ('sample',), x, rounds)['sample']
  mix, longest = found[workloads.MIX.name], workloads.MIX.new_tokens
  for name, row in mix.items():
    if 'skipped' not in row:
      refill = workers[name].hello.get('refill', False)
      slots = workloads.MIX.slots
      row['stop_rate'] = arithmetic.stop_rate(
        list(itertools.chain(*row['lengths'])), longest
      )
      row['busy'] = arithmetic.busy(row['lengths'][-1], slots, refill)
  return found


def step(workers: dict, rounds: int, workload=workloads.STEP) -> dict:
  """The step of each trainer, and the parts of ours, alone."""
  calls = ('step', 'rollout', 'weigh', 'update', 'move_anchor')
  return rounds_of(workers, calls, workload, rounds)


def head() -> list[dict]:
  """In a process of its own for each width, which gives its memory back."""
  found = []
  for features in (128, 640):
    command = [sys.executable, '-m', 'benchmarks.head', f'--d={features}']
    done = subprocess.run(
      command, cwd=peers.ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
      print(f'head, d = {features}: failed, status {done.returncode}')
      continue
    found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f'head, d = {features}: done', flush=True)
  return found


def large(rounds: int, folder: str, args) -> dict:
  """Workers of their own: no other model shares the accelerator."""
  model, batch, length = args.model, args.batch, args.length
  workload = workloads.Workload(f'{model} {batch} x {length}', batch, 1, 32,
                                length)  # fmt: skip
  make_weights(folder, model)
  workers, skipped = peers.start(['ours', 'transformers'], folder, (model,))
  found = rounds_of(workers, ('sample', 'train'), workload, rounds)
  hellos = {k: v.hello for k, v in workers.items()}
  for worker in workers.values():
    worker.close()
  from benchmarks import large as sizes  # imports jax; the device is free now

  about = {**hellos.get('ours', {}), **sizes.possible(model, workload)}
  return dict(workload=workload._asdict(), skipped=skipped, about=about,
              **found)  # fmt: skip


def on_released(names: list[str], folder: str, path: str, dtype, results):
  """Workers over the weights of a path; `results` say who they are."""
  workers, skipped = peers.start(names, folder, (path, dtype))
  hellos = {k: v.hello for k, v in workers.items()}
  results['workers'] = results.get('workers', {}) | hellos
  results['skipped'] = results.get('skipped', {}) | skipped
  return workers


def real(rounds: int, folder: str, path: str, results: dict) -> dict:
  """dtype -> workload -> what `rounds_of` found."""
  found = {}
  for dtype in ('float32', 'bfloat16'):
    names = ['ours', 'transformers']
    workers = on_released(names, folder, path, dtype, results)
    found[dtype] = {
      x.name: rounds_of(workers, ('sample',), x, rounds)['sample']
      for x in workloads.REAL
    }
    for worker in workers.values():
      worker.close()
  return found


def real_step(rounds: int, folder: str, path: str, results: dict) -> dict:
  """As `step`, of adapters of released weights in float32."""
  names = ['ours', 'trl']
  workers = on_released(names, folder, path, 'float32', results)
  found = step(workers, rounds, workloads.REAL_STEP)
  for worker in workers.values():
    worker.close()
  return found


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', default=','.join(SECTIONS))
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--out', type=os.path.expanduser, default='runs/bench')
  parser.add_argument(
    '--weights', default='data/gemma-3-270m', help='of real, a folder'
  )
  parser.add_argument('--model', default='gemma3_1b', help='of large')
  parser.add_argument('--batch', type=int, default=256, help='of large')
  parser.add_argument('--length', type=int, default=256, help='of large')
  args = parser.parse_args(argv)
  args.only = args.only.split(',')
  unknown = set(args.only) - {*SECTIONS, *MORE}
  if unknown or args.rounds < 1:
    parser.error(
      f'--only takes {", ".join((*SECTIONS, *MORE))}, --rounds 1 or more; got'
      f' {", ".join(unknown) or args.rounds}'
    )
  return args


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  folder = os.path.abspath(os.path.join(args.out, 'weights'))
  os.makedirs(folder, exist_ok=True)
  found = dict(
    date=datetime.date.today().isoformat(),
    machine=peers.machine(),
    rounds=args.rounds,
    load_before=os.getloadavg()[0],
  )
  if {'sampling', 'step'} & set(args.only):
    make_weights(folder)
    workers, found['skipped'] = peers.start(list(peers.SAMPLERS), folder)
    found['workers'] = {k: v.hello for k, v in workers.items()}
    if 'sampling' in args.only:
      found['sampling'] = sampling(workers, args.rounds)
    if 'step' in args.only:
      found['step'] = step(workers, args.rounds)
    for worker in workers.values():
      worker.close()
  if 'head' in args.only:
    found['head'] = head()
  path = os.path.abspath(args.weights)
  for name, measure in ('real', real), ('real_step', real_step):
    if name in args.only:
      found[name] = measure(args.rounds, folder, path, found)
  if 'large' in args.only:
    found['large'] = large(args.rounds, folder, args)
  found['load_after'] = os.getloadavg()[0]
  path = os.path.join(args.out, 'results.json')
  with open(path, 'w') as f:
    json.dump(found, f, indent=1)
  print('\n' + tables.report(found))
  figures.draw(found, args.out)
  print(f'\nbench: done, see {path}')


if __name__ == '__main__':
  main()
