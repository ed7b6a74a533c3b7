"""The house rules: which room may import which, and sizes, from the source."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'bond_jax'
FILES = {
  '.'.join(p.relative_to(PACKAGE).with_suffix('').parts): p
  for p in PACKAGE.rglob('*.py')
  if p.name != '__init__.py'
}
COMMANDS = [
  n for n, p in FILES.items() if "__name__ == '__main__'" in p.read_text()
]

# A file imports its own room and those before it; all may import the nouns,
# and the commands in the root may import all.
NOUNS = {'types', 'errors'}
ORDER = [
    'algorithms', 'measures', 'devices', 'models', 'runs', 'data', 'weights',
    'rewards', 'training', 'reward_models', 'evaluation', 'sizing',
]  # fmt: skip
# Their parameters are the settings that users give.
FACTORIES = {'make', 'adam', 'scalar_head', 'classifier'}
# Must run where only jax, flax, optax and orbax are installed.
CORE = {'training.step', 'training.micro_batches', 'training.step_metrics',
        'training.optimizer', 'devices.sharding'} | NOUNS  # fmt: skip


def room(name):
  return name.partition('.')[0] if '.' in name else ''


def is_core(name):
  return name in CORE or room(name) in ('algorithms', 'models')


@functools.cache
def imports(path):
  """Full names of all modules that a file imports, wherever in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      names |= {f'{node.module}.{a.name}' for a in node.names}
  return names


def own(names):
  """Those of this package, as keys of FILES."""
  found = set()
  for name in names:
    first, _, rest = name.partition('.')
    if first == 'bond_jax':
      known = [n for n in FILES if rest == n or rest.startswith(n + '.')]
      if known or not (PACKAGE / rest.replace('.', '/')).is_dir():
        found.add(max(known, key=len, default=rest))
  return found


def tops(names):
  return {name.partition('.')[0] for name in names}


def upwards(name, others):
  """Those of the modules `others` that the order does not let `name` import."""
  if not room(name):
    return others - NOUNS if name in NOUNS else set()
  place = ORDER.index(room(name))
  allowed = {'', *ORDER[: place + 1]}
  return {
    other
    for other in others
    if room(other) not in allowed or (not room(other) and other not in NOUNS)
  }


def test_the_reader_of_imports_reads(tmp_path):
  path = tmp_path / 'x.py'
  path.write_text(
    'import a.b\nfrom bond_jax.algorithms.parts import ops\n'
    'def f():\n  from bond_jax.models.gemma.model import make\n'
  )
  names = imports(path)
  assert tops(names) == {'a', 'bond_jax'}
  assert own(names) == {'algorithms.parts.ops', 'models.gemma.model'}
  assert {'algorithms.jbond', 'models.gemma.model', 'types'} <= set(FILES)


def test_a_file_imports_its_own_room_and_those_before_it():
  assert {room(name) for name in FILES} == {'', *ORDER}
  found = {
    (name, other)
    for name, path in FILES.items()
    for other in upwards(name, own(imports(path)))
  }
  assert not found, sorted(found)


def test_an_import_against_the_order_is_found():
  assert upwards('models.lora', {'runs.command'}) == {'runs.command'}
  assert upwards('models.lora', {'train'}) == {'train'}  # a command
  assert upwards('types', {'models.lora'}) == {'models.lora'}
  assert not upwards('training.step', {'models.lora', 'types'})
  assert not upwards('train', {'training.distil'})


def test_mathematics_knows_no_configs_and_no_models():
  for name, path in FILES.items():
    found = tops(imports(path))
    assert 'tensorflow' not in found, name
    assert 'gemma' not in found or name == 'models.library'
    if room(name) == 'measures':
      assert 'jax' not in found, name
    if room(name) in ('algorithms', 'measures', 'devices', 'models'):
      assert 'ml_collections' not in found, name
    if is_core(name):
      assert not found & {'ml_collections', 'grain', 'tensorflow_datasets'}
      for other in own(imports(path)):  # and by way of no other file
        assert is_core(other), (name, other)


def test_only_the_algorithms_know_an_algorithm():
  for name, path in FILES.items():
    for other in own(imports(path)):
      if room(other) == 'algorithms' and room(name) != 'algorithms':
        assert other.startswith('algorithms.parts.'), (name, other)


def test_files_and_functions_stay_short():
  for path in FILES.values():
    text = path.read_text()
    assert len(text.splitlines()) <= 400, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        length = node.end_lineno - node.lineno + 1
        assert length <= 80, (node.name, length)
        count = len(node.args.args) + len(node.args.kwonlyargs)
        assert count <= 8 or node.name in FACTORIES, (path, node.name, count)
  folders = [PACKAGE, *(p for p in PACKAGE.rglob('*') if p.is_dir())]
  for folder in folders:
    files = [p for p in folder.glob('*.py') if p.name != '__init__.py']
    assert len(files) <= 14, folder


@pytest.mark.parametrize('name', COMMANDS)
def test_a_command_is_imported_by_nothing_that_it_imports(name):
  """`python -m` would execute it twice, with two classes of one name."""
  found, todo = set(), [name]
  while todo:
    there = own(imports(FILES[todo.pop()])) & set(FILES)
    todo += there - found
    found |= there
  assert name not in found, sorted(found)


def run(code):
  result = subprocess.run(
      [sys.executable, '-c', code],
      cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr


def test_the_core_runs_without_the_other_packages():
  blocked = ('ml_collections', 'grain', 'tensorflow_datasets', 'tensorflow')
  run(f"""
import importlib, sys
for name in {blocked}:
  sys.modules[name] = None  # importing it raises
for name in {sorted(filter(is_core, FILES))}:
  importlib.import_module('bond_jax.' + name)
""")


def test_training_loads_no_tensorflow():
  run("""
import sys
import bond_jax.train
assert 'bond_jax.training.step' in sys.modules
assert 'tensorflow' not in sys.modules
""")
