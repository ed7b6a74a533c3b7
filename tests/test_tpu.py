"""launch/tpu.sh and what it runs on the workers, against a stand-in of gcloud.

The stand-in, tests/stand_ins/gcloud, keeps VMs as folders and runs in them for
real what is sent to a worker; only Python, gcsfuse and findmnt are replaced.
"""

import glob
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import toy

STAND_INS = os.path.join(toy.ROOT, 'tests', 'stand_ins')
# A trainer: goes on from its checkpoint, and ends when $CLOUD/go says how.
PROGRAM = """
printf '%s\\n' "$@" > "$HOME/arguments"
for word; do case $word in --workdir=*) workdir=${word#*=} ;; esac; done
mkdir -p "$workdir/train/checkpoints"
echo "from step $(cat "$workdir/train/checkpoints/step" 2>/dev/null || echo 0)"
echo 3 > "$workdir/$$"
mv "$workdir/$$" "$workdir/train/checkpoints/step"
until [ -e "$CLOUD/go" ]; do sleep 0.05; done
echo "  {}" | tee "$workdir/summary.json"
exit "$(cat "$CLOUD/go")"
"""
KINDS = {
  'vm': (['--spot'], ['demo']),
  'queued': (['--spot', '--queued', '--valid-until=6h'], ['demo']),
  'multislice': (['--num-slices=2'], ['demo-0', 'demo-1']),
}
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
COMMAND = ['--', 'train', '--config=configs/x.py:a', '--workdir=runs/demo']


class Cloud:
  """A repository, and a cloud of its own; `tpu` runs launch/tpu.sh there."""

  def __init__(self, folder, kind='vm'):
    self.repo, self.path = folder / 'repo', folder / 'cloud'
    self.home = folder / 'home'
    for name in ('nodes', 'requests', 'fail', 'away', 'cut', 'buckets/bkt'):
      (self.path / name).mkdir(parents=True)
    self.home.mkdir()
    (self.path / 'program').write_text(PROGRAM)
    shutil.copytree(os.path.join(toy.ROOT, 'launch'), self.repo / 'launch')
    (self.repo / 'bond_jax').mkdir()
    (self.repo / 'requirements.txt').write_text('jax==1.2.3\n')
    module = "if __name__ == '__main__': ..."
    (self.repo / 'bond_jax' / 'train.py').write_text(module)
    self.flags, self.nodes = KINDS[kind]
    self.git('init', '--quiet')
    self.commit()

  def git(self, *args):
    name = ['-c', 'user.name=t', '-c', 'user.email=t@t']
    subprocess.run(['git', *name, *args], cwd=self.repo, check=True)

  def commit(self):
    self.git('add', '--all')
    self.git('commit', '--quiet', '--message=x')

  def start(self, verb, *args, **env):
    """Starts a verb; `env` may leave PATH as it is or replace it."""
    path = f'{STAND_INS}:/usr/bin:/bin'
    where = ['--name=demo', '--zone=us-west4-a', '--type=v5litepod-16']
    cut = args.index('--') if '--' in args else len(args)
    flags = [*where, '--every=0', *self.flags, *args[:cut]]
    return subprocess.Popen(
      [self.repo / 'launch' / 'tpu.sh', verb, *flags, *args[cut:]],
      env={
        'PATH': path,
        'HOME': str(self.home),
        'CLOUD': str(self.path),
        'TPU_WORKER_HOSTNAMES': 'a,b',
        **env,
      },
      cwd='/',
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def tpu(self, verb, *args, code=0, **env):
    """Runs a verb to its end, which must have this status; stdout, stderr."""
    out, err = (process := self.start(verb, *args, **env)).communicate(
      timeout=20
    )
    assert process.returncode == code, f'{process.returncode} {out} {err}'
    if code in (1, 2, 3, 6) and (verb, code) != ('status', 6):
      assert err.splitlines()[-1].startswith('error: '), err
      assert err.count('error: ') == 1
    return out, err

  def up(self, *args):
    for verb in ('create', 'setup'):
      self.tpu(verb, *args)

  def log(self):
    path = self.path / 'log'
    return path.read_text().splitlines() if path.exists() else []

  def homes(self):
    return [self.path / 'nodes' / n / k for n in self.nodes for k in '01']

  def runs(self):
    """The ids of the runs' process groups, of workers that have one."""
    paths = glob.glob(str(self.path / 'nodes/*/*/bond_jax/.run/id'))
    return {p: int(open(p).read().split()[0]) for p in paths}

  def preempt(self):
    """Takes the first node away, and with it every process there."""
    self.kill(self.path / 'nodes' / self.nodes[0])
    for home in self.homes()[:2]:
      shutil.rmtree(home)
    (self.path / 'nodes' / self.nodes[0] / 'state').write_text('PREEMPTED\n')

  def kill(self, folder):
    for path, pid in self.runs().items():
      if path.startswith(str(folder)) and os.path.exists(f'/proc/{pid}'):
        os.killpg(pid, signal.SIGKILL)

  def end(self, status=0):
    (self.path / 'going').write_text(f'{status}\n')
    (self.path / 'going').rename(self.path / 'go')

  def wait(self, *statuses):
    """Waits until `status` prints these; gives its exit status."""

    def look():
      out, _ = (process := self.start('status')).communicate(timeout=20)
      told = [line.split(': ')[1] for line in out.splitlines()]
      return told == [*statuses], process.returncode, told

    return until(look)[1]


def until(look, process=None):
  """Waits for something true, as long as this process runs; returns it."""
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    found = look()
    if found[0] if isinstance(found, tuple) else found:
      return found
    assert process is None or process.poll() is None, process.communicate()
    time.sleep(0.05)
  raise AssertionError(f'waited 20 s in vain: {found}')


def alive(group):
  """The processes of this group, less those that nobody has buried."""
  rows = subprocess.run(
    ['ps', '-e', '-o', 'pgid=,stat=,args='], capture_output=True, text=True
  ).stdout.splitlines()
  rows = [row.split(None, 2) for row in rows]
  return [r for r in rows if r[0] == str(group) and r[1][0] != 'Z']


@pytest.fixture
def cloud(tmp_path, request):
  made = Cloud(tmp_path, getattr(request, 'param', 'vm'))
  yield made
  made.kill(made.path)


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
  out, err = keep.communicate(timeout=20)
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
  cloud.kill(cloud.homes()[1])
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
    'echo "$*"; [ "$2" != --fail ] || exit 3; [ "$2" != --wait ] || {\n'
    'trap "" TERM; until [ -e "$CLOUD/go" ]; do sleep 0.05; done; }\n'
  )
  log = cloud.homes()[1] / 'bond_jax/.run/log'
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
  until(lambda: log.exists() and 'wait' in log.read_text())
  stop = cloud.start('stop')
  time.sleep(0.5)
  cloud.end()
  stop.communicate(timeout=20)
  assert cloud.wait('finished 143', 'finished 143') == 5
  assert log.read_text() == 'bond_jax.train --wait\n'


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
  pids = [*pids, *cloud.runs().values()]
  cloud.tpu('stop', STOP_SECONDS='1')
  assert cloud.wait('finished 137', 'finished 137') == 5
  assert [alive(pid) for pid in pids] == [[]] * 4


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
  out, err = logs.communicate(timeout=20)
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


