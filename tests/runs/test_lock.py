"""One run in a workdir: a second one is refused, what is left is taken over."""

import fcntl
import os
import subprocess
import sys

import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.runs import lock as locks

# Holds a workdir for ever.
HOLD = """
import sys, time
from bond_jax.runs import lock as locks

with locks.held(sys.argv[1], 'train'):
  print('held', flush=True)
  time.sleep(100)
"""


def hold(workdir, script=HOLD):
  process = subprocess.Popen(
    [sys.executable, '-c', script, workdir],
    cwd=toy.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout.readline() == 'held\n', process.communicate()
  return process


@pytest.fixture
def workdir(tmp_path):
  return str(tmp_path)


def lock(workdir):
  return os.path.join(workdir, '.lock')


def test_a_second_run_is_refused_with_the_first_s_process(workdir):
  """As its user sees it; and the first is not disturbed."""
  with locks.held(workdir, 'train'):
    arguments = (
      f'--config={toy.TESTS}/toy.py:{toy.folder()}', f'--workdir={workdir}'
    )  # fmt: skip
    out, err = (process := toy.command('sft', *arguments)).communicate()
    assert process.returncode == 2
    assert out == '' and err.count('\n') == 1
    assert f'error: {workdir} is in use by process {os.getpid()} on ' in err
    assert os.uname().nodename in err and 'train, started 2' in err
    assert os.listdir(workdir) == ['.lock']
  assert os.listdir(workdir) == []


def test_kill_9_leaves_what_the_next_takes_over_at_once(workdir, capsys):
  first = hold(workdir)
  with pytest.raises(UserError, match=f'in use by process {first.pid} on'):
    locks.held(workdir, 'sft').__enter__()
  first.kill()
  first.communicate()
  assert os.path.exists(lock(workdir))
  with locks.held(workdir, 'sft'), open(lock(workdir)) as f:
    assert f.read().startswith(f'process {os.getpid()} on ')
  said = capsys.readouterr().out
  assert f'took over the lock of process {first.pid} on ' in said
  assert 'still runs' not in said  # it was on this machine
  assert not os.path.exists(lock(workdir))


STAGE = """
import sys, time
from bond_jax.runs import command
from bond_jax.runs import lock as locks
from bond_jax.runs import stopping

def main():
  with stopping.listening(), locks.held(workdir, 'train'):
    print('held', flush=True)
    time.sleep(100)

workdir = sys.argv.pop()
command.execute(main, '')
"""


def test_no_lock_is_left_after_a_signal(workdir):
  process = hold(workdir, STAGE)
  process.terminate()
  _, err = process.communicate()
  assert process.returncode == 143, err
  assert os.listdir(workdir) == []


def test_what_another_machine_left_is_taken_over_with_a_warning(
  workdir, capsys
):
  with open(lock(workdir), 'w') as f:
    f.write('process 7 on other, train, started 2026-01-01 (train)\n')
  with locks.held(workdir, 'sft'):
    pass
  said = capsys.readouterr().out
  assert 'took over the lock of process 7 on other, train' in said
  assert 'if it still runs' in said


def test_a_file_system_without_locks_is_a_warning(workdir, monkeypatch, capsys):
  def none(*_):
    raise OSError(38, 'Function not implemented')

  monkeypatch.setattr(fcntl, 'flock', none)
  with locks.held(workdir, 'sft'):
    assert os.path.exists(lock(workdir))
  assert 'cannot be locked (Function not' in capsys.readouterr().err


def test_a_lock_that_was_just_removed_is_made_anew(workdir, monkeypatch):
  """Between opening the file and locking it."""
  flock, once = fcntl.flock, iter([True])

  def late(*args):
    if next(once, False):
      os.remove(lock(workdir))
    flock(*args)

  monkeypatch.setattr(fcntl, 'flock', late)
  with locks.held(workdir, 'sft'), pytest.raises(UserError, match='in use by'):
    locks.held(workdir, 'sft').__enter__()
  assert os.listdir(workdir) == []
