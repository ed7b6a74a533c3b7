"""A small run on several hosts: processes of this machine, joined over gloo.

    python tests/several.py DATA MESH STAGE=WORKDIR ...

runs stages one after the other, as their commands would, in each process; MESH
is 'data,model'; CHANGES, in the environment and JSON, are other arguments of
`get_config`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from typing import NamedTuple

import ml_collections
import toy

from bond_jax.devices import hosts
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import command

LAUNCHER = os.path.join(toy.ROOT, 'launch', 'local_hosts.sh')
# Less to compile, which every process does for itself.
MODEL = dataclasses.replace(
  toy.MODEL, layers=1, pattern=('global',), qk_norm=False, post_norms=False
)


def get_config(
  folder: str, data=4, model=1, algorithm=None, stored=''
) -> ml_collections.ConfigDict:
  """Ten steps of J-BOND, or of another algorithm; saves at 3, 6, 9 and 10."""
  config = toy.get_config(folder)
  gemma.CONFIGS['toy'] = MODEL
  config.mesh.update(dict(data=data, model=model))
  config.length = 4
  config.sft.update(dict(steps=2, save_every=2))
  config.train.update(dict(steps=10))
  config.data.stored = stored
  with config.unlocked():
    config.algorithm = algorithm or config.algorithm
  return config


def run(*args: str) -> tuple[str, ...]:
  """The command that runs this file."""
  return sys.executable, os.path.join(toy.TESTS, 'several.py'), *args


class Ended(NamedTuple):
  """What the processes of a launch left behind."""

  status: int
  said: list[str]  # the output of each host
  seconds: float


def launch(count: int, *args: str, devices: int = 1, **env: str) -> Ended:
  """Runs a command on several hosts, to its end."""
  begin = time.monotonic()
  done = subprocess.run(
    [LAUNCHER, str(count), '--devices', str(devices), '--', *args],
    cwd=toy.ROOT,
    env={
      **toy.environment(),
      'PYTHONPATH': os.pathsep.join((toy.ROOT, toy.TESTS)),
      **env,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=900,
    check=False,
  )
  said = [
    '\n'.join(re.findall(rf'^\[{i}\] (.*)$', done.stdout, re.M))
    for i in range(count)
  ]
  return Ended(done.returncode, said, time.monotonic() - begin)


def errors(ended: Ended) -> list[list[str]]:
  """The error lines of each host."""
  return [re.findall(r'^error: (.*)$', text, re.M) for text in ended.said]


def main() -> None:
  hosts.HEARTBEAT = 10  # it takes that long to see that a host is dead
  folder, mesh, *stages = sys.argv[1:]
  changes = json.loads(os.environ.get('CHANGES', '{}'))
  config = get_config(folder, *map(int, mesh.split(',')), **changes)
  sys.argv[1:] = []

  def work():
    for stage in stages:
      name, _, workdir = stage.partition('=')
      toy.main_of(name)(config, workdir)

  command.execute(work, __doc__)


if __name__ == '__main__':
  main()
