"""launch/gke and launch/sky.yaml: they parse, and run what there is to run."""

import math
import os
import re
import subprocess

import pytest
import toy
import yaml

from bond_jax.runs import stopping

# Chips of a host with all of them, by GKE's name of the accelerator.
CHIPS = {'tpu-v5-lite-podslice': 4}


def read(*names):
  with open(os.path.join(toy.ROOT, 'launch', *names)) as f:
    return f.read()


def job():
  (slices,) = yaml.safe_load(read('gke', 'jobset.yaml'))['spec'][
    'replicatedJobs'
  ]
  return slices['template']['spec']


def pod():
  return job()['template']['spec']


def container():
  (found,) = pod()['containers']
  return found


def scripts():
  sky = yaml.safe_load(read('sky.yaml'))
  bash, flags, gke = container()['command']
  assert (bash, flags) == ('bash', '-euc')
  return {'setup': sky['setup'], 'run': sky['run'], 'gke': gke}


def test_pods_of_a_slice_have_all_its_chips():
  select = pod()['nodeSelector']
  chips = container()['resources']['limits']['google.com/tpu']
  assert chips == CHIPS[select['cloud.google.com/gke-tpu-accelerator']]
  sides = select['cloud.google.com/gke-tpu-topology'].split('x')
  assert job()['parallelism'] * chips == math.prod(map(int, sides))
  assert job()['completions'] == job()['parallelism']
  accelerator = yaml.safe_load(read('sky.yaml'))['resources']['accelerators']
  assert accelerator == f'tpu-v5litepod-{math.prod(map(int, sides))}'


def test_results_are_in_the_bucket():
  (mount,) = container()['volumeMounts']
  (volume,) = pod()['volumes']
  assert mount['name'] == volume['name']
  folder = re.search(r'^WORKDIR (.*)$', read('gke', 'Dockerfile'), re.M)[1]
  assert mount['mountPath'] == f'{folder}/runs'
  # Workers write side by side: neither mount may remember what was there.
  assert '--metadata-cache-ttl-secs=0' in read('worker.sh')
  options = volume['csi']['volumeAttributes']['mountOptions'].split(',')
  assert 'metadata-cache:ttl-secs:0' in options
  annotations = job()['template']['metadata']['annotations']
  assert annotations == {'gke-gcsfuse/volumes': 'true'}


@pytest.mark.parametrize('name', ['setup', 'run', 'gke'])
def test_the_commands_exist(name, tmp_path):
  """Each is run with stand-ins that look at their arguments."""
  seen = tmp_path / 'seen'
  (tmp_path / 'launch').mkdir()
  for script in ('tpu_vm.sh', 'worker.sh'):
    path = tmp_path / 'launch' / script
    path.write_text(f'#!/bin/bash\necho {script} "$@" >> {seen}\n')
    path.chmod(0o755)
  subprocess.run(
    ['bash', '-euc', scripts()[name]], cwd=tmp_path, check=True,
    env={'PATH': '/usr/bin:/bin', 'BUCKET': 'bkt'},
  )  # fmt: skip
  lines = seen.read_text().splitlines()
  if name == 'setup':
    assert lines == ['worker.sh setup bkt']
    return
  modules = [line.split()[1] for line in lines]
  assert modules == ['movie_reviews', *toy.STAGES]
  for line in lines:
    _, module, *flags = line.split()
    assert os.path.exists(os.path.join(toy.ROOT, 'bond_jax', f'{module}.py'))
    values = dict(flag.split('=') for flag in flags)
    if module != 'movie_reviews':
      assert os.path.exists(os.path.join(toy.ROOT, values['--config']))
      assert values['--workdir'].startswith('runs/')


@pytest.mark.long
@pytest.mark.parametrize('stage', ['movie_reviews', 'reward_model'])
def test_a_pod_that_is_evicted_hands_the_signal_on(tmp_path, stage):
  """And says by its status that it is to start again."""
  (tmp_path / 'launch').mkdir()
  path = tmp_path / 'launch' / 'tpu_vm.sh'
  path.write_text(
    f'#!/bin/bash\n[ "$1" = {stage} ] || exit 0\n'
    "trap 'sleep 0.5; exit 143' TERM\necho ready\n"
    'for i in {1..100}; do sleep 0.1; done\n'
  )
  path.chmod(0o755)
  pod_ = subprocess.Popen(
    ['bash', '-euc', scripts()['gke']], cwd=tmp_path, text=True,
    stdout=subprocess.PIPE, env={'PATH': '/usr/bin:/bin'},
  )  # fmt: skip
  assert pod_.stdout.readline() == 'ready\n'
  pod_.terminate()
  assert pod_.wait(60) == 143
  assert pod_.stdout.read() == ''  # no other stage
  (rule,) = job()['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [143]
  assert rule['onExitCodes']['containerName'] == container()['name']
  assert pod()['terminationGracePeriodSeconds'] > stopping.BOUND


@pytest.mark.long
def test_a_pod_ends_with_the_status_of_its_stage(tmp_path):
  (tmp_path / 'launch').mkdir()
  path = tmp_path / 'launch' / 'tpu_vm.sh'
  path.write_text('#!/bin/bash\n[ "$1" != sft ] || exit 3\n')
  path.chmod(0o755)
  done = subprocess.run(['bash', '-euc', scripts()['gke']], cwd=tmp_path)
  assert done.returncode == 3


def test_what_the_manifest_leaves_open():
  """envsubst fills these, as the file's head says, and nothing else."""
  head, _, body = read('gke', 'jobset.yaml').partition('apiVersion')
  assert set(re.findall(r'\$[A-Z]\w*', body)) == {'$IMAGE', '$BUCKET'}
  assert "envsubst '$IMAGE $BUCKET' < launch/gke/jobset.yaml" in head
