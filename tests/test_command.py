"""The command line: one clear line for a user's mistake, and status 2."""

import json
import os
import subprocess
import sys

import ml_collections
import pytest
import toy

import bond_jax
from bond_jax import command
from bond_jax.errors import UserError

# The smallest command there is: it starts in a fraction of a second.
SCRIPT = """
from bond_jax import command, errors

def main(config, workdir):
  if config.train.steps == 1:
    raise errors.UserError('one is too few')
  if config.train.steps == 2:
    raise ValueError('a bug')
  if config.train.steps == 3:
    raise KeyboardInterrupt
  print(workdir, config.train.steps)

command.run(main, 'What it does.')
"""
CONFIG = """
import ml_collections

def get_config(steps='7'):
  return ml_collections.ConfigDict(
      dict(seed=0, train=dict(steps=int(steps), batch=8)))
"""


@pytest.fixture(scope='module')
def call(tmp_path_factory):
  folder = tmp_path_factory.mktemp('command')
  (folder / 'script.py').write_text(SCRIPT)
  (folder / 'config.py').write_text(CONFIG)
  (folder / 'torn.py').write_text('def get_config(:\n')
  (folder / 'empty.py').write_text('')

  def run(*args, config=True):
    if config and not any(arg.startswith('--config=') for arg in args):
      args = ['--config=config.py', *args]
    return subprocess.run(
      [sys.executable, 'script.py', *args],
      cwd=folder,
      env={**os.environ, 'PYTHONPATH': toy.ROOT},
      capture_output=True,
      text=True,
    )

  return run


def test_a_command_that_works(call):
  done = call('--workdir=a//b/', '--config.train.steps=5')
  assert (done.returncode, done.stdout, done.stderr) == (0, 'a/b 5\n', '')


@pytest.mark.parametrize(
  'args, says',
  [
    (
      ['--config.train.bach=3'],
      "--config.train.bach: config.train has no 'bach'; it has batch, steps.",
    ),
    (
      ['--config.train.steps=5', '--config.tain.steps=3'],
      "--config.tain.steps: config has no 'tain'; it has seed, train.",
    ),
    (['--config.seed.x=3'], "config.seed has no 'x'"),
    (['--config.train.steps=abc'], 'config.train.steps=abc: invalid literal'),
    (['--config.train.steps=2.5'], 'config.train.steps=2.5: invalid literal'),
    (['--steps=3'], "Unknown command line flag 'steps'"),
    (['extra'], "unexpected argument 'extra'"),
    (['--config=nowhere.py'], 'cannot read --config=nowhere.py'),
    (['--config=torn.py'], 'torn.py, line 1'),
    (['--config=empty.py'], "--config has no attribute 'get_config'"),
    (['--config=config.py:x'], 'ValueError: invalid literal for int()'),
    (['--config.train.steps=1'], 'one is too few'),
  ],
)
def test_a_mistake_is_one_line_and_status_2(call, args, says):
  done = call(*args, '--workdir=run')
  assert done.returncode == 2
  assert done.stdout == ''
  assert done.stderr.count('\n') == 1
  assert done.stderr.startswith('error: ')
  assert says in done.stderr


def test_without_a_config_it_is_that_of_the_run(call, tmp_path):
  """Tuples are tuples again; and what is wrong with the folder is one line."""
  workdir = str(tmp_path)
  config = dict(seed=0, train=dict(steps=5, rates=[1, [2, 3]]))
  (tmp_path / 'config.json').write_text(json.dumps(config))
  read = command.read_config(workdir)
  assert read.train.rates == (1, (2, 3)) and read.is_locked
  assert json.loads(read.to_json_best_effort()) == config
  done = call(f'--workdir={workdir}', config=False)
  assert (done.returncode, done.stdout) == (0, f'{workdir} 5\n')
  done = call(f'--workdir={workdir}', '--config.train.steps=6', config=False)
  assert done.stderr.count('\n') == 1 and 'give that too' in done.stderr
  done = call(f'--workdir={workdir}/none', config=False)
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert f'cannot read {workdir}/none/config.json (No such file' in done.stderr
  for broken in ('{"seed"', '3'):
    (tmp_path / 'config.json').write_text(broken)
    with pytest.raises(UserError, match='not JSON of ours'):
      command.read_config(workdir)


@pytest.mark.parametrize('theirs, fine', [
  ('0.0.9', True), (bond_jax.__version__, True), ('0.10.0', False),
  ('1.0', False),
])  # fmt: skip
def test_a_run_of_a_newer_version(tmp_path, theirs, fine):
  config = ml_collections.ConfigDict(dict(seed=0))
  command.claim_workdir(str(tmp_path), config)
  path = tmp_path / 'version.json'
  assert json.loads(path.read_text()) == {'bond_jax': bond_jax.__version__}
  path.write_text(json.dumps({'bond_jax': theirs}))
  for act in (
    lambda: command.check_workdir(str(tmp_path), config),
    lambda: command.read_config(str(tmp_path)),
  ):
    if fine:
      act()
    else:
      with pytest.raises(UserError, match=f'made by bond_jax {theirs}, and'):
        act()


