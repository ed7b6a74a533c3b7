"""The documents that say how something is done: it works as written."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import ml_collections
import mutate
import pytest
import toy

from bond_jax.rewards import calling, make, serve
from bond_jax.runs.settings import defaults

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


@pytest.mark.long
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
    capture_output=True, timeout=900,
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


def read(name):
  with open(os.path.join(toy.ROOT, 'docs', name)) as f:
    return f.read()


def test_the_rewards_of_the_page_are_rewards(tmp_path, monkeypatch):
  """Those it writes; and every config line names one, with its arguments."""
  own, *lines = re.findall(r'```python\n(.*?)```', read('rewards.md'), re.S)
  (tmp_path / 'my_rewards.py').write_text(own)
  monkeypatch.syspath_prepend(tmp_path)
  import my_rewards

  texts = [['a', 'ccc', 'please']]
  asked = ['p'], texts, toy.context(texts, rows=[{'length': 2}])
  call = lambda reward: calling.call(reward, *asked)[0].tolist()
  assert call(my_rewards.short(2)) == [[0, -1, -4]]
  assert call(my_rewards.kind_and_complete('please')) == [[0.5, 0.5, 1.5]]
  assert call(my_rewards.nearer()) == [
    [[0.5, 0.5, 1], [0.5, 0.5, 1], [0, 0, 0.5]]
  ]
  config, modules = ml_collections.ConfigDict({'reference': '{workdir}'}), set()
  for setting in ast.parse(''.join(lines)).body:
    exec(ast.unparse(setting), {'config': config, 'defaults': defaults})
    if config.reward.parts:
      made = make.make_reward(config, config.reward, '')
      assert call(made) == [[0.5, 0.5, 1.25]]
    elif config.reward.function:
      make.check_reward(config.reward)
      modules.add(config.reward.function.partition(':')[0])
    json.loads(config.to_json_best_effort())
  sources = {
    f'bond_jax.rewards.{x}' for x in ('hf', 'http', 'ridge', 'text', 'trl')
  }
  assert modules == {'my_rewards', *sources}


def test_the_page_names_every_key_of_a_reward():
  keys = re.findall(r'^\| `(\w+)` \|', read('rewards.md'), re.M)
  assert keys == list(defaults.TREE['reward'])


def test_the_http_schema_of_the_page_is_answered():
  blocks = re.findall(r'```json\n(.*?)```', read('rewards.md'), re.S)
  sent, rewards, wins = map(json.loads, blocks)
  prompts, completions, context = serve.read(json.dumps(sent).encode())
  assert list(sent) == ['prompts', 'completions', *context._fields]
  for answer, kind in ((rewards, 'rewards'), (wins, 'wins')):
    reward = lambda *asked, a=answer, k=kind: a[k]
    value, _ = calling.call(reward, prompts, completions, context)
    assert value.ndim == 2 + (kind == 'wins') and list(answer) == [kind]


def test_every_mutation_still_breaks_something():
  """A line of mutations.txt whose code has changed is a check that is gone."""
  lines = mutate.read('')
  assert len(lines) > 100
  for test in {test for x in lines for test in x.tests}:
    path, _, name = test.partition('::')
    with open(os.path.join(toy.ROOT, path)) as f:
      assert f'def {name.partition("[")[0]}' in f.read(), test
