"""The algorithm and the setup of a step, from a config."""

import importlib
import pkgutil

import ml_collections

from bond_jax import algorithms
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import policies
from bond_jax.runs.settings import fields
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.training import step as step_lib
from bond_jax.types import Policy


def make_algorithm(config: ml_collections.ConfigDict):
  """The algorithm whose file in `algorithms/` bears `config.algorithm.name`."""
  name = config.algorithm.name
  found = pkgutil.iter_modules(algorithms.__path__)
  known = sorted(module.name for module in found if not module.ispkg)
  if name not in known:
    message = f'algorithm.name is {name!r}; known are {", ".join(known)}.'
    raise UserError(message)
  module = importlib.import_module(f'bond_jax.algorithms.{name}')
  args = config.algorithm.args.to_dict()
  rules = {'algorithm': {'args': fields.of_arguments(module.make)}}
  fields.check({'algorithm': {'args': args}}, rules=rules)
  try:
    return module.make(**args)
  except ValueError as e:
    raise UserError(f'algorithm {name}: {e}; args are {args}.') from e


def make_setup(
  config: ml_collections.ConfigDict,
  policy: Policy,
  stop,
  mesh,
  teacher: Policy | None = None,
) -> step_lib.Setup:
  """The setup that a config describes, of a policy and a teacher on a mesh."""
  settings = config.train
  if config.model.lora.rank and settings.optimizer.layer_rate != 1:
    raise UserError(
      'train.optimizer.layer_rate is that of full weights, got'
      f' {settings.optimizer.layer_rate} with model.lora.rank ='
      f' {config.model.lora.rank}: leave it at 1, and set learning_rate.'
    )
  # One schedule for the run, or one for each iteration.
  period = settings.rollouts * settings.epochs
  steps = period if settings.restart else settings.steps
  return step_lib.Setup(
    policy=policy,
    algorithm=policies.with_anchor(make_algorithm(config), config.model),
    optimizer=optimizer_lib.adam(steps=steps, **settings.optimizer),
    length=config.length,
    stop=stop,
    rollouts=settings.rollouts,
    epochs=settings.epochs,
    micro_batches=settings.micro_batches,
    chunk=config.chunk,
    slots=config.slots,
    buckets=settings.buckets,
    restart=settings.restart,
    mesh=mesh,
    sampling_mesh=sharding.reshaped(mesh, **config.sampling_mesh),
    teacher=teacher,
  )
