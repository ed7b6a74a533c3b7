"""launch/tpu.sh and what it runs on workers, against a stand-in of gcloud."""

import os
import re
import signal
import subprocess

from clouds import (
  alive,
  Cloud,
  COMMAND,
  KINDS,
  PATIENCE,
  PROGRAM,
  STAND_INS,
  until,
)
import pytest
import toy

pytestmark = pytest.mark.long

CREATED = {
  'vm': 'tpu-vm create demo --zone=us-west4-a --quiet'
  ' --accelerator-type=v5litepod-16 --spot --version=v2-alpha-tpuv5-lite',
  'queued': 'queued-resources create demo --zone=us-west4-a --quiet'
  ' --accelerator-type=v5litepod-16 --spot --node-id=demo'
  ' --valid-until-duration=6h --runtime-version=v2-alpha-tpuv5-lite',
  'multislice': 'queued-resources create demo --zone=us-west4-a --quiet'
  ' --accelerator-type=v5litepod-16 --node-count=2 --node-prefix=demo'
  ' --runtime-version=v2-alpha-tpuv5-lite',
}


@pytest.fixture
def cloud(tmp_path, request):
  made = Cloud(tmp_path, getattr(request, 'param', 'vm'))
  yield made
  made.close()


kinds = pytest.mark.parametrize('cloud', KINDS, indirect=True)


@kinds
def test_from_nothing_to_results(cloud, request):
  """Each verb twice: the second time it changes nothing."""
  kind = request.node.callspec.params['cloud']
  count = len(cloud.homes())
  for _ in range(2):
    cloud.tpu('create')
  creations = [line for line in cloud.log() if ' create ' in line]
  assert [c.strip() for c in creations] == [f'compute tpus {CREATED[kind]}']
  for _ in range(2):
    cloud.tpu('setup')
  installed = (cloud.path / 'pip').read_text()
  assert installed.count('-m pip install --quiet -r requirements.txt') == count
  assert cloud.tpu('status', code=5)[0].count('none') == count
  assert f'started on {count} worker' in cloud.tpu('run', *COMMAND)[1]
  before = cloud.runs()
  assert len(before) == count
  assert 'runs already' in cloud.tpu('run', *COMMAND)[1]
  assert cloud.runs() == before
  cloud.tpu('status', code=4)
  cloud.end()
  assert cloud.wait(*['finished 0'] * count) == 0
  for home in cloud.homes():
    passed = (home / 'arguments').read_text().splitlines()
    assert passed == ['bond_jax.train', *COMMAND[2:]]
    assert (home / 'bond_jax/.run/log').read_text() == 'from step 0\n  {}\n'
  for _ in range(2):
    cloud.tpu('fetch', '--workdir=runs/demo')
  assert (cloud.repo / 'runs/demo/summary.json').read_text() == '  {}\n'
  assert not (cloud.repo / 'runs/demo/train/checkpoints/step').exists()
  cloud.tpu('fetch', '--workdir=runs/demo', '--checkpoints')
  assert (cloud.repo / 'runs/demo/train/checkpoints/step').exists()
  cloud.tpu('delete', code=2)
  assert all(home.exists() for home in cloud.homes())
  assert 'deleted' in cloud.tpu('delete', '--yes')[1]
  assert os.listdir(cloud.path / 'nodes') == []
  assert os.listdir(cloud.path / 'requests') == []
  assert 'there is none' in cloud.tpu('delete', '--yes')[1]


@kinds
def test_kept_through_a_preemption(cloud):
  """The run goes on from the checkpoint in the bucket, on a new TPU."""
  keep = cloud.start('keep', '--bucket=bkt', *COMMAND)
  step = cloud.path / 'buckets/bkt/demo/train/checkpoints/step'
  count = len(cloud.homes())
  until(lambda: step.exists() and len(cloud.runs()) == count, keep)
  cloud.preempt()
  until(lambda: sum(' create ' in line for line in cloud.log()) == 2, keep)
  cloud.end()
  out, err = keep.communicate(timeout=PATIENCE)
  assert keep.returncode == 0, err
  assert out.splitlines()[-1].endswith('finished 0')
  for home in cloud.homes():
    assert (home / 'bond_jax/.run/log').read_text().startswith('from step 3\n')
  creations = [line for line in cloud.log() if ' create ' in line]
  assert len(creations) == 2
  assert len(set(creations)) == 1
  # What the bucket holds is there when the TPU is gone.
  cloud.tpu('delete', '--yes')
  cloud.tpu('fetch', '--bucket=bkt', '--workdir=runs/demo')
  assert (cloud.repo / 'runs/demo/summary.json').exists()
  assert not (cloud.repo / 'runs/demo/train/checkpoints').exists()
  assert 'finished' not in cloud.tpu('resume', '--bucket=bkt', *COMMAND)[1]


