"""What a config must hold: every file in configs/ does; each kind counts."""

import importlib
import pathlib

import ml_collections
import pytest
import toy

from bond_jax import build, fields, text_task
from bond_jax.errors import UserError

# Not figures.py, which holds many runs, nor the body of gemma*_jbond.py.
CONFIGS = sorted(
  {p.stem for p in pathlib.Path(toy.ROOT, 'configs').glob('*.py')}
  - {'figures', 'gemma_jbond'}
)
NEEDED = (*build.NEEDED, *text_task.NEEDED)


@pytest.fixture
def config():
  return toy.get_config('nowhere').to_dict()


def place(config, path):
  *above, name = path.split('.')
  for key in above:
    config = config[key]
  return config, name


def test_the_toy_is_well(config):
  fields.check(config, NEEDED)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_well_once_it_is_filled_in(name):
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config()
  filled = {WHOLE: 1, TEXT: 'x'}

  def fill(node, rule):
    for key, value in node.items():
      inner = rule.get(key, rule.get(f'{key}?', rule.get('*', '')))
      if isinstance(value, ml_collections.ConfigDict):
        fill(value, inner if isinstance(inner, dict) else {})
      elif value is None:
        node[key] = filled.get(inner, 'x')

  with config.unlocked():
    fill(config, fields.FIELDS)
  fields.check(config.to_dict(), build.NEEDED)


WHOLE, TEXT = fields.WHOLE, fields.TEXT


@pytest.mark.parametrize(
  'path, values',
  [
    ('train.batch', ['8', 8.0, True, None, [8], {}, 10**18]),
    ('train.optimizer.clip', ['1', None, False, float('nan'), 10**400]),
    ('model.scan', [0, 'False', None]),
    ('model.sizes', [3, 'x', [], None]),
    ('model.sizes.layers', ['2', 2.5]),
    ('prompt.kind', [1, None, 'a\0b', '\ud800']),
    ('data.splits', [{'train': 3}, 'x', {'train': None}]),
    ('data.mix', [{'a': 3}, {'a': {'name': 3}}]),
    ('reward.parts', [{'a': {'function': 'x', 'args': {}, 'weight': '1'}}]),
    ('reward_model.alphas', [3, ['a'], None]),
    ('stop', ['x', ['x', 1], None, {}]),
    ('sft', [None, 3]),
  ],
)
def test_what_is_of_another_kind_is_one_line(config, path, values):
  inside, name = place(config, path)
  for value in values:
    inside[name] = value
    with pytest.raises(UserError, match='expected') as e:
      fields.check(config, NEEDED)
    assert f'config.{path}' in str(e.value)
    assert str(e.value).count('\n') == 0


@pytest.mark.parametrize(
  'path, values',
  [
    ('train.optimizer.clip', [1, 0.5, float('inf')]),
    ('model.sizes', [{}, {'layers': 2, 'window': 4}]),
    ('data.mix', [{'a': {'name': 'x', 'weight': 2}}]),
    ('reward_model.alphas', [(1, 2.0), [0.5]]),
    ('stop', [(), ('\n', ' a'), ['x']]),
    ('algorithm.args', [{}, {'what': 'ever'}]),
  ],
)
def test_what_is_of_the_kind_passes(config, path, values):
  inside, name = place(config, path)
  for value in values:
    inside[name] = value
    fields.check(config, NEEDED)


@pytest.mark.parametrize('path', ['seed', 'train.batch', 'model.lora.rank'])
def test_what_is_missing_is_named(config, path):
  inside, name = place(config, path)
  del inside[name]
  with pytest.raises(
    UserError, match=f"has no '{name}', which must be a whole"
  ):
    fields.check(config, NEEDED)


@pytest.mark.parametrize('name', ['sft', 'reward_model', 'evaluate'])
def test_a_section_that_no_task_needs_may_be_missing(config, name):
  del config[name]
  fields.check(config, build.NEEDED)


def test_an_argument_of_an_algorithm_of_another_kind_is_one_line():
  config = toy.get_config('nowhere')
  with config.unlocked():
    config.algorithm.args = dict(config.algorithm.args, backward_weight='x')
  with pytest.raises(UserError, match="algorithm jbond: .*'x'"):
    build.make_algorithm(config)


def test_the_check_of_a_run_looks_at_its_fields():
  """Of what every task has, and of what texts need beside."""
  for path, says in (
    ('train.steps', "config.train has no 'steps'"),
    ('prompt', "config has no 'prompt'"),
  ):
    config = toy.get_config('nowhere')
    inside, name = place(config, path)
    with inside.unlocked():
      del inside[name]
    with pytest.raises(UserError, match=says):
      build.check(config)
