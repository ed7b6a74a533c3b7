"""SIGTERM and Ctrl-C: the step ends, is saved, and nothing is lost."""

import glob
import os
import re
import signal
import subprocess
import sys

from conftest import core
import pytest
import several
import toy

from bond_jax.errors import Stopped, UserError
from bond_jax.runs import stopping
from bond_jax.training import distil, guard

# The reward's call at step 2: the probe's reference, and two steps.
CALL_OF_STEP_2 = 3

# A command whose main thread is where no Python handler reaches it, or waits
# for a reward that does not answer.
SCRIPT = """
import contextlib, hashlib, sys, time
from bond_jax.runs import command
from bond_jax.runs import stopping
from bond_jax.rewards import make

stopping.BOUND = float(sys.argv.pop())
how = sys.argv.pop()

def slow():
  def reward(prompts, completions, context):
    print('ready', flush=True)
    time.sleep(1000)
  return reward

def main():
  idle = how in ('idle', 'asking')
  block = contextlib.nullcontext() if idle else stopping.deferred()
  with stopping.listening(), block:
    if how.startswith('asking'):
      make.reward({'': make.Part('__main__:slow', {})})(['a'], [['b']], None)
    print('ready', flush=True)
    if how == 'stuck':
      hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
    while not stopping.due():
      pass
    raise stopping.stopped('some', 4)

command.execute(main, '')
"""


