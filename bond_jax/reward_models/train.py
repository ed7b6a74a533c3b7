"""Training a Gemma with a scalar head on preferences: kind='gemma'.

It leaves in reward/ what `rewards.gemma.scalar_head` reads: checkpoints,
tokenizer.model, model.json.
"""

import functools
import itertools
import os
from typing import Any

import jax
import numpy as np

from bond_jax.data import preferences
from bond_jax.data import sources as sources_lib
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import hosts, sharding
from bond_jax.errors import UserError
from bond_jax.measures import preferences as measures
from bond_jax.models import policies, scalar_head
from bond_jax.reward_models import losses as preference_losses
from bond_jax.reward_models import report
from bond_jax.rewards import gemma as reward_lib
from bond_jax.runs import files, log, provenance, stages, stopping
from bond_jax.runs.checkpoints import saving
from bond_jax.runs.settings import configs
from bond_jax.training import guard as guard_lib
from bond_jax.training import loop, supervised
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.types import Policy, TrainState
from bond_jax.weights import load

_BATCH = 128  # texts that are judged at a time
_HELD_OUT_PARTNERS = 100  # more pairs of the same texts: less noise


def _tokenizer(config, mine, sources, workdir: str):
  """The run's vocabulary, or the section's: a file, or trained on its rows."""
  if 'tokenizer' not in config.reward_model or mine.tokenizer.path:
    return load.load_tokenizer(mine, workdir)
  texts = sources_lib.each(sources['train'], preferences.texts)
  ensure = functools.partial(
    tokenizer_lib.ensure,
    os.path.join(workdir, 'reward', 'tokenizer.model'),
    itertools.chain.from_iterable(texts),
    mine.tokenizer.vocab_size,
  )
  hosts.once(lambda: ensure() and None)  # one trains it
  return ensure()


def make_loss(policy: Policy, name: str, margin: float, pool: str):
  """loss(params, batch, total): the sum over members of the mean of their rows.

  Arrays of a batch, or of a part of one, are [rows, members, ...], and `total`
  is the rows of the batch. Targets are standardised: the gaps of pairs, or the
  ratings of texts.
  """

  def one(params, tokens, mask, target, total):
    rows = (-1, tokens.shape[-1])
    score = scalar_head.score(
      policy, params, tokens.reshape(rows), mask.reshape(rows), pool
    ).reshape(tokens.shape[:2])
    if name == 'regression':
      losses = preference_losses.squared_error(score[:, 0], target)
    elif name == 'margin':
      losses = preference_losses.bradley_terry_margin(
        score[:, 0], score[:, 1], margin * target
      )
    else:
      losses = preference_losses.bradley_terry(score[:, 0], score[:, 1])
    return losses.sum() / total

  def loss(params, batch, total):
    return sum(
      one(member, *(x[:, i] for x in batch), total)
      for i, member in enumerate(params.values())
    )

  return loss


def init_state(
  config, mine, policy: Policy, optimizer, workdir: str, mesh
) -> TrainState:
  """The state before the first step, created in its shards."""

  members = range(config.reward_model.members)

  def begin(*starts):
    params = reward_lib.begin(policy, starts)
    return TrainState(
      jax.numpy.int32(0), params, {}, optimizer.init(params), {}
    )

  if mine.weights == 'random':
    key = configs.key(config.seed, 'reward_model')
    starts = [
      sharding.initialised(policy.init, jax.random.fold_in(key, i), mesh)
      for i in members
    ]
  elif mine.weights == 'sft':
    folder = configs.reference_dir(config, workdir)
    params = load.load_params(policy, folder, 'sft', 'last', mesh)
    starts = [params] * len(members)
  else:
    starts = [load.load_weights(mine, mesh, 'float32')] * len(members)
  shards = sharding.tree_shardings(jax.eval_shape(begin, *starts), mesh)
  return jax.jit(begin, out_shardings=shards)(*starts)


def read_splits(
  config, mine, sources, tokenizer
) -> dict[str, preferences.Judged]:
  """The judged texts of each split; see `preferences.read`.

  Rated texts of the held-out splits meet more others than those of training.
  """
  settings, judged = config.reward_model, {}
  for split in preferences.SPLITS:
    judged[split] = preferences.read(
      sources[split],
      split,
      tokenizer,
      turns=mine.prompt.kind == 'turn',
      system=load.has_system_turn(mine),
      length=settings.length,
      pair=functools.partial(
        preferences.pairs_of,
        min_gap=settings.min_gap,
        partners=settings.partners if split == 'train' else _HELD_OUT_PARTNERS,
        seed=config.seed,
      ),
    )
  for split, part in judged.items():
    if part.bad:
      rows = len(sources[split])
      hosts.say(sources_lib.skipped(part.bad, rows, f'reward_model, {split}'))
  return judged


