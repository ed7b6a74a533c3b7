"""A cloud of folders, for the tests of launch/tpu.sh.

The stand-in of gcloud, tests/stand_ins/gcloud, keeps VMs as folders and runs in
them for real what is sent to a worker; only Python, gcsfuse and findmnt are
replaced.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import toy

PATIENCE = 60  # seconds after which something hangs, on a busy machine too
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
    self.started = []
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
    process = subprocess.Popen(
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
    self.started.append(process)
    return process

  def close(self):
    """Ends what a failed test has left: `keep` would go on for ever."""
    for process in self.started:
      process.kill()
    self.kill(self.runs())
    for process in self.started:
      process.communicate()

  def tpu(self, verb, *args, code=0, **env):
    """Runs a verb to its end, which must have this status; stdout, stderr."""
    process = self.start(verb, *args, **env)
    out, err = process.communicate(timeout=PATIENCE)
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

  def runs(self, node='*', worker='*'):
    """The ids of the runs' process groups, of workers that have one."""
    found = {}
    for path in self.path.glob(f'nodes/{node}/{worker}/bond_jax/.run/id'):
      with contextlib.suppress(FileNotFoundError):  # it is being replaced
        found[str(path)] = int(path.read_text().split()[0])
    return found

  def preempt(self):
    """Takes the first node away, and with it every process there.

    `keep` may look at any moment: it must not see these runs ended on a node
    that is READY, nor may we kill those of the node that it then makes.
    """
    node = self.nodes[0]
    runs, state = self.runs(node), self.path / 'nodes' / node / 'state'
    state.with_suffix('.new').write_text('PREEMPTED\n')
    state.with_suffix('.new').rename(state)
    self.kill(runs)

  def kill(self, runs, number=signal.SIGKILL):
    """Sends a signal to such of `runs` as have not ended."""
    for pid in runs.values():
      with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        # Its number may be another process's by now.
        if os.readlink(f'/proc/{pid}/cwd').startswith(str(self.path)):
          os.killpg(pid, number)

  def end(self, status=0):
    (self.path / 'going').write_text(f'{status}\n')
    (self.path / 'going').rename(self.path / 'go')

  def wait(self, *statuses):
    """Waits until `status` prints these; gives its exit status."""

    def look():
      process = self.start('status')
      out, _ = process.communicate(timeout=PATIENCE)
      told = [line.split(': ')[1] for line in out.splitlines()]
      return told == [*statuses], process.returncode, told

    return until(look)[1]


def until(look, process=None):
  """Waits for something true, as long as this process runs; returns it."""
  deadline = time.monotonic() + PATIENCE
  while time.monotonic() < deadline:
    found = look()
    if found[0] if isinstance(found, tuple) else found:
      return found
    assert process is None or process.poll() is None, process.communicate()
    time.sleep(0.05)
  raise AssertionError(f'waited {PATIENCE} s in vain: {found}')


def alive(group):
  """The processes of this group, less those that nobody has buried."""
  rows = subprocess.run(
    ['ps', '-e', '-o', 'pgid=,stat=,args='], capture_output=True, text=True
  ).stdout.splitlines()
  rows = [row.split(None, 2) for row in rows]
  return [r for r in rows if r[0] == str(group) and r[1][0] != 'Z']
