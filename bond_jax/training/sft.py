"""Maximum likelihood on the data: the vocabulary, and the later reference."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bond_jax.data import examples, sources
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import hosts, sharding
from bond_jax.models import policies
from bond_jax.models.log_probs import log_probs
from bond_jax.runs import log, provenance, stages, stopping
from bond_jax.runs.checkpoints import saving
from bond_jax.runs.settings import configs
from bond_jax.training import checks, loop, supervised
from bond_jax.training import guard as guard_lib
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.training.tasks import text_task
from bond_jax.types import Policy, TrainState
from bond_jax.weights import load


def make_loss(policy: Policy, chunk: int):
  """loss(params, batch, total): nats per token, where `total` are all tokens.

  A batch is what `examples.pairs` yields, or a part of it.
  """

  def loss(params, batch, total):
    prompts, completion, mask = batch
    out = log_probs(policy, params, prompts, completion, mask, chunk=chunk)
    return -out.sum() / total

  return loss


def tokens_of(batch):
  """The tokens of a batch that are learnt."""
  return batch[2].sum()


def init_state(config, policy: Policy, optimizer, mesh) -> TrainState:
  """The state before the first step, created in its shards.

  Its parameters are the checkpoint `config.weights`, or random without one.
  """

  def begin(params):
    return TrainState(jnp.int32(0), params, {}, optimizer.init(params), {})

  if config.weights:
    params = load.load_weights(config, mesh, 'float32')
  else:
    key = configs.key(config.seed, 'sft')
    params = sharding.initialised(policy.init, key, mesh)
  shards = sharding.tree_shardings(jax.eval_shape(begin, params), mesh)
  return jax.jit(begin, out_shardings=shards, donate_argnums=(0,))(params)


def batches_of(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: examples.Source,
):
  """Whole texts, or answers to prompts, as `sft.target` says."""
  settings, prompt_length = config.sft, 1
  if settings.target == 'text':
    make = examples.sentence(tokenizer, settings.length)
  else:
    encode = load.make_encoder(config, tokenizer)
    make = examples.answer(encode, tokenizer, settings.length)
    prompt_length = config.prompt.length
  return examples.pairs(
    rows,
    make,
    prompt_length=prompt_length,
    length=settings.length,
    batch=settings.batch,
    seed=config.seed,
  )


def look_at(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: examples.Source,
) -> dict[str, int]:
  """Says what of the rows `batches_of` does not use; see `text_task`."""
  length = config.sft.length
  if config.sft.target == 'text':
    return text_task.look_at(rows, examples.sentence(tokenizer, length), None)
  encode = load.make_encoder(config, tokenizer, longer='drop')
  make = examples.answer(encode, tokenizer, length)
  return text_task.look_at(rows, make, config.prompt)


def load_vocabulary(
  config: ml_collections.ConfigDict, workdir: str, rows: examples.Source
) -> tokenizer_lib.Tokenizer:
  """That of the config, else one that is trained on the rows, once."""
  if config.tokenizer.path:
    return load.load_tokenizer(config, workdir)

  def text_of_row(row: examples.Row) -> str:
    text = examples.text_of(
      row, 'a vocabulary is trained on; give tokenizer.path'
    )
    answer = row.get('completion')
    return text + answer if isinstance(answer, str) else text

  ensure = functools.partial(
    tokenizer_lib.ensure,
    os.path.join(workdir, 'tokenizer.model'),
    sources.each(rows, text_of_row),
    config.tokenizer.vocab_size,
  )
  hosts.once(lambda: ensure() and None)  # one trains it
  return ensure()


def train(run: stages.Run) -> dict[str, Any]:
  """Runs the stage to its end, from its last checkpoint if it has one."""
  config, workdir, mesh, _ = run
  settings, folder = config.sft, os.path.join(workdir, 'sft')
  rows = run.rows('train')
  tokenizer = load_vocabulary(config, workdir, rows)
  # A bad row shows before weights are loaded.
  batches = functools.partial(batches_of, config, tokenizer)
  held_out = batches(run.rows('validation'))
  held_out = [next(held_out) for _ in range(settings.validation_batches)]
  batches = batches(rows)
  of_data = look_at(config, tokenizer, rows)
  policy = policies.make_policy(
    config.model, config.tokenizer.vocab_size, full=True
  )
  optimizer = optimizer_lib.adam(steps=settings.steps, **settings.optimizer)

  state = init_state(config, policy, optimizer, mesh)
  loss = make_loss(policy, config.chunk)
  update = supervised.make_update(
    loss, tokens_of, optimizer, settings.micro_batches, mesh, state
  )
  measure = jax.jit(lambda params, x: loss(params, x, tokens_of(x)))

  def validation(state):
    values = [
      measure(state.params, sharding.put_batch(batch, mesh))
      for batch in held_out
    ]
    return {'validation_loss': np.mean(jax.device_get(values))}

  saver = saving.Saver(
    os.path.join(folder, 'checkpoints'), 'sft', config.save_failure,
    provenance.of(config, mesh),
    lambda: provenance.inputs(config, workdir, 'sft'),
  )  # fmt: skip
  if saver.start is not None:
    state, position = saver.restore(state)
    batches.set_state(position)
  show = ('loss', 'validation_loss')
  writer = log.Writer(folder, 'sft', settings.steps, saver.start, show)
  job = loop.Job(
    name='sft',
    iterate=supervised.iterations(update, batches, mesh, writer),
    measure=validation,
    position=batches.get_state,
    score=lambda row: -row['validation_loss'],
  )
  guard = guard_lib.Guard('sft', config.train.skip_limit)
  with stopping.deferred(), writer, saver:
    state = loop.run(
      job, state, settings.steps, settings.save_every, saver, writer, guard
    )
  rows, times = loop.times(folder)
  return {
    'steps': settings.steps,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'loss': rows[-1]['loss'],
    'validation_loss': rows[-1]['validation_loss'],
    **of_data,
    **times,
  }


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  stages.stage(
    'sft', train, config, workdir, folder='sft', open_run=checks.open_run
  )