def test_kept_through_a_signal(cloud):
  """SIGTERM on machines that stay: saved, and started again on them."""
  keep = cloud.start('keep', '--bucket=bkt', *COMMAND)
  step = cloud.path / 'buckets/bkt/demo/train/checkpoints/step'
  until(lambda: step.exists() and len(cloud.runs()) == 2, keep)
  before = cloud.runs()
  cloud.kill(cloud.runs(), signal.SIGTERM)
  until(lambda: not set(before.values()) & set(cloud.runs().values()), keep)
  cloud.end()
  _, err = keep.communicate(timeout=PATIENCE)
  assert keep.returncode == 0, err
  assert len([x for x in cloud.log() if ' create ' in x]) == 1
  for home in cloud.homes():
    assert (home / 'bond_jax/.run/log').read_text().startswith('from step 3\n')


def test_what_was_stopped_by_a_signal_goes_on(cloud):
  cloud.up()
  cloud.tpu('run', *COMMAND)
  cloud.kill(cloud.runs(), signal.SIGTERM)
  assert cloud.wait('preempted', 'preempted') == 7
  cloud.tpu('resume', *COMMAND)
  cloud.tpu('stop')
  assert cloud.wait('finished 143', 'finished 143') == 5


MOVE = '/bin/mv "$@" || exit'


@pytest.mark.parametrize(
  'file, mv, status, code',
  [
    ('id', [MOVE, 'kill -TERM 0'], 'preempted', 7),
    ('status', ['kill -TERM 0', MOVE], 'finished 0', 0),
  ],
)
def test_a_signal_around_the_commands(cloud, file, mv, status, code):
  """As soon as it has an id to go to, and while the status is written."""
  cloud.up()
  cloud.end()
  tools = cloud.home / 'bin'
  tools.mkdir()
  other = f'[ "$2" = .run/{file} ] || exec /bin/mv "$@"'
  (tools / 'mv').write_text('\n'.join(['#!/bin/bash', other, *mv]))
  (tools / 'mv').chmod(0o755)
  cloud.tpu('run', *COMMAND, PATH=f'{tools}:{STAND_INS}:/usr/bin:/bin')
  assert cloud.wait(status, status) == code
  ran = [(home / 'arguments').exists() for home in cloud.homes()]
  assert ran == [file == 'status'] * 2


def test_resume_starts_what_is_missing(cloud):
  """From nothing; a run that is on is left alone, a finished one too."""
  cloud.tpu('resume', *COMMAND)
  before = cloud.runs()
  assert 'runs already' in cloud.tpu('resume', *COMMAND)[1]
  assert cloud.runs() == before
  other = [*COMMAND[:-1], '--workdir=runs/other']
  assert 'another run is on' in cloud.tpu('resume', *other, code=1)[1]
  assert cloud.runs() == before
  assert cloud.wait('running', 'running') == 4
  # A VM that was started anew: the run is gone and has left no status.
  cloud.kill(cloud.runs(worker=1))
  assert cloud.wait('running', 'lost') == 4
  cloud.tpu('resume', *COMMAND)
  assert cloud.wait('running', 'running') == 4
  assert len(set(cloud.runs().values()) | set(before.values())) == 4
  cloud.end()
  cloud.wait('finished 0', 'finished 0')
  after = cloud.runs()
  assert 'finished' in cloud.tpu('resume', *COMMAND)[1]
  assert cloud.runs() == after
  cloud.tpu('resume', *other)
  assert set(cloud.runs().values()).isdisjoint(after.values())


def test_a_run_that_fails_is_told_and_not_repeated(cloud):
  cloud.end(3)
  _, err = cloud.tpu('keep', *COMMAND, code=1)
  assert 'see "status" and "logs"' in err
  assert cloud.wait('finished 3', 'finished 3') == 5
  out, err = cloud.tpu('logs', code=1)
  assert out == 'from step 0\n  {}\n'
  assert 'worker 0 of demo: finished 3' in err
  assert len([x for x in cloud.log() if 'worker.sh start' in x]) == 2


def test_arguments_arrive_as_they_were(cloud):
  cloud.up()
  odd = ['--x=a  b', '--y=\'"$HOME`id`;|&*', '--z=é\\', '', '--config.n=(1, 2)']
  cloud.tpu('run', *COMMAND, *odd)
  cloud.end()
  cloud.wait('finished 0', 'finished 0')
  for home in cloud.homes():
    passed = (home / 'arguments').read_text().splitlines()
    assert passed == ['bond_jax.train', *COMMAND[2:], *odd]


def test_commands_follow_each_other_until_one_fails(cloud):
  cloud.up()
  (cloud.path / 'program').write_text(
    '[ "$2" != --wait ] || trap \'touch "$HOME/told"\' TERM\n'
    'echo "$*"; [ "$2" != --fail ] || exit 3\n'
    'until [ "$2" != --wait ] || [ -e "$CLOUD/go" ]; do sleep 0.05; done\n'
  )
  home = cloud.homes()[1]
  log = home / 'bond_jax/.run/log'
  chain = ['--', 'train', '--x=a b', '--', 'train', '--fail', '--', 'train']
  cloud.tpu('run', *chain)
  assert cloud.wait('finished 3', 'finished 3') == 5
  said = 'bond_jax.train --x=a b\nbond_jax.train --fail\n'
  assert log.read_text() == said
  cloud.tpu('run', *[word for word in chain if word != '--fail'])
  assert cloud.wait('finished 0', 'finished 0') == 0
  assert log.read_text() == said.replace(' --fail', '') + 'bond_jax.train\n'
  # Stopped, and the command that caught the signal goes on to its end.
  cloud.tpu('run', '--', 'train', '--wait', '--', 'train')
  logs = [h / 'bond_jax/.run/log' for h in cloud.homes()]
  until(lambda: all('wait' in path.read_text() for path in logs))
  stop = cloud.start('stop')
  until(lambda: all((h / 'told').exists() for h in cloud.homes()), stop)
  cloud.end()
  stop.communicate(timeout=PATIENCE)
  assert cloud.wait('finished 143', 'finished 143') == 5
  assert log.read_text().count('bond_jax.train') == 1


