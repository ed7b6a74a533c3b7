"""The pages are complete, their links lead somewhere, their code compiles."""

import ast
import glob
import importlib
import inspect
import json
import os
import pathlib
import re
import textwrap

import config_page
import jax.numpy as jnp
import language
import ml_collections
import numpy as np
import pytest
import toy

from bond_jax.algorithms.parts import ops
from bond_jax.rewards import calling
from bond_jax.training import setups, watch
from bond_jax.types import Scores
from configs import demo

FILES_END = (
  '.py', '.sh', '.md', '.jsonl', '.png', '.safetensors', '.gguf', '.model',
  'json',
)  # fmt: skip


def pages():
  """Path -> text, of README.md and the pages of docs/."""
  paths = glob.glob(os.path.join(toy.ROOT, 'docs', '*.md'))
  found = {}
  for path in [os.path.join(toy.ROOT, 'README.md'), *sorted(paths)]:
    with open(path, encoding='utf-8') as f:
      found[os.path.relpath(path, toy.ROOT)] = f.read()
  return found


def sections(page):
  """Heading without its marks -> the rows of its tables, as lists of cells."""
  found, title = {}, ''
  for line in pages()[f'docs/{page}.md'].splitlines():
    if line.startswith('#'):
      title = line.strip('# `')
    elif line.startswith('| `'):
      cells = [cell.strip() for cell in line.strip('|').split(' | ')]
      found.setdefault(title, []).append(cells)
  return found


def names(rows):
  """The keys of a table; a key that is there twice is a mistake."""
  keys = [cells[0].strip('`') for cells in rows]
  assert len(keys) == len(set(keys)), sorted(keys)
  return set(keys)


# -- config.md ----------------------------------------------------------------


# Of a config: what users fill in.
OPEN = re.compile(
  r'.*\.args|.*\.parts|model\.sizes|data\.(fields|splits|mix)'
  r'|reward_model\.(model|tokenizer|data|prompt)'
)


def flat(config, above=''):
  """key -> value of a config, open sections whole."""
  found = {}
  for key, value in config.items():
    path = f'{above}{key}'
    section = isinstance(value, ml_collections.ConfigDict)
    if section and not OPEN.fullmatch(path):
      found |= flat(value, f'{path}.')
    else:
      found[path] = value.to_dict() if section else value
  return found


def test_the_page_has_every_setting_and_its_default():
  text, algorithms = pages()['docs/config.md'], set(demo.ALGORITHMS)
  rows = [
    row
    for title, table in sections('config').items()
    if title not in algorithms
    for row in table
  ]
  assert names(rows) == set(config_page.settings())
  assert config_page.page(text) == text


def test_every_argument_of_every_algorithm_is_on_the_page():
  page = sections('config')
  for name, (_, _, _, args) in demo.ALGORITHMS.items():
    make = importlib.import_module(f'bond_jax.algorithms.{name}').make
    assert names(page[name]) == set(inspect.signature(make).parameters), name
    for key, kind, value, *_ in page[name]:
      parameter = inspect.signature(make).parameters[key.strip('`')]
      assert inspect.formatannotation(parameter.annotation) == kind, (name, key)
      assert value == f'`{args[key.strip("`")]!r}`', (name, key)


def test_every_algorithm_has_its_place():
  folder = os.path.join(toy.ROOT, 'bond_jax', 'algorithms')
  files = {f[:-3] for f in os.listdir(folder) if f.endswith('.py')}
  assert files - {'__init__'} == set(demo.ALGORITHMS) <= set(sections('config'))


# -- metrics.md ---------------------------------------------------------------

FILES = (
  'sft/metrics.jsonl',
  'train/metrics.jsonl',
  'evaluate/metrics.jsonl',
  'summary.json',
  'sft/summary.json',
  'reward/summary.json',
  'train/summary.json',
)


@pytest.mark.parametrize('name', FILES)
def test_the_page_has_what_a_finished_run_has_left(name):
  path = os.path.join(toy.finished(), name)
  with open(path, encoding='utf-8') as f:
    rows = list(map(json.loads, f)) if name[-1] == 'l' else [json.load(f)]
  left = {key for row in rows for key in row}
  assert names(sections('metrics')[name]) == left


