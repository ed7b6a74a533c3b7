"""Breaks the code in one place at a time, and sees that a test goes red.

    make mutations

Each line of tests/mutations.txt is a file, a text that occurs in it once, what
to put in its place, and the tests of which one must fail then, separated by
' || '. Works on copies, one for each core. Exits 0 only if every broken copy is
found out and the unbroken one is not. About 20 minutes on two cores; a word as
argument picks the lines that contain it.
"""

import collections
from concurrent import futures
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COPIED = (
  '.ci', 'bond_jax', 'configs', 'benchmarks', 'colab', 'docs', 'launch',
  'tests', 'README.md', 'LOG.md', 'CITATION.cff', 'pyproject.toml',
  'requirements.txt', 'requirements-hf.txt',
)  # fmt: skip
# Too large to copy: the browser and the TPU compiler.
LINKED = '.browser', '.libtpu'
# Processes that have what all tests import, but nothing of this project.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['jax', 'optax', 'orbax.checkpoint', 'pytest'])
Mutation = collections.namedtuple('Mutation', 'path old new tests')


def read(word: str) -> list[Mutation]:
  """The lines with this word; a ValueError for one that breaks nothing."""
  with open(os.path.join(ROOT, 'tests', 'mutations.txt')) as f:
    lines = [x.rstrip('\n') for x in f if x.strip() and x[0] != '#']
  found = []
  for line in filter(lambda line: word in line, lines):
    parts = line.split(' || ')
    if len(parts) != 4:
      raise ValueError(f'file || old || new || tests expected, got: {line}')
    with open(os.path.join(ROOT, parts[0])) as f:
      count = f.read().count(parts[1])
    if count != 1 or parts[1] == parts[2]:
      raise ValueError(f'in {count} places, 1 and a change expected: {line}')
    found.append(Mutation(*parts[:3], parts[3].split()))
  return found


def run(folder: str, tests: list[str]) -> tuple[int, str]:
  """pytest's status and output in a copy."""
  env = {
    **os.environ,
    'PYTHONPATH': folder,
    'PYTHONDONTWRITEBYTECODE': '1',
    # Of a broken copy only what changed is compiled anew.
    'JAX_COMPILATION_CACHE_DIR': os.path.join(
      os.path.dirname(folder), 'programs'
    ),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  process = FORKS.Process(target=_pytest, args=(folder, tests, env))
  process.start()
  process.join()
  with open(f'{folder}.out') as f:
    return process.exitcode, f.read()


def _pytest(folder: str, tests: list[str], env: dict[str, str]) -> None:
  out = os.open(f'{folder}.out', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(out, 1)
  os.dup2(out, 2)
  os.chdir(folder)
  os.environ.clear()
  os.environ.update(env)
  sys.dont_write_bytecode = True
  # What the fork brought along is not the copy's.
  sys.path[:] = [p for p in sys.path if p and not p.startswith(ROOT + '/tests')]
  sys.path.insert(0, folder)
  sys.exit(pytest.main(['-x', '-m', '', '-p', 'no:cacheprovider', *tests]))


def found_out(folder: str, mutation: Mutation) -> tuple[bool, str]:
  """Whether a test fails when the copy is broken; its name, or what came."""
  path = os.path.join(folder, mutation.path)
  with open(path) as f:
    text = f.read()
  with open(path, 'w') as f:
    f.write(text.replace(mutation.old, mutation.new))
  status, out = run(folder, mutation.tests)
  with open(path, 'w') as f:
    f.write(text)
  failed = re.findall(r'^(?:FAILED|ERROR) \S+::(\S+)', out, re.M)
  # 1: a test has failed. Code or names of tests that are wrong give others.
  if status == 1 and failed:
    return True, failed[0]
  return False, f'SURVIVED: {(out.splitlines() or [""])[-1]}'


def main(word: str = '') -> int:
  mutations, survivors, start = read(word), 0, time.time()
  workers, folders = os.cpu_count(), queue.SimpleQueue()

  def timed(m: Mutation):
    folder, begin = folders.get(), time.time()
    red, what = found_out(folder, m)
    folders.put(folder)
    return red, f'{what}, {time.time() - begin:.0f} s'

  with tempfile.TemporaryDirectory() as root:
    for i in range(workers):
      folders.put(folder := os.path.join(root, str(i)))
      for name in COPIED:
        path = os.path.join(ROOT, name)
        to = os.path.join(folder, name)
        os.makedirs(folder, exist_ok=True)
        (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, to)
      for name in LINKED:
        os.symlink(os.path.join(ROOT, name), os.path.join(folder, name))
    status, out = run(
      folder, sorted({test for m in mutations for test in m.tests})
    )
    if status:
      print(f'{out[-2000:]}\nfails before anything is broken')
      return 1
    print(f'nothing broken: all pass, {time.time() - start:.0f} s', flush=True)
    with futures.ThreadPoolExecutor(workers) as threads:
      for m, (red, what) in zip(mutations, threads.map(timed, mutations)):
        survivors += not red
        print(f'{what}\n    {m.path}: {m.old} -> {m.new}', flush=True)
  seconds = time.time() - start
  print(f'{len(mutations)} mutations, {survivors} survive; {seconds:.0f} s')
  return int(survivors > 0)


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
