"""The examples in docstrings say what comes out."""

import doctest
import importlib
import os

import pytest
import toy


def modules():
  """Name -> the number of prompts, of modules that have examples."""
  found = {}
  for where, _, files in os.walk(os.path.join(toy.ROOT, 'bond_jax')):
    for name in sorted(f for f in files if f.endswith('.py')):
      path = os.path.join(where, name)
      with open(path, encoding='utf-8') as f:
        count = sum(line.lstrip().startswith('>>> ') for line in f)
      if count:
        dotted = os.path.relpath(path, toy.ROOT)[:-3].replace(os.sep, '.')
        found[dotted] = count
  return found


def test_there_are_examples():
  assert {
    'bond_jax.algorithms.parts.ops',
    'bond_jax.algorithms.parts.quantiles',
    'bond_jax.algorithms.parts.anchors',
  } <= set(modules())


@pytest.mark.parametrize('name', sorted(modules()))
def test_the_examples_hold(name):
  module = importlib.import_module(name)
  failed, tried = doctest.testmod(
    module, optionflags=doctest.NORMALIZE_WHITESPACE
  )
  assert failed == 0
  assert tried == modules()[name]
