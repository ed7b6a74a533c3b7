"""Hosts that disagree, fail or do not come: all end, with the same line."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import several
import toy

from bond_jax.rewards import calling
from bond_jax.rewards.calling import Scored


def launch(tmp_path, count: int, text: str, **env: str) -> several.Ended:
  """Runs a script on several hosts."""
  path = tmp_path / 'script.py'
  path.write_text(text)
  return several.launch(count, sys.executable, str(path), **env)


OWNERS = """
import jax
from jax.sharding import AxisType, Mesh
import numpy as np

from bond_jax.devices import hosts, sharding, shares
from bond_jax.runs import command

def main():
  hosts.start()
  me, seen = hosts.index(), []
  assert hosts.gather((me, 'x' * me)) == [(i, 'x' * i) for i in range(4)]
  # Within `once` there are no others: nobody would answer.
  assert hosts.once(lambda: hosts.once(lambda: hosts.gather(me))) == [0]
  assert hosts.gather(me) == [0, 1, 2, 3]
  x = np.arange(24).reshape(8, 3)
  devices = np.array(jax.devices())
  for order, shape in (
    ([0, 1, 2, 3], (4, 1)),
    ([0, 1, 2, 3], (2, 2)),
    ([0, 1, 2, 3], (1, 4)),
    ([2, 0, 3, 1], (2, 2)),
  ):
    mesh = Mesh(devices[order].reshape(shape), ('data', 'model'),
                axis_types=(AxisType.Auto,) * 2)
    own = shares.own(mesh, 8)
    on_mesh = sharding.put_batch(x, mesh)
    part = shares.take(on_mesh, own)
    np.testing.assert_array_equal(part, x[own])
    np.testing.assert_array_equal(shares.over(own, lambda: part), x)
    np.testing.assert_array_equal(shares.fetch(on_mesh), x)
    seen.append(shares.owners(mesh, 8).tolist())
  # Rows for two of four hosts: the others ask nobody, and learn of it all.
  mesh = sharding.make_mesh(1, 4)
  own = shares.own(mesh, 2)
  asked = []
  whole = shares.over(own, lambda: asked.append(1) or own.astype(float))
  assert whole.tolist() == [0, 1] and len(asked) == (me in (0, 2))
  print('owners', seen)

command.execute(main, '')
"""


@pytest.mark.long
def test_every_row_has_one_owner_that_holds_it(tmp_path):
  ended = launch(tmp_path, 4, OWNERS)
  assert ended.status == 0, ended.said
  in_order, elsewhere = [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 2, 2, 1, 1, 3, 3]
  for said in ended.said:
    assert f'owners {[*[in_order] * 3, elsewhere]}' in said


def test_what_hosts_found_is_what_one_would_have_found():
  rng = np.random.default_rng(0)
  value = rng.standard_normal((6, 2)).astype(np.float32)
  weight = np.array([1, 0, 1, 1, 1, 0], np.float32)

  def of(rows):
    kept = value[rows][weight[rows] > 0]
    skipped = float((weight[rows] == 0).sum())
    metrics = {'score/a': float(kept.mean()), 'reward/skipped': skipped}
    return rows, Scored(value[rows], weight[rows], metrics)

  whole = of(np.arange(6))[1]
  none = np.zeros(0, np.int64), None
  parts = [of(np.array([4, 5])), none, of(np.array([0, 1, 2, 3]))]
  joined = calling.join(parts)
  np.testing.assert_array_equal(joined.value, whole.value)
  np.testing.assert_array_equal(joined.weight, whole.weight)
  assert joined.metrics == pytest.approx(whole.metrics)
  assert calling.join([of(np.arange(6))]).metrics == whole.metrics


# -- at the start


def in_bash(line: str) -> tuple[str, ...]:
  """A command in which $JAX_PROCESS_ID is the number of the host."""
  return 'bash', '-c', f'{line.replace("python", sys.executable)}'


def ridge(**flags: str) -> str:
  asked = ' '.join(f'--{name}={value}' for name, value in flags.items())
  return (
    'exec python -m bond_jax.reward_model'
    f' --config=tests/toy.py:{toy.folder()} {asked}'
  )


def the_line(ended: several.Ended) -> str:
  """What every host said in the end, the same on all, with status 2."""
  assert ended.status == 2, ended.said
  first, *others = several.errors(ended)
  assert len(first) == 1 and all(line == first for line in others), ended.said
  return first[0]


@pytest.mark.long
def test_other_configs_are_named(tmp_path):
  workdir, flag = str(tmp_path / 'run'), 'config.train.batch'
  line = ridge(**{'workdir': workdir, flag: '$((8 + JAX_PROCESS_ID / 2 * 8))'})
  said = the_line(several.launch(3, *in_bash(line)))
  assert said.startswith('host 2 and host 0 do not run the same')
  assert '(config.train.batch: 8 -> 16)' in said
  assert not os.path.exists(workdir)


@pytest.mark.long
def test_other_code_is_named(tmp_path):
  """Of host 1, who also asks for another stage."""
  copy = tmp_path / 'copy'
  for name in ('bond_jax', 'configs', 'tests'):
    shutil.copytree(os.path.join(toy.ROOT, name), copy / name)
  path = copy / 'bond_jax' / 'algorithms' / 'bond.py'
  path.write_text(path.read_text() + '# another line\n')
  line = (
    f'if [ $JAX_PROCESS_ID = 1 ]; then cd {copy};'
    f' export PYTHONPATH={copy}:{copy}/tests; fi;'
    + ridge(workdir=str(tmp_path / 'run'))
  )
  said = the_line(several.launch(2, *in_bash(line)))
  assert said.startswith('host 1 and host 0 do not run the same')
  assert '(code.algorithms/bond.py: ' in said


@pytest.mark.long
def test_a_workdir_that_is_not_shared(tmp_path):
  mine = {'workdir': f'{tmp_path}/$JAX_PROCESS_ID', 'config.mesh.data': '-1'}
  said = the_line(several.launch(2, *in_bash(ridge(**mine))))
  assert said.startswith(f'{tmp_path}/')
  assert 'is not shared: host 1 did not see there what host 0 wrote' in said


@pytest.mark.long
def test_hosts_without_a_device_in_the_mesh(tmp_path):
  command = several.run(toy.folder(), '1,1', f'sft={tmp_path}/run')
  said = the_line(several.launch(2, *command))
  assert said.startswith('mesh data=1 x model=1 has no device of host 1;')


ALONE = 'from bond_jax.devices import hosts; hosts.start(timeout=1)'


@pytest.mark.long
@pytest.mark.parametrize('host', ['0', '1'])
def test_a_host_that_stays_alone_ends(host):
  with socket.socket() as held:  # nobody else gets this port meanwhile
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(('', 0))
    done = subprocess.run(
      [sys.executable, '-c', ALONE],
      cwd=toy.ROOT,
      env={
        **os.environ,
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{held.getsockname()[1]}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': host,
      },
      capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
  assert done.returncode
  assert done.stdout == 'joining the other hosts, for 1 s at most\n'


# -- during a run

FAILS = """
import os, signal, sys
from bond_jax.runs import command
from bond_jax.devices import hosts
from bond_jax.errors import UserError

