"""The house rules on imports and sizes, read from the source."""

import ast
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

# Arrays in, arrays out: no model, no token, no mesh, no config.
MATHEMATICS = {
    'ops', 'step_metrics', 'anchors', 'quantiles', 'bandit', 'bandit_samples',
    'measures', 'objectives', 'exact', 'curves', 'comparisons',
    'preference_losses', 'preference_measures',
}  # fmt: skip
# Where the two sides meet; all the rest is the machine.
MEETING = {
    'step', 'build', 'train', 'sft', 'reward_model', 'evaluate', 'sample',
    'plan', 'export', 'figures', 'report', 'report_style', 'text_task',
    'enumerable', 'reproduce', 'bandit_figure', 'origin', 'reward_training',
    'reward_report', 'costs', 'programs', 'sweep', 'report_words',
    'report_cautions', 'report_samples', 'faults', 'facts', 'guard', 'notebook',
}  # fmt: skip
# Must run where only jax, flax, optax and orbax are installed.
CORE = {'types', 'errors', 'ops', 'anchors', 'log_probs', 'sampling', 'step',
        'sharding', 'optimizer', 'quantiles', 'micro_batches',
        'step_metrics', 'stops'}  # fmt: skip
# The only readers of configs.
CONFIGURED = {
    'command', 'build', 'sft', 'reward_model', 'train', 'evaluate', 'sample',
    'plan', 'export', 'text_task', 'enumerable', 'reproduce', 'origin',
    'reward_training', 'costs', 'programs', 'facts', 'guard',
}  # fmt: skip


def is_mathematics(name):
  return name in MATHEMATICS or name.startswith('algorithms.')


def is_core(name):
  return name in CORE or name.startswith(('algorithms.', 'models.'))


def is_machine(name):
  return not is_mathematics(name) and name not in MEETING | {'types'}


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
      found.add(next(
          (n for n in FILES if rest == n or rest.startswith(n + '.')), rest
      ))  # fmt: skip
  return found


def tops(names):
  return {name.partition('.')[0] for name in names}


def test_the_reader_of_imports_reads(tmp_path):
  path = tmp_path / 'x.py'
  path.write_text(
    'import a.b\nfrom bond_jax import ops\n'
    'def f():\n  from bond_jax.models.gemma import make\n'
  )
  names = imports(path)
  assert tops(names) == {'a', 'bond_jax'}
  assert own(names) == {'ops', 'models.gemma'}
  assert {'ops', 'algorithms.jbond', 'models.gemma', 'step'} <= set(FILES)


@pytest.mark.parametrize('name', sorted(filter(is_mathematics, FILES)))
def test_mathematics_imports_types_and_its_own_side(name):
  for other in own(imports(FILES[name])):
    assert other == 'types' or is_mathematics(other), (name, other)


@pytest.mark.parametrize('name', sorted(filter(is_machine, FILES)))
def test_the_machine_knows_no_algorithm_and_no_meeting_place(name):
  for other in own(imports(FILES[name])):
    assert other == 'types' or is_machine(other), (name, other)


def test_the_step_knows_no_algorithm_by_name():
  for name in MEETING & set(FILES):
    assert not any(
      n.startswith('algorithms') for n in own(imports(FILES[name]))
    ), name


@pytest.mark.parametrize('name', FILES)
def test_packages_are_imported_where_they_may_be(name):
  found = tops(imports(FILES[name]))
  assert 'tensorflow' not in found
  if name != 'models.library':
    assert 'gemma' not in found
  if name not in CONFIGURED:
    assert 'ml_collections' not in found
  if is_core(name):
    assert not found & {'ml_collections', 'grain', 'tensorflow_datasets'}
    for other in own(imports(FILES[name])):  # and by way of no other file
      assert is_core(other), (name, other)


@pytest.mark.parametrize('name', FILES)
def test_files_and_functions_stay_short(name):
  text = FILES[name].read_text()
  assert len(text.splitlines()) <= 400
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      length = node.end_lineno - node.lineno + 1
      assert length <= 80, (node.name, length)


# Modules that are imported by the name that `config.task` gives.
TASKS = {'text_task', 'enumerable'}


@pytest.mark.parametrize(
  'name', [n for n, p in FILES.items() if '__main__' in p.read_text()]
)
def test_a_command_is_imported_by_nothing_that_it_imports(name):
  """`python -m` would execute it twice, with two classes of one name."""
  found, todo = set(), [name]
  while todo:
    there = own(imports(FILES[todo.pop()]))
    there |= TASKS if 'build' in there else set()
    todo += (there & set(FILES)) - found
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
assert 'bond_jax.step' in sys.modules
assert 'tensorflow' not in sys.modules
""")
