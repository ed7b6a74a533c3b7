"""Gemma 3 270M's released weights: what ours samples and trains them with."""

import jax

from benchmarks import jbond_step
from benchmarks.workers import serve
from bond_jax.devices import sharding
from bond_jax.evaluation import sample
from bond_jax.models import policies
from bond_jax.types import Frozen
from bond_jax.weights import identify, load

CHUNK = 1024  # tokens whose logits exist at one time


def open_(path: str, dtype: str):
  """The sampler of a folder's weights, and a J-BOND step of their adapters."""
  from benchmarks.workers import ours

  found = identify.identify(path, '')
  config = sample.config_of(found, length=1, temperature=1.0)
  config.model.dtype = dtype
  mesh = sharding.make_mesh(data=1, model=1)
  vocab_size = config.tokenizer.vocab_size
  policy = policies.make_policy(config.model, vocab_size)
  base = load.load_weights(config, mesh, dtype)
  config.model.lora.update(rank=8, alpha=8.0)
  adapters = policies.make_policy(config.model, vocab_size)
  reference = sharding.initialised(adapters.init, jax.random.key(0), mesh)
  calls = jbond_step.calls(adapters, Frozen(reference, base), CHUNK)
  hello = dict(
    versions=serve.versions('jax', 'jaxlib', 'flax'),
    device=jax.devices()[0].device_kind,
  )
  return dict(sample=ours.sampler(policy, base), **calls), hello
