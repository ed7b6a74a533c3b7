"""The command line: one clear line for a user's mistake, and status 2."""

import json
import os
import re

import forked
import ml_collections
import pytest
import toy

import bond_jax
from bond_jax.errors import UserError
from bond_jax.rewards import make
from bond_jax.runs import files
from bond_jax.runs.settings import configs

# The smallest command there is.
SCRIPT = """
from bond_jax import errors
from bond_jax.runs import command

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
    where = str(folder)
    return forked.call('script.py', *args, folder=where, HOME=where)

  return run


def test_a_command_that_works(call):
  done = call('--workdir=a//b/', '--config.train.steps=5')
  assert (done.returncode, done.stdout, done.stderr) == (0, 'a/b 5\n', '')


def test_a_tilde_is_the_home_folder(call):
  done = call('--config=~/config.py', '--workdir=~/a')
  assert (done.returncode, done.stderr) == (0, '')
  assert re.fullmatch(r'/.*/command\d*/a 7\n', done.stdout)
  done = call('--workdir=~nobody_here/a')
  assert done.returncode == 2 and 'no home folder ~nobody_here;' in done.stderr


@pytest.mark.parametrize(
  'args, says',
  [
    (
      ['--config.train.bach=3'],
      "--config.train.bach: config.train has no 'bach'; did you mean 'batch'?",
    ),
    (
      ['--config.train.steps=5', '--config.tain.steps=3'],
      "--config.tain.steps: config has no 'tain'; did you mean 'train'?",
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


def run_of(folder, **changes) -> str:
  """A folder with the config.json of a run; `changes` by dotted names."""
  config = toy.get_config('nowhere')
  config.update_from_flattened_dict({'train.steps': 5, **changes})
  configs.claim_workdir(str(folder), config)
  return str(folder)


@pytest.mark.parametrize('name', ['text', 'enumerable'])
def test_a_run_of_before_the_rooms_is_read(tmp_path, name):
  """Its config names the task by a module that is elsewhere now."""
  config = toy.get_config('nowhere')
  config.task = name
  configs.claim_workdir(str(tmp_path), config)
  path = tmp_path / 'config.json'
  old = {'text': 'bond_jax.text_task', 'enumerable': 'bond_jax.enumerable'}
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {'task': old[name]})
  )
  assert configs.read_config(str(tmp_path)).task == name
  assert configs.check_workdir(str(tmp_path), config)  # it is still its own


def test_a_run_that_is_older_than_a_setting_has_its_default(tmp_path):
  config = toy.get_config('nowhere')
  configs.claim_workdir(str(tmp_path), config)
  path = tmp_path / 'config.json'
  old = json.loads(path.read_text())
  del old['stop'], old['sft']['micro_batches']
  path.write_text(json.dumps(old))
  read = configs.read_config(str(tmp_path))
  assert (read.stop, read.sft.micro_batches) == ((), 1)
  assert configs.check_workdir(str(tmp_path), config)


def test_without_a_config_it_is_that_of_the_run(call, tmp_path):
  """Tuples are tuples again; and what is wrong with the folder is one line."""
  workdir = run_of(tmp_path)
  read = configs.read_config(workdir)
  assert read.reward_model.alphas == (0.3, 1.0) and read.is_locked
  config = json.loads((tmp_path / 'config.json').read_text())
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
    with pytest.raises(UserError, match='not a JSON object'):
      configs.read_config(workdir)


def test_the_config_of_a_run_is_that_of_another(call, tmp_path):
  """--config takes it, flags change it, and what is wrong in it is one line."""
  path = os.path.join(run_of(tmp_path / 'run'), 'config.json')
  done = call(f'--config={path}', '--workdir=b', '--config.train.steps=7')
  assert done.stdout.endswith(' 7\n') and done.returncode == 0
  assert f"{path} names 'toy:reward': code that is run" in done.stderr
  for args, says in (
    ((f'--config={path}', '--config.train.stpes=7'), "mean 'steps'?"),
    ((f'--config={tmp_path}/config.json',), 'cannot read'),
  ):
    done = call(*args, '--workdir=b')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert says in done.stderr
  for change, says in (
    (lambda c: c['train'].update(steps=0), 'train.steps is 0, expected'),
    (lambda c: c['train'].update(stepz=5), "has 'stepz', which nothing reads"),
    (lambda c: c['train'].pop('steps'), "config.train has no 'steps'"),
  ):
    config = toy.get_config('nowhere').to_dict()
    change(config)
    with open(path, 'w') as f:
      json.dump(config, f)
    with pytest.raises(UserError, match=says) as e:
      configs.read_config(str(tmp_path / 'run'))
    assert path in str(e.value) and '\n' not in str(e.value)


WHERE = """
import glob, os
from bond_jax.runs import command, paths

def main(config, workdir):
  print(os.getcwd(), workdir, other.value, glob.glob(config.data.name))

