"""The notebooks of colab/: whole, executed in order, and fit to be read."""

import ast
import base64
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest
import toy

from bond_jax.errors import UserError
from colab import helper

FOLDER = pathlib.Path(toy.ROOT, 'colab')
NAMES = [
  'bandit_figure1', 'gemma3_on_tpu_or_gpu', 'quickstart', 'your_own_reward'
]  # fmt: skip
# Of the machine that executed it. (/content is Colab's own.)
PATHS = re.compile(
  r'(?:^|[\s\'"=(])(/(?:root|home|mnt|tmp|usr|opt|Users)/\S*|[A-Z]:\\\S*)'
)
OURS = re.compile(r'(bond_jax|configs|benchmarks|colab)\b')
SIZE = 700_000  # bytes of a notebook


def read(name):
  return json.loads((FOLDER / f'{name}.ipynb').read_text())


def cells(name, kind='code'):
  return [c for c in read(name)['cells'] if c['cell_type'] == kind]


def source(cell):
  return ''.join(cell['source'])


def texts(cell):
  """All that a cell has put out as text."""
  for output in cell['outputs']:
    yield ''.join(output.get('text', ''))
    for kind, value in output.get('data', {}).items():
      if kind != 'image/png':
        yield ''.join(value)


def python(cell):
  """The Python of a cell: all of it, or what it writes to a file."""
  lines = source(cell).splitlines()
  if lines[0].startswith('%%writefile '):
    assert lines[0].endswith('.py'), lines[0]
    lines = lines[1:]
  return '\n'.join(lines)


def test_these_are_the_notebooks():
  assert sorted(p.stem for p in FOLDER.glob('*.ipynb')) == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_it_is_a_notebook_of_the_format(name):
  """What nbformat's schema asks for; nbformat itself where it is there."""
  found = read(name)
  assert (found['nbformat'], found['nbformat_minor']) == (4, 5)
  assert found['metadata']['kernelspec']['name'] == 'python3'
  ids = [cell['id'] for cell in found['cells']]
  assert len(set(ids)) == len(ids)
  for cell in found['cells']:
    assert cell['metadata'] == {}
    keys = {'cell_type', 'id', 'metadata', 'source'}
    if cell['cell_type'] == 'code':
      keys |= {'execution_count', 'outputs'}
    assert set(cell) == keys
  try:
    import nbformat
  except ImportError:
    return
  nbformat.validate(found)


@pytest.mark.parametrize('name', NAMES)
def test_it_opens_with_what_it_needs_and_takes(name):
  first = read(name)['cells'][0]
  assert first['cell_type'] == 'markdown'
  title, _, head, rule, *rows = source(first).splitlines()
  assert title.startswith('# ')
  for word in ('needs', 'takes', 'downloads'):
    assert f'| {word} |' in head
  assert set(rule) == set('|-')
  assert 'Python 3.11' in rows[0] and 'minute' in rows[0]


@pytest.mark.parametrize('name', NAMES)
def test_its_outputs_are_kept(name):
  found = cells(name)
  assert [c['execution_count'] for c in found] == list(range(1, len(found) + 1))
  types = {o['output_type'] for c in found for o in c['outputs']}
  assert types <= {'stream', 'display_data', 'execute_result'}
  images = [
    o['data']['image/png']
    for c in found
    for o in c['outputs']
    if 'image/png' in o.get('data', {})
  ]
  assert images
  for image in images:
    content = base64.b64decode(''.join(image))
    assert content.startswith(b'\x89PNG')
    assert len(content) < 320_000
  assert (FOLDER / f'{name}.ipynb').stat().st_size < SIZE


@pytest.mark.parametrize('name', NAMES)
def test_its_outputs_tell_of_no_machine_and_no_failure(name):
  for cell in cells(name):
    for output in cell['outputs']:
      assert output.get('name') != 'stderr', output
    for text in texts(cell):
      assert not PATHS.findall(text)
      for word in ('Traceback', 'Warning', '\x1b[', 'finished already'):
        assert word not in text, text


def test_machine_paths_are_found():
  for text in ('see /mnt/x/y', "'/home/me/a.py'", '/root/a', 'a=/tmp/b'):
    assert PATHS.search(text), text
  assert not PATHS.search('runs/tmp/x, /content/drive, 1/2, w/home/x')


@pytest.mark.parametrize('name', NAMES)
def test_its_cells_are_python(name):
  for cell in cells(name):
    ast.parse(python(cell))
    assert not re.search(r'^\s*[!%]', python(cell), re.M)


def imported(module, name):
  """What `from module import name` gives."""
  found = {}
  exec(f'from {module} import {name} as value', found)
  return found['value']


@pytest.mark.parametrize('name', NAMES)
def test_the_names_of_ours_that_it_uses_exist(name):
  """A cell is executed by `make notebooks` alone, which takes minutes."""
  trees = [ast.parse(python(cell)) for cell in cells(name)]
  nodes = [node for tree in trees for node in ast.walk(tree)]
  modules = {}
  for node in nodes:
    if isinstance(node, ast.ImportFrom) and OURS.match(node.module):
      for found in node.names:
        value = imported(node.module, found.name)
        if inspect.ismodule(value):
          modules[found.asname or found.name] = value
  for node in nodes:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      module = modules.get(node.value.id)
      assert module is None or hasattr(module, node.attr), ast.unparse(node)
  assert modules