def test_the_workdir_is_required(call):
  done = call()
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  assert '--workdir' in done.stderr


def test_debug_shows_where(call):
  done = call('--config=config.py:1', '--workdir=run', '--debug')
  assert done.returncode != 0
  assert 'Traceback' in done.stderr
  assert 'in main' in done.stderr
  assert 'one is too few' in done.stderr


def test_a_bug_keeps_its_traceback(call):
  done = call('--config=config.py:2', '--workdir=run')
  assert done.returncode == 1
  assert 'in main' in done.stderr
  assert 'ValueError: a bug' in done.stderr


def test_an_interrupt_is_one_line(call):
  done = call('--config=config.py:3', '--workdir=run')
  assert done.returncode == 130
  assert done.stderr.count('\n') == 1
  assert done.stderr.startswith('interrupted')


def test_load_names_what_is_wrong(tmp_path, monkeypatch):
  (tmp_path / 'of_the_user.py').write_text('x = 1\ndef f(): return 3\n')
  (tmp_path / 'broken.py').write_text('1 / 0\n')
  (tmp_path / 'needy.py').write_text('import no_such_package\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  assert command.load('of_the_user:f')() == 3
  for reference, says in (
    ('of_the_user', 'write it as "module:function"'),
    ('of_the_user:g', "has no function 'g'"),
    ('of_the_user:x', "has no function 'x'"),
    ('nowhere:f', "cannot import 'nowhere'"),
    ('needy:f', "cannot import 'no_such_package'"),
    ('broken:f', 'ZeroDivisionError: division by zero'),
  ):
    with pytest.raises(UserError, match=says):
      command.load(reference)


def test_a_workdir_belongs_to_the_config_that_claimed_it(tmp_path):
  workdir = str(tmp_path / 'runs' / 'a')
  first = ml_collections.ConfigDict(dict(a=1, b=dict(c=(1, 2), d='x')))
  assert not command.check_workdir(workdir, first)
  assert not os.path.exists(workdir)
  command.claim_workdir(workdir, first)
  command.claim_workdir(workdir, first)
  assert command.check_workdir(workdir, first)
  written = toy.listing(workdir)
  assert sorted(written) == ['config.json', 'version.json']
  assert json.loads(written['config.json'])['b'] == {'c': [1, 2], 'd': 'x'}
  second = first.copy_and_resolve_references()
  second.b.d = 'y'
  second.b.e = 3
  for act in (command.check_workdir, command.claim_workdir):
    with pytest.raises(UserError) as e:
      act(workdir, second)
    assert "b.d: 'x' -> 'y'; b.e: '(absent)' -> 3" in str(e.value)
    assert 'a: ' not in str(e.value).split('(')[1]
  assert toy.listing(workdir) == written


def test_a_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write to --workdir'):
    command.claim_workdir(
      str(tmp_path / 'file' / 'run'), ml_collections.ConfigDict()
    )


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = str(tmp_path / 'x.json')
  command.write_json(path, {'a': [1, None]})
  with pytest.raises(TypeError):
    command.write_json(path, {'a': 2, 'b': object()})
  assert command.read_json(path) == {'a': [1, None]}


@pytest.mark.parametrize('content', ['', '{', '[' * 10**5, '3', '"\\xff"'])
def test_a_json_file_that_was_cut_is_one_line(tmp_path, content):
  path = tmp_path / 'summary.json'
  path.write_text(content, encoding='latin-1')
  with pytest.raises(UserError, match='it is not JSON of ours.*restore it'):
    command.read_json(str(path))


def test_a_config_whose_keys_are_no_names_is_one_line(tmp_path):
  (tmp_path / 'config.json').write_text('{"a.b": {"c": 1}}')
  with pytest.raises(UserError, match='is no config'):
    command.read_config(str(tmp_path))


@pytest.mark.parametrize('content', ['{}', '{"bond_jax": 3}', '[]'])
def test_a_version_that_is_none(tmp_path, content):
  (tmp_path / command.VERSION).write_text(content)
  with pytest.raises(UserError, match=command.VERSION):
    command.check_version(str(tmp_path))


def test_a_version_of_endless_digits(tmp_path):
  text = json.dumps({'bond_jax': '9' * 9999})
  (tmp_path / command.VERSION).write_text(text)
  with pytest.raises(UserError, match='update it'):
    command.check_version(str(tmp_path))


@pytest.mark.parametrize(
  'args',
  [
    ['--\x1b[2J=1'],
    ['--config=-1'],
    ['--config.train.steps=\x1b[2J'],
    ['--' + 'a' * 3000],
  ],
)
def test_strange_words_are_one_line(call, args):
  done = call(*args, '--workdir=run')
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert '\x1b' not in done.stderr and 'Traceback' not in done.stderr
