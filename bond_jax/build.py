"""The pieces of a run, built from its config: the only readers of its names."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import importlib
import importlib.metadata
import inspect
import os
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections

from bond_jax import checkpoint, command, data, metrics, sharding
from bond_jax import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.models import gemma
from bond_jax.types import Params, Policy, Prompts, RewardFn, Rollout


def configure_jax() -> None:
  """The process-wide settings that every number of the project rests on."""
  jax.config.update('jax_threefry_partitionable', True)
  jax.config.update('jax_numpy_rank_promotion', 'raise')


def make_policy(config: ml_collections.ConfigDict) -> Policy:
  """The model that `config.model` names, with the run's vocabulary."""
  name = config.model.name
  if name not in gemma.CONFIGS:
    raise UserError(
      f'model.name is {name!r}; known are {", ".join(gemma.CONFIGS)}.'
    )
  sizes = gemma.CONFIGS[name]
  if config.tokenizer.vocab_size > sizes.vocab_size:
    raise UserError(
      f'tokenizer.vocab_size ({config.tokenizer.vocab_size}) is larger than'
      f' the {sizes.vocab_size} embedding rows of {name}.'
    )
  # Rows of the embedding that no piece uses are never drawn.
  sizes = dataclasses.replace(sizes, used_vocab=config.tokenizer.vocab_size)
  kwargs = {k: v for k, v in config.model.items() if k != 'name'}
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


def make_reward(section: ml_collections.ConfigDict, workdir: str) -> RewardFn:
  """The reward `section.function`, called with `section.args`.

  '{workdir}' in a string argument stands for this run's folder.
  """
  args = {
    k: v.replace('{workdir}', workdir) if isinstance(v, str) else v
    for k, v in section.args.items()
  }
  factory = command.load(section.function)
  try:
    return factory(**args)
  except UserError:
    raise
  except Exception as e:
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())
    raise UserError(
      f'reward {section.function} raised {reason}; --debug shows where.'
    ) from e


def load_tokenizer(workdir: str) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.load(os.path.join(workdir, 'tokenizer.model'))


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
  """The mesh of a config; a UserError for what no stage could work with.

  A wrong setting of a late stage must not cost the early ones.
  """
  train = config.train
  mesh = sharding.make_mesh(**config.mesh)
  for name, batch, micro_batches in (
    ('sft.batch', config.sft.batch, 1),
    ('train.batch', train.batch, train.micro_batches),
    ('train.probe_prompts', train.probe_prompts, 1),
    ('evaluate.prompts', config.evaluate.prompts, 1),
  ):
    sharding.check_batch(name, batch, mesh, micro_batches)
  make_policy(config)
  make_algorithm(config)
  for section in (config.reward, config.gold):
    factory = command.load(section.function)
    _check_arguments(f'reward {section.function}', factory, section.args)
  for split in ('train', 'validation', 'test'):
    rows(config, split)
  return mesh


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
