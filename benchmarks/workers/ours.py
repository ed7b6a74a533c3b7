"""bond_jax's sampler and its J-BOND step."""

import functools
import itertools

import jax
import numpy as np

from benchmarks import jbond_step, large, real, tiny, workloads
from benchmarks.workers import serve
from bond_jax.models import sampling
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.types import Frozen, Prompts


def prompts_of(rows: np.ndarray, first: int) -> Prompts:
  ids = np.arange(first, first + len(rows), dtype=np.int32)
  ones = np.ones(len(rows), np.float32)
  return Prompts(rows, np.ones_like(rows, bool), ids, ones)


def draw(policy, params, prompts, key, workload: workloads.Workload):
  """The call that is measured."""
  stop = Stop(workloads.stop_ids(workload))
  limits = sampling.Limits(workload.new_tokens, stop, workload.slots or 0)
  return sampling.sample(policy, params, prompts, key, limits, num=workload.n)


def sampler(policy, params) -> serve.Call:
  program = jax.jit(
    lambda params, prompts, key, workload: draw(
      policy, params, prompts, key, workload
    ),
    static_argnames='workload',
  )

  @functools.cache
  def prepared(workload):
    rows = workloads.tokens(workload, policy.vocab_size)
    parts = [rows]
    starts = itertools.accumulate(map(len, parts), initial=0)
    return [
      jax.device_put(prompts_of(x, i))
      for x, i in zip(parts, starts, strict=False)
    ]

  def call(workload, seed):
    found = []
    for prompts in prepared(workload):
      rollout = program(params, prompts, jax.random.key(seed), workload)
      _, mask = jax.device_get((rollout.completion, rollout.mask))
      found += mask.sum(-1).ravel().tolist()
    return found

  return call


def open_(folder: str, model: str = '', dtype: str = ''):
  del folder  # the weights are made anew, the same, or those of a path
  if dtype:
    return real.open_(model, dtype)
  if model:
    return large.open_(model)
  policy = gemma.make(
    tiny.CONFIG, temperature=1.0, dtype='float32', scan=False, remat='none'
  )
  params = tiny.params()
  device = jax.devices()[0]
  calls = dict(sample=sampler(policy, params))
  calls |= jbond_step.calls(policy, Frozen(params, {}), 8192)
  hello = dict(
    versions=serve.versions('jax', 'jaxlib', 'flax'),
    device=device.device_kind,
    refill=True,
  )
  return calls, hello


if __name__ == '__main__':
  serve.serve(open_)
