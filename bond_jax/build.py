"""The pieces of a run, built from its config: the only readers of its names."""

from __future__ import annotations

from collections.abc import Callable
import importlib
import importlib.metadata
import os
from typing import Any

import jax
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
  try:
    return module.make(**config.algorithm.args)
  except (TypeError, ValueError) as e:
    raise UserError(f'algorithm {name}: {e}') from e


def make_reward(section: ml_collections.ConfigDict, workdir: str) -> RewardFn:
  """The reward `section.function`, called with `section.args`.

  '{workdir}' in a string argument stands for this run's folder.
  """
  args = {
    k: v.format(workdir=workdir) if isinstance(v, str) else v
    for k, v in section.args.items()
  }
  return command.load(section.function)(**args)


def load_tokenizer(workdir: str) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.load(os.path.join(workdir, 'tokenizer.model'))


def load_params(
  policy: Policy, workdir: str, stage: str, which: str, mesh
) -> Params:
  """The parameters that a stage left, straight into their shards.

  `which` is 'last', 'best' or a step; see `checkpoint.choose`.
  """
  folder = os.path.join(workdir, stage, 'checkpoints')
  if not os.path.isdir(folder):
    raise UserError(f'there is no {folder}; run the {stage} stage first.')
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


def stage(
  name: str,
  work: Callable[[ml_collections.ConfigDict, str], dict[str, Any]],
  config: ml_collections.ConfigDict,
  workdir: str,
) -> None:
  """Runs a stage once: its summary, in `<workdir>/<name>`, marks it done."""
  command.claim_workdir(workdir, config)
  configure_jax()
  path = os.path.join(workdir, name, 'summary.json')
  if os.path.exists(path):
    print(f'{name}: finished already, see {path}')
    return
  os.makedirs(os.path.dirname(path), exist_ok=True)
  summary = work(config, workdir)
  command.write_json(path, {**summary, 'versions': versions()})
  rows = [(k, v) for k, v in summary.items() if not isinstance(v, dict)]
  metrics.table([('', 'value'), *rows], f'{name}: done, see {path}')


def versions() -> dict[str, str]:
  """Of the packages that the numbers depend on."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {name: importlib.metadata.version(name) for name in names}
