"""Supervised training: a step on a batch of the data, for `loop.run`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bond_jax.devices import hosts, sharding
from bond_jax.runs import log, stopping
from bond_jax.training import micro_batches
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.types import Array, Params, TrainState


def make_update(
  loss: Callable[[Params, Any, Array], Array],
  weight: Callable[[Any], Array],
  optimizer: optax.GradientTransformation,
  parts: int,
  mesh,
  state: TrainState,
):
  """update(state, batch) -> state, metrics; jitted, the state in its shards.

  `loss(params, part, total)` is what a part of a batch adds to its mean loss,
  and `weight(batch)` the total: the gradients of the `parts` micro-batches add
  up to that of the batch exactly. A step whose loss or gradient is not finite
  moves nothing but the step, and `skipped` is 1.
  """

  def gradient_of(params, batch):
    total = weight(batch)
    one = jax.value_and_grad(loss)
    if parts == 1:
      return one(params, batch, total)

    def add(so_far, part):
      return jax.tree.map(jnp.add, so_far, one(params, part, total)), None

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zero, micro_batches.split(batch, parts))[0]

  def update(state, batch):
    value, gradient = gradient_of(state.params, batch)
    params, opt_state, row = optimizer_lib.descend(
      optimizer, state.params, state.opt_state, gradient, value
    )
    state = state._replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, row

  shards = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(
    update,
    out_shardings=(shards, sharding.replicated(mesh)),
    donate_argnums=(0,),
  )


def iterations(update, batches, mesh, writer: log.Writer):
  """What `loop.Job` repeats: one batch, one update."""

  def iterate(state):
    with writer.phase('update'):
      batch = sharding.put_batch(next(batches), mesh)
      state, row = update(state, batch)
      row = jax.device_get(row)
    stopping.hear(hosts.gather(stopping.asked()))
    yield state, row

  return iterate