other = paths.flag('other', None, 'Another run.')
command.run(main, 'Says where it is.')
"""


def test_a_run_s_paths_are_relative_to_where_it_was_started(
  tmp_path, monkeypatch
):
  """From any folder; flags mean what they did in the one they were typed in."""
  there, here = tmp_path / 'there', tmp_path / 'here'
  for folder in (there, here):
    folder.mkdir()
    (folder / 'rows.jsonl').touch()
  monkeypatch.chdir(there)
  run_of('run', **{'data.name': 'rows.jsonl'})
  (tmp_path / 'where.py').write_text(WHERE)

  def call(*args):
    done = forked.call('../where.py', *args, folder=str(here))
    assert done.returncode == 0, done.stderr
    return done

  done = call('--workdir=../there/run', '--other=x')
  assert done.stdout == f"{there} run ../here/x ['rows.jsonl']\n"
  assert f'was started in {str(there)!r}; its relative paths' in done.stderr
  done = call('--config=../there/run/config.json', '--workdir=mine')
  assert done.stdout == f"{there} ../here/mine None ['rows.jsonl']\n"
  # A folder that is not here, as after a copy to another machine.
  version = there / 'run' / 'version.json'
  version.write_text(version.read_text().replace('/there', '/gone'))
  done = call('--workdir=../there/run')
  assert done.stdout == f"{here} ../there/run None ['rows.jsonl']\n"
  assert f'are taken from {here}, since that folder is not' in done.stderr


@pytest.mark.parametrize('theirs, fine', [
  ('0.0.9', True), (bond_jax.__version__, True), ('0.10.0', False),
  ('1.0', False),
])  # fmt: skip
def test_a_run_of_a_newer_version(tmp_path, theirs, fine):
  config = ml_collections.ConfigDict(dict(seed=0))
  configs.claim_workdir(str(tmp_path), config)
  path = tmp_path / 'version.json'
  made = {'bond_jax': bond_jax.__version__, 'folder': os.getcwd()}
  assert json.loads(path.read_text()) == made
  path.write_text(json.dumps({'bond_jax': theirs}))
  for act in (
    lambda: configs.check_workdir(str(tmp_path), config),
    lambda: configs.read_config(str(tmp_path)),
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
  assert make.load('of_the_user:f')() == 3
  for reference, says in (
    ('of_the_user', 'write it as "module:function"'),
    ('of_the_user:g', "has no function 'g'"),
    ('of_the_user:x', "has no function 'x'"),
    ('nowhere:f', "cannot import 'nowhere'"),
    ('needy:f', "cannot import 'no_such_package'"),
    ('broken:f', 'ZeroDivisionError: division by zero'),
  ):
    with pytest.raises(UserError, match=says):
      make.load(reference)


def test_the_function_that_is_advised_is_there():
  with pytest.raises(UserError, match='for instance') as e:
    make.load('toy')
  advised = re.search(r'for instance "(.*?)"', str(e.value))[1]
  assert callable(make.load(advised))


def test_a_workdir_belongs_to_the_config_that_claimed_it(tmp_path):
  workdir = str(tmp_path / 'runs' / 'a')
  first = ml_collections.ConfigDict(dict(a=1, b=dict(c=(1, 2), d='x')))
  assert not configs.check_workdir(workdir, first)
  assert not os.path.exists(workdir)
  configs.claim_workdir(workdir, first)
  configs.claim_workdir(workdir, first)
  assert configs.check_workdir(workdir, first)
  written = toy.listing(workdir)
  assert sorted(written) == ['config.json', 'version.json']
  assert json.loads(written['config.json'])['b'] == {'c': [1, 2], 'd': 'x'}
  second = first.copy_and_resolve_references()
  second.b.d = 'y'
  second.b.e = 3
  for act in (configs.check_workdir, configs.claim_workdir):
    with pytest.raises(UserError) as e:
      act(workdir, second)
    assert "b.d: 'x' -> 'y'; b.e: '(absent)' -> 3" in str(e.value)
    assert 'a: ' not in str(e.value).split('(')[1]
  assert toy.listing(workdir) == written


def test_a_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write to --workdir'):
    configs.claim_workdir(
      str(tmp_path / 'file' / 'run'), ml_collections.ConfigDict()
    )


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = str(tmp_path / 'x.json')
  files.write_json(path, {'a': [1, None]})
  with pytest.raises(TypeError):
    files.write_json(path, {'a': 2, 'b': object()})
  assert files.read_json(path) == {'a': [1, None]}


@pytest.mark.parametrize('content', ['', '{', '[' * 10**5, '3', '"\\xff"'])
def test_a_json_file_that_was_cut_is_one_line(tmp_path, content):
  path = tmp_path / 'summary.json'
  path.write_text(content, encoding='latin-1')
  with pytest.raises(UserError, match='it is not a JSON object.*restore it'):
    files.read_json(str(path))


def test_a_config_whose_keys_are_no_names_is_one_line(tmp_path):
  (tmp_path / 'config.json').write_text('{"a.b": {"c": 1}}')
  with pytest.raises(UserError, match='is no config'):
    configs.read_config(str(tmp_path))


@pytest.mark.parametrize('content', ['{}', '{"bond_jax": 3}', '[]'])
def test_a_version_that_is_none(tmp_path, content):
  (tmp_path / configs.VERSION).write_text(content)
  with pytest.raises(UserError, match=configs.VERSION):
    configs.check_version(str(tmp_path))


def test_a_version_of_endless_digits(tmp_path):
  text = json.dumps({'bond_jax': '9' * 9999})
  (tmp_path / configs.VERSION).write_text(text)
  with pytest.raises(UserError, match='update it'):
    configs.check_version(str(tmp_path))


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
