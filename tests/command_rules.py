"""What is run in the place of each command of README.md and docs/.

What is really run, per class of command (`RULES`, the first that fits counts):

  stage     python -m bond_jax.STAGE with one of our configs: as written, in a
            copy of the repository, with sizes appended that fit a test, and a
            data set of 300 lines in the place of the demo's; Gemma's weights
            and tokenizer are replaced by what a tiny run has exported, and a
            conversation by one --prompt.
  figures   reproduce: as stage, by a figure whose runs have 2 steps each.
            bandit: as written.
  plan      as written, for a tiny model: libtpu compiles for the slice, or,
            where there is no libtpu, XLA for as many CPU devices.
  hosts     as written, with the enumerable language as its config and two
            processes, which find each other on this machine.
  tpu       launch/tpu.sh and gcloud: the whole block, in a cloud of folders
            (clouds.py), whose workers run a stand-in of the trainer.
  xpk       a stand-in looks at the flags; the --command of it is run.
  make      `make -n` knows the target, and every module and file that it would
            run is there. Its own stages are run where a page has them.
  benchmark minutes to hours: `--help` is asked for, and has the flags, or
            the file is imported, and defines them; costs.py is run.
  server    as written, on a free port; curl asks that one.
  plain     tail, mv ...: as written.
"""

import os
import re
import shlex
import subprocess

import clouds
from commands import flags, free_port, listens, Place, SIZES, TIMEOUT
import toy

# The flags that weights.md gives once, and leaves out with "...".
GEMMA = (
  '--config=configs/gemma3_1b_jbond.py'
  ' --config.reward.function=my_module:my_reward'
  ' --config.gold.function=my_module:another'
)


def stage(place: Place, command: str):
  if '--weights=' in command:
    place.demo(*toy.STAGES[:3])
    out = f'exported_{len(place.done)}'
    export = f'python -m bond_jax.export --workdir=runs/demo --out={out}'
    place.run(f'{export} --format=gguf')
    file = f'--weights={out}/model.gguf'
    place.run(re.sub(r'--weights=\S+', file, f"{command} --prompt='the film'"))
    return
  if '--config' not in command:  # of a run, which knows its own
    place.demo()
    place.run(command.replace('runs/gemma', 'runs/demo'))
    return
  if 'gemma' in command or '--workdir=runs/mine' in command:
    place.weights()
  elif 'runs/demo' in command:
    before = {'train': toy.STAGES[:2], 'evaluate': toy.STAGES[:3],
              'sample': toy.STAGES[:3]}  # fmt: skip
    name = re.search(r'bond_jax\.(\w+)', command)[1]
    if '--config.reference=runs/demo' in command:
      place.demo(*toy.STAGES[:2])
    elif name in before:
      place.demo(*before[name])
  if '.sample' in command:
    command = command.replace('--config=...', GEMMA)
    command = f'{command} --config.mesh.data=1'
    if '--prompt' not in command:
      command = f"{command} --prompt='the film'"  # for a terminal's lines
  place.stage(command)


def soft_best_of_n(place: Place, command: str):
  """The files of its page, which test_docs.py tests, and the command."""
  with open(place.folder / 'docs/adding_an_algorithm.md') as f:
    named = re.findall(
      r'`([\w/]+\.py)`[^`]*```python\n(.*?)```', f.read(), re.S
    )
  for name, content in named:
    (place.folder / name).write_text(content)
  place.stage(command)


def export(place: Place, command: str):
  """LoRA's adapter is of a run with LoRA."""
  place.weights()
  base = f'python -m bond_jax.train {GEMMA}'
  place.stage(f'{base} --workdir=runs/mine')
  out = f'exported_{len(place.done)}'
  command = re.sub(r'--out=\S+', f'--out={out}', command)
  if '--format=adapter' in command:
    place.stage(
      f'{base} --workdir=runs/lora --config.model.lora.rank=2'
      ' --config.model.lora.alpha=2'
    )
    command = command.replace('runs/mine', 'runs/lora')
  place.run(command)
  assert os.listdir(place.folder / out)


