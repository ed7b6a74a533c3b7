"""The other libraries: environments of their own, and workers in them."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys

from benchmarks.workloads import Workload

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# In the order of the tables; `ours` runs in the environment of the benchmark.
NAMES = {
  'ours': 'bond_jax',
  'gemma': 'gm.text.Sampler',
  'tunix': 'Tunix',
  'transformers': 'transformers',
  'trl': 'TRL',
}
SAMPLERS = 'ours', 'gemma', 'tunix', 'transformers'


class Unavailable(Exception):
  """Why a peer cannot take part, in one line."""


def environment(name: str) -> str:
  """The Python of a peer's environment, which is made if it is not there."""
  if name == 'ours':
    return sys.executable
  pins = os.path.join(ROOT, 'benchmarks', f'requirements-{name}.txt')
  folder = os.path.join(ROOT, f'.bench-{name}')
  python = os.path.join(folder, 'bin', 'python')
  with open(pins, 'rb') as f:
    wanted = hashlib.sha256(f.read()).hexdigest()
  stamp = os.path.join(folder, '.done')
  if os.path.exists(stamp):
    with open(stamp) as f:
      if f.read() == wanted:
        return python
  print(f'creating .bench-{name}: this takes minutes', flush=True)
  shutil.rmtree(folder, ignore_errors=True)
  base = _run([os.path.join(ROOT, 'launch', 'find_python.sh')]).strip()
  _run([base, '-m', 'venv', folder])
  pip = [python, '-m', 'pip', 'install', '--quiet']
  _run([*pip, '--upgrade', 'pip'])
  _run([*pip, '-r', pins])
  with open(stamp, 'w') as f:
    f.write(wanted)
  return python


def _run(command: list[str]) -> str:
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  if done.returncode:
    said = [x for x in done.stderr.splitlines() if x.strip()] or ['no word']
    errors = [x for x in said if x.startswith('ERROR')] or said
    raise Unavailable(f'{" ".join(command[:4])} failed: {errors[-1]}')
  return done.stdout


class Worker:
  """A peer in a process of its own, idle unless it is asked."""

  def __init__(self, name: str, folder: str, arguments: tuple[str, ...] = ()):
    """Starts it; `folder` holds the weights and gets the log."""
    python = environment(name)
    self.name = name
    self._log = os.path.join(folder, f'{name}.log')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    # Several processes share the memory of an accelerator.
    env['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    env['HF_HUB_OFFLINE'] = '1'
    with open(self._log, 'w') as log:
      self._process = subprocess.Popen(
          [python, '-m', f'benchmarks.workers.{name}', folder, *arguments],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
          cwd=ROOT, env=env,
      )  # fmt: skip
    self.hello = self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      with open(self._log) as f:
        said = [x.strip() for x in f if x.strip()] or ['no word']
      raise Unavailable(f'ended: {said[-1][:300]} (all of it in {self._log})')
    return json.loads(line)

  def measure(
    self, call: str, workload: Workload, repeats: int, seed: int
  ) -> dict:
    """One measurement; see workers/serve.py."""
    asked = dict(call=call, workload=workload, repeats=repeats, seed=seed)
    try:
      self._process.stdin.write(json.dumps(asked) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # what it said last is in its log
    answer = self._answer()
    if 'error' in answer:
      raise Unavailable(answer['error'])
    return answer

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def start(
  names: list[str], folder: str, arguments: tuple[str, ...] = ()
) -> tuple[dict[str, Worker], dict[str, str]]:
  """The workers that run, and why the others do not."""
  workers, skipped = {}, {}
  for name in names:
    try:
      workers[name] = Worker(name, folder, arguments)
    except Unavailable as why:
      skipped[name] = str(why)
      print(f'{NAMES[name]} is skipped: {why}', flush=True)
  return workers, skipped


@functools.cache
def machine() -> str:
  """The processor, and how many cores of it this process may use."""
  model = 'unknown processor'
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo') as f:
      found = [x.split(':')[1].strip() for x in f if x.startswith('model name')]
    model = found[0] if found else model
  return f'{len(os.sched_getaffinity(0))} cores, {model}'
