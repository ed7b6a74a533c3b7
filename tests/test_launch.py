"""launch/tpu_vm.sh, with stand-ins for Python, pip and the metadata server."""

import os
import shutil
import subprocess

import pytest
import toy

# Every call leaves a line in $LOG. An environment that it "makes" holds a copy
# of itself.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "$0"; exit; fi
echo "$*" >> "$LOG"
case "$*" in
  '-m venv '*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip install '*) exit "${PIP_STATUS:-0}" ;;
  '-m bond_jax.'*)
    printf '%s\\n' "$@" > "$LOG.arguments"
    env > "$LOG.env"
    exit "${STATUS:-0}" ;;
esac
"""
CURL = """#!/usr/bin/env bash
url=${!#}
file=$METADATA/${url##*/}
[ -e "$file" ] || exit 22
cat "$file"
"""


@pytest.fixture
def call(tmp_path):
  """Runs the script in a copy of what it needs; gives what happened."""
  root, bin_ = tmp_path / 'repo', tmp_path / 'bin'
  metadata, log = tmp_path / 'metadata', tmp_path / 'log'
  shutil.copytree(os.path.join(toy.ROOT, 'launch'), root / 'launch')
  for folder in (bin_, metadata, root / 'bond_jax'):
    folder.mkdir()
  (root / 'requirements.txt').write_text('jax==1.2.3\n')
  (root / 'bond_jax' / 'train.py').write_text("if __name__ == '__main__': ...")
  (root / 'bond_jax' / 'ops.py').write_text("sys.modules['__main__']")
  for name, text in (('python3.12', PYTHON), ('curl', CURL)):
    (bin_ / name).write_text(text)
    (bin_ / name).chmod(0o755)

  def run(*args, endpoints='10.0.0.2', tpu_env='', **env):
    (metadata / 'tpu-env').write_text(tpu_env)
    (metadata / 'worker-network-endpoints').write_text(endpoints)
    log.write_text('')
    done = subprocess.run(
      [root / 'launch' / 'tpu_vm.sh', *args],
      env={
        'PATH': f'{bin_}:/usr/bin:/bin',
        'HOME': str(tmp_path),
        'LOG': str(log),
        'METADATA': str(metadata),
        **env,
      },
      cwd='/',
      capture_output=True,
      text=True,
    )
    return done, log.read_text().splitlines()

  run.root, run.log = root, log
  return run


INSTALL = '-m pip install --quiet -r requirements.txt jax[tpu]'


def test_it_installs_once_and_runs(call):
  args = ['train', '--config=configs/x.py:a b', '--config.seed=3', '--x=*']
  done, log = call(*args, STATUS='3')
  assert done.returncode == 3
  assert done.stderr == ''
  assert log[0] == '-m venv .venv-tpu'
  assert log.index(INSTALL) > log.index('-m pip install --quiet --upgrade pip')
  assert log[-2] == '-m pip check'
  passed = (call.log.parent / 'log.arguments').read_text().splitlines()
  assert passed == ['-m', 'bond_jax.train', *args[1:]]
  env = (call.log.parent / 'log.env').read_text().splitlines()
  assert 'PYTHONUNBUFFERED=1' in env
  assert 'JAX_PLATFORMS=tpu,cpu' in env
  assert f'JAX_COMPILATION_CACHE_DIR={call.root.parent}/.cache/bond_jax' in env

  done, log = call(*args)
  assert done.returncode == 0
  assert done.stdout == ''
  assert len(log) == 1

  requirements = call.root / 'requirements.txt'
  later = os.stat(call.root / '.venv-tpu' / '.done').st_mtime + 5
  os.utime(requirements, (later, later))
  _, log = call(*args)
  assert INSTALL in log


def test_an_installation_that_failed_is_done_again(call):
  done, log = call('train', PIP_STATUS='1')
  assert done.returncode != 0
  assert not any('bond_jax' in line for line in log)
  done, log = call('train')
  assert done.returncode == 0
  assert log[0] == '-m venv .venv-tpu'
  assert INSTALL in log


@pytest.mark.parametrize(
  'told, says',
  [
    (dict(endpoints='10.0.0.2,10.0.0.3'), '2 hosts in 1 slice'),
    (dict(endpoints='a:0:10.0.0.2,b:1:10.0.0.3,c:2:10.0.0.4'), '3 hosts'),
    (dict(TPU_WORKER_HOSTNAMES='a,b'), '2 hosts'),
    (dict(tpu_env="A: 'b'\nMEGASCALE_NUM_SLICES: '2'\n"), '1 hosts in 2 slice'),
    (dict(MEGASCALE_NUM_SLICES='4'), '1 hosts in 4 slice'),
    (dict(endpoints=''), 'this is no TPU VM'),
  ],
)
def test_anything_but_one_host_is_refused(call, told, says):
  done, log = call('train', **told)
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  assert done.stderr.startswith('error: ')
  assert says in done.stderr
  assert log == []


def test_one_host_may_be_said_by_hand(call):
  done, log = call('train', endpoints='', TPU_WORKER_HOSTNAMES='localhost')
  assert done.returncode == 0, done.stderr
  assert log[-1] == '-m bond_jax.train'


@pytest.mark.parametrize('args', [[], ['ops'], ['trains'], ['--help'], ['.']])
def test_an_unknown_command_is_one_line(call, args):
  done, log = call(*args)
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  assert 'is no command; give one of train, then its flags' in done.stderr
  assert log == []


@pytest.mark.skipif(
  not shutil.which('shellcheck'), reason='shellcheck is not installed'
)
def test_shellcheck():
  folder = os.path.join(toy.ROOT, 'launch')
  scripts = [os.path.join(folder, name) for name in os.listdir(folder)]
  done = subprocess.run(
    ['shellcheck', *scripts], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout
