"""Fuzzes every reader of the project; ends with a table, and 1 if any fails.

    make fuzz

A reader runs in a process of its own, with an end to its memory, so that a
crash in a library is a line of the table too. `--only=NAME` takes one target,
`--seed` other inputs, `--inputs` so many of each for every source of inputs
(slow targets get fewer). What was found is printed, once for each place, and
the input is kept under runs/fuzz. atheris adds inputs that look for new
branches where it is installed (requirements-fuzz.txt, Linux).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings

KINDS = ('refused', 'accepted', 'traceback', 'hang', 'outside')
SOURCES = ('mutated', 'hypothesis', 'atheris')
ROOM = 3 * 2**30  # bytes that the inputs of a target may take, all together
HERE = pathlib.Path(__file__).resolve().parent


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default='')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--inputs', type=int, default=400)
  parser.add_argument('--out', default='runs/fuzz')
  parser.add_argument('--source', choices=SOURCES)
  args = parser.parse_args()
  if args.source:
    child(args)
  have = importlib.util.find_spec('atheris')
  print(f'seed {args.seed}; {"with" if have else "WITHOUT"} atheris')
  found = import_targets().TARGETS
  rows = collections.defaultdict(collections.Counter)
  for name in [args.only] if args.only else found:
    for source in SOURCES if have else SOURCES[:2]:
      row, most = one(args, name, source), rows[name]['megabytes']
      rows[name] += row
      rows[name]['megabytes'] = max(most, row['megabytes'])
    print(line(name, rows[name]), flush=True)
  total = sum(rows.values(), collections.Counter())
  del total['megabytes']
  print(f'{line("target", None)}\n{line("all", total)}')
  return int(any(total[kind] for kind in (*KINDS[2:], 'crash')))


def import_targets():
  rooms = ('data', 'measures', 'weights')  # tests that help
  sys.path[:0] = [str(HERE), str(HERE.parent), *(str(HERE / x) for x in rooms)]
  import fuzz_targets

  return fuzz_targets


def line(name: str, row: collections.Counter | None) -> str:
  keys = ('inputs', *KINDS, 'crash', 'megabytes', 'seconds')
  cells = [key if row is None else f'{row[key]:.0f}' for key in keys]
  return f'{name:<24}' + ''.join(cell.rjust(11) for cell in cells)


def one(args, name: str, source: str) -> collections.Counter:
  """Runs a target with one source of inputs in a process; what it counted."""
  with tempfile.TemporaryDirectory() as folder:
    told = os.path.join(folder, 'told.json')
    command = [
      sys.executable, __file__, f'--only={name}', f'--source={source}',
      f'--seed={args.seed}', f'--inputs={args.inputs}', f'--out={args.out}',
    ]  # fmt: skip
    env = {**os.environ, 'FUZZ_TOLD': told, 'TMPDIR': folder,
           'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    row = collections.Counter()
    if os.path.exists(told):
      row.update(json.loads(pathlib.Path(told).read_text()))
    row['seconds'] = time.monotonic() - start
    tell_end(args, name, source, done, row, folder)
  return row


def tell_end(args, name, source, done, row, folder: str) -> None:
  """Prints what a process found, and how it ended unless well."""
  print(''.join(f'  {x}\n' for x in done.stdout.splitlines()
                if x.startswith('FOUND')), end='')  # fmt: skip
  if done.returncode:
    row['crash'] += 1
    print(f'  {name}, {source}: ended with {done.returncode}')
    for path in pathlib.Path(folder).glob('*/input'):
      print(f'  the input was {keep(args, name, path.read_bytes())}')
    print('    ' + '\n    '.join(done.stderr.splitlines()[-12:]))


def child(args) -> None:
  """All inputs of one target from one source, in this process."""
  if args.source == 'atheris':
    import atheris

    with atheris.instrument_imports(include=['bond_jax']):
      targets = import_targets()
  else:
    targets = import_targets()
  import fuzzing
  import jax

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  warnings.simplefilter('ignore')
  around = pathlib.Path(tempfile.mkdtemp())
  folder = around / 'given'
  folder.mkdir()
  (around / 'canary').write_text('as it was')
  os.chdir(folder)
  target = targets.TARGETS[args.only](folder)
  watch = fuzzing.Watch(str(folder))
  for seed in reversed(target.seeds):  # imports, caches, compiled programs
    outcome = fuzzing.judge(target, seed, watch)
  row, seen = collections.Counter(), set()
  if outcome.kind != 'accepted':  # then nothing behind it is looked at
    print(f'FOUND the first seed is {outcome.kind}: {outcome.said}')
    row['traceback'] += 1
  limit_memory()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  def inside_out() -> list:
    files = fuzzing.listing(str(around))
    return [x for x in files if not x[0].startswith('given/')]

  beside = inside_out()

  def give(data: bytes, last: int | None = None) -> None:
    # A loop in C is not interrupted: the process ends, and says where.
    faulthandler.dump_traceback_later(6 * fuzzing.LIMIT, exit=True)
    (around / 'input').write_bytes(data)  # of a crash
    outcome = fuzzing.judge(target, data, watch)
    row[outcome.kind] += 1
    row['inputs'] += 1
    if outcome.kind in KINDS[2:] and outcome.said.split(' at ')[-1] not in seen:
      seen.add(outcome.said.split(' at ')[-1])
      print(
        f'FOUND {outcome.kind}: {outcome.said} <- {keep(args, args.only, data)}'
      )
    if row['inputs'] % 50 == 0:
      tell()
    if row['inputs'] == last:
      finish()

  def tell() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row['megabytes'] = (peak - before) // 1024
    pathlib.Path(os.environ['FUZZ_TOLD']).write_text(json.dumps(row))

  def finish() -> None:
    if beside != [x for x in inside_out() if x[0] != 'input']:
      print(f'FOUND outside: {inside_out()}')
      row['outside'] += 1
    tell()
    shutil.rmtree(around)
    sys.stdout.flush()
    os._exit(0)  # threads of readers that were given up may still run

  sources = dict(
    mutated=from_mutated, hypothesis=from_hypothesis, atheris=from_atheris
  )
  sources[args.source](target, args, give)
  finish()


def limit_memory() -> None:
  size = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  limit = size * resource.getpagesize() + ROOM
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def keep(args, name: str, data: bytes) -> str:
  folder = HERE.parent / args.out
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{name}-{hashlib.sha256(data).hexdigest()[:12]}'
  path.write_bytes(data)
  return os.path.relpath(path, HERE.parent)


def count(target, args) -> int:
  return max(5, round(args.inputs * target.share))


def from_mutated(target, args, give) -> None:
  import fuzzing

  rng = random.Random(f'{args.seed} {target.name}')
  for _ in range(count(target, args)):
    give(fuzzing.mutated(target, rng))


def from_hypothesis(target, args, give) -> None:
  import fuzzing
  import hypothesis

  @hypothesis.seed(args.seed)
  @hypothesis.settings(
    max_examples=count(target, args), deadline=None, database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )  # fmt: skip
  @hypothesis.given(fuzzing.inputs(target))
  def run(data):
    give(data)

  run()


def from_atheris(target, args, give) -> None:
  """Inputs of libFuzzer, which looks for new branches in bond_jax."""
  import atheris
  import fuzzing

  seeds = pathlib.Path(tempfile.mkdtemp())
  for i, seed in enumerate(target.seeds):
    (seeds / str(i)).write_bytes(seed)

  def mutate(data: bytes, most: int, seed: int) -> bytes:
    with contextlib.suppress(ValueError, RecursionError, LookupError):
      if seed % 2:  # else libFuzzer's own, of what has led somewhere new
        again = target._replace(seeds=[bytes(data)])
        return fuzzing.mutated(again, random.Random(seed))[:most]
    return atheris.Mutate(data, most)

  most = 2 * max(map(len, target.seeds)) + 999
  runs = count(target, args)
  options = [
    '-timeout=0',
    '-rss_limit_mb=0',
    '-verbosity=0',
    '-close_fd_mask=0',
  ]
  atheris.Setup(
    ['fuzz', f'-runs={runs}', f'-seed={args.seed + 1}', f'-max_len={most}',
     *options, str(seeds)],
    lambda data: give(data, last=runs), custom_mutator=mutate,
  )  # fmt: skip
  atheris.Fuzz()


if __name__ == '__main__':
  sys.exit(main())