def fail(cloud, what, message):
  (cloud.path / 'fail' / what).write_text(message)


QUOTA = (
  "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProject' has"
  ' been exceeded. Limit: 0 in zone us-west4-a.'
)
CAPACITY = (
  '{\n  "code": 8,\n  "message": "There is no more capacity in the zone'
  ' \\"us-west4-a\\"; you can try in another zone"\n}'
)
LOGIN = (
  'You do not currently have an active account selected.\nPlease run:\n\n  $'
  ' gcloud auth login\n\nto obtain new credentials.'
)


@pytest.mark.parametrize(
  'verb, what, message, code, says',
  [
    ('create', 'create', QUOTA, 3, 'quota exceeded (ERROR: '),
    ('create', 'create', CAPACITY, 3, 'no capacity in us-west4-a'),
    ('create', 'describe', LOGIN, 1, 'run "gcloud auth login"'),
    ('create', 'create', 'PERMISSION_DENIED: no', 1, 'not allowed'),
    ('create', 'create', 'something else', 1, 'something else'),
    ('status', 'describe', LOGIN, 1, 'run "gcloud auth login"'),
    ('delete', 'delete', 'it burns', 1, 'it burns'),
    ('fetch', 'rsync', 'it burns', 1, 'it burns'),
    ('setup', 'scp', 'no space left', 6, 'could not be reached'),
  ],
)
def test_what_gcloud_says_is_one_line(cloud, verb, what, message, code, says):
  if verb != 'create':
    cloud.tpu('create')
  fail(cloud, what, message)
  args = {
    'fetch': ['--bucket=bkt', '--workdir=runs/demo'], 'delete': ['--yes']
  }  # fmt: skip
  assert says in cloud.tpu(verb, *args.get(verb, []), code=code)[1]


