"""What a run starts from: its vocabulary, its model, and the weights."""

import functools
import json
import os
from typing import Any

import jax
import ml_collections

from bond_jax.data import examples
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import policies
from bond_jax.runs import files, provenance
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.runs.settings import configs
from bond_jax.types import Frozen, Params, Policy
from bond_jax.weights import official
from bond_jax.weights.huggingface import adapter


def load_tokenizer(
  config: ml_collections.ConfigDict, workdir: str
) -> tokenizer_lib.Tokenizer:
  """The vocabulary of `tokenizer.path`, else the one that was trained."""
  settings = config.tokenizer
  folder = configs.reference_dir(config, workdir)
  if settings.path:
    path, remedy = settings.path, {}
  else:
    path = os.path.join(folder, tokenizer_lib.FILE)
    remedy = {'remedy': tokenizer_lib.OWN}
  tokenizer = tokenizer_lib.load(path, settings.sha256, **remedy)
  if tokenizer.vocab_size != settings.vocab_size:
    raise UserError(
      f'{path} has {tokenizer.vocab_size} pieces, the'
      f' config asks for tokenizer.vocab_size {settings.vocab_size}: is it of'
      f' another model than {config.model.name}?'
    )
  return tokenizer


def has_system_turn(config: ml_collections.ConfigDict) -> bool:
  """Whether a system may speak: of the families in Gemma 3 alone."""
  return config.model.name.lower().startswith('gemma3')


def make_encoder(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  longer: str | None = None,
) -> examples.Encode:
  """What makes a row of the data a prompt; see `examples.encoder`."""
  return examples.encoder(
    config.prompt.kind,
    tokenizer,
    length=config.prompt.length,
    system=has_system_turn(config),
    longer=longer or config.prompt.longer,
  )


def load_frozen(config, policy: Policy, workdir: str, mesh) -> Frozen:
  """What the policy starts from: the reference, and the base under it.

  The full weights are those that the sft stage left, or `config.weights` where
  the config has no such stage. With LoRA they are the base, in the dtype of
  the computation, and the reference is the adapter `model.lora.weights`, or
  one that changes nothing.
  """
  low_rank = bool(config.model.lora.rank)
  if 'sft' in config:
    full = _load_sft(config, workdir, mesh)
  else:
    dtype = config.model.dtype if low_rank else 'float32'
    full = load_weights(config, mesh, dtype)
  if not low_rank:
    return Frozen(reference=full, base={})
  base = jax.tree.map(lambda x: x.astype(config.model.dtype), full)
  if config.model.lora.weights:
    sizes = policies.make_sizes(config.model, config.tokenizer.vocab_size)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    like = sharding.tree_structs(shapes, mesh)
    reference = adapter.load_adapter(config.model.lora.weights, sizes, like)
  else:
    key = configs.key(config.seed, 'lora')
    reference = sharding.initialised(policy.init, key, mesh)
  return Frozen(reference, base)


def load_weights(config: ml_collections.ConfigDict, mesh, dtype) -> Params:
  """The checkpoint `config.weights`, straight into its shards."""
  vocab_size = config.tokenizer.vocab_size
  policy = policies.make_policy(config.model, vocab_size, full=True)
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  like = sharding.tree_structs(shapes, mesh, dtype)
  sizes = None  # of a model of the gemma library
  if not policies.is_library(config.model):
    sizes = policies.make_sizes(config.model, vocab_size)
  return official.load(config.weights, sizes, like)


def _load_sft(config, workdir: str, mesh) -> Params:
  """The weights that the sft stage left; a UserError if of another model."""
  folder = configs.reference_dir(config, workdir)
  path = os.path.join(folder, 'config.json')
  if os.path.exists(path):
    ours = json.loads(config.to_json_best_effort())
    rows = configs.differences(
      _model_of(files.read_json(path)), _model_of(ours)
    )
    if rows:
      raise UserError(
        f'the reference of {folder} is of another model ({"; ".join(rows)});'
        ' set these as there, or start from another run.'
      )
  policy = policies.make_policy(
    config.model, config.tokenizer.vocab_size, full=True
  )
  return load_params(policy, folder, 'sft', 'last', mesh)


