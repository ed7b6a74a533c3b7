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
  # Readings of all weights, by an update or a micro-batch of it; of a teacher's
  # as many as it is times as large.
  passes: float
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
  teacher: configs.Config | None = None,
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
    teacher: the sizes of the reference; None where they are the model's.
  """
  a, m = algorithm, costs.num_trained(algorithm)
  reference = teacher or sizes
  anchor = sizes if a.anchor.moves else reference
  quantile = len(a.quantile_rows)
  row, whole = tokens_read(prompt, length), prompt + length
  w = work(sizes)
  per_row = lambda n: _row(sizes, n)
  share = lambda of: work(of).weights / w.weights
  draws = [
    (_drawn(of, num, prompt, length), share(of))
    for of, num in ((sizes, a.num_policy), (anchor, a.num_anchor))
  ]
  scored = (anchor, len(a.anchor_rows)), (reference, len(a.reference_rows))
  score = sum(
    num * (_row(of, row) + length * work(of).head) for of, num in scored
  )
  score += quantile * per_row(whole)
  # A backward pass is two forward ones, with frozen weights about one.
  back = 1 if sizes.lora_scale else 2
  again = remat == 'all'
  layers = 1 + again + back
  train = m * (layers * per_row(row) + (2 + back) * length * w.head)
  train += quantile * layers * per_row(whole)
  # Weights: once per token for all rows, once per pass and micro-batch else.
  once = sum(share(of) for of, num in scored if num) + bool(quantile)
  return {
    'rollout': Phase(
      sum(drawn.flops for drawn, _ in draws) / epochs,
      sum(drawn.passes * times for drawn, times in draws) / epochs,
      sum(drawn.cached for drawn, _ in draws) / epochs,
    ),
    'weigh': Phase(score / epochs, once / epochs, 0.0),
    'update': Phase(train, (1 + bool(quantile)) * (2 + again), 0.0),
  }


def _row(sizes: configs.Config, tokens: int) -> float:
  """Operations of the layers on a row of tokens."""
  return tokens * work(sizes).layers + attention(sizes, tokens, tokens)


def _drawn(sizes: configs.Config, num: int, prompt: int, length: int) -> Phase:
  """What a model does that draws `num` completions of a prompt, maybe none."""
  if not num:
    return Phase(0.0, 0.0, 0.0)
  w = work(sizes)
  # Layers: prompts, then tokens one by one, each of which sees the whole cache.
  before, own = columns(sizes, prompt), columns(sizes, max(1, length - 1))
  flops = _row(sizes, prompt) + num * (
    (length - 1) * w.layers
    + 4.0 * sizes.heads * sizes.head_size * (length - 1) * (before + own)
    + length * w.head
  )
  # A prompt's keys are read once for all its completions, side by side.
  cached = 2 * sizes.kv_heads * sizes.head_size
  return Phase(flops, length, cached * (length - 1) * (before + num * own))


def of_config(
  config: ml_collections.ConfigDict,
  algorithm: Algorithm,
  sizes: configs.Config,
  teacher: configs.Config | None = None,
) -> dict[str, Phase]:
  """The phases of a run; `teacher` as in `phases`."""
  return phases(
    algorithm, sizes, prompt=config.prompt.length, length=config.length,
    epochs=config.train.epochs, remat=config.model.remat, teacher=teacher,
  )  # fmt: skip


def least_seconds(
  name: str,
  sent: float,
  config: ml_collections.ConfigDict,
  algorithm: Algorithm,
  size: dict[str, int],
  mesh: Mesh,
  chip: chips.Chip,
  teacher: configs.Config | None,
) -> dict[str, float]:
  """Of computing, of reading memory and of sending, for one program of a step.

  `sent` are bytes that a chip receives, `size` those of a chip's part of what
  the run keeps, by the names of `programs.resident`; `teacher` as in `phases`.
  """
  sizes = policies.make_sizes(config.model, config.tokenizer.vocab_size)
  found = of_config(config, algorithm, sizes, teacher)
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
    read += size['parameters'] + 2 * size['anchor']
    read += 0 if teacher else size['reference']
  prompts = config.train.batch / mesh.size
  read += part.cached * itemsize * prompts
  return {
    'compute': part.flops * prompts / chip.flops,
    'memory': read / chip.bandwidth,
    'interconnect': sent / chip.interconnect,
  }
