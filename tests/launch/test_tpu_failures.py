"""What launch/tpu.sh does when something is wrong: one line, and a status."""

import os
import shutil
import subprocess

from clouds import Cloud, COMMAND, PATIENCE, STAND_INS
import pytest

pytestmark = pytest.mark.long


@pytest.fixture
def cloud(tmp_path, request):
  made = Cloud(tmp_path, getattr(request, 'param', 'vm'))
  yield made
  made.close()


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
  _, err = cloud.start('keep', *COMMAND, **env).communicate(timeout=PATIENCE)
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