def _model_of(config: dict[str, Any]) -> dict[str, Any]:
  """What of a config the parameters of its sft stage depend on in shape."""
  model = config['model']
  return {
    'model': {'name': model['name'], 'sizes': model.get('sizes', {})},
    'tokenizer': config['tokenizer'],
  }


def load_policy(
  config: ml_collections.ConfigDict,
  policy: Policy,
  workdir: str,
  which: str,
  mesh,
  *,
  alone: bool,
) -> Params:
  """The policy of a run; see `provenance.check_start` and `find_step`."""
  step = find_step(workdir, 'train', which)
  with checkpoint.manager(_checkpoints(workdir, 'train')) as checkpoints:
    made = checkpoint.read_facts(checkpoints, step)
  provenance.check_start(config, workdir, made, alone)
  return load_params(policy, workdir, 'train', str(step), mesh)


def check_factor(which: str, factor: float) -> None:
  """Refuses what is no factor of `extrapolated`, and the reference with one."""
  if not 0 <= factor < float('inf'):
    raise UserError(
      f'--extrapolate={factor} must be a finite number, 0 or more: 1 is the'
      ' policy, 0 its reference.'
    )
  if factor != 1 and which == 'reference':
    raise UserError(
      f'--extrapolate={factor} is for a policy; leave out'
      ' --checkpoint=reference.'
    )


def extrapolated(
  config, params: Params, reference: Params | None, factor: float
) -> Params:
  """The policy `factor` times as far from its reference, in weights.

  reference + factor (params - reference). Of adapters that began at nothing,
  W + factor s A B: factor times B, exactly. 1 is the policy, 0 the reference.

  Args:
    config: of the run.
    params: the policy; donated.
    reference: what training started from; not looked at with LoRA.
    factor: see `check_factor`. A UserError for one other than 1 where the
      policy started from an adapter.
  """
  if factor == 1:
    return params
  if config.model.lora.rank:
    if start := config.model.lora.weights:
      raise UserError(
        f'a policy that started from the adapter {start} cannot be'
        ' extrapolated; export what it started from with'
        ' --checkpoint=reference, and train from these weights.'
      )
    of = lambda path, x: x * factor if path[-1].key.endswith('_b') else x
    scale = functools.partial(jax.tree_util.tree_map_with_path, of)
    return jax.jit(scale, donate_argnums=0)(params)
  move = lambda x, y: y + factor * (x - y)
  move = functools.partial(jax.tree.map, move)
  return jax.jit(move, donate_argnums=0)(params, reference)


def load_params(
  policy: Policy, workdir: str, stage: str, which: str, mesh
) -> Params:
  """The parameters that a finished stage left, straight into their shards.

  `which` is 'last', 'best' or a step; see `find_step`.
  """
  step = find_step(workdir, stage, which)
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  like = sharding.tree_structs(shapes, mesh)
  with checkpoint.manager(_checkpoints(workdir, stage)) as checkpoints:
    return checkpoint.restore_params(checkpoints, like, step)


def find_step(workdir: str, stage: str, which: str) -> int:
  """The step that 'last', 'best' or a number means, the same on all hosts.

  A UserError where there is none; 'last' is that of a stage that has finished.
  """
  folder = _checkpoints(workdir, stage)
  finished = os.path.exists(os.path.join(workdir, stage, 'summary.json'))
  there = os.path.isdir(folder)
  if not there or (which == 'last' and not finished):
    other = there and stage == 'train'
    raise UserError(
      f'the {stage} stage has not finished in {workdir}; run "python -m'
      f' bond_jax.{stage}" first, with the same --config and --workdir'
      f'{", or give --checkpoint=best" if other else ""}.'
    )
  with checkpoint.manager(folder) as checkpoints:
    return checkpoint.choose(checkpoints, which)


def _checkpoints(workdir: str, stage: str) -> str:
  return os.path.join(workdir, stage, 'checkpoints')
