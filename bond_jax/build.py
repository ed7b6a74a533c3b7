"""The pieces of a run, built from its config: the only readers of its names."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import os
from typing import Any, NamedTuple
import zlib

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from bond_jax import checkpoint, command, data, metrics, sharding
from bond_jax import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.models import gemma
from bond_jax.types import Params, Policy, Prompts, RewardFn, Rollout


def configure_jax() -> None:
  """The process-wide settings that every number of the project rests on."""
  jax.config.update('jax_threefry_partitionable', True)
  jax.config.update('jax_numpy_rank_promotion', 'raise')


class Task(NamedTuple):
  """What the train stage trains on, and how it is watched.

  Built by the module that `config.task` names, from `make(config, workdir,
  mesh)`; its `check(config, mesh)` refuses a config before any stage starts.
  """

  policy: Policy
  reference: Params  # in its shards
  stop_ids: tuple[int, ...]
  batches: Any  # iterator of Prompts, with get_state() and set_state(state)
  reward: Callable[[Prompts, Rollout], np.ndarray]  # on the host: f32[B, K]
  # () -> probe, a function from params to validation numbers, among them
  # win_rate/reference and kl/reference
  make_probe: Callable[[], Callable[[Params], dict[str, float]]]


def task(config: ml_collections.ConfigDict):
  """The module that `config.task` names."""
  command.load(f'{config.task}:check')  # for its one-line errors
  return importlib.import_module(config.task)


def key(seed: int, stream: str) -> jax.Array:
  """The random key of one purpose: no two streams or seeds share draws."""
  return jax.random.fold_in(
    jax.random.key(seed), zlib.crc32(stream.encode('utf-8'))
  )


def make_policy(model: ml_collections.ConfigDict, used_vocab: int) -> Policy:
  """The model that `config.model` describes, drawing the first tokens alone.

  Rows of the embedding from `used_vocab` on may be read and are never drawn.
  """
  if model.name not in gemma.CONFIGS:
    raise UserError(
      f'model.name is {model.name!r}; known are {", ".join(gemma.CONFIGS)}.'
    )
  try:
    sizes = dataclasses.replace(gemma.CONFIGS[model.name], **model.sizes)
  except TypeError as e:
    raise UserError(
      f'model.sizes: {e}; known are'
      f' {", ".join(f.name for f in dataclasses.fields(gemma.Config))}.'
    ) from e
  if sizes.heads % sizes.kv_heads:
    raise UserError(
      f'model.sizes: heads ({sizes.heads}) must be a multiple of kv_heads'
      f' ({sizes.kv_heads}).'
    )
  if used_vocab > sizes.vocab_size:
    raise UserError(
      f'tokenizer.vocab_size ({used_vocab}) is larger than the'
      f' {sizes.vocab_size} embedding rows of {model.name}.'
    )
  sizes = dataclasses.replace(sizes, used_vocab=used_vocab)
  kwargs = {k: v for k, v in model.items() if k not in ('name', 'sizes')}
  return gemma.make(sizes, **kwargs)


def make_algorithm(config: ml_collections.ConfigDict):
  """The algorithm whose file in `algorithms/` bears `config.algorithm.name`."""
  name = config.algorithm.name
  folder = os.path.join(os.path.dirname(__file__), 'algorithms')
  known = sorted(
    f[:-3] for f in os.listdir(folder) if f.endswith('.py') and f[0] != '_'
  )
  if name not in known:
    raise UserError(
      f'algorithm.name is {name!r}; known are {", ".join(known)}.'
    )
  module = importlib.import_module(f'bond_jax.algorithms.{name}')
  _check_arguments(f'algorithm {name}', module.make, config.algorithm.args)
  try:
    return module.make(**config.algorithm.args)
  except ValueError as e:
    raise UserError(f'algorithm {name}: {e}.') from e


def _check_arguments(name: str, function: Callable[..., Any], args) -> None:
  signature = inspect.signature(function)
  try:
    signature.bind(**args)
  except TypeError as e:
    raise UserError(
      f'{name}: {e}; args in the config are {", ".join(args) or "empty"},'
      f' allowed are {", ".join(signature.parameters) or "none"}.'
    ) from e


def reference_dir(config: ml_collections.ConfigDict, workdir: str) -> str:
  """The run whose sft and reward stages this one starts from."""
  return os.path.normpath(config.reference.replace('{workdir}', workdir))


def check_reward(section: ml_collections.ConfigDict) -> None:
  factory = command.load(section.function)
  _check_arguments(f'reward {section.function}', factory, section.args)


def make_reward(
  config: ml_collections.ConfigDict, section, workdir: str
) -> RewardFn:
  """The reward `section.function`, called with `section.args`.

  In a string argument '{workdir}' stands for this run's folder, '{reference}'
  for that of the run it starts from.
  """

  def filled(value):
    if not isinstance(value, str):
      return value
    value = value.replace('{reference}', reference_dir(config, workdir))
    return value.replace('{workdir}', workdir)

  factory = command.load(section.function)
  try:
    return factory(**{k: filled(v) for k, v in section.args.items()})
  except UserError:
    raise
  except Exception as e:
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())
    raise UserError(
      f'reward {section.function} raised {reason}; --debug shows where.'
    ) from e


def load_tokenizer(
  config: ml_collections.ConfigDict, workdir: str
) -> tokenizer_lib.Tokenizer:
  folder = reference_dir(config, workdir)
  return tokenizer_lib.load(os.path.join(folder, 'tokenizer.model'))


def load_reference(config, policy: Policy, workdir: str, mesh) -> Params:
  """The parameters that the sft stage left; a UserError if of another model."""
  folder = reference_dir(config, workdir)
  path = os.path.join(folder, 'config.json')
  if os.path.exists(path):
    ours = json.loads(config.to_json_best_effort())
    rows = command.differences(
      _model_of(command.read_json(path)), _model_of(ours)
    )
    if rows:
      raise UserError(
        f'the reference of {folder} is of another model ({"; ".join(rows)});'
        ' set these as there, or start from another run.'
      )
  return load_params(policy, folder, 'sft', 'last', mesh)


def _model_of(config: dict[str, Any]) -> dict[str, Any]:
  """What of a config the parameters of its sft stage depend on in shape."""
  model = config['model']
  return {
    'model': {'name': model['name'], 'sizes': model.get('sizes', {})},
    'tokenizer': config['tokenizer'],
  }


def load_params(
  policy: Policy, workdir: str, stage: str, which: str, mesh
) -> Params:
  """The parameters that a finished stage left, straight into their shards.

  `which` is 'last', 'best' or a step; see `checkpoint.choose`.
  """
  if not os.path.exists(os.path.join(workdir, stage, 'summary.json')):
    raise UserError(
      f'the {stage} stage has not finished in {workdir}; run "python -m'
      f' bond_jax.{stage}" first, with the same --config and --workdir.'
    )
  folder = os.path.join(workdir, stage, 'checkpoints')
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.tree_shardings(shapes, mesh),
  )
  with checkpoint.manager(folder) as checkpoints:
    step = checkpoint.choose(checkpoints, which)
    return checkpoint.restore_params(checkpoints, like, step)


def rows(config: ml_collections.ConfigDict, split: str) -> data.Source:
  """The rows of a split of the run's data."""
  return data.source(config.data.name, split, config.data.data_dir)


