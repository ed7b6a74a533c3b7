"""A cloud of folders, for the tests of launch/tpu.sh.

The stand-in of gcloud, tests/stand_ins/gcloud, keeps VMs as folders and runs in
them for real what is sent to a worker; only Python, gcsfuse and findmnt are
replaced.
"""

import glob
import os
import shutil
import signal
import subprocess
import time

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

  def kill(self, folder, number=signal.SIGKILL):
    for path, pid in self.runs().items():
      if path.startswith(str(folder)) and os.path.exists(f'/proc/{pid}'):
        os.killpg(pid, number)

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
