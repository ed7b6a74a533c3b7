"""One run in a workdir: a second one is refused, what is left is taken over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.runs import lock as locks

# Holds a workdir for ever.
HOLD = """
import sys, time
from bond_jax.runs import lock as locks

locks.BEAT = 0.1
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
  with locks.held(workdir, 'sft'):
    assert locks._read(lock(workdir))['pid'] == os.getpid()
  said = capsys.readouterr().out
  assert f'took over the lock of process {first.pid} on ' in said
  assert 'its process is gone' in said and 'waiting' not in said
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


def elsewhere(workdir, **changes):
  """A lock that a process of another machine has left, or holds."""
  owner = locks._describe('train') | {'host': 'other', 'boot': 'x', 'beat': 1.0}
  with open(lock(workdir), 'w') as f:
    json.dump(owner | changes, f)


def test_another_host_that_gives_no_sign_of_life(workdir, capsys, monkeypatch):
  monkeypatch.setattr(locks, 'PATIENCE', 0.5)
  elsewhere(workdir, beat=time.time() + 3600)  # its clock is not ours
  with locks.held(workdir, 'sft'):
    pass
  said = capsys.readouterr().out
  assert 'on other, train' in said and 'no sign of life in' in said


def test_another_host_that_lives(workdir, monkeypatch):
  """On a file system that locks within each machine alone."""
  monkeypatch.setattr(locks, 'PATIENCE', 60.0)
  monkeypatch.setattr(locks, '_flock', lambda fd: True)
  script = HOLD.replace('with', 'locks._describe = other\nwith').replace(
    '\nlocks.BEAT',
    '\ndef other(stage, describe=locks._describe):\n'
    "  return describe(stage) | {'host': 'other'}\nlocks.BEAT",
  )
  process = hold(workdir, script)
  with pytest.raises(UserError, match='in use by process .* on other, train'):
    locks.held(workdir, 'sft').__enter__()
  # One that does not see the first takes the file; the first sees that.
  elsewhere(workdir, host='third')
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2
  assert 'this run lost its workdir' in err and 'on third' in err


def test_a_machine_that_was_started_anew(workdir, capsys):
  """Its name is the same, and the last beat was before it came up."""
  elsewhere(workdir, host=os.uname().nodename)
  with locks.held(workdir, 'sft'):
    pass
  assert 'the machine was started anew since' in capsys.readouterr().out


def test_without_flock_the_process_is_asked(workdir, monkeypatch):
  monkeypatch.setattr(locks, '_flock', lambda fd: None)
  process = hold(workdir)
  with pytest.raises(UserError, match=f'in use by process {process.pid} on'):
    locks.held(workdir, 'sft').__enter__()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with locks.held(workdir, 'sft'):
    pass


def test_a_lock_that_somebody_removed_is_made_again(workdir, monkeypatch):
  monkeypatch.setattr(locks, 'BEAT', 0.05)
  with locks.held(workdir, 'sft'):
    os.remove(lock(workdir))
    until = time.monotonic() + 60
    while not os.path.exists(lock(workdir)) and time.monotonic() < until:
      time.sleep(0.02)
    with pytest.raises(UserError, match='in use by'):
      locks.held(workdir, 'sft').__enter__()
  assert not os.path.exists(lock(workdir))
