"""What a run needs of a slice, from its compiler, before anything is rented.

    python -m bond_jax.plan --config=configs/gemma_7b_jbond.py \
      --topology=v5e:4x4 --out=runs/plan

compiles every program of a step, and the probe, for those chips, none of which
has to be there, and says whether each fits, with all that lives beside it; what
it computes, reads and sends; and the least time that these take.
"""

from __future__ import annotations

import math
import os
import re
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections

from bond_jax import (
  build,
  chips,
  command,
  costs,
  hlo,
  metrics,
  origin,
  sharding,
  text_task,
  train,
)
from bond_jax import step as step_lib
from bond_jax.errors import UserError
from bond_jax.types import Frozen, Params, Prompts, Rollout

_TOPOLOGY = flags.DEFINE_string(
  'topology', None, f'The devices: {chips.EXAMPLES}.', required=True
)
_SEARCH = flags.DEFINE_bool(
  'search', False, 'Find the largest batch that fits.'
)

# What is on the chip all the time, and the names under which it is shown.
KEPT = ('parameters', 'optimizer', 'anchor', 'quantile', 'base')
GIB = chips.GIB


class Program(NamedTuple):
  """A jitted function of the run, and what it is called with."""

  function: Any
  args: tuple[Any, ...]  # shapes, with their shardings
  beside: int  # bytes on each chip that are not among its arguments
  loops: int  # how often a loop of it runs that ends when all is drawn


class Compiled(NamedTuple):
  """What the compiler says of a program, per chip, in bytes and seconds."""

  peak: float  # with all that lives beside it
  arguments: float
  beside: float
  temporaries: float
  code: float
  collectives: list[hlo.Collective]
  seconds: float  # of compilation