def test_quota_is_tried_again_and_not_for_ever(cloud):
  cloud.flags = ['--every=1', '--spot']
  (cloud.path / 'program').write_text('exit 0')
  slept = cloud.home / 'slept'
  path = cloud.home / 'bin'
  path.mkdir()
  sleep = path / 'sleep'
  sleep.write_text(f'#!/bin/sh\necho "$1" >> {slept}\n/bin/sleep 0.01\n')
  sleep.chmod(0o755)
  env = {'PATH': f'{path}:{STAND_INS}:/usr/bin:/bin'}
  fail(cloud, 'create', QUOTA)
  cloud.tpu('keep', *COMMAND, **env)
  assert slept.read_text().split()[0] == '2'
  cloud.tpu('delete', '--yes')
  # A stand-in that never has one: each failure waits twice as long.
  always = path / 'gcloud'
  always.write_text(
    '#!/bin/bash\n'
    f'[ "$4" != create ] || cp {cloud.path}/quota {cloud.path}/fail/create\n'
    f'exec {STAND_INS}/gcloud "$@"\n'
  )
  always.chmod(0o755)
  (cloud.path / 'quota').write_text(QUOTA)
  slept.unlink()
  _, err = cloud.start('keep', *COMMAND, **env).communicate(timeout=20)
  assert err.splitlines()[-1] == 'error: no TPU after 8 tries.'
  assert slept.read_text().split() == ['2', '4', '8', '16', '32', '64', '128']


def test_a_tpu_that_is_gone(cloud):
  for verb in ('setup', 'run', 'stop', 'status', 'logs', 'fetch'):
    args = {'run': COMMAND, 'fetch': ['--workdir=runs/demo']}.get(verb, [])
    says = cloud.tpu(verb, *args, code=1)[1]
    assert 'there is no TPU demo in us-west4-a; "create" makes it' in says
  cloud.tpu('create')
  cloud.preempt()
  assert 'demo is PREEMPTED' in cloud.tpu('status', code=1)[1]
  assert '"resume" replaces it' in cloud.tpu('create', code=1)[1]
  (cloud.path / 'nodes/demo/state').write_text('STOPPED\n')
  assert 'somebody stopped it' in cloud.tpu('resume', *COMMAND, code=1)[1]
  assert not any(' delete ' in line for line in cloud.log())


@pytest.mark.parametrize('cloud', ['queued'], indirect=True)
def test_a_request_that_failed(cloud):
  """It is replaced once: a second failure is for the caller to wait out."""
  cloud.tpu('create')
  (cloud.path / 'requests/demo').write_text('SUSPENDED\n')
  assert 'demo is SUSPENDED' in cloud.tpu('create', code=1)[1]
  cloud.tpu('resume', *COMMAND)
  (cloud.path / 'requests/demo').write_text('FAILED\n')
  path = cloud.home / 'gcloud'
  path.write_text(
    f'#!/bin/bash\n{STAND_INS}/gcloud "$@" || exit\n'
    f'[ "$4" != create ] || echo FAILED > {cloud.path}/requests/demo\n'
  )
  path.chmod(0o755)
  env = {'PATH': f'{cloud.home}:{STAND_INS}:/usr/bin:/bin'}
  says = cloud.tpu('resume', *COMMAND, code=3, **env)[1]
  assert 'was asked for and is FAILED' in says


@pytest.mark.parametrize('cloud', ['multislice'], indirect=True)
def test_one_worker_that_cannot_be_reached(cloud):
  cloud.up()
  away = cloud.path / 'away' / 'demo-1.1'
  away.touch()
  for verb in ('setup', 'run', 'stop', 'resume'):
    args = COMMAND if verb in ('run', 'resume') else []
    says = cloud.tpu(verb, *args, code=6)[1]
    assert 'worker 1 of demo-1 could not be reached by ssh (ERROR: ' in says
  assert cloud.runs() == {}
  assert cloud.tpu('status', code=6)[0].splitlines() == [
    'demo-0 worker 0: none', 'demo-0 worker 1: none', 'demo-1 worker 0: none',
    'demo-1 worker 1: unreachable',
  ]  # fmt: skip
  away.unlink()
  # It answers, and is gone when the run starts: the others do not wait for it.
  worker = cloud.homes()[3] / 'bond_jax/launch/worker.sh'
  text = worker.read_text()
  worker.write_text(text.replace('  local now\n', '  fail "no disk"\n'))
  says = cloud.tpu('run', *COMMAND, code=1)[1]
  assert 'start on worker 1 of demo-1: no disk' in says
  cloud.wait(*['finished 143'] * 3, 'none')


