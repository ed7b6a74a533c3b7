"""The programs of a run, compiled for devices that need not be there."""

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
from bond_jax.training import distil, setups
from bond_jax.training import step as step_lib
from bond_jax.training.tasks import text_task
from bond_jax.types import Frozen, Params, Prompts, Rollout
from bond_jax.weights import teachers


class Program(NamedTuple):
  """A jitted function of the run, and what it is called with."""

  function: Any
  kept: tuple[Any, ...]  # its first arguments, which the run keeps; as shapes
  more: tuple[Any, ...]  # those that follow
  resident: int  # bytes of all that the run keeps on each chip by then
  loops: int  # turns of a loop that ends when all is drawn


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


def shapes(config, policy, setup: step_lib.Setup, teacher, mesh: Mesh):
  """The state and the frozen trees of a run, as shapes in their shards."""
  base: Params = {}
  if config.model.lora.rank:
    full = policies.make_policy(
      config.model, config.tokenizer.vocab_size, full=True
    )
    base = sharding.tree_structs(
      jax.eval_shape(full.init, jax.random.key(0)), mesh, config.model.dtype
    )
  start = jax.eval_shape(policy.init, jax.random.key(0))
  start = reference = sharding.tree_structs(start, mesh)
  if teacher:
    reference = jax.eval_shape(teacher.policy.init, jax.random.key(0))
    reference = sharding.tree_structs(reference, mesh, teacher.dtype)
  frozen = Frozen(reference, base)
  return distil.state_like(setup, frozen, mesh, start), frozen


def of_config(config: ml_collections.ConfigDict, mesh: Mesh):
  """The programs of a run by their names, and the trees that it keeps."""
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  # Stand-ins for the ids and the pieces: the shapes are the same.
  stop = stops.make((1,), [b''] * config.tokenizer.vocab_size, config.stop)
  teacher = teachers.find(config)
  taught_by = teacher and teacher.policy
  setup = setups.make_setup(config, policy, stop, mesh, taught_by)
  state, frozen = shapes(config, policy, setup, teacher, mesh)
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
  probe = text_task.probe_programs(config, policy, stop, mesh, taught_by)
  shown, n = config.train.probe_prompts, config.train.probe_completions

  def turns(completions):
    slots = min(config.slots, completions) or completions
    return -(-completions // slots) * t

  light = frozen
  if not step_lib.reads_reference(a):
    light = frozen._replace(reference={})
  size, light_size = bytes_of((state, frozen)), bytes_of((state, light))
  drawn = turns(max(a.num_policy, a.num_anchor) * b)
  folds = -(-setup.micro_batches // setup.buckets)  # see micro_batches.fold
  judged = prompts(b), rollouts(b, k), row(jnp.float32, b, k)
  probed = prompts(shown), rollouts(shown, n)
  of_step = lambda f, *more: (f, (state, light), more, light_size)
  found = {
    'rollout': Program(*of_step(of_run.rollout, prompts(b), key, index), drawn),
    'weigh': Program(*of_step(of_run.weigh, *judged), folds),
    'update': Program(*of_step(of_run.update, batch), folds),
    'move_anchor': Program(of_run.move_anchor, (state, frozen), (), size, 1),
    'probe/draw': Program(
      probe.draw, (state.params, frozen.base), (prompts(shown), key),
      light_size, turns(shown * n),
    ),
    'probe/score': Program(probe.score, (frozen,), probed, size, 1),
  }  # fmt: skip
  if teacher:  # before there is a state
    found['probe/draw_teacher'] = Program(
      probe.draw_teacher, (frozen.reference,), (prompts(shown), key),
      bytes_of((frozen, state.params)), turns(shown * n),
    )  # fmt: skip
  return found, resident(state, frozen)


def compile_program(program: Program) -> dict[str, Any] | float:
  """What the compiler says of a program, per chip, in bytes and seconds.

  If it is too much for a chip by itself, the bytes that it needs at least, 0
  where the compiler does not say.
  """
  start = time.monotonic()
  args = program.kept + program.more
  try:
    compiled = program.function.lower(*args).compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    needed = re.search(r'HLO temporaries \(([\d.]+)G\)', str(e))
    return float(needed[1]) * 2**30 if needed else 0.0
  memory = compiled.memory_analysis()
  used = compiled._executable._kept_var_idx  # of the arguments; not public
  leaves = jax.tree.leaves(program.kept)
  passed = bytes_of([x for i, x in enumerate(leaves) if i in used])
  # Less than nothing would be the rounding of tiny arrays.
  beside = max(0, program.resident - passed)
  sent = hlo.collectives(compiled.as_text(), program.loops)
  largest = max(sent, key=lambda c: c.bytes, default=None)
  return {
    'peak_bytes': memory.peak_memory_in_bytes + beside,
    'argument_bytes': memory.argument_size_in_bytes,
    'beside_bytes': beside,
    'temporary_bytes': memory.peak_memory_in_bytes
    - memory.argument_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
    'compile_seconds': round(time.monotonic() - start, 1),
    'collectives': {
      kind: {'times': times, 'bytes': size}
      for kind, (times, size) in hlo.totals(sent).items()
    },
    'largest_collective': largest and largest._asdict(),
  }
