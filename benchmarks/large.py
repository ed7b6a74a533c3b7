"""Gemma 3 1B's shape on an accelerator: what it does, and what it could do."""

import functools
import math

import jax
import jax.numpy as jnp

from benchmarks import jbond_step, workloads
from benchmarks.workers import serve
from bond_jax.models.gemma import model as gemma
from bond_jax.types import Frozen
from bond_jax.weights import stacks

PROMPTS_AT_ONCE = 16  # of a micro-batch, two rows each
CHUNK = 1024  # tokens whose logits exist at one time
ROWS = 2  # trained of each prompt by J-BOND

# jax's device_kind -> bytes per second of memory, bfloat16 operations per
# second: the makers' figures, dense.
DEVICES = {
  'NVIDIA A100-SXM4-40GB': (1.555e12, 312e12),
  'NVIDIA A100-SXM4-80GB': (2.039e12, 312e12),
  'NVIDIA H100 80GB HBM3': (3.35e12, 989e12),
  'NVIDIA H200': (4.8e12, 989e12),
  'NVIDIA L4': (300e9, 121e12),
  'TPU v4': (1.2e12, 275e12),
  'TPU v5 lite': (819e9, 197e12),
  'TPU v5p': (2.765e12, 459e12),
  'TPU v6 lite': (1.64e12, 918e12),
}


def size(config: gemma.Config) -> int:
  """Parameters."""
  return sum(
    math.prod(x.shape) for x in jax.tree.leaves(stacks.init_shapes(config))
  )


def contexts(config: gemma.Config, at: int) -> int:
  """Positions that the token at `at` sees, summed over the layers."""
  seen = {'global': at + 1, 'local': min(at + 1, config.window or at + 1)}
  period = len(config.pattern)
  return sum(seen[config.pattern[i % period]] for i in range(config.layers))


def sample_bytes(config: gemma.Config, rows, prompt, new, width=2) -> float:
  """That decoding must read: the weights and the cache, once for each token.

  `width`: bytes of a number. Prefill and writing are left out: they are less
  than a hundredth of it.
  """
  per_position = 2 * config.kv_heads * config.head_size * width
  cache = sum(contexts(config, prompt + t) for t in range(new))
  return new * size(config) * width + rows * per_position * cache


def train_flops(config: gemma.Config, rows, prompt, new) -> float:
  """Of one update, forward and backward; nothing that is computed twice."""
  body = size(config) - config.vocab_size * config.features
  head = config.vocab_size * config.features
  seen = sum(contexts(config, t) for t in range(prompt + new))
  attention = 2 * config.heads * config.head_size * seen
  return 6.0 * rows * ((prompt + new) * body + new * head + attention)


def open_(model: str):
  """The calls `sample` and `train` of one model, and what is known of it."""
  from benchmarks.workers import ours

  config = gemma.CONFIGS[model]
  make = functools.partial(
    gemma.make, config, temperature=1.0, dtype='bfloat16'
  )
  policy = make(scan=False, remat='none')
  trained = make(scan=True, remat='all')
  init = jax.jit(lambda key: gemma.init(config, key))
  low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  params = jax.jit(lambda key: low(init(key)))(jax.random.key(0))

  @functools.cache
  def opened(workload):
    micro = max(1, workload.prompts // PROMPTS_AT_ONCE)
    setup = jbond_step.make_setup(trained, workload.new_tokens, micro, CHUNK)
    params = init(jax.random.key(0))
    return jbond_step.open_step(setup, Frozen(params, {}), workload)

  def train(workload, seed):
    opened(workload)['update'](seed)
    row = workload.prompt_length + workload.new_tokens
    return [row] * (workload.prompts * ROWS)

  device = jax.devices()[0].device_kind
  bandwidth, peak_flops = DEVICES.get(device, (None, None))
  hello = dict(
    versions=serve.versions('jax', 'jaxlib', 'flax'),
    device=device,
    bandwidth=bandwidth,
    peak_flops=peak_flops,
    parameters=size(config),
  )
  return dict(sample=ours.sampler(policy, params), train=train), hello


def possible(model: str, workload: workloads.Workload) -> dict[str, float]:
  """Bytes of the workload's sampling, operations of its update."""
  config = gemma.CONFIGS[model]
  shape = workload.prompt_length, workload.new_tokens
  return dict(
    sample_bytes=sample_bytes(config, workload.prompts, *shape),
    train_flops=train_flops(config, workload.prompts * ROWS, *shape),
  )
