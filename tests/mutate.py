"""Breaks the code in one place at a time, and sees that a test goes red.

    make mutations

Each line of tests/mutations.txt is a file, a text that occurs in it once, what
to put in its place, and the tests of which one must fail then, separated by
' || '. Works on a copy. Exits 0 only if every broken copy is found out and the
unbroken one is not. About 25 minutes on one core; a word as argument picks
the lines that contain it.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COPIED = (
  'bond_jax', 'configs', 'benchmarks', 'docs', 'launch', 'tests', 'colab',
  'README.md', 'LOG.md', 'CITATION.cff', 'pyproject.toml', 'requirements.txt',
  'requirements-hf.txt',
)  # fmt: skip
# The copy has no compiler and no browser of its own.
OURS = {
  'BROWSER': os.path.join(ROOT, '.browser'),
  'TPU_LIBRARY_PATH': os.path.join(ROOT, '.libtpu', 'libtpu', 'libtpu.so'),
}
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


def run(folder: str, tests: list[str]) -> subprocess.CompletedProcess:
  env = {
    **OURS,
    **os.environ,
    'PYTHONPATH': folder,
    'PYTHONDONTWRITEBYTECODE': '1',
    # Of a broken copy only what changed is compiled anew.
    'JAX_COMPILATION_CACHE_DIR': os.path.join(folder, 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  return subprocess.run(
    [sys.executable, '-m', 'pytest', '-x', '-m', '', '-p', 'no:cacheprovider',
     *tests],
    cwd=folder, env=env, capture_output=True, text=True,
  )  # fmt: skip


def found_out(folder: str, mutation: Mutation) -> tuple[bool, str]:
  """Whether a test fails when the copy is broken; its name, or what came."""
  path = os.path.join(folder, mutation.path)
  with open(path) as f:
    text = f.read()
  with open(path, 'w') as f:
    f.write(text.replace(mutation.old, mutation.new))
  result = run(folder, mutation.tests)
  with open(path, 'w') as f:
    f.write(text)
  failed = re.findall(r'^(?:FAILED|ERROR) \S+::(\S+)', result.stdout, re.M)
  # 1: a test has failed. Code or names of tests that are wrong give others.
  if result.returncode == 1 and failed:
    return True, failed[0]
  return False, f'SURVIVED: {(result.stdout.splitlines() or [""])[-1]}'


def main(word: str = '') -> int:
  mutations, survivors, start = read(word), 0, time.time()
  with tempfile.TemporaryDirectory() as folder:
    for name in COPIED:
      path = os.path.join(ROOT, name)
      copy = shutil.copytree if os.path.isdir(path) else shutil.copy
      copy(path, os.path.join(folder, name))
    whole = run(folder, sorted({test for m in mutations for test in m.tests}))
    if whole.returncode:
      print(f'{whole.stdout[-2000:]}\nfails before anything is broken')
      return 1
    print(f'nothing broken: all pass, {time.time() - start:.0f} s', flush=True)
    for m in mutations:
      begin, (red, what) = time.time(), found_out(folder, m)
      survivors += not red
      print(f'{what}, {time.time() - begin:.0f} s')
      print(f'    {m.path}: {m.old} -> {m.new}', flush=True)
  seconds = time.time() - start
  print(f'{len(mutations)} mutations, {survivors} survive; {seconds:.0f} s')
  return int(survivors > 0)


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
