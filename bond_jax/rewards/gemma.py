"""Our own reward model as a reward: what kind='gemma' has left.

A folder with model.json (how texts are read, and by which model), the
vocabulary tokenizer.model, and the weights under checkpoints. It is all that is
needed, whichever model the policy is.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
import numpy as np

from bond_jax.data import conversations, examples, preferences
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import library
from bond_jax.models import scalar_head as head_lib
from bond_jax.models.gemma import model as gemma
from bond_jax.rewards.text import judged
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.types import Params, Policy, RewardFn

_SHORTEST = 16  # pieces to which texts are padded at least


def make_policy(settings: dict[str, Any]) -> Policy:
  """The model that model.json describes: the library's name, or our sizes."""
  kwargs = {'temperature': 1.0, 'dtype': settings['dtype']}
  if settings['library']:
    return library.make(library.model(settings['library']), **kwargs)
  sizes = dict(settings['sizes'])
  sizes = gemma.Config(**{**sizes, 'pattern': tuple(sizes['pattern'])})
  return gemma.make(sizes, **kwargs, scan=settings['scan'], remat='none')


def begin(policy: Policy, starts: Sequence[Params]) -> Params:
  """The parameters of an ensemble whose members start from these models."""
  return {
    f'member_{i}': head_lib.init(policy, params)
    for i, params in enumerate(starts)
  }


def describe(
  sizes: gemma.Config | None, model: dict[str, Any], **more: Any
) -> dict[str, Any]:
  """What model.json says of a model: `sizes`, or None and its library name."""
  return {
    'library': '' if sizes else model['name'],
    'sizes': dataclasses.asdict(sizes) if sizes else {},
    'dtype': model['dtype'],
    'scan': model['scan'],
    **more,
  }


def scorer(policy: Policy, pool: str, mesh: Mesh, batch: int):
  """A function from (params, texts' pieces) to their scores, f64[N].

  Texts of about one length are scored together: they are padded to the next
  power of two, and the last batch is filled up, so that a handful of programs
  serves all. A score does not depend on the texts around it.
  """
  rows = -(-batch // mesh.shape['data']) * mesh.shape['data']
  program = jax.jit(
    lambda params, tokens, mask: head_lib.mean_score(
      policy, params, tokens, mask, pool
    ),
    out_shardings=sharding.replicated(mesh),
  )

  def score(params: Params, pieces: Sequence[Sequence[int]]) -> np.ndarray:
    width = [max(_SHORTEST, 1 << (len(p) - 1).bit_length()) for p in pieces]
    found = np.zeros(len(pieces))
    for length in sorted(set(width)):
      index = [i for i, w in enumerate(width) if w == length]
      for start in range(0, len(index), rows):
        some = index[start : start + rows]
        filled = some + some[:1] * (rows - len(some))
        batch = examples.pack([pieces[i] for i in filled], length)
        values = program(params, *sharding.put_batch(batch, mesh))
        found[some] = jax.device_get(values)[: len(some)]
    return found

  return score


def read(
  path: str, batch: int
) -> tuple[
  Callable[[Sequence[Sequence[int]]], np.ndarray],
  tokenizer_lib.Tokenizer,
  dict[str, Any],
]:
  """What the stage left in `path`; a UserError if that is not there.

  Returns score(pieces) -> f64[N], the tokenizer, and what model.json holds.
  """
  name = os.path.join(path, 'model.json')
  try:
    with open(name, encoding='utf-8') as f:
      settings = json.load(f)
    policy = make_policy(settings)
    pool, step = settings['pool'], settings['step']
    temperature, members = settings['temperature'], settings['members']
  except FileNotFoundError as e:
    raise UserError(
      f'there is no reward model in {path}; run the reward_model stage with'
      " reward_model.kind = 'gemma' first."
    ) from e
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(
      f'{name} does not describe a reward model ({e!r}); delete {path} and run'
      ' the reward_model stage again.'
    ) from e
  tokenizer = tokenizer_lib.load(
    os.path.join(path, tokenizer_lib.FILE),
    settings['tokenizer_sha256'],
    'run the reward_model stage again',
  )
  # Each process scores its own texts: the devices that it has to itself.
  devices = np.array(jax.local_devices()).reshape(-1, 1)
  mesh = Mesh(devices, ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
  shapes = jax.eval_shape(
    lambda key: begin(policy, [policy.init(key)] * members), jax.random.key(0)
  )
  like = sharding.tree_structs(shapes, mesh)
  with checkpoint.manager(os.path.join(path, 'checkpoints')) as checkpoints:
    step = checkpoint.choose(checkpoints, str(step))
    params = checkpoint.restore_params(checkpoints, like, step)
  score = scorer(policy, pool, mesh, batch)
  calibrated = lambda pieces: score(params, pieces) / temperature
  return calibrated, tokenizer, settings


def scalar_head(path: str, batch: int = 256) -> RewardFn:
  """Returns the score of the reward model in the folder `path`.

  sigmoid(a - b) of two scores is the probability, calibrated on the validation
  split, that people prefer the first text.

  Args:
    path: '{reference}/reward' is that of the run's own stage.
    batch: texts that are scored at a time.
  """
  score, tokenizer, settings = read(path, batch)
  turns, system = settings['turns'], settings['system']

  def scalar_head_reward(prompts, completions, context):
    if turns != context.turns:
      raise UserError(
        f'the reward model in {path} was trained on'
        f' {"answers to turns" if turns else "texts"}, and scores'
        f' {"answers to turns" if context.turns else "texts"} here: prompt.kind'
        ' and reward_model.prompt.kind must agree.'
      )
    texts = judged(prompts, completions, context)
    prompt_turns = [
      conversations.prompt_turns(row) if turns else None
      for row, ys in zip(context.rows, completions, strict=True)
      for _ in ys
    ]
    pieces = [
      preferences.encode(tokenizer, text, messages, system=system)
      for text, messages in zip(texts, prompt_turns, strict=True)
    ]
    return score(pieces).reshape(len(prompts), -1)

  return scalar_head_reward
