"""A teacher: another model, with the same vocabulary, as the reference.

`config.teacher` names a finished stage of a run, 'runs/large/sft' or
'runs/large/train', which is the law that this run's model has, at its own
temperature; or weights, as `config.weights` does, of a Gemma in the sizes that
the files tell, at the temperature of the config.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import os
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.data.tokenizer import Tokenizer
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora, policies
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import paths
from bond_jax.runs.settings import configs
from bond_jax.types import Params, Policy
from bond_jax.weights import identify, load, official

_STAGES = ('sft', 'train')
_PADDING = 256  # rows of an embedding beyond its pieces, at most


class Teacher(NamedTuple):
  """What is known of a teacher before its weights are read."""

  name: str  # as the config calls it
  policy: Policy  # of all its weights, adapters among them
  dtype: str  # in which they are kept, but for adapters: of the computation
  sizes: gemma.Config | None  # None: of a model of the gemma library
  tokenizer: Callable[[], Tokenizer]
  load: Callable[[Mesh], Params]  # into their shards


def find(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer | None = None
) -> Teacher | None:
  """The teacher of a config, None where it has none; reads no weights.

  A UserError for one that is not there, and for one with another vocabulary:
  of another size, or, where the student's `tokenizer` is given, other pieces.
  """
  if not config.teacher:
    return None
  path = os.path.normpath(paths.expanded(config.teacher))
  folder, stage = os.path.split(os.path.abspath(path))
  if _is_run(path):
    raise UserError(
      f'teacher is {config.teacher}, a run; name the stage that left the'
      f' weights: {" or ".join(os.path.join(path, x) for x in _STAGES)}.'
    )
  if stage in _STAGES and _is_run(folder):
    teacher = _of_run(config, folder, stage)
  elif stage in _STAGES and not os.path.isdir(path):
    raise UserError(
      f'teacher is {config.teacher}, and {folder} is no run: name the {stage}'
      ' stage of a run that has finished it, or weights.'
    )
  else:
    teacher = _of_weights(config)
  if tokenizer:
    _check_pieces(teacher, tokenizer)
  return teacher


def _is_run(folder: str) -> bool:
  """Whether there is a run: Hugging Face's folders have a config.json too."""
  there = functools.partial(os.path.join, folder)
  return os.path.exists(there('config.json')) and any(
    os.path.isdir(there(stage)) for stage in _STAGES
  )


def _check_pieces(teacher: Teacher, ours: Tokenizer) -> None:
  """A UserError unless the teacher's vocabulary has the same pieces."""
  theirs = teacher.tokenizer()
  if theirs.sha256 == ours.sha256:
    return
  a, b = (
    t.processor.id_to_piece(list(range(t.vocab_size))) for t in (ours, theirs)
  )
  if a == b and ours.stop_ids == theirs.stop_ids:
    return
  places = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
  where = 'another size or other ends'
  if places:
    i = places[0]
    where = f'piece {i} is {b[i]!r}, here {a[i]!r}'
  raise UserError(
    f'the teacher {teacher.name} has another vocabulary ({where}): log-probs of'
    ' the same completion need the same pieces; take a teacher of the same'
    ' family, or a student that has its tokenizer.path.'
  )


def _check_size(name: str, theirs: int, ours: int, padding: int = 0) -> None:
  if not 0 <= theirs - ours <= padding:
    raise UserError(
      f'the teacher {name} has a vocabulary of {theirs} pieces, and'
      f' tokenizer.vocab_size is {ours}: teacher and student must share theirs.'
    )


def _of_run(ours, workdir: str, stage: str) -> Teacher:
  """The policy that a stage of a run has left, the last of a finished one."""
  # Paths in its config are relative to the folder in which it was started.
  home = paths.home(workdir, configs.check_version(workdir))
  there = functools.partial(contextlib.chdir, home)
  config = configs.read_config(workdir)
  if config.task != 'text':
    raise UserError(
      f'the teacher {ours.teacher} is of task {config.task!r}, which has no'
      ' text; name a stage of a run on text.'
    )
  vocab_size = config.tokenizer.vocab_size
  _check_size(ours.teacher, vocab_size, ours.tokenizer.vocab_size)
  load.find_step(workdir, stage, 'last')  # or there is none
  model = config.model
  full = policies.make_policy(model, vocab_size, full=True)
  policy, sizes = full, None
  adapters = stage == 'train' and model.lora.rank
  if not policies.is_library(model):
    sizes = policies.make_sizes(model, vocab_size)
  if adapters:
    low_rank = policies.make_policy(model, vocab_size)
    init = lambda key: lora.join(full.init(key), low_rank.init(key))
    policy = low_rank._replace(init=init)

  def weights(mesh: Mesh) -> Params:
    with there():
      if stage == 'sft':
        params = load.load_params(full, workdir, stage, 'last', mesh)
      else:
        trained = low_rank if adapters else full
        params = load.load_policy(
          config, trained, workdir, 'last', mesh, alone=True
        )
      if adapters:
        base = load.load_frozen(config, low_rank, workdir, mesh).base
        return lora.join(base, params)
    return jax.tree.map(lambda x: x.astype(model.dtype), params)

  def tokenizer() -> Tokenizer:
    with there():
      return load.load_tokenizer(config, workdir)

  return Teacher(ours.teacher, policy, model.dtype, sizes, tokenizer, weights)


def _of_weights(config) -> Teacher:
  """A Gemma from files, at the settings with which the student computes."""
  path, model = config.teacher, config.model
  sizes = gemma.CONFIGS.get(path.rpartition('_')[0])
  if path not in official.RELEASES or sizes is None:
    sizes = identify.look(path).sizes
  used = config.tokenizer.vocab_size
  _check_size(path, sizes.vocab_size, used, _PADDING)
  sizes = dataclasses.replace(sizes, used_vocab=used)
  policy = gemma.make(
    sizes, temperature=model.temperature, dtype=model.dtype, scan=model.scan,
    remat='none',
  )  # fmt: skip

  def weights(mesh: Mesh) -> Params:
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    like = sharding.tree_structs(shapes, mesh, model.dtype)
    return official.load(path, sizes, like)

  def tokenizer() -> Tokenizer:
    own = identify.look(path).tokenizer or config.tokenizer.path
    if not own:
      raise UserError(
        f'the teacher {path} has no {tokenizer_lib.FILE} beside it, so that'
        ' vocabularies cannot be compared: put its own there, or set'
        ' tokenizer.path.'
      )
    return tokenizer_lib.load(own)

  return Teacher(path, policy, model.dtype, sizes, tokenizer, weights)