@pytest.fixture(autouse=True)
def _survives():
  """A test that fails does not end pytest."""
  before = signal.signal(signal.SIGTERM, lambda *_: None)
  yield
  signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
  'how, bound, signals, status, says',
  core(
    3,
    [
      ('loop', 60, [signal.SIGTERM], 143, 'some: SIGTERM: ended after step 4,'),
      (
        'stuck',
        60,
        2 * [signal.SIGTERM],
        143,
        'a second signal: ended at once',
      ),
      ('asking', 60, [signal.SIGINT], 130, 'interrupted; the same command'),
      ('loop', 60, [signal.SIGINT], 130, 'some: SIGINT: ended after step 4,'),
      ('stuck', 60, 2 * [signal.SIGINT], 130, 'a second signal: ended at once'),
      ('stuck', 1, [signal.SIGTERM], 143, 'not at the end of a step after 1'),
      (
        'asking',
        60,
        [signal.SIGTERM],
        143,
        'SIGTERM: ended before anything of',
      ),
      ('asking in a step', 60, 2 * [signal.SIGINT], 130, 'ended at once'),
      ('idle', 60, [signal.SIGTERM], 143, 'SIGTERM: ended before anything of'),
      ('idle', 60, [signal.SIGINT], 130, 'interrupted; the same command'),
    ],
  ),
)
def test_signals(how, bound, signals, status, says):
  process = subprocess.Popen(
    # In the background of a script pytest itself takes no Ctrl-C. (Not by
    # preexec_fn: Python code between fork and exec may wait for ever.)
    ['env', '--default-signal=INT',
     sys.executable, '-c', SCRIPT, how, str(bound)],
    cwd=toy.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout.readline() == 'ready\n'
  for i, number in enumerate(signals):
    if i:  # the first has been taken
      assert 'once more ends it at once' in _line(process.stderr)
    # Any thread of a process may get its signals: here the youngest one does.
    threads = glob.glob(f'/proc/{process.pid}/task/*') or [str(process.pid)]
    os.kill(max(int(os.path.basename(t)) for t in threads), number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == status, err
  assert says in err
  assert 'Traceback' not in err


def _line(stream):
  while not (line := stream.readline()).strip():
    assert line
  return line


def test_sigterm_and_again_ends_as_an_undisturbed_run(tmp_path):
  """Between two saves; not a row more, and no checkpoint more at the end."""
  workdir = str(tmp_path)
  toy.before('train', workdir)
  toy.light(workdir, CALL_OF_STEP_2, 'term')
  arguments = (
    f'--config={toy.TESTS}/toy.py:{toy.folder()}', f'--workdir={workdir}'
  )  # fmt: skip
  process = toy.command('train', *arguments)
  _, err = process.communicate()
  assert process.returncode == 143, err
  assert 'train: SIGTERM: ended after step 2, which is saved' in err
  assert 'Traceback' not in err
  assert toy.steps(workdir, 'train') == [2]
  assert not os.path.exists(f'{workdir}/train/summary.json')
  assert not os.path.exists(f'{workdir}/.lock')
  toy.run('train', toy.get_config(toy.folder()), workdir)
  toy.same_end(workdir, toy.finished(), 'train')


@pytest.mark.long
def test_at_the_end_of_an_iteration(tmp_path):
  """Of two rollouts and two epochs: a checkpoint holds no half of one."""
  config = toy.get_config(toy.folder())
  config.algorithm.name = 'best_of_n'
  with config.unlocked():
    config.algorithm.args = dict(n=2, anchor='periodic:1')
  config.train.update(dict(rollouts=2, epochs=2, steps=12, save_every=12))
  workdirs = [str(tmp_path / name) for name in ('whole', 'stopped')]
  for workdir in workdirs:
    os.makedirs(workdir)
    toy.before('train', workdir, config)
  toy.run('train', config, workdirs[0])
  toy.light(workdirs[1], 2, 'term')  # the first rollout
  with pytest.raises(Stopped, match='ended after step 4,') as e:
    toy.run('train', config, workdirs[1])
  assert e.value.status == 143
  assert toy.steps(workdirs[1], 'train') == [4]
  toy.run('train', config, workdirs[1])
  toy.same_end(workdirs[1], workdirs[0], 'train', step=12)


def test_in_the_last_step_the_stage_is_done_and_the_next_not_begun(tmp_path):
  workdir = str(tmp_path)
  toy.before('train', workdir)
  toy.light(workdir, 8, 'term')  # the sixth step: one save before
  config = toy.get_config(toy.folder())
  with pytest.raises(Stopped, match='train: SIGTERM: the stage is finished'):
    toy.run('train', config, workdir)
  toy.same_end(workdir, toy.finished(), 'train')
  toy.run('train', config, workdir)  # the signal is forgotten


@pytest.mark.long
def test_the_supervised_stage_stops_too(tmp_path, monkeypatch):
  config, check = toy.get_config(toy.folder()), guard.check_finite

  def signals(row, step, folder):
    check(row, step, folder)
    if step == 4:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(guard, 'check_finite', signals)
  with pytest.raises(Stopped, match='sft: SIGTERM: ended after step [45],'):
    toy.run('sft', config, str(tmp_path))
  monkeypatch.undo()
  assert toy.steps(tmp_path, 'sft')[-1] in (4, 5)
  toy.run('sft', config, str(tmp_path))
  toy.same_end(str(tmp_path), toy.finished(), 'sft')


@pytest.mark.long
def test_what_is_broken_is_not_saved_on_request(tmp_path, monkeypatch):
  """A step whose parameters no validation has seen."""
  config, make = toy.get_config(toy.folder()), distil.make_programs
  toy.before('train', str(tmp_path))

  def poisoned(*args):
    programs = make(*args)

    def update(state, *rest):
      state, row = programs.update(state, *rest)
      scale = state.params['final_norm']['scale'] * float('nan')
      params = state.params | {'final_norm': {'scale': scale}}
      return state._replace(params=params), row

    return programs._replace(update=update)

  monkeypatch.setattr(distil, 'make_programs', poisoned)
  toy.light(str(tmp_path), 2, 'term')
  with pytest.raises(
    UserError, match='step 1: not finite are .*params/final_n'
  ):
    toy.run('train', config, str(tmp_path))
  assert toy.steps(tmp_path, 'train') == []


@pytest.mark.long
def test_hosts_stop_at_one_step(tmp_path):
  """One of two gets the signal."""
  workdir = str(tmp_path)
  stages = [f'{stage}={workdir}' for stage in toy.STAGES]
  command = several.run(toy.folder(), '2,1', *stages)
  toy.light(workdir, CALL_OF_STEP_2, 'term', host=1)
  ended = several.launch(2, *command)
  assert ended.status == 143, ended.said
  for text in ended.said:
    assert re.search('^train: SIGTERM: ended after step 2, ', text, re.M), text
    assert 'error' not in text
  assert toy.steps(workdir, 'train') == [2]


def test_without_signals_nothing_is_due():
  assert stopping.due() is None and stopping.asked() is None