def of_the_algorithms():
  """The metrics of every algorithm's `weigh`."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
  found = set()
  for name in demo.ALGORITHMS:
    made = setups.make_algorithm(demo.get_config(f'algorithm={name}'))
    reward = draw(2, made.num_policy + made.num_anchor)
    win = ops.win_matrix(reward)
    index = made.select(reward, win)
    rows = lambda kind, a=made: draw(2, len(getattr(a, kind)), 3)
    scores = Scores(
      reward=reward,
      win=win,
      index=index,
      log_sampled=draw(*index.shape, 3),
      log_anchor=rows('anchor_rows'),
      log_reference=rows('reference_rows'),
      log_quantile=draw(2, len(made.quantile_rows)),
      weight=jnp.ones(2),
    )
    found |= set(made.weigh(scores)[1])
  return found


def of_a_reward():
  """The metrics of a reward of parts, one of them called NAME, that skips."""
  texts = [['a', 'b']]
  reward = lambda prompts, completions, context: {'NAME': np.ones((1, 2))}
  return set(
    calling.score(
      reward, ['p'], texts, toy.context(texts), failure='skip'
    ).metrics
  )


def of_an_exact_run(workdir):
  """The metrics of a run on the enumerable language, its quantile learned."""
  config = language.get_config('bond', **language.LEARNED)
  config.enumerable.kl_weight = 0.5
  toy.run('train', config, workdir)
  return {key for row in toy.rows(workdir, 'train') for key in row}


@pytest.mark.long
def test_the_page_has_what_other_runs_leave(tmp_path):
  page = sections('metrics')
  left = of_the_algorithms() | of_a_reward() | of_an_exact_run(str(tmp_path))
  left |= {f'watch/{name}' for name in watch.ADVICE}
  usual = names(page['train/metrics.jsonl'])
  assert names(page['In some runs only']) == left - usual


# -- links and code -----------------------------------------------------------


def anchors(text):
  """The anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r'```.*?```', '', text, flags=re.S)
  found = set()
  for title in re.findall(r'^#+ (.*)$', text, re.M):
    title = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', title).strip().lower()
    anchor = re.sub(r'[^\w\- ]', '', title).replace(' ', '-')
    assert anchor not in found, f'two headings {title!r}'
    found.add(anchor)
  return found


def links(text):
  """The targets of all links and figures of a page, code left out."""
  text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
  text = re.sub(r'^    .*$', '', text, flags=re.M)
  return re.findall(r'\]\(([^)\s]+)\)', text)


@pytest.mark.parametrize('name', sorted(pages()))
def test_every_link_leads_somewhere(name):
  for link in links(pages()[name]):
    if re.match(r'https?://', link):
      continue
    target, _, anchor = link.partition('#')
    folder = os.path.dirname(name)
    path = os.path.normpath(os.path.join(folder, target)) if target else name
    assert os.path.exists(os.path.join(toy.ROOT, path)), f'{name}: {link}'
    if anchor:
      assert anchor in anchors(pages()[path]), f'{name}: {link}'


def test_every_page_and_figure_can_be_found():
  """From the index of the README, and from the pages that show them."""
  found = {'README.md': links(pages()['README.md'])}
  index = {x.partition('#')[0] for x in found['README.md']}
  assert {name for name in pages() if name != 'README.md'} <= index
  shown = {
    os.path.basename(link) for text in pages().values() for link in links(text)
  }
  folder = os.path.join(toy.ROOT, 'docs', 'figures')
  assert set(os.listdir(folder)) <= shown


def test_the_map_of_the_readme_has_every_room():
  """And every file of the root; a room tells of its own files itself."""
  tree = re.search(r'```\n(bond_jax/\n.*?)```', pages()['README.md'], re.S)[1]
  ours = tree.partition('configs/')[0]
  package = pathlib.Path(toy.ROOT, 'bond_jax')
  files = {p.name for p in package.glob('*.py')} - {'__init__.py'}
  assert set(re.findall(r'\w+\.py', ours)) == files
  rooms = [p.parent.name for p in package.glob('*/__init__.py')]
  assert sorted(re.findall(r'^  (\w+)/', ours, re.M)) == sorted(rooms)


