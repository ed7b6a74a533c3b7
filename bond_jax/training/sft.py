"""Maximum likelihood on the data: the vocabulary, and the later reference."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bond_jax.data import examples, sources
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import hosts, sharding
from bond_jax.models import policies
from bond_jax.models.log_probs import log_probs
from bond_jax.runs import (
  configs,
  log,
  provenance,
  saving,
  stages,
  stopping,
)
from bond_jax.training import checks, text_task
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.training.guard import check_finite
from bond_jax.types import Policy, TrainState
from bond_jax.weights import load


def make_programs(policy: Policy, optimizer, chunk: int, mesh, state):
  """update(state, batch) -> state, metrics; and the loss.

  loss(params, batch) is in nats per token of the completions; a batch is what
  `examples.sentences` yields.
  """

  def loss(params, batch):
    prompts, completion, mask = batch
    out = log_probs(policy, params, prompts, completion, mask, chunk=chunk)
    return -out.sum() / mask.sum()

  def update(state, batch):
    value, gradient = jax.value_and_grad(loss)(state.params, batch)
    changes, opt_state = optimizer.update(
      gradient, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, changes)
    state = state._replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, {'loss': value, 'gradient_norm': optax.tree.norm(gradient)}

  shards = jax.tree.map(lambda x: x.sharding, state)
  return (
    jax.jit(
      update,
      out_shardings=(shards, sharding.replicated(mesh)),
      donate_argnums=(0,),
    ),
    jax.jit(loss),
  )


def init_state(config, policy: Policy, optimizer, mesh) -> TrainState:
  """The state before the first step, created in its shards.

  Its parameters are the checkpoint `config.weights`, or random without one.
  """

  def begin(params):
    return TrainState(jnp.int32(0), params, {}, optimizer.init(params), {})

  init = lambda: policy.init(configs.key(config.seed, 'sft'))
  shapes = jax.eval_shape(init)
  if config.weights:
    params = load.load_weights(config, mesh, 'float32')
  else:
    # Optimizing the random numbers of `init` takes 10 s on CPU, and saves none.
    cpu = jax.default_backend() == 'cpu'
    options = {'xla_backend_optimization_level': 0} if cpu else None
    shards = sharding.tree_shardings(shapes, mesh)
    params = jax.jit(init, out_shardings=shards, compiler_options=options)()
  shards = sharding.tree_shardings(jax.eval_shape(begin, shapes), mesh)
  return jax.jit(begin, out_shardings=shards, donate_argnums=(0,))(params)


def batches_of(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  split: str,
):
  """Whole texts, or answers to prompts, as `sft.target` says."""
  settings, rows = config.sft, sources.rows(config, split)
  kwargs = dict(
    length=settings.length,
    batch=settings.batch,
    seed=config.seed,
  )
  if settings.target == 'text':
    return examples.sentences(rows, tokenizer, **kwargs)
  encode = load.make_encoder(config, tokenizer)
  length = config.prompt.length
  return examples.answers(
    rows, encode, tokenizer, prompt_length=length, **kwargs
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

  def said(row: examples.Row) -> str:
    text = examples.text_of(
      row, 'a vocabulary is trained on; give tokenizer.path'
    )
    answer = row.get('completion')
    return text + answer if isinstance(answer, str) else text

  return tokenizer_lib.ensure(
    os.path.join(workdir, 'tokenizer.model'),
    sources.each(rows, said),
    config.tokenizer.vocab_size,
  )


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Runs the stage to its end, from its last checkpoint if it has one."""
  settings, folder = config.sft, os.path.join(workdir, 'sft')
  mesh = sharding.make_mesh(**config.mesh)
  rows = sources.rows(config, 'train')
  tokenizer = load_vocabulary(config, workdir, rows)
  # A bad row shows before weights are loaded.
  batches = functools.partial(batches_of, config, tokenizer)
  held_out = batches('validation')
  held_out = [next(held_out) for _ in range(settings.validation_batches)]
  batches = batches('train')
  of_data = look_at(config, tokenizer, rows)
  policy = policies.make_policy(
    config.model, config.tokenizer.vocab_size, full=True
  )
  optimizer = optimizer_lib.adam(steps=settings.steps, **settings.optimizer)

  state = init_state(config, policy, optimizer, mesh)
  update, loss = make_programs(policy, optimizer, config.chunk, mesh, state)
  saver = saving.Saver(
    os.path.join(folder, 'checkpoints'), 'sft', config.save_failure,
    provenance.of(config, mesh),
    lambda: provenance.inputs(config, workdir, 'sft'),
  )  # fmt: skip
  start = saver.start
  if start is not None:
    state, position = saver.restore(state)
    batches.set_state(position)
  show = ('loss', 'validation_loss')
  writer = log.Writer(folder, 'sft', settings.steps, start, show)
  with stopping.deferred(), writer, saver:
    for step in range((start or 0) + 1, settings.steps + 1):
      with writer.phase('update'):
        batch = sharding.put_batch(next(batches), mesh)
        state, row = update(state, batch)
        row = jax.device_get(row)
      stopping.hear(hosts.gather(stopping.asked()))
      stop = stopping.due()
      due = step % settings.save_every == 0 or step == settings.steps
      if due:
        with writer.phase('evaluate'):
          values = [
            loss(state.params, sharding.put_batch(batch, mesh))
            for batch in held_out
          ]
          row['validation_loss'] = np.mean(jax.device_get(values))
      check_finite(row, step, saver.folder)
      writer.write(step, row)
      saver.look()
      if due or stop:
        score = -row['validation_loss'] if due else None
        must = bool(stop) or step == settings.steps
        saver.save(
          step, state, batches.get_state(), score, writer.sync, must=must
        )
      if stop and step < settings.steps:
        raise stopping.stopped('sft', step)
  path = os.path.join(folder, 'metrics.jsonl')
  rows = hosts.once(lambda: log.read_rows(path))
  phases = log.phase_seconds(rows)
  return {
    'steps': settings.steps,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'loss': rows[-1]['loss'],
    'validation_loss': rows[-1]['validation_loss'],
    **of_data,
    'seconds': round(sum(phases.values()), 3),
    'phase_seconds': {k: round(v, 3) for k, v in phases.items()},
  }


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  stages.stage('sft', train, config, workdir, folder='sft', check=checks.check)
