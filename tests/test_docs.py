"""The documents that say how something is done: it works as written."""

import os
import re
import shutil
import subprocess
import sys

import mutate
import toy

PAGE = os.path.join(toy.ROOT, 'docs', 'adding_an_algorithm.md')
FILES = ('bond_jax', 'configs', 'tests', 'pyproject.toml')


def blocks():
  """File name -> content, of the Python blocks after a named file."""
  with open(PAGE) as f:
    text = f.read()
  named = re.findall(r'`([\w/]+\.py)`[^`]*```python\n(.*?)```', text, re.S)
  return dict(named)


def test_the_page_names_its_files():
  assert list(blocks()) == [
    'bond_jax/algorithms/soft_best_of_n.py',
    'configs/soft_best_of_n.py',
    'tests/test_soft_best_of_n.py',
  ]


def test_an_algorithm_is_added_by_the_files_of_the_page(tmp_path):
  for name in FILES:
    path = os.path.join(toy.ROOT, name)
    copy = shutil.copytree if os.path.isdir(path) else shutil.copy
    copy(path, tmp_path / name)
  for name, content in blocks().items():
    (tmp_path / name).write_text(content)
  env = toy.environment()
  env.pop('PYTHONPATH', None)
  run = lambda *args: subprocess.run(
    [sys.executable, '-m', *args], cwd=tmp_path, env=env, text=True,
    capture_output=True, timeout=300,
  )  # fmt: skip
  proof = run('pytest', 'tests/test_soft_best_of_n.py')
  assert proof.returncode == 0, proof.stdout
  assert '1 passed' in proof.stdout
  train = run(
    'bond_jax.train', '--config=configs/soft_best_of_n.py', '--workdir=run',
    '--config.train.steps=4', '--config.train.save_every=2',
    '--config.train.batch=16', '--config.enumerable.vocab=4',
    '--config.model.sizes.layers=1',
  )  # fmt: skip
  assert train.returncode == 0, train.stderr
  rows = toy.rows(str(tmp_path / 'run'), 'train')
  assert [r['step'] for r in rows] == [1, 2, 3, 4]
  assert 'backward_kl' in rows[-1]


def test_every_mutation_still_breaks_something():
  """A line of mutations.txt whose code has changed is a check that is gone."""
  lines = mutate.read('')
  assert len(lines) > 100
  for name in {test.partition('::')[0] for x in lines for test in x.tests}:
    assert os.path.exists(os.path.join(toy.ROOT, name)), name
