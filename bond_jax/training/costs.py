"""What a step of an algorithm costs, in closed form, from the config alone.

Everything is per prompt and update, at most: no completion ends before T. Of
the floating-point operations those of products with weights and of attention
are counted, a multiplication and an addition as two. Axes as in `types`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from bond_jax.models import policies
from bond_jax.models.gemma import configs
from bond_jax.models.gemma import model as gemma
from bond_jax.models.log_probs import tokens_read
from bond_jax.types import Algorithm


class Cost(NamedTuple):
  """Rows and tokens of one prompt in one update; operations, bytes."""

  decodes: float  # completions drawn
  anchor_rows: float  # forward passes
  reference_rows: float
  quantile_rows: float  # of the learned quantile, each also trained
  trained_rows: float
  prefilled: float  # tokens of prompts that a sampler reads
  decoded: float  # ... drawn
  scored: float  # ... of scored rows, prompts included
  trained: float  # ... of trained rows, prompts and the quantile's included
  flops: float | None = None  # None: a model whose sizes are not known here
  gigabytes: float | None = None  # weights and caches read, in its dtype


class Phase(NamedTuple):
  """What one phase of a step does, for one prompt in one update."""

  flops: float
  passes: float  # readings of all weights, by an update or a micro-batch of it
  cached: float  # numbers of the cache that are read


class Work(NamedTuple):
  """Operations of one token in the layers, of one in the head; weights."""

  layers: float
  head: float
  weights: float  # that a pass over the model reads, the head's included


def work(sizes: gemma.Config) -> Work:
  """Of the products with weights; attention is apart, in `attention`."""
  c = sizes
  attention = c.features * c.head_size * (2 * c.heads + 2 * c.kv_heads)
  layers = c.layers * (attention + 3 * c.features * c.feed_forward)
  head = c.vocab_size * c.features
  return Work(2.0 * layers, 2.0 * head, layers + head)


def attention(sizes: gemma.Config, queries: int, keys: int) -> float:
  """Operations of scores and mixtures in all layers."""
  return 4.0 * sizes.layers * sizes.heads * sizes.head_size * queries * keys


def columns(sizes: gemma.Config, n: int) -> int:
  """Keys of n positions that are kept while decoding, over all layers."""
  kept = lambda kind: min(n, sizes.window) if kind == 'local' else n
  return sum(kept(kind) for kind in configs.kinds(sizes))


def num_trained(algorithm: Algorithm) -> int:
  """M: how many of the K completions of a prompt enter the loss."""
  k = algorithm.num_policy + algorithm.num_anchor
  reward = jax.ShapeDtypeStruct((1, k), jnp.float32)
  win = jax.ShapeDtypeStruct((1, k, k), jnp.float32)
  return jax.eval_shape(algorithm.select, reward, win).shape[1]


def cost(
  algorithm: Algorithm,
  sizes: gemma.Config | None,
  *,
  prompt: int,
  length: int,
  batch: int,
  micro_batches: int,
  epochs: int,
  itemsize: int,
  remat: str,
) -> Cost:
  """The cost of one prompt in one update.

  Args:
    algorithm: what is drawn, scored and trained.
    sizes: of the model; None where they are not known.
    prompt: P.
    length: T.
    batch: prompts of an update, which share one reading of the weights.
    micro_batches: into which an update is split: each reads the weights.
    epochs: updates on every rollout, which share what it cost.
    itemsize: bytes of a number in the computation.
    remat: with 'all', layers are computed again in the backward pass; the head
      always is.
  """
  a, m = algorithm, num_trained(algorithm)
  drawn = a.num_policy + a.num_anchor
  models = bool(a.num_policy) + bool(a.num_anchor)
  scored = len(a.anchor_rows) + len(a.reference_rows)
  quantile = len(a.quantile_rows)
  row, whole = tokens_read(prompt, length), prompt + length
  found = Cost(
    decodes=drawn / epochs,
    anchor_rows=len(a.anchor_rows) / epochs,
    reference_rows=len(a.reference_rows) / epochs,
    quantile_rows=quantile / epochs,
    trained_rows=m,
    prefilled=models * prompt / epochs,
    decoded=drawn * length / epochs,
    scored=(scored * row + quantile * whole) / epochs,
    trained=m * row + quantile * whole,
  )
  if sizes is None:
    return found
  parts = phases(
    a, sizes, prompt=prompt, length=length, epochs=epochs, remat=remat
  )
  per_batch = parts['rollout'].passes
  per_batch += micro_batches * (parts['weigh'].passes + parts['update'].passes)
  read = per_batch * work(sizes).weights / batch
  read += sum(part.cached for part in parts.values())
  return found._replace(
    flops=sum(part.flops for part in parts.values()),
    gigabytes=read * itemsize / 1e9,
  )


def phases(
  algorithm: Algorithm,
  sizes: gemma.Config,
  *,
  prompt: int,
  length: int,
  epochs: int,
  remat: str,
) -> dict[str, Phase]:
  """The rollout, the weighing and the update; arguments as those of `cost`."""
  a, m = algorithm, num_trained(algorithm)
  drawn = a.num_policy + a.num_anchor
  models = bool(a.num_policy) + bool(a.num_anchor)
  scored = len(a.anchor_rows) + len(a.reference_rows)
  quantile = len(a.quantile_rows)
  row, whole = tokens_read(prompt, length), prompt + length
  w = work(sizes)
  per_row = lambda n: n * w.layers + attention(sizes, n, n)
  # Layers: prompts, then tokens one by one, each of which sees the whole cache.
  before, own = columns(sizes, prompt), columns(sizes, max(1, length - 1))
  sample = models * per_row(prompt) + drawn * (
    (length - 1) * w.layers
    + 4.0 * sizes.heads * sizes.head_size * (length - 1) * (before + own)
    + length * w.head
  )
  score = scored * (per_row(row) + length * w.head)
  score += quantile * per_row(whole)
  # A backward pass is two forward ones, with frozen weights about one.
  back = 1 if sizes.lora_scale else 2
  again = remat == 'all'
  layers = 1 + again + back
  train = m * (layers * per_row(row) + (2 + back) * length * w.head)
  train += quantile * layers * per_row(whole)
  # Weights: once per token for all rows, once per pass and micro-batch else.
  once = bool(a.anchor_rows) + bool(a.reference_rows) + bool(quantile)
  # A prompt's keys are read once for all its completions, side by side.
  cached = 2 * sizes.kv_heads * sizes.head_size
  cached *= (length - 1) * (models * before + drawn * own)
  return {
    'rollout': Phase(
      sample / epochs, models * length / epochs, cached / epochs
    ),
    'weigh': Phase(score / epochs, once / epochs, 0.0),
    'update': Phase(train, (1 + bool(quantile)) * (2 + again), 0.0),
  }


def of_config(
  config: ml_collections.ConfigDict, algorithm: Algorithm, vocab_size: int
) -> Cost:
  """The cost of a run's config; prompts of an enumerable language are a token.

  `vocab_size` is the policy's, which the task may have chosen.
  """
  model, settings = config.model, config.train
  sizes = None
  if not policies.is_library(model):
    sizes = policies.make_sizes(model, 1)
    sizes = dataclasses.replace(sizes, vocab_size=vocab_size)
  return cost(
    algorithm,
    sizes,
    prompt=config.prompt.length if 'prompt' in config else 1,
    length=config.length,
    batch=settings.batch,
    micro_batches=settings.micro_batches,
    epochs=settings.epochs,
    itemsize=jnp.dtype(model.dtype).itemsize,
    remat=model.remat,
  )


def table(costs: dict[str, Cost]) -> list[tuple[Any, ...]]:
  """Rows for `show.table`, one per name."""
  head = ('per prompt and update', *(x.replace('_', ' ') for x in Cost._fields))
  return [head, *((name, *found) for name, found in costs.items())]


def line(found: Cost) -> str:
  """What a user should know before a run, in a few words."""
  text = (
    f'per prompt and update, at most: {found.decodes:g} decodes,'
    f' {found.anchor_rows:g} anchor and {found.reference_rows:g} reference'
    f' rows scored, {found.trained_rows:g} rows trained; tokens:'
    f' {found.prefilled:g} prefilled, {found.decoded:g} decoded,'
    f' {found.scored:g} scored, {found.trained:g} trained'
  )
  if found.flops is not None:
    text += f'; {found.flops / 1e9:.3g} GFLOP'
    text += f', {found.gigabytes:.3g} GB of weights and caches read'
  return text
