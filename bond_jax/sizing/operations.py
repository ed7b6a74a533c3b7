"""Operations and bytes of a step in closed form, and the least time they take.

All are per prompt and update, at most: no completion ends before T. Of the
floating-point operations those of products with weights and of attention are
counted, a multiplication and an addition as two. Axes as in `types`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from bond_jax.devices import sharding
from bond_jax.models import policies
from bond_jax.models.gemma import configs
from bond_jax.models.log_probs import tokens_read
from bond_jax.sizing import chips
from bond_jax.training import costs
from bond_jax.types import Algorithm


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


def work(sizes: configs.Config) -> Work:
  """Of the products with weights; attention is apart, in `attention`."""
  c = sizes
  attention = c.features * c.head_size * (2 * c.heads + 2 * c.kv_heads)
  layers = c.layers * (attention + 3 * c.features * c.feed_forward)
  head = c.vocab_size * c.features
  return Work(2.0 * layers, 2.0 * head, layers + head)


def attention(sizes: configs.Config, queries: int, keys: int) -> float:
  """Operations of scores and mixtures in all layers."""
  return 4.0 * sizes.layers * sizes.heads * sizes.head_size * queries * keys


def columns(sizes: configs.Config, n: int) -> int:
  """Keys of n positions that are kept while decoding, over all layers."""
  kept = lambda kind: min(n, sizes.window) if kind == 'local' else n
  return sum(kept(kind) for kind in configs.kinds(sizes))


def phases(
  algorithm: Algorithm,
  sizes: configs.Config,
  *,
  prompt: int,
  length: int,
  epochs: int,
  remat: str,
) -> dict[str, Phase]:
  """The rollout, the weighing and the update.

  Args:
    algorithm: what is drawn, scored and trained.
    sizes: of the model.
    prompt: P.
    length: T.
    epochs: updates on every rollout, which share what it cost.
    remat: with 'all', layers are computed again in the backward pass; the head
      always is.
  """
  a, m = algorithm, costs.num_trained(algorithm)
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
  config: ml_collections.ConfigDict, algorithm: Algorithm, sizes: configs.Config
) -> dict[str, Phase]:
  """The phases of a run."""
  return phases(
    algorithm, sizes, prompt=config.prompt.length, length=config.length,
    epochs=config.train.epochs, remat=config.model.remat,
  )  # fmt: skip


def least_seconds(
  name: str,
  sent: float,
  config: ml_collections.ConfigDict,
  algorithm: Algorithm,
  size: dict[str, int],
  mesh: Mesh,
  chip: chips.Chip,
) -> dict[str, float]:
  """Of computing, of reading memory and of sending, for one program of a step.

  `sent` are bytes that a chip receives, `size` those of a chip's part of what
  the run keeps, by the names of `programs.resident`.
  """
  sizes = policies.make_sizes(config.model, config.tokenizer.vocab_size)
  found = of_config(config, algorithm, sizes)
  part = found.get(name, Phase(0.0, 0.0, 0.0))
  itemsize = jnp.dtype(config.model.dtype).itemsize
  read = part.passes * work(sizes).weights * itemsize
  if name == 'rollout':
    read /= sharding.reshaped(mesh, **config.sampling_mesh).shape['model']
  else:
    read *= config.train.micro_batches / mesh.shape['model']
  if name == 'update':  # what is read and written anew
    read += 2 * (size['parameters'] + size['optimizer'])
  if name == 'move_anchor':
    read += size['parameters'] + size['reference'] + 2 * size['anchor']
  prompts = config.train.batch / mesh.size
  read += part.cached * itemsize * prompts
  return {
    'compute': part.flops * prompts / chip.flops,
    'memory': read / chip.bandwidth,
    'interconnect': sent / chip.interconnect,
  }
