"""The commands on README.md and docs/, and a place where they may be run."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import jax
import toy

TIMEOUT = 300
COPIED = (
  'bond_jax', 'configs', 'benchmarks', 'docs', 'launch', 'tests', 'Makefile',
  'README.md', 'pyproject.toml', 'requirements.txt', 'requirements-dev.txt',
  'requirements-plan.txt', 'requirements-hf.txt', 'requirements-fuzz.txt',
  'requirements-audit.txt', 'requirements-gemma.txt',
)  # fmt: skip
FIRST = re.compile(
  r'^(?:[A-Z_]+=\S+\s+)*(?:python|make|launch/|gcloud|curl|pip|xpk|sky|kubectl'
  r'|docker|tail|mv|cp|ls|bash|git|ssh|tensorboard)\b'
)

SIZES = (
  '--config.model.sizes={"layers":1,"features":16,"heads":2,"kv_heads":1,'
  '"head_size":8,"feed_forward":32}'
)
TRAIN = dict(steps=2, save_every=2, batch=8)
PROBE = dict(probe_prompts=8, probe_completions=2)
TEXT = {
  'mesh.data': 1, 'prompt.length': 3, 'length': 6, 'chunk': 48,
  'data.name': 'prompts/{split}.jsonl', 'tokenizer.vocab_size': 96,
  **{f'train.{k}': v for k, v in {**TRAIN, **PROBE}.items()},
  'evaluate.prompts': 16, 'evaluate.policy_completions': 4,
  'evaluate.reference_completions': 8, 'evaluate.at_once': 4,
}  # fmt: skip
DEMO = {
  **TEXT, 'sft.steps': 2, 'sft.batch': 8, 'sft.length': 8, 'sft.save_every': 2,
  'sft.validation_batches': 1,
}  # fmt: skip
LEARNED = {
  **DEMO, 'reward_model.members': 1, 'reward_model.steps': 2,
  'reward_model.batch': 8, 'reward_model.save_every': 2,
  'reward_model.tokenizer.vocab_size': 96,
  'reward_model.model.sizes.vocab_size': 96,
  'reward_model.model.sizes.feed_forward': 32,
}  # fmt: skip
GEMMA = {
  **TEXT, 'model.name': 'gemma3_tiny', 'model.dtype': 'float32',
  'prompt.kind': 'opening', 'train.micro_batches': 2, 'train.buckets': 1,
  'sampling_mesh.model': 1, 'weights': 'weights',
  'tokenizer.path': 'weights.model',
}  # fmt: skip
EXACT = {
  'enumerable.prompts': 2, 'enumerable.vocab': 3, 'length': 2,
  'model.sizes.features': 16, 'model.sizes.layers': 1, 'model.sizes.heads': 2,
  'model.sizes.kv_heads': 1, 'model.sizes.head_size': 8,
  'model.sizes.feed_forward': 32,
  'train.batch': 8, 'train.steps': 16, 'train.save_every': 16,
}  # fmt: skip
# By a word in the config's name, the first that is in it.
SMALL = {
  'demo_learned_reward': [LEARNED],
  'demo': [DEMO, SIZES],
  'gemma': [GEMMA, SIZES],
  'enumerable': [EXACT],
  'soft_best_of_n': [EXACT],
}
MODULE = """
def my_reward():
  return lambda prompts, completions, context: [
    [-len(y) for y in ys] for ys in completions
  ]


def another():
  return my_reward()