def texts(
  tokenizer: tokenizer_lib.Tokenizer, prompts: Prompts, drawn: Rollout
) -> tuple[list[str], list[list[str]]]:
  """Prompts [B] and completions [B][K] as text; arrays on the host."""
  completions = [
    [tokenizer.decode(y[m]) for y, m in zip(row, mask, strict=True)]
    for row, mask in zip(drawn.completion, drawn.mask, strict=True)
  ]
  return [tokenizer.decode(row) for row in prompts.tokens], completions


def check(config: ml_collections.ConfigDict) -> Mesh:
  """The mesh of a config; a UserError for what no stage could work with."""
  settings = config.train
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch(
    'train.batch', settings.batch, mesh, settings.micro_batches
  )
  algorithm = make_algorithm(config)
  steps = settings.rollouts * settings.epochs
  if min(settings.rollouts, settings.epochs) < 1:
    raise UserError(
      f'train.rollouts ({settings.rollouts}) and train.epochs'
      f' ({settings.epochs}) must both be 1 or more.'
    )
  if steps > 1 and algorithm.num_policy:
    raise UserError(
      f"algorithm {config.algorithm.name} trains on the policy's completions,"
      ' which one update makes stale; set train.rollouts and train.epochs to 1.'
    )
  for name in ('steps', 'save_every'):
    if settings[name] < 1 or settings[name] % steps:
      raise UserError(
        f'train.{name} ({settings[name]}) must be a positive multiple of'
        f' train.rollouts x train.epochs = {steps}: a checkpoint holds no half'
        ' iteration.'
      )
  task(config).check(config, mesh)
  return mesh


def check_stage(
  name: str, config: ml_collections.ConfigDict, workdir: str
) -> None:
  """Refuses a stage that this run does not have."""
  if name not in config:
    raise UserError(
      f'this config has no {name} section: what {config.task} trains on needs'
      ' no such stage.'
    )
  start = reference_dir(config, workdir)
  if name in ('sft', 'reward_model') and start != os.path.normpath(workdir):
    raise UserError(
      f'this config starts from the sft and reward stages of {start}: its'
      f' {name} stage is run there, not in {workdir}.'
    )


def scalars(summary: dict[str, Any]) -> list[tuple]:
  """A table of the numbers and names in a summary."""
  plain = [(k, v) for k, v in summary.items() if not isinstance(v, dict)]
  return [('', 'value'), *plain]


def stage(
  name: str,
  work: Callable[..., dict[str, Any]],
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  folder: str,
  table: Callable[[dict[str, Any]], list[tuple]] = scalars,
  **asked: str,
) -> None:
  """Runs a stage once: `<workdir>/<folder>/summary.json` marks it done.

  Args:
    name: of the stage, for people.
    work: (config, workdir, **asked) -> the summary.
    config: of the run.
    workdir: of the run.
    folder: in which the summary goes.
    table: what of the summary is shown at the end.
    **asked: flags beside the config; the summary repeats them.
  """
  configure_jax()
  command.check_workdir(workdir, config)
  path = os.path.normpath(os.path.join(workdir, folder, 'summary.json'))
  if os.path.exists(path):
    done = {k: v for k, v in command.read_json(path).items() if k in asked}
    if changed := command.differences(done, asked):
      raise UserError(
        f'{path} is there, with {"; ".join(changed)} asked for now. Nothing was'
        f' changed; move away what the {name} stage wrote to run it again.'
      )
    print(f'{name}: finished already, see {path}')
    return
  check_stage(name, config, workdir)
  devices = f'{check(config).size} {jax.default_backend()} device(s)'
  command.claim_workdir(workdir, config)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  print(f'{name}: {config.model.name} on {devices}, into {workdir}', flush=True)
  summary = {**work(config, workdir, **asked), **asked, 'versions': versions()}
  command.write_json(path, summary)
  metrics.table(table(summary), f'{name}: done, see {path}')


def versions() -> dict[str, str]:
  """Of the packages that the numbers depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {name: importlib.metadata.version(name) for name in names}