def bytes_of(tree: Any) -> int:
  """Bytes of one chip's shards."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def resident(state, frozen: Frozen) -> dict[str, Any]:
  """What a run keeps, by the names that people use."""
  return {
    'parameters': state.params,
    'optimizer': state.opt_state,
    'anchor': state.anchor,
    'quantile': state.aux,
    'base': frozen.base,
    'reference': frozen.reference,
  }


def shapes(config, policy, setup: step_lib.Setup, mesh: Mesh):
  """The state and the frozen trees of a run, as shapes in their shards."""
  base: Params = {}
  if config.model.lora.rank:
    full = origin.make_policy(
      config.model, config.tokenizer.vocab_size, full=True
    )
    base = sharding.tree_structs(
      jax.eval_shape(full.init, jax.random.key(0)), mesh, config.model.dtype
    )
  reference = jax.eval_shape(policy.init, jax.random.key(0))
  frozen = Frozen(sharding.tree_structs(reference, mesh), base)
  state = jax.eval_shape(lambda x: step_lib.init_state(setup, x), frozen)
  return sharding.tree_structs(state, mesh), frozen


def programs(config: ml_collections.ConfigDict, mesh: Mesh):
  """The programs of a run on a mesh by their names, and what it keeps."""
  policy = origin.make_policy(config.model, config.tokenizer.vocab_size)
  stop_ids = (1,)  # which they are changes no shape
  setup = train.make_setup(config, policy, stop_ids, mesh)
  state, frozen = shapes(config, policy, setup, mesh)
  of_run = train.make_programs(setup, mesh, state)
  rows = sharding.by_row(mesh)
  whole = NamedSharding(mesh, PartitionSpec())

  def row(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  def prompts(b):
    length = config.prompt.length
    return Prompts(
      row(jnp.int32, b, length),
      row(bool, b, length),
      row(jnp.int32, b),
      row(jnp.float32, b),
    )

  a, b, t = setup.algorithm, config.train.batch, config.length
  k = a.num_policy + a.num_anchor
  drawn = Rollout(
    row(jnp.int32, b, k, t),
    row(bool, b, k, t),
    row(jnp.float32, b, k, t),
    row(jnp.float32, b, k),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
  index = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  batch, _ = jax.eval_shape(
    lambda *x: step_lib.weigh(setup, *x),
    state, frozen, prompts(b), drawn, row(jnp.float32, b, k),
  )  # fmt: skip
  batch = jax.tree.map(lambda x: row(x.dtype, *x.shape), batch)
  probe = text_task.probe_program(config, policy, stop_ids, mesh)
  shown = config.train.probe_prompts, config.train.probe_completions
  calls = {
    'rollout': (of_run.rollout, prompts(b), key, index),
    'weigh': (of_run.weigh, prompts(b), drawn, row(jnp.float32, b, k)),
    'update': (of_run.update, batch),
    'move_anchor': (of_run.move_anchor,),
    'probe': (probe, prompts(shown[0]), key),
  }
  kept = resident(state, frozen)
  rests = not step_lib.reads_reference(a)
  found = {}
  for name, (function, *more) in calls.items():
    first = state.params if name == 'probe' else state
    args = (first, frozen, *more)
    here = {k: v for k, v in kept.items() if v != {}}
    if rests and name in ('rollout', 'weigh', 'update'):
      args = (first, frozen._replace(reference={}), *more)
      here.pop('reference')
    completions = max(a.num_policy, a.num_anchor) * b
    if name == 'probe':
      completions = shown[0] * shown[1]
    slots = min(config.slots, completions) or completions
    # Those that are no arguments of this program are there all the same.
    found[name] = Program(
      function, args, bytes_of(here), -(-completions // slots) * t
    )
  return found, kept


def compile_program(program: Program) -> Compiled | str:
  """Compiles a program for its mesh; what it needs in words, if too much."""
  start = time.monotonic()
  try:
    compiled = program.function.lower(*program.args).compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    needed = re.search(r'HLO temporaries \(([\d.]+)G\)', str(e))
    return needed[1] if needed else 'more'
  memory = compiled.memory_analysis()
  collectives = hlo.collectives(compiled.as_text(), program.loops)
  kept = _kept_bytes(compiled, program.args)
  arguments = memory.argument_size_in_bytes
  beside = max(0, program.beside - kept)  # rounding of tiny arrays
  return Compiled(
    peak=memory.peak_memory_in_bytes + beside,
    arguments=arguments,
    beside=beside,
    temporaries=memory.peak_memory_in_bytes - arguments,
    code=memory.generated_code_size_in_bytes,
    collectives=collectives,
    seconds=time.monotonic() - start,
  )


def _kept_bytes(compiled, args) -> int:
  """Bytes of state and frozen trees that the program has as arguments.

  jit leaves out what a function does not look at.
  """
  state, frozen, *_ = args
  used = compiled._executable._kept_var_idx  # no public name says it
  leaves = jax.tree.leaves((state, frozen))
  return bytes_of([x for i, x in enumerate(leaves) if i in used])


def least_seconds(name, compiled, config, algorithm, kept, mesh, chip):
  """Of computing, reading memory and sending: the phases of a step alone."""
  sizes = origin.make_sizes(config.model, config.tokenizer.vocab_size)
  phases = costs.phases(
    algorithm, sizes, prompt=config.prompt.length, length=config.length,
    epochs=config.train.epochs, remat=config.model.remat,
  )  # fmt: skip
  batch, n = config.train.batch, mesh.size
  itemsize = jnp.dtype(config.model.dtype).itemsize
  weights = costs.work(sizes).weights * itemsize
  sent = sum(size for _, size in hlo.totals(compiled.collectives).values())
  if name == 'move_anchor':
    moved = bytes_of((kept['parameters'], kept['anchor']))
    return 0.0, (moved + bytes_of(kept['anchor'])) / chip.bandwidth, 0.0
  part = phases[name]
  if name == 'rollout':
    over = sharding.reshaped(mesh, **config.sampling_mesh).shape['model']
    read = part.passes * weights / over
  else:
    read = part.passes * weights * config.train.micro_batches
    read /= mesh.shape['model']
  if name == 'update':  # the optimizer reads and writes all that it keeps
    read += 2 * bytes_of((kept['parameters'], kept['optimizer']))
  read += part.cached * itemsize * batch / n
  return (
    part.flops * batch / n / chip.flops,
    read / chip.bandwidth,
    sent / chip.interconnect,
  )


def plan(
  config: ml_collections.ConfigDict, topology: str, say=print
) -> dict[str, Any]:
  """Compiles a run for a topology; the summary."""
  devices, chip = chips.devices(topology)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  check(config, mesh)
  wanted, kept = programs(config, mesh)
  algorithm = build.make_algorithm(config)
  rows, too_much = {}, {}
  for name, program in wanted.items():
    say(f'compiling {name} for {topology} ...')
    compiled = compile_program(program)
    if isinstance(compiled, str):
      too_much[name] = compiled
      continue
    totals = hlo.totals(compiled.collectives)
    largest = max(compiled.collectives, key=lambda c: c.bytes, default=None)
    row = {
      'peak_bytes': compiled.peak,
      'argument_bytes': compiled.arguments,
      'beside_bytes': compiled.beside,
      'temporary_bytes': compiled.temporaries,
      'code_bytes': compiled.code,
      'compile_seconds': round(compiled.seconds, 1),
      'collectives': {
        kind: {'times': times, 'bytes': size}
        for kind, (times, size) in totals.items()
      },
      'largest_collective': largest and largest._asdict(),
    }
    if chip.flops and name != 'probe':
      names = 'compute', 'memory', 'interconnect'
      seconds = least_seconds(
        name, compiled, config, algorithm, kept, mesh, chip
      )
      row['least_seconds'] = dict(zip(names, seconds, strict=True))
    rows[name] = row
  code = sum(row['code_bytes'] for row in rows.values())
  for row in rows.values():  # all programs stay loaded
    row['peak_bytes'] += code - row['code_bytes']
  peak = max((row['peak_bytes'] for row in rows.values()), default=None)
  fits = not too_much and peak <= chip.memory
  return {
    'fits': fits,
    'topology': topology,
    'chips': mesh.size,
    'mesh': dict(mesh.shape),
    'sampling_mesh': dict(
      sharding.reshaped(mesh, **config.sampling_mesh).shape
    ),
    'model': config.model.name,
    'algorithm': config.algorithm.name,
    'trainable': f'LoRA, rank {config.model.lora.rank}'
    if config.model.lora.rank
    else 'all parameters',
    'param_dtype': str(jax.tree.leaves(kept['parameters'])[0].dtype),
    'batch': config.train.batch,
    'micro_batches': config.train.micro_batches,
    'prompt_length': config.prompt.length,
    'max_new_tokens': config.length,
    'slots': config.slots,
    'hbm_bytes': chip.memory,
    'peak_bytes': None if too_much else peak,
    'resident_bytes': {k: bytes_of(v) for k, v in kept.items() if v != {}},
    'reference_on_chip': step_lib.reads_reference(algorithm),
    'programs': rows,
    'too_much': too_much,
  }


def check(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses what the run would refuse, of what does not need its data."""
  if config.task != 'bond_jax.text_task' or origin.is_library(config.model):
    raise UserError(
      f'a plan is made for models in {origin.__name__} that are trained on'
      f' text; this config has task {config.task}, model {config.model.name}.'
    )
  settings = config.train
  sampling_mesh = sharding.reshaped(mesh, **config.sampling_mesh)
  sharding.check_batch(
    'train.batch', settings.batch, mesh, settings.micro_batches
  )
  for name, batch in (
    ('train.batch', settings.batch),
    ('train.probe_prompts', settings.probe_prompts),
  ):
    sharding.check_batch(name, batch, mesh, 1)
    sharding.check_batch(name, batch, sampling_mesh, 1)