"""


def flags(config):
  """The flags that make a command with this config small."""
  for word, parts in SMALL.items():
    if word in config:
      found = []
      for part in parts:
        if isinstance(part, str):
          found.append(part)
        else:
          found += [f'--config.{k}={v}' for k, v in part.items()]
      return ' '.join(map(shlex.quote, found))
  raise AssertionError(f'no sizes for {config}')


# -- what is on a page --------------------------------------------------------


def blocks(text):
  """The shell blocks of a page: fenced as bash, or indented with a command."""
  found = re.findall(r'^```bash\n(.*?)^```', text, re.S | re.M)
  rest = re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)
  for block in re.findall(r'(?:^    .*\n)+', rest, re.M):
    block = re.sub(r'^    ', '', block, flags=re.M)
    if FIRST.match(block):
      found.append(block)
  for lang, block in re.findall(r'^```(\w*)\n(.*?)^```', text, re.S | re.M):
    lines = block.splitlines()
    if lang not in ('bash', 'python', 'json') and any(map(FIRST.match, lines)):
      raise AssertionError(f'a block with commands is not bash: {block}')
  return found


def commands(text):
  """The commands of a page, in order; a block with a function is one."""
  found = []
  for block in blocks(text):
    if re.search(r'^\w+\(\) \{', block, re.M):
      found.append(block)
      continue
    block = re.sub(r'\\\n\s*', '', block)
    for line in block.splitlines():
      line = re.sub(r'(^|\s+)# .*$', '', line).strip()
      if line:
        found.append(line)
  return found


# -- where they run -----------------------------------------------------------


class Place:
  """A clean copy of the repository, with small data, and what runs there."""

  def __init__(self, folder):
    self.folder, self.done, self.server, self.port = folder, {}, None, None
    for name in COPIED:
      path = os.path.join(toy.ROOT, name)
      copy = shutil.copytree if os.path.isdir(path) else shutil.copy
      copy(path, folder / name)
    for name in ('prompts', 'bin'):
      (folder / name).mkdir()
    toy.write_data(str(folder / 'prompts'))
    (folder / 'my_module.py').write_text(MODULE)
    self.program('python', f'exec {shlex.quote(sys.executable)} "$@"')

  def program(self, name, body, folder='bin'):
    path = self.folder / folder / name
    path.write_text(f'#!/usr/bin/env bash\n{body}\n')
    path.chmod(0o755)

  def environment(self):
    env = {
      **os.environ,
      'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PATH': f'{self.folder / "bin"}:{os.environ["PATH"]}',
      'PYTHONPATH': str(self.folder),
    }
    # Else jax would look for a TPU in every command.
    for name in ('JAX_NUM_CPU_DEVICES', 'TPU_LIBRARY_PATH'):
      env.pop(name, None)
    return env

  def start(self, command, **kwargs):
    return subprocess.Popen(
      ['bash', '-euo', 'pipefail', '-c', command], cwd=self.folder,
      env=self.environment(), stdin=subprocess.DEVNULL, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs,
    )  # fmt: skip

  def run(self, command):
    """Runs a command to its good end, the same one once; its output."""
    if command not in self.done:
      process = self.start(command)
      try:
        out, _ = process.communicate(timeout=TIMEOUT)
      except subprocess.TimeoutExpired:
        process.kill()
        raise
      assert process.returncode == 0, f'{command}\n{out[-3000:]}'
      self.done[command] = out
    return self.done[command]

  def stage(self, command):
    """Runs a stage at the size of a test."""
    config = re.search(r'--config=(\S+)', command)[1]
    return self.run(f'{command} {flags(config)}')

  def demo(self, *stages):
    """The demo's stages, which other pages begin from."""
    for stage in stages or toy.STAGES:
      self.stage(
        f'python -m bond_jax.{stage} --config=configs/demo.py'
        ' --workdir=runs/demo'
      )

  def weights(self):
    """An official checkpoint and its vocabulary, as Gemma's would lie there."""
    self.demo('sft', 'reward_model', 'train')
    self.run(
      'python -m bond_jax.export --workdir=runs/demo --out=weights'
      ' --format=official'
    )
    shutil.copy(
      self.folder / 'runs/demo/tokenizer.model', self.folder / 'weights.model'
    )

  def close(self):
    if self.server:
      self.server.kill()
      self.server.communicate()


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def listens(port):
  with socket.socket() as s:
    return s.connect_ex(('127.0.0.1', port)) == 0
