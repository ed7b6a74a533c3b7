"""Scripts in processes of their own that do not import everything again."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['bond_jax.runs.command'])


def _run(script: str, args, folder: str, env, out: str) -> None:
  for number, name in ((1, 'stdout'), (2, 'stderr')):
    os.dup2(os.open(f'{out}/{name}', os.O_WRONLY | os.O_CREAT), number)
  os.chdir(folder)
  os.environ.update(env)
  sys.argv = [script, *args]
  runpy.run_path(script, run_name='__main__')


def call(script: str, *args: str, folder: str, **env: str):
  """A script's status and output, as subprocess.run has them."""
  with tempfile.TemporaryDirectory() as out:
    process = CONTEXT.Process(
      target=_run, args=(script, args, folder, env, out)
    )
    process.start()
    process.join()
    said = {}
    for name in ('stdout', 'stderr'):
      with open(f'{out}/{name}') as f:
        said[name] = f.read()
  return subprocess.CompletedProcess(args, process.exitcode, **said)