def figures(place: Place, command: str):
  config = re.search(r'--config=configs/figures.py:(\w+)', command)
  if config:
    path = place.folder / 'configs/figures.py'
    text = path.read_text()
    shrunk = text.replace(
      '= steps, save_every\n',
      '= 2, 2\n  run.train.batch = 8\n  run.length = 2\n'
      '  run.enumerable.update(dict(prompts=2, vocab=3))\n'
      '  run.model.sizes.update(dict(features=16, layers=1))\n',
    )
    assert shrunk != text or '= 2, 2\n' in text
    path.write_text(shrunk)
  place.run(command)
  out = re.search(r'--(?:out|workdir)=(\S+)', command)[1]
  name = 'figure.png' if config else 'bandit_figure1.png'
  assert (place.folder / out / name).exists()


def plan(place: Place, command: str):
  small = {
    'model.name': 'gemma3_tiny', 'tokenizer.vocab_size': 256,
    'prompt.length': 8, 'length': 8, 'train.batch': 32,
    'train.micro_batches': 2, 'train.buckets': 1, 'train.probe_prompts': 32,
  }  # fmt: skip
  library = os.path.join(toy.ROOT, '.libtpu', 'libtpu', 'libtpu.so')
  library = os.environ.get('TPU_LIBRARY_PATH', library)
  if os.path.exists(library):
    command = f'TPU_LIBRARY_PATH={shlex.quote(library)} {command}'
  else:
    command = re.sub(r'--topology=\S+', '--topology=cpu:16', command)
  added = ' '.join(f'--config.{k}={v}' for k, v in small.items())
  assert 'fits' in place.run(f'{command} {added} {shlex.quote(SIZES)}')


def hosts(place: Place, command: str):
  config = 'configs/enumerable.py'
  command = command.replace('--config=...', f'--config={config}')
  command = command.replace('/shared/run', f'runs/hosts_{len(place.done)}')
  command = command.removesuffix(' ...')
  if 'local_hosts' in command:
    command = command.replace('sh 4 --devices 2', 'sh 2 --devices 1')
    command += f' --config={config} --workdir=runs/local'
  command += f' {flags(config)}'
  if '--config.mesh.data=-1' not in command:
    command += ' --config.mesh.data=-1'
  command += ' --config.sampling_mesh.data=-1'
  if 'PROCESS_ID=I' not in command:
    place.run(command)
    return
  command = command.replace('10.0.0.1:1234', f'127.0.0.1:{free_port()}')
  command = command.replace('PROCESSES=N', 'PROCESSES=2')
  both = [place.start(command.replace('ID=I', f'ID={i}')) for i in range(2)]
  told = [process.communicate(timeout=TIMEOUT)[0] for process in both]
  assert [p.returncode for p in both] == [0, 0], told


def tpu(place: Place, command: str):
  """The whole block, on a cloud whose trainer ends well at once."""
  number = len(place.done)
  cloud = clouds.Cloud(place.folder.parent / f'cloud_{number}', 'queued')
  for name in ('movie_reviews', *toy.STAGES):
    module = "if __name__ == '__main__': ..."
    (cloud.repo / f'bond_jax/{name}.py').write_text(module)
  cloud.commit()
  cloud.end()
  command = command.replace('my-bucket', 'bkt')
  command = re.sub(r'--name=(\w+)', r'--name=\1 --every=0', command)
  command = re.sub(r'^tpu delete$', 'tpu delete --yes', command, flags=re.M)
  try:
    done = subprocess.run(
      ['bash', '-euo', 'pipefail', '-c', command], cwd=cloud.repo, text=True,
      env={
        'PATH': f'{clouds.STAND_INS}:/usr/bin:/bin', 'HOME': str(cloud.home),
        'CLOUD': str(cloud.path), 'TPU_WORKER_HOSTNAMES': 'a,b',
      },
      stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT,
    )  # fmt: skip
  finally:
    cloud.close()
  assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
  place.done[command] = done.stdout
  created = [line for line in cloud.log() if ' create ' in line]
  assert any('queued-resources create' in line for line in created)
  if 'tpu delete' in command:
    assert os.listdir(cloud.path / 'nodes') == []
    assert (cloud.repo / 'runs/demo/summary.json').exists()