def advice(found: dict[str, Any]) -> str:
  """What to try for a run that does not fit."""
  kept = sum(
    size
    for name, size in found['resident_bytes'].items()
    if name != 'reference' or found['reference_on_chip']
  )
  if kept > 0.9 * found['hbm_bytes']:
    return 'more chips, a larger mesh, or LoRA (model.lora.rank)'
  over = set(found['too_much']) | {
    name
    for name, row in found['programs'].items()
    if row['peak_bytes'] > found['hbm_bytes']
  }
  tips = []
  if over & {'rollout', 'probe'}:
    tips.append(
      'sampling_mesh with a larger model axis, or fewer slots'
      f' (slots={max(1, (found["slots"] or found["batch"]) // 2)})'
    )
  if over & {'weigh', 'update'}:
    tips.append(f'train.micro_batches={2 * found["micro_batches"]}')
  return ', '.join(tips) or 'more chips'


def verdict(found: dict[str, Any]) -> str:
  """Whether it fits, and if not why, and what to try."""
  gib = lambda x: f'{x / GIB:.2f} GiB'
  limit = gib(found['hbm_bytes'])
  if found['fits']:
    name, row = max(
      found['programs'].items(), key=lambda item: item[1]['peak_bytes']
    )
    return f'fits: at most {gib(row["peak_bytes"])} of {limit}, in {name}'
  reasons = [
    f'{name} needs {size} GiB' if size != 'more' else f'{name} needs more'
    for name, size in found['too_much'].items()
  ] + [
    f'{name} needs {gib(row["peak_bytes"])}'
    for name, row in found['programs'].items()
    if row['peak_bytes'] > found['hbm_bytes']
  ]
  return (
    f'does not fit: {", ".join(reasons)} of {limit} per chip; try'
    f' {advice(found)}'
  )