def test_a_dry_run_prints_and_runs_nothing(cloud):
  for verb in (
    'create', 'setup', 'run', 'logs', 'status', 'stop', 'resume', 'keep',
    'fetch', 'delete',
  ):  # fmt: skip
    args = ['--bucket=bkt', '--workdir=runs/demo', '--dry-run', *COMMAND]
    out, err = cloud.tpu(verb, *args, PATH='/usr/bin:/bin')
    assert err == ''
    assert 'gcloud ' in out
  # It may come first, and what it prints can be pasted.
  flags = ['--name=demo', '--zone=us-west4-a', '--type=v5litepod-16']
  script = cloud.repo / 'launch' / 'tpu.sh'
  done = subprocess.run(
    [script, '--dry-run', 'run', *flags, *COMMAND, "--x=it's"],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert cloud.log() == []
  cloud.up()
  last = done.stdout.splitlines()[-1]
  assert last.startswith('gcloud compute tpus tpu-vm ssh demo --worker=0')
  subprocess.run(
    ['bash', '-c', last], check=True, capture_output=True,
    env={
      'PATH': f'{STAND_INS}:/usr/bin:/bin', 'CLOUD': str(cloud.path),
      'TPU_WORKER_HOSTNAMES': 'a,b',
    },
  )  # fmt: skip
  cloud.end()
  cloud.wait('finished 0', 'none')
  passed = (cloud.homes()[0] / 'arguments').read_text().splitlines()
  assert passed[-1] == "--x=it's"


@pytest.mark.parametrize(
  'args, says',
  [
    (['--name=Demo'], "--name='Demo'"),
    (['--name=a;b'], 'small letters'),
    (['--name=-a'], 'small letters'),
    (['--name='], "'--name=' is no flag"),
    (['--zone=../x'], '--zone'),
    (['--project=a b'], '--project'),
    (['--type=v5 litepod'], '--type'),
    (['--type=v9-8'], 'no runtime is known for v9-8'),
    (['--version=$x'], '--version'),
    (['--num-slices=0'], '--num-slices'),
    (['--bucket=a/b'], '--bucket'),
    (['--workdir=runs/../x'], 'no ..'),
    (['--workdir=/runs/x'], 'a folder in runs/'),
    (['--valid-until=soon', '--queued'], '--valid-until'),
    (['--valid-until=6h'], 'for --queued alone'),
    (['--every=1m'], 'seconds'),
    (['--colour=red'], "'--colour=red' is no flag"),
    (['train'], 'comes after " -- "'),
    ([], 'run needs the command after " -- "'),
    (['--', 'train', '--x=a\nb'], 'line break'),
    (['--', 'trian'], "'trian' is no command of bond_jax"),
    (['--', 'train', '--', '--x=1'], "'--x=1' is no command"),
    (['--', 'train', '--'], "'--' is no command"),
  ],
)
def test_odd_flags_are_refused(cloud, args, says):
  cloud.flags = []
  _, err = cloud.tpu('run', *args, code=2)
  assert says in err
  assert len(err.splitlines()) == 1
  assert cloud.log() == []


def test_what_is_missing_is_told(cloud):
  script = cloud.repo / 'launch' / 'tpu.sh'
  call = lambda *args, **env: subprocess.run(
    [script, *args], capture_output=True, text=True,
    env={'PATH': '/usr/bin:/bin', **env},
  )  # fmt: skip
  assert 'create needs --name' in call('create').stderr
  assert 'create needs --zone' in call('create', '--name=a').stderr
  where = ['--name=a', '--zone=us-west4-a']
  needs = call('create', '--dry-run', *where).stderr
  assert needs.startswith('error: create needs --type')
  assert "'fly' is no verb" in call('fly').stderr
  listed = call()
  assert listed.returncode == 2
  assert 'resume' in listed.stdout
  tools = cloud.home / 'bin'
  tools.mkdir()
  for name in ('bash', 'dirname', 'mktemp', 'rm', 'env'):
    os.symlink(shutil.which(name), tools / name)
  done = call('create', *where, '--type=v4-8', PATH=str(tools))
  assert done.returncode == 1
  assert done.stderr.startswith('error: gcloud is missing; install it')


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