def test_a_room_tells_of_every_file_in_it():
  """Or, of the many, of the room that they are in: rewards are a list."""
  for path in pathlib.Path(toy.ROOT, 'bond_jax').rglob('*/__init__.py'):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert 'Start at ' in said and len(said.splitlines()) <= 7, path
    named = set(re.findall(r'\w+\.py', said))
    assert named <= {p.name for p in path.parent.glob('*.py')}, path


def test_the_files_that_are_named_are_there():
  """Names of files of the repository in `code`, with their folder."""
  for name, text in pages().items():
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    for path in re.findall(
      r'`((?:bond_jax|configs|tests|launch|benchmarks)/[\w/]+\.\w+)`', text
    ):
      if 'soft_best_of_n' not in path:
        assert os.path.exists(os.path.join(toy.ROOT, path)), f'{name}: {path}'


@pytest.mark.parametrize('name', sorted(pages()))
def test_python_blocks_compile(name):
  for block in re.findall(r'^```python\n(.*?)^```', pages()[name], re.S | re.M):
    ast.parse(textwrap.dedent(block))


def test_configs_of_the_data_page_are_configs():
  """Each block of data.md that defines one is run, and its keys are known."""
  known = set(config_page.settings())
  blocks = re.findall(r'```python\n(.*?)```', pages()['docs/data.md'], re.S)
  assert len(blocks) == 2
  for block in blocks:
    space = {}
    exec(block, space)
    config = space['get_config']()
    assert set(flat(config)) <= known
    json.loads(config.to_json_best_effort())


def test_settings_in_the_text_exist():
  """`config.a.b`, `--config.a.b`, and `train.steps` written as code."""
  known = set(config_page.settings())
  tops = {key.split('.')[0] for key in known}
  nodes = {
    '.'.join(key.split('.')[:i])
    for key in known
    for i in range(1, key.count('.') + 2)
  }
  missing = []
  for name, text in pages().items():
    text = re.sub(r'```python.*?```', '', text, flags=re.S)
    named = re.findall(r'`?(?:--)config\.([\w.]+\w)', text)
    named += re.findall(r'`config\.([\w.]+\w)', text)
    named += [
      key
      for key in re.findall(r'`([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`', text)
      if key.split('.')[0] in tops
    ]
    for key in named:
      files = key.endswith(FILES_END)
      above = any(
        OPEN.fullmatch(key.rsplit('.', i)[0]) for i in range(1, key.count('.'))
      )
      if not (files or above or key in nodes or OPEN.fullmatch(key)):
        missing.append(f'{name}: {key}')
  assert not missing


def test_the_walk_leads_through_code_that_is_there():
  """Each hop of walk.md is a file and a name in it; 25 at most."""
  text = pages()['docs/walk.md']
  hops = re.findall(r'^ *\d+\. .*', text, re.M)
  assert len(hops) <= 25
  places = re.findall(r'`(bond_jax/[\w/]+\.py):(\w+)`', text)
  assert len(places) == len(hops) - 1  # the first is the command itself
  for path, name in places:
    body = ast.parse(pathlib.Path(toy.ROOT, path).read_text()).body
    assert name in {getattr(node, 'name', '') for node in body}, (path, name)


def test_the_reading_order_has_the_lines_that_it_says():
  """To the next hundred."""
  text = pages()['README.md']
  package = pathlib.Path(toy.ROOT, 'bond_jax')
  lines = lambda paths: sum(len(p.read_text().splitlines()) for p in paths)
  says = r'To read it: (.*?) are ([\d,]+) lines; .* it is ([\d,]+)\.'
  first = re.search(says, text, re.S)
  path = [pathlib.Path(toy.ROOT, x) for x in re.findall(r'\((.*?)\)', first[1])]
  whole = {*path, package / 'training' / 'distil.py'}
  whole |= {p for room in ('algorithms', 'models')
            for p in (package / room).rglob('*.py')}  # fmt: skip
  for paths, says in ((path, first[2]), (whole, first[3])):
    assert abs(lines(paths) - int(says.replace(',', ''))) <= 100, says