def tables(found: dict[str, Any]) -> None:
  """Prints what a person wants to know of a plan."""
  unit, size = ('GiB', GIB) if found['hbm_bytes'] > GIB else ('MiB', 2**20)
  gib = lambda x: f'{x / size:.2f}'
  where = lambda name: (
    'hosts, but in move_anchor and probe'
    if name == 'reference' and not found['reference_on_chip']
    else 'chips'
  )
  metrics.table(
    [
      ('kept all the time', 'GiB per chip', 'on'),
      *((k, gib(v), where(k)) for k, v in found['resident_bytes'].items()),
    ],
    f'{found["model"]}, {found["trainable"]}, {found["algorithm"]}: batch'
    f' {found["batch"]}, {found["prompt_length"]} + {found["max_new_tokens"]}'
    f' tokens, on {found["topology"]}',
  )
  head = ('GiB per chip', 'arguments', 'beside them', 'temporaries', 'peak',
          'of', 'compiled in s')  # fmt: skip
  rows = [
    (
      name,
      gib(row['argument_bytes']),
      gib(row['beside_bytes']),
      gib(row['temporary_bytes']),
      gib(row['peak_bytes']),
      gib(found['hbm_bytes']),
      row['compile_seconds'],
    )
    for name, row in found['programs'].items()
  ]
  rows += [
    (name, '', '', '', f'> {size}', gib(found['hbm_bytes']), '')
    for name, size in found['too_much'].items()
  ]
  metrics.table([head, *rows], 'memory')
  metrics.table(_sent(found), 'sent between chips, and the largest at one time')
  if seconds := _seconds(found):
    metrics.table(
      seconds,
      'least seconds of a step, from published peaks; all completions at full'
      ' length',
    )


def _sent(found) -> list[tuple]:
  head = ('GB to each chip', *hlo.KINDS, 'largest')
  rows = []
  for name, row in found['programs'].items():
    of = lambda kind, row=row: row['collectives'].get(kind, {'bytes': 0})
    largest = row['largest_collective']
    rows.append(
      (
        name,
        *(f'{of(kind)["bytes"] / 1e9:.3g}' for kind in hlo.KINDS),
        f'{largest["bytes"] / 1e9:.3g}' if largest else 'none',
      )
    )
  return [head, *rows]


def _seconds(found) -> list[tuple]:
  rows, total = [], 0.0
  for name, row in found['programs'].items():
    if parts := row.get('least_seconds'):
      bound = max(parts, key=parts.get)
      total += parts[bound]
      shown = (f'{x:.3g}' for x in (*parts.values(), parts[bound]))
      rows.append((name, *shown, bound))
  if not rows:
    return []
  head = ('', 'compute', 'memory', 'interconnect', 'at least', 'bound by')
  return [head, *rows, ('step', '', '', '', f'{total:.3g}', '')]


def search(config: ml_collections.ConfigDict, topology: str) -> dict[str, Any]:
  """The plan of the largest batch that fits, to within an eighth.

  Micro-batches keep their size: there are more of them in a larger batch.
  """
  size = config.train.batch // config.train.micro_batches
  tried = {}

  def fits(n: int) -> bool:
    if n not in tried:
      with config.unlocked():
        config.train.batch, config.train.micro_batches = n * size, n
      print(f'batch {n * size}:', flush=True)
      tried[n] = plan(config, topology)
      print(f'batch {n * size} {verdict(tried[n])}', flush=True)
    return tried[n]['fits']

  low, high = 0, config.train.micro_batches
  while high <= 4096 and fits(high):
    low, high = high, 2 * high
  while high > 1 and not low:
    if fits(high // 2):
      low = high // 2
    else:
      high //= 2
  while low and high - low > max(1, low // 8):
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return tried[low or 1]


def main(config: ml_collections.ConfigDict, out: str) -> None:
  build.configure_jax()
  with config.unlocked():
    # A schedule wants a number; no shape depends on it.
    config.train.steps = config.train.get('steps') or 1
  work = search if _SEARCH.value else plan
  found = work(config, _TOPOLOGY.value) | {'versions': build.versions()}
  os.makedirs(out, exist_ok=True)
  path = os.path.join(out, 'summary.json')
  command.write_json(path, found)
  tables(found)
  print(f'{verdict(found)}; see {path}')


if __name__ == '__main__':
  # The compiler needs none of the devices that may be here.
  jax.config.update('jax_platforms', 'cpu')
  command.run(main, __doc__, folder='out', partial=True)