def make_batches(config, train: preferences.Judged, tokenizer):
  """Batches of pairs, or for regression of texts, with standardised targets."""
  settings = config.reward_model
  spread = 1.0 if train.rating is None else train.rating.std()
  groups, target = train.pairs, train.gap / spread
  if settings.loss == 'regression':
    if train.rating is None:
      raise UserError(
        "reward_model.loss 'regression' needs rows with 'text' and 'rating';"
        " these have 'chosen' and 'rejected'."
      )
    groups = np.arange(len(train.texts))[:, None]
    target = (train.rating - train.rating.mean()) / spread

  def pieces(i: int, rng: np.random.Generator) -> list[int]:
    if not (drop := settings.merge_dropout):
      return train.pieces[i]
    return preferences.cut_anew(
      train, i, tokenizer, drop=drop, length=settings.length, rng=rng
    )

  return preferences.batches(
    pieces,
    groups,
    target,
    length=settings.length,
    batch=settings.batch * settings.members,
    dropout=settings.dropout,
    seed=config.seed,
  )


def _fit(config, folder, batches, held_out, state, update, score, mesh):
  """Trains to the last step; returns the best one, and its parameters.

  Best by the share of the validation pairs that are right: the log-loss of a
  model that is too sure of itself is mended by a temperature.
  """
  settings = config.reward_model
  saver = saving.Saver(
    os.path.join(folder, 'checkpoints'), 'reward_model', config.save_failure,
    provenance.of(config, mesh),
    lambda: provenance.inputs(
      configs.of_reward_model(config), os.path.dirname(folder), 'reward'
    ),
  )  # fmt: skip
  if saver.start is not None:
    state, position = saver.restore(state)
    batches.set_state(position)
  # One row after the other is of another member.
  shape = (settings.batch, settings.members)
  of_members = (
    tuple(x.reshape(*shape, *x.shape[1:]) for x in batch) for batch in batches
  )
  show = ('loss', 'validation_accuracy')
  writer = log.Writer(folder, 'reward', settings.steps, saver.start, show)

  def validation(state):
    scores = score(state.params, held_out.pieces)
    lead = report.leads(scores, held_out)
    return {
      'validation_accuracy': measures.right(lead).mean(),
      'validation_log_loss': measures.log_loss(lead),
    }

  job = loop.Job(
    name='reward_model',
    iterate=supervised.iterations(update, of_members, mesh, writer),
    measure=validation,
    position=batches.get_state,
    score=lambda row: row['validation_accuracy'],
  )
  guard = guard_lib.Guard('reward_model', config.train.skip_limit)
  with stopping.deferred(), writer, saver:
    state = loop.run(
      job, state, settings.steps, settings.save_every, saver, writer, guard
    )
    saver.finish()
    return saver.best(state.params)


def train(run: stages.Run) -> dict[str, Any]:
  """Runs the stage to its end, from its last checkpoint if it has one."""
  config, workdir, mesh, _ = run
  settings, folder = config.reward_model, os.path.join(workdir, 'reward')
  mine = configs.of_reward_model(config)
  sources = {split: run.rows(split) for split in preferences.SPLITS}
  tokenizer = _tokenizer(config, mine, sources, workdir)
  judged = read_splits(config, mine, sources, tokenizer)
  batches = make_batches(config, judged['train'], tokenizer)
  policy = policies.make_policy(
    mine.model, mine.tokenizer.vocab_size, full=True
  )
  optimizer = optimizer_lib.adam(steps=settings.steps, **settings.optimizer)
  state = init_state(config, mine, policy, optimizer, workdir, mesh)
  loss = make_loss(policy, settings.loss, settings.margin, settings.pool)
  descend = supervised.make_update(
    loss, lambda batch: len(batch[0]), optimizer, settings.micro_batches, mesh,
    state,
  )  # fmt: skip

  def update(state, batch):
    state, row = descend(state, batch)
    return state, row | {'loss': row['loss'] / settings.members}

  score = reward_lib.scorer(policy, settings.pool, mesh, _BATCH)
  best, params = _fit(
    config, folder, batches, judged['validation'], state, update, score, mesh
  )
  scores = {
    split: score(params, part.pieces)
    for split, part in judged.items()
    if split != 'train'
  }
  found = hosts.once(lambda: report.report(scores, judged))
  sizes = None
  if not policies.is_library(mine.model):
    sizes = policies.make_sizes(mine.model, mine.tokenizer.vocab_size)
  described = reward_lib.describe(
    sizes,
    mine.model.to_dict(),
    pool=settings.pool,
    members=settings.members,
    step=best,
    temperature=found['temperature'],
    turns=mine.prompt.kind == 'turn',
    system=load.has_system_turn(mine),
    tokenizer_sha256=tokenizer.sha256,
  )
  path = os.path.join(folder, 'model.json')
  if hosts.first():
    vocabulary = os.path.join(folder, tokenizer_lib.FILE)
    with files.whole(vocabulary, 'wb') as f:
      f.write(tokenizer.processor.serialized_model_proto())
    files.write_json(path, described)
  _, times = loop.times(folder)
  return {
    'loss': settings.loss,
    'steps': settings.steps,
    'best_step': best,
    'members': settings.members,
    'parameters': sum(x.size for x in jax.tree.leaves(params)),
    **found,
    'tokenizer_sha256': tokenizer.sha256,
    **times,
  }
