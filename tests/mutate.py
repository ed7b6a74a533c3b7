"""Breaks the code in one place at a time, and sees that a test goes red.

    make mutations

Each line of tests/mutations.txt is a file, a text that occurs in it once, what
to put in its place, and the tests that must fail then, separated by ' || '.
Works on a copy. Exits 0 only if every broken copy is found out and the
unbroken one is not. About ten minutes on two cores; a word as argument picks
the lines that contain it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COPIED = ('bond_jax', 'configs', 'tests', 'pyproject.toml')


def read(word: str) -> list[tuple[str, str, str, list[str]]]:
  with open(os.path.join(ROOT, 'tests', 'mutations.txt')) as f:
    lines = [x.rstrip('\n') for x in f if x.strip() and x[0] != '#']
  found = []
  for line in lines:
    if word in line:
      path, old, new, tests = line.split(' || ')
      found.append((path, old, new, tests.split()))
  return found


def run(folder: str, tests: list[str]) -> subprocess.CompletedProcess:
  env = {**os.environ, 'PYTHONPATH': folder, 'PYTHONDONTWRITEBYTECODE': '1'}
  return subprocess.run(
    [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider',
     *tests], cwd=folder, env=env, capture_output=True, text=True,
  )  # fmt: skip


def main(word: str = '') -> int:
  mutations = read(word)
  with tempfile.TemporaryDirectory() as folder:
    for name in COPIED:
      path = os.path.join(ROOT, name)
      copy = shutil.copytree if os.path.isdir(path) else shutil.copy
      copy(path, os.path.join(folder, name))
    whole = sorted({test for *_, tests in mutations for test in tests})
    if run(folder, whole).returncode:
      print('the tests fail before anything is broken')
      return 1
    survivors = 0
    for path, old, new, tests in mutations:
      path = os.path.join(folder, path)
      with open(path) as f:
        text = f.read()
      if text.count(old) != 1:
        print(f'{text.count(old)} places: {path}: {old}')
        survivors += 1
        continue
      with open(path, 'w') as f:
        f.write(text.replace(old, new))
      start = time.time()
      # 1: some test failed. Code that no longer parses would give 2.
      killed = run(folder, tests).returncode == 1
      with open(path, 'w') as f:
        f.write(text)
      survivors += not killed
      print(
        f'{"red     " if killed else "SURVIVED"} {time.time() - start:3.0f} s '
        f' {os.path.relpath(path, folder)}: {old} -> {new}',
        flush=True,
      )
  print(f'{len(mutations)} mutations, {survivors} not found out')
  return int(survivors > 0)


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