def xpk(place: Place, command: str):
  place.program('xpk', 'printf "%s\\n" "$@" > xpk.arguments')
  command = f'CLUSTER=c PROJECT=p ZONE=z IMAGE=i; {command}'
  place.run(command)
  words = (place.folder / 'xpk.arguments').read_text().splitlines()
  assert words[:2] == ['workload', 'create'] and '--cluster=c' in words
  (inner,) = [w.partition('=')[2] for w in words if w[:10] == '--command=']
  module, *rest = re.search(r'launch/tpu_vm.sh (.*)', inner)[1].split()
  assert (place.folder / f'bond_jax/{module}.py').exists()
  values = dict(word.split('=') for word in rest)
  assert (place.folder / values['--config']).exists()
  script = place.folder / 'launch/tpu_vm.sh'
  kept = script.read_text()
  place.program('tpu_vm.sh', 'printf "%s\\n" "$@" > vm.arguments', 'launch')
  place.run(inner.replace('cd /bond_jax', f'cd {place.folder}'))
  script.write_text(kept)
  told = (place.folder / 'vm.arguments').read_text().split()
  assert told == [module, *rest]


def make(place: Place, command: str):
  target = re.search(r'make (\S+)', command)[1]
  said = place.run(f'make -n {target}')
  assert re.search(rf'^{target}:.*## ', (place.folder / 'Makefile').read_text(),
                   re.M), f'make help does not know {target}'  # fmt: skip
  for module in re.findall(r'-m ((?:bond_jax|benchmarks)\.\w+)', said):
    path = place.folder / f'{module.replace(".", "/")}.py'
    assert path.exists() or '$' in module, module
  for path in re.findall(r'(?:benchmarks|configs|tests)/\S+?\.py', said):
    assert (place.folder / path).exists(), path


def benchmark(place: Place, command: str):
  command = re.sub(r'-m benchmarks\.(\w+)', r'benchmarks/\1.py', command)
  path, *given = re.search(r'python (benchmarks/\S+)(.*)', command).groups()
  given = re.findall(r'--\w+', given[0])
  text = (place.folder / path).read_text()
  if path.endswith('costs.py'):
    assert '| jbond |' in place.run(command)
  elif 'ArgumentParser' in text:
    told = place.run(f'PYTHONPATH=. python {path} --help')
    assert all(flag in told for flag in given), told
  else:
    assert all(f"'{flag[2:]}'" in text for flag in given), given
    place.run(
      'PYTHONPATH=. python -c "import runpy;'
      f" runpy.run_path('{path}', run_name='imported')\""
    )


def server(place: Place, command: str):
  if 'serve' in command:
    place.close()
    place.port = free_port()
    place.server = place.start(
      'exec ' + command.replace('--port=8000', f'--port={place.port}')
    )
    clouds.until(lambda: listens(place.port), place.server)
    return
  command = command.replace('curl ', 'curl --silent --fail ')
  assert '"rewards"' in place.run(command.replace('8000', str(place.port)))


def plain(place: Place, command: str):
  place.demo()
  place.run(command)


RULES = (
  (r'(\w+=\S+ )?make \S+', make),
  (r'python -m benchmarks\.papers\.(reproduce|wind_1) ', figures),
  (r'(PYTHONPATH=\S+ )?python (benchmarks/|-m benchmarks\.)\w+', benchmark),
  (r'python -m bond_jax\.plan ', plan),
  (r'python -m bond_jax\.export ', export),
  (r'python -m bond_jax\.train --config=configs/soft_', soft_best_of_n),
  (r'(JAX_\w+=\S+ )+python -m bond_jax\.train --config=\.\.\.', hosts),
  (r'launch/local_hosts\.sh ', hosts),
  (r'python -m bond_jax\.train --config=\.\.\.', hosts),
  (r'python -m bond_jax\.draw ', stage),
  (r'python -m bond_jax\.(sft|reward_model|train|evaluate|sample)\s', stage),
  (r'python -m bond_jax\.rewards\.serve |curl http://127', server),
  (r'launch/tpu\.sh |bucket=', tpu),
  (r'xpk workload create ', xpk),
  (r'tail ', plain),
)  # fmt: skip


def rule(command):
  """The function that runs a command; an AssertionError if none does."""
  for pattern, function in RULES:
    if re.match(pattern, command):
      return function
  raise AssertionError(f'no rule of tests/command_rules.py runs: {command}')