def test_stop_ends_the_group_on_every_worker(cloud):
  cloud.up()
  cloud.tpu('run', *COMMAND)
  pids = cloud.runs().values()
  for _ in range(2):
    cloud.tpu('stop')
  assert cloud.wait('finished 143', 'finished 143') == 5
  # One that catches the signal, as jax does where several hosts run together.
  (cloud.path / 'program').write_text('trap : TERM\n' + PROGRAM)
  cloud.tpu('run', *COMMAND)
  for home in cloud.homes():  # else the signal may come before the trap
    until(lambda: 'from step' in (home / 'bond_jax/.run/log').read_text())  # noqa: B023
  pids = [*pids, *cloud.runs().values()]
  cloud.tpu('stop', STOP_SECONDS='1')
  assert cloud.wait('finished 137', 'finished 137') == 5
  assert len(pids) == 4
  until(lambda: not any(map(alive, pids)))  # dying takes a moment


def test_logs_follow_over_a_broken_connection(cloud):
  """No line is lost, none is printed twice, and the end is seen."""
  cloud.up()
  lines = [f'  line {i} \\' for i in range(40)]
  text = '\n'.join(lines)
  (cloud.path / 'program').write_text(
    f"cat <<'E'\n{text}\nE\n" + PROGRAM.replace('echo "  {}"', 'echo last')
  )
  cloud.tpu('run', *COMMAND)
  (cloud.path / 'cut' / 'demo.1').write_text('7 12\n')
  logs = cloud.start('logs', '--worker=1')
  until(lambda: any('log 13' in line for line in cloud.log()), logs)
  cloud.end()
  out, err = logs.communicate(timeout=PATIENCE)
  assert logs.returncode == 0, err
  assert out.splitlines() == [*lines, 'from step 0', 'last']
  assert 'the connection broke' in err


def test_code_is_replaced_and_results_stay(cloud):
  (cloud.repo / 'bond_jax' / 'old.py').write_text('')
  cloud.commit()
  cloud.up()
  code = cloud.homes()[1] / 'bond_jax'
  (code / 'runs').mkdir()
  (code / 'runs' / 'kept').write_text('')
  assert (code / 'bond_jax' / 'old.py').exists()
  (cloud.repo / 'bond_jax' / 'old.py').unlink()
  cloud.commit()
  (cloud.repo / 'bond_jax' / 'new.py').write_text('')
  assert 'not committed is not copied' in cloud.tpu('setup')[1]
  assert sorted(os.listdir(code / 'bond_jax')) == ['train.py']
  assert (code / 'runs' / 'kept').exists()
  cloud.tpu('run', *COMMAND)
  assert '"stop" it before' in cloud.tpu('setup', code=1)[1]
  # A bucket over results on the VM's disk would hide them.
  cloud.tpu('stop')
  says = cloud.tpu('setup', '--bucket=bkt', code=1)[1]
  assert 'not empty' in says


def test_a_flat_bucket_is_refused(cloud):
  cloud.tpu('create')
  (cloud.path / 'flat').touch()
  says = cloud.tpu('setup', '--bucket=bkt', code=1)[1]
  assert '--enable-hierarchical-namespace' in says
  assert not any(' ssh ' in line for line in cloud.log())
  assert 'bucket other' in cloud.tpu('setup', '--bucket=other', code=1)[1]


def test_the_page_runs_as_it_is_written():
  """docs/tpu.md, its first example, in a dry run."""
  with open(os.path.join(toy.ROOT, 'docs', 'tpu.md')) as f:
    block = re.search('```bash\n(.*?)```', f.read(), re.S)[1]
  block = block.replace('launch/tpu.sh "$1"', 'launch/tpu.sh --dry-run "$1"')
  done = subprocess.run(
    ['bash', '-euc', block.replace('gcloud storage', 'echo gcloud storage')],
    cwd=toy.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert '--location=us-west4 ' in done.stdout
  (start,) = re.findall(r"worker.sh start (.*)'\n", done.stdout)
  flags = '--config=configs/demo.py --workdir=runs/demo'
  stages = [f'{stage} {flags}' for stage in toy.STAGES]
  assert start == ' -- '.join(['movie_reviews --data_dir=data', *stages])
  assert 'queued-resources delete demo' in done.stdout.splitlines()[-1]