def test_its_files_are_formatted(tmp_path):
  """ruff formats cells, but not what they write to files."""
  for name in NAMES:
    for i, cell in enumerate(cells(name)):
      if source(cell).startswith('%%writefile'):
        (tmp_path / f'{name}_{i}.py').write_text(python(cell) + '\n')
  assert list(tmp_path.iterdir())
  ruff = [sys.executable, '-m', 'ruff']
  config = f'--config={toy.ROOT}/pyproject.toml'
  for args in (['format', '--check'], ['check']):
    done = subprocess.run(
      [*ruff, *args, config, tmp_path], capture_output=True, text=True,
      check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', NAMES)
def test_it_installs_by_ranges_and_leaves_jax_alone(name):
  """In Colab: the package by pyproject.toml, and the very jax that is there."""
  whole = '\n'.join(map(source, cells(name)))
  assert 'requirements' not in whole
  (install,) = re.findall(r'subprocess\.run\(\[\*pip, (.*?)\], check', whole)
  assert re.fullmatch(r"'\.(\[[a-z,]+\])?', jax_here", install)
  assert """jax_here = f'jax=={importlib.metadata.version("jax")}'""" in whole
  assert not re.search(r'[\'"][\w-]+==\d', whole)


# -- what they share


def test_run_shows_what_a_command_says(capsys, monkeypatch, tmp_path):
  (tmp_path / 'talks.py').write_text(
    'import sys\n'
    'print("begins")\n'
    'print("train    1/2  eta 0:01", file=sys.stderr)\n'
    'print("train    2/2  in 0:02", file=sys.stderr)\n'
    'print("ends")\n'
    'sys.exit(*map(int, sys.argv[1:]))\n'
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  display = pytest.importorskip('IPython.display')
  monkeypatch.setattr(display, 'clear_output', lambda wait: print('-- cleared'))
  helper.run('talks')
  last = capsys.readouterr().out.split('-- cleared\n')[-1]
  lines = last.splitlines()
  assert sorted(lines) == ['begins', 'ends', 'train    2/2  in 0:02']
  with pytest.raises(UserError, match='talks ended with 3: ends'):
    helper.run('talks', '3')


def test_tables_hold_text_and_no_markup():
  html = helper.html_table([('a', 'b'), ('<b>', '1')])._repr_html_()
  assert '&lt;b&gt;' in html and '<b>' not in html
  assert html.count('<tr>') == 2 and html.count('<th ') == 2


def test_runs_are_compared_and_their_texts_shown(tmp_path):
  (tmp_path / 'summary.json').write_text('{"win_rate": 0.75}')
  with open(tmp_path / 'completions.jsonl', 'w') as f:
    for who, reward in (('policy', 2.5), ('policy', 9), ('reference', 1.5)):
      for i in range(3):
        row = dict(id=i, who=who, reward=reward + i, prompt=f'p{i}')
        f.write(json.dumps({**row, 'completion': f' {who} <{i}>'}) + '\n')
  run = str(tmp_path)
  html = helper.compare({'one': run}, {'win_rate': 'wins', 'x': 'none'}).text
  assert re.findall('>([^<>]+)<', html) == [
    'one',
    'wins',
    '0.75',
    'none',
    'n/a',
  ]
  html = helper.side_by_side(run, 2)._repr_html_()
  assert re.findall('>([^<>]+)<', html)[5:] == [
    'p0', ' reference &lt;0&gt;', '1.50', ' policy &lt;0&gt;', '2.50',
    'p1', ' reference &lt;1&gt;', '2.50', ' policy &lt;1&gt;', '3.50',
  ]  # fmt: skip


def test_outputs_are_taken_over_from_the_same_source_alone(monkeypatch):
  nbformat = pytest.importorskip('nbformat')
  monkeypatch.syspath_prepend(FOLDER)
  import keep_outputs

  v4 = nbformat.v4

  def book(text, outputs):
    cell = v4.new_code_cell(text, outputs=outputs, execution_count=7)
    cell.metadata = {'execution': {'at': 'noon'}}
    return v4.new_notebook(cells=[cell])

  said = v4.new_output('stream', text='see /a/b/runs/x\n')
  found = keep_outputs.kept(book('f()', []), book('f()', [said]), '/a/b')
  (cell,) = found.cells
  assert cell.outputs[0].text == 'see runs/x\n'
  assert (cell.execution_count, cell.metadata) == (7, {})
  with pytest.raises(ValueError, match='source has changed'):
    keep_outputs.kept(book('f()', []), book('g()', [said]), '/a/b')
  said = v4.new_output('stream', text='sft: finished already, see x\n')
  with pytest.raises(ValueError, match='had been run before'):
    keep_outputs.kept(book('f()', []), book('f()', [said]), '/a/b')
