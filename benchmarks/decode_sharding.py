"""Sampling in its own sharding: what it takes to get there, and what it buys.

    PYTHONPATH=. python benchmarks/decode_sharding.py

Parameters are trained in shards along `data` and `model`. The sampler gathers
them along `data` once, and each part of that axis then decodes its prompts on
its own (`mesh=`); the other way is one loop over all devices, in which every
step gathers parameters again. Eight virtual devices on one machine show the
collectives, and times only in so far as a copy costs what a link would.
Alternating rounds, median of the ratios.
"""

import functools
import re
import statistics
import time

import jax

jax.config.update('jax_num_cpu_devices', 8)

import numpy as np  # noqa: E402

from bond_jax.devices import sharding  # noqa: E402
from bond_jax.models.gemma import model as gemma  # noqa: E402
from bond_jax.models.sampling import Limits, sample  # noqa: E402
from bond_jax.models.stops import Stop  # noqa: E402
from bond_jax.types import Prompts  # noqa: E402

CONFIG = gemma.CONFIGS['gemma3_tiny']
B, P, NUM, T, ROUNDS = 32, 32, 2, 64, 5


def seconds(program, *args) -> float:
  begun = time.perf_counter()
  jax.block_until_ready(program(*args))
  return time.perf_counter() - begun


def main(data: int, model: int) -> None:
  policy = gemma.make(
    CONFIG, temperature=1.0, dtype='float32', scan=False, remat='none'
  )
  mesh = sharding.make_mesh(data, model)
  params = jax.jit(functools.partial(gemma.init, CONFIG))(jax.random.key(0))
  params = jax.device_put(params, sharding.tree_shardings(params, mesh))
  tokens = np.random.default_rng(0).integers(3, 1000, (B, P)).astype(np.int32)
  ids, ones = np.arange(B, dtype=np.int32), np.ones(B, np.float32)
  prompts = sharding.put_batch(Prompts(tokens, tokens > 0, ids, ones), mesh)

  def draw(params, prompts, mesh):
    return sample(
        policy, params, prompts, jax.random.key(1),
        Limits(T, Stop(()), mesh=mesh), num=NUM,
    )  # fmt: skip

  own, whole = (
    jax.jit(functools.partial(draw, mesh=m)).lower(params, prompts).compile()
    for m in (mesh, None)
  )
  convert = jax.jit(
    lambda params: jax.shard_map(
      lambda x: x, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(),
      axis_names={'data'}, check_vma=False,
    )(policy.prepare(params))
  )  # fmt: skip
  for program in (own, whole):
    program(params, prompts)
  convert(params)
  times = [
    (
      seconds(own, params, prompts),
      seconds(whole, params, prompts),
      seconds(convert, params),
    )
    for _ in range(ROUNDS)
  ]
  ratio = statistics.median(b / a for a, b, _ in times)
  share = statistics.median(c / a for a, _, c in times)
  inside = lambda text: len(
    re.findall(r'all-gather\(.*op_name="[^"]*while/body', text)
  )
  print(
    f'mesh {data} x {model}: own sharding {ratio:.2f} x as fast as one loop'
    f' over all; getting there takes {share:.3f} of its time; all-gathers'
    f' within the loop: {inside(own.as_text())} against'
    f' {inside(whole.as_text())}'
  )


if __name__ == '__main__':
  for shape in ((8, 1), (4, 2)):
    main(*shape)
