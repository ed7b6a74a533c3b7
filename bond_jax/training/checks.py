"""Refuses a config that some stage could not work with, before the first."""

import functools
import math

from jax.sharding import Mesh
import ml_collections

from bond_jax.data import sources
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import policies
from bond_jax.runs import stages
from bond_jax.runs.settings import configs, defaults
from bond_jax.training import setups
from bond_jax.training import step as step_lib
from bond_jax.training.tasks import enumerable, text_task
from bond_jax.types import Algorithm


def open_run(config: ml_collections.ConfigDict, workdir: str) -> stages.Run:
  """A run whose config every stage could work with; else a UserError."""
  rows = functools.cache(functools.partial(sources.rows, config))
  return stages.Run(config, workdir, check(config, rows), rows)


def check(config: ml_collections.ConfigDict, rows=None) -> Mesh:
  """The mesh of a config; a UserError for what no stage could work with.

  `rows(split)` are those of its data; they are opened here without it.
  """
  rows = rows or functools.partial(sources.rows, config)
  defaults.check(config.to_dict(), defaults.COMMON)
  settings = config.train
  if not config.model.temperature:
    raise UserError('model.temperature is 0, the greedy law, which is for'
                    ' bond_jax.sample; training needs more.')  # fmt: skip
  mesh = sharding.make_mesh(**config.mesh)
  drawn_on = sharding.reshaped(mesh, **config.sampling_mesh)
  parts = settings.micro_batches
  sharding.check_batch('train.batch', settings.batch, mesh, parts)
  # Each part of the mesh draws whole prompts.
  sharding.check_batch('train.batch', settings.batch, drawn_on, 1)
  algorithm = setups.make_algorithm(config)
  if config.task == 'text':
    check_teacher(config, algorithm)
  steps = settings.rollouts * settings.epochs
  if steps > 1 and algorithm.num_policy:
    raise UserError(
      f"algorithm {config.algorithm.name} trains on the policy's completions,"
      ' which one update makes stale; set train.rollouts and train.epochs to 1.'
    )
  for name in ('steps', 'save_every'):
    if settings[name] % steps:
      raise UserError(
        f'train.{name} ({settings[name]}) must be a multiple of'
        f' train.rollouts x train.epochs = {steps}: a checkpoint holds no half'
        ' iteration.'
      )
  task(config).check(config, mesh, rows)
  if 'reward_model' in config:
    check_reward_model(config, mesh)
  return mesh


def task(config: ml_collections.ConfigDict):
  """The module that `config.task` names."""
  return {'text': text_task, 'enumerable': enumerable}[config.task]


def check_teacher(
  config: ml_collections.ConfigDict, algorithm: Algorithm
) -> None:
  """Refuses a teacher that no step would look at, and one that is missing."""
  name = config.algorithm.name
  if algorithm.needs_teacher and not config.teacher:
    raise UserError(
      f'algorithm {name} draws the policy to its reference, from which it'
      ' starts: without a teacher nothing is to learn; set config.teacher, for'
      " instance to 'runs/large/sft' or 'gemma3_27b_it'."
    )
  if config.teacher and not step_lib.reads_reference(algorithm):
    raise UserError(
      f'algorithm {name} looks at its anchor alone, which follows the policy,'
      f' and never at the teacher {config.teacher}; take bond or best_of_n with'
      " anchor 'fixed', wind or ipo with a kl_weight, or start from the teacher"
      ' (config.reference, config.weights).'
    )


def check_reward_model(config: ml_collections.ConfigDict, mesh) -> None:
  """Refuses a reward_model section that the stage could not work with."""
  settings = config.reward_model
  if settings.kind == 'ridge':
    vocab_size = config.tokenizer.vocab_size
    if settings.order * math.log2(vocab_size + 1) >= 63:
      raise UserError(
        f'reward_model.order is {settings.order}: n-grams of {vocab_size}'
        ' pieces that long do not fit 63 bits; use a smaller order.'
      )
    return
  sharding.check_batch(
    'reward_model.batch', settings.batch, mesh, settings.micro_batches
  )
  if settings.weights == 'sft':
    if 'sft' not in config:
      raise UserError(
        "reward_model.weights is 'sft', and this config has no sft stage; name"
        " a checkpoint, or 'random'."
      )
    if 'model' in settings or 'tokenizer' in settings:
      raise UserError(
        "reward_model.weights is 'sft': the reward model is the sft stage's,"
        ' and has no model or tokenizer of its own. Drop these, or take'
        " 'random' or a checkpoint."
      )
  mine = configs.of_reward_model(config)
  policies.make_policy(mine.model, mine.tokenizer.vocab_size, full=True)