hosts.HEARTBEAT = 5

def main():
  hosts.start()
  hosts.gather(None)
  how, me = sys.argv[1], hosts.index()
  if how == 'bug' and me == 1:
    {}['where']
  if how == 'kill' and me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  if how == 'two':
    raise UserError(f'the same, {me}')
  hosts.gather('for ever')

argv, sys.argv = sys.argv, sys.argv[:1]
command.execute(lambda: (setattr(sys, 'argv', argv), main()), '')
"""


def fails(tmp_path, count, how):
  path = tmp_path / 'script.py'
  path.write_text(FAILS)
  return several.launch(count, sys.executable, str(path), how)


@pytest.mark.long
def test_a_bug_ends_all_and_shows_where(tmp_path):
  ended = fails(tmp_path, 3, 'bug')
  assert ended.status == 1
  assert several.errors(ended) == [["host 1: KeyError: 'where'"]] * 3
  assert "{}['where']" in ended.said[1] and 'Traceback' not in ended.said[0]


@pytest.mark.long
def test_errors_at_the_same_time_are_one_line(tmp_path):
  said = the_line(fails(tmp_path, 3, 'two'))
  assert said in [f'host {i}: the same, {i}' for i in range(3)]


@pytest.mark.long
def test_after_a_host_was_killed_the_others_end(tmp_path):
  ended = fails(tmp_path, 3, 'kill')
  assert ended.status
  assert ended.seconds < 60


# -- the launcher


def start(*args: str, **env: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [several.LAUNCHER, *args], env={**os.environ, **env},
    capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip


@pytest.mark.parametrize(
  'args, says',
  [
    (['0', '--', 'true'], "'0' is no number of processes"),
    ([], "'' is no number of processes"),
    (['2', 'true'], "'--' expected before the command, got 'true'"),
    (['2', '--devices', 'x', '--', 'true'], "'x' is no number of devices"),
    (['2', '--'], 'no command'),
  ],
)
def test_the_launcher_says_how_it_is_called(args, says):
  done = start(*args)
  assert done.returncode == 2
  assert done.stderr.startswith(f'error: {says}; usage: ')


def test_the_launcher_tells_processes_apart():
  line = 'echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES, $JAX_NUM_CPU_DEVICES;'
  done = start('3', '--devices', '2', '--', 'bash', '-c', line + 'echo e >&2')
  assert done.returncode == 0
  assert sorted(done.stdout.splitlines()) == [
    f'[{i}] {i} of 3, 2' for i in range(3)
  ]
  assert sorted(done.stderr.splitlines()) == [f'[{i}] e' for i in range(3)]


@pytest.mark.long
def test_the_launcher_ends_those_that_go_on(tmp_path):
  line = (
    f'cd {tmp_path}; if [ $JAX_PROCESS_ID = 1 ]; then'
    ' until [ "$(cat pids | wc -l)" = 2 ]; do sleep 0.05; done; exit 7; fi;'
    ' echo $$ >> pids; exec sleep 1000'
  )
  done = start('3', '--', 'bash', '-c', line, GRACE='1')
  assert done.returncode == 7
  pids = (tmp_path / 'pids').read_text().split()
  assert len(pids) == 2
  for pid in pids:
    assert not os.path.exists(f'/proc/{pid}')
