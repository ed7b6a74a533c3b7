"""What pyproject.toml asks for: ranges that hold what has been tested."""

import ast
import pathlib
import re
import sys
import tomllib

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = ('requirements.txt', 'requirements-dev.txt', 'requirements-hf.txt')
# Python 3.12 and later get the newest, 3.11 the newest that support it.
VERSIONS = ('3.11', '3.12')
# Module -> distribution, where the names differ.
NAMES = {
  'absl': 'absl-py',
  'google': 'protobuf',
  'orbax': 'orbax-checkpoint',
  'sklearn': 'scikit-learn',
  'tensorflow_datasets': 'tensorflow-datasets',
}
# Not ours to install: what a notebook runs in, and a library of its own suite.
ELSEWHERE = {'IPython', 'gemma'}


def project():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def pins(version):
  """name -> the version that the requirements files pin for a Python."""
  found = {}
  environment = {**default_environment(), 'python_version': version}
  for name in FILES:
    for line in (ROOT / name).read_text().splitlines():
      if not line or line[0] == '#':
        continue
      pin = Requirement(line)
      if pin.marker is None or pin.marker.evaluate(environment):
        (spec,) = pin.specifier
        assert spec.operator == '==', line
        found[canonicalize_name(pin.name)] = spec.version
  return found


def asked():
  """All dependencies, of extras too."""
  lines = project()['dependencies']
  for extra in project()['optional-dependencies'].values():
    lines = lines + extra
  return [Requirement(line) for line in lines]


@pytest.mark.parametrize('version', VERSIONS)
def test_the_ranges_hold_the_pins(version):
  pinned = pins(version)
  for wanted in asked():
    name = canonicalize_name(wanted.name)
    if name == 'gcsfs':  # no test reads from Google's buckets
      continue
    assert wanted.specifier.contains(pinned[name], prereleases=True), wanted


def test_ranges_are_ranges():
  """A pin would replace what is there, Colab's jax for instance."""
  exact = [
    wanted.name
    for wanted in asked()
    if any(spec.operator in ('==', '===', '~=') for spec in wanted.specifier)
  ]
  # A lexicon: another version would be another judge.
  assert exact == ['vaderSentiment']


def test_all_that_is_imported_is_asked_for():
  names = {canonicalize_name(wanted.name) for wanted in asked()}
  for path in (ROOT / 'bond_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        modules = [node.module]
      else:
        continue
      for module in {m.partition('.')[0] for m in modules}:
        if module in sys.stdlib_module_names or module == 'bond_jax':
          continue
        if module not in ELSEWHERE:
          name = canonicalize_name(NAMES.get(module, module))
          assert name in names, (path.name, module)


def test_the_oldest_python_is_one_that_is_pinned_for():
  assert project()['requires-python'] == f'>={VERSIONS[0]}'
  text = (ROOT / 'requirements.txt').read_text()
  assert set(re.findall(r'python_version \S+ "(.*?)"', text)) <= set(VERSIONS)
