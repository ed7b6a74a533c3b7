"""The programs of a run, compiled for devices that need not be there."""

from __future__ import annotations

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from bond_jax.devices import sharding
from bond_jax.models import policies, stops
from bond_jax.sizing import hlo
from bond_jax.training import costs, distil, setups, text_task
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Params, Prompts, Rollout


class Program(NamedTuple):
  """A jitted function of the run, and what it is called with."""

  function: Any
  args: tuple[Any, ...]  # shapes, with their shardings
  kept: int  # how many of their leaves the run keeps, the first ones
  there: int  # bytes of all that the run keeps on each chip by then
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
    full = policies.make_policy(
      config.model, config.tokenizer.vocab_size, full=True
    )
    base = sharding.tree_structs(
      jax.eval_shape(full.init, jax.random.key(0)), mesh, config.model.dtype
    )
  reference = jax.eval_shape(policy.init, jax.random.key(0))
  frozen = Frozen(sharding.tree_structs(reference, mesh), base)
  return distil.state_like(setup, frozen, mesh), frozen


def of_config(config: ml_collections.ConfigDict, mesh: Mesh):
  """The programs of a run on a mesh by their names, and what it keeps."""
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  # Stand-ins for the ids and the pieces: the shapes are the same.
  stop = stops.make((1,), [b''] * config.tokenizer.vocab_size, config.stop)
  setup = setups.make_setup(config, policy, stop, mesh)
  state, frozen = shapes(config, policy, setup, mesh)
  of_run = distil.make_programs(setup, mesh, state)
  rows = sharding.by_row(mesh)
  whole = sharding.replicated(mesh)

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

  def rollouts(b, k):
    return Rollout(
      row(jnp.int32, b, k, t),
      row(bool, b, k, t),
      row(jnp.float32, b, k, t),
      row(jnp.float32, b, k),
    )

  key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=whole)
  index = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  batch, _ = jax.eval_shape(
    lambda *x: step_lib.weigh(setup, *x),
    state, frozen, prompts(b), rollouts(b, k), row(jnp.float32, b, k),
  )  # fmt: skip
  batch = jax.tree.map(lambda x: row(x.dtype, *x.shape), batch)
  probe = text_task.probe_programs(config, policy, stop, mesh)
  shown, n = config.train.probe_prompts, config.train.probe_completions
  calls = {
    'rollout': (of_run.rollout, prompts(b), key, index),
    'weigh': (of_run.weigh, prompts(b), rollouts(b, k), row(jnp.float32, b, k)),
    'update': (of_run.update, batch),
    'move_anchor': (of_run.move_anchor,),
    'probe/draw': (probe.draw, prompts(shown), key),
    'probe/score': (probe.score, prompts(shown), rollouts(shown, n)),
  }
  kept = resident(state, frozen)
  light = frozen
  if not step_lib.reads_reference(a):
    light = frozen._replace(reference={})
  trees = {
    'move_anchor': (state, frozen),
    'probe/draw': (state.params, frozen.base),
    'probe/score': (frozen,),
  }
  found = {}
  for name, (function, *more) in calls.items():
    first = trees.get(name, (state, light))
    # What is no argument of a program is there all the same.
    there = frozen if name in ('move_anchor', 'probe/score') else light
    completions = max(a.num_policy, a.num_anchor) * b
    if name == 'probe/draw':
      completions = shown * n
    slots = min(config.slots, completions) or completions
    loops = -(-completions // slots) * t
    if name in ('weigh', 'update'):  # of each length, see micro_batches.fold
      loops = -(-setup.micro_batches // setup.buckets)
    found[name] = Program(
      function,
      (*first, *more),
      len(jax.tree.leaves(first)),
      bytes_of((state, there)),
      loops,
    )
  return found, kept


def compile_program(program: Program) -> Compiled | float:
  """Compiles a program for its mesh.

  If it is too much for a chip by itself, returns the bytes that it needs at
  least, 0 where the compiler does not say.
  """
  start = time.monotonic()
  try:
    compiled = program.function.lower(*program.args).compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    needed = re.search(r'HLO temporaries \(([\d.]+)G\)', str(e))
    return float(needed[1]) * 2**30 if needed else 0.0
  memory = compiled.memory_analysis()
  collectives = hlo.collectives(compiled.as_text(), program.loops)
  arguments = memory.argument_size_in_bytes
  # Less than nothing would be the rounding of tiny arrays.
  beside = max(0, program.there - _kept_bytes(compiled, program))
  return Compiled(
    peak=memory.peak_memory_in_bytes + beside,
    arguments=arguments,
    beside=beside,
    temporaries=memory.peak_memory_in_bytes - arguments,
    code=memory.generated_code_size_in_bytes,
    collectives=collectives,
    seconds=time.monotonic() - start,
  )


def _kept_bytes(compiled, program: Program) -> int:
  """Bytes of the arguments that the run keeps; jit drops what is not used."""
  used = compiled._executable._kept_var_idx  # no public name says it
  leaves = jax.tree.leaves(program.args)[: program.kept]
  return bytes_of([x for i, x in enumerate(leaves) if i in used])


def least_seconds(name, compiled, config, algorithm, kept, mesh, chip):
  """Of computing, reading memory and sending: the phases of a step alone."""
  sizes = policies.make_sizes(config.model, config.tokenizer.vocab_size)
  phases = costs.phases(
    algorithm, sizes, prompt=config.prompt.length, length=config.length,
    epochs=config.train.epochs, remat=config.model.remat,
  )  # fmt: skip
  batch, n = config.train.batch, mesh.size
  itemsize = jnp.dtype(config.model.dtype).itemsize
  weights = costs.work(sizes).weights * itemsize
  sent = sum(size for _, size in hlo.totals(compiled.collectives).values())
  part = phases.get(name, costs.Phase(0.0, 0.0, 0.0))
  if name == 'rollout':
    over = sharding.reshaped(mesh, **config.sampling_mesh).shape['model']
    read = part.passes * weights / over
  else:
    read = part.passes * weights * config.train.micro_batches
    read /= mesh.shape['model']
  # What is read and written anew.
  if name == 'update':
    read += 2 * bytes_of((kept['parameters'], kept['optimizer']))
  if name == 'move_anchor':
    read += bytes_of((kept['parameters'], kept['reference']))
    read += 2 * bytes_of(kept['anchor'])
  read += part.cached * itemsize * batch / n
  return {
    'compute': part.flops * batch / n / chip.flops,
    'memory': read / chip.bandwidth,
    'interconnect': sent / chip.interconnect,
  }
