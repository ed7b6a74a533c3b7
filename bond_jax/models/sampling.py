"""Autoregressive sampling: n completions of each prompt, on the device.

Each prompt is read once. Its completions share what the model remembers of it,
where all are decoded side by side; where there are fewer slots than
completions, a slot whose completion has ended takes the next one from the
queue, and its prompt with it, at once.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models.stops import Stop
from bond_jax.types import Array, Decoder, Params, Policy, Prompts, Rollout


class Limits(NamedTuple):
  """What ends a completion, and where completions are drawn."""

  length: int  # T, the largest number of new tokens
  stop: Stop  # what else ends a completion, itself part of it
  slots: int = 0  # completions decoded side by side; 0 = all of them
  # Where it splits prompts, each part has slots and a queue of its own, and all
  # parameters: nothing crosses the axis `data` after they are there.
  mesh: Mesh | None = None


class State(NamedTuple):
  """What the loop carries; S slots, at most N steps."""

  cache: Any
  pool: Any  # (first, hidden, prefix) of the prompts read last; see `_refill`
  queued: Array  # i32[], completions begun so far
  row: Array  # i32[S], the completion of each slot
  drawn: Array  # i32[S], its tokens so far
  busy: Array  # bool[S]
  fresh: Array  # bool[S], nothing drawn yet: its prompt's hidden state is next
  hidden: Array  # [S, D], that state
  found: Array | None  # u8[S], of `Stop.table` after the text; None without
  token: Array  # i32[S], the last token drawn
  steps: Array  # i32[]
  log: tuple[Array, ...]  # [N, S]: place in the rollout, token, log-prob


def sample(
  policy: Policy,
  params: Params,
  prompts: Prompts,
  key: Array,
  limits: Limits,
  *,
  num: int,
  first: int = 0,
) -> Rollout:
  """Draws `num` completions per prompt from the untruncated law.

  The key of completion k of prompt x at position t is `key` folded with the id
  of x, then `first + k`, then t: the draw does not depend on the batch it is
  part of, on the slots, on the mesh, or on the number of hosts.

  Args:
    policy: the model; float32 logits, temperature included.
    params: its parameters.
    prompts: B left-padded prompts of length P.
    key: the key of this step; consumed.
    limits: see `Limits`.
    num: completions per prompt.
    first: the index of the first completion of each prompt.

  Returns:
    Rollout with K = num. Tokens after the end are 0, masked, of log-prob 0.

  Raises:
    UserError: for what cannot be drawn; see `check`.
  """
  mesh = limits.mesh
  parts = mesh.shape['data'] if mesh else 1
  check(policy, limits, parts)
  of_part = limits._replace(slots=limits.slots // parts)

  def draw(params, prompts, key):
    decoder = policy.decoder(params)
    return _sample(decoder, prompts, key, of_part, num=num, first=first)

  if parts > 1:
    by_row = PartitionSpec('data')
    draw = jax.shard_map(
      draw,
      mesh=mesh,
      in_specs=(PartitionSpec(), by_row, PartitionSpec()),
      out_specs=by_row,
      axis_names={'data'},
      check_vma=False,
    )
  params = policy.prepare(params)
  if mesh:
    params = sharding.for_sampler(params, mesh)
    prompts = jax.lax.with_sharding_constraint(prompts, sharding.by_row(mesh))
  return draw(params, prompts, key)


def check(policy: Policy, limits: Limits, parts: int) -> None:
  """Refuses what cannot be drawn, in one line."""
  length, stop, slots, _ = limits
  if length < 1:
    raise UserError(f'length, the new tokens at most, must be 1 or more, got'
                    f' {length}.')  # fmt: skip
  unknown = [i for i in stop.ids if not 0 <= i < policy.vocab_size]
  if unknown:
    raise UserError(
      f'stop ids {unknown} are not in the vocabulary of {policy.vocab_size}'
      ' tokens: no completion would end with them; give ids of this model.'
    )
  if slots < 0 or slots % parts:
    raise UserError(
      f'slots ({slots}) must be 0, for all completions at once, or a multiple'
      f" of the {parts} parts of mesh axis 'data'."
    )


def _sample(
  decoder: Decoder,
  prompts: Prompts,
  key: Array,
  limits: Limits,
  *,
  num: int,
  first: int,
) -> Rollout:
  """See `sample`; on the prompts of one part of the mesh."""
  length, stop, slots, _ = limits
  b = prompts.tokens.shape[0]
  rows = b * num
  slots = min(slots, rows) or rows
  if slots < rows and decoder.refill is None:
    raise UserError(
      f'this model draws all completions at once, got {slots} slots for {rows};'
      ' slots=0 does that.'
    )
  uniforms = _uniforms(key, prompts.id, first + jnp.arange(num), length)
  stops = jnp.array(stop.ids, jnp.int32)
  table = None if stop.table is None else jnp.asarray(stop.table)

  def draw(state: State, hidden: Array) -> State:
    """Draws the next token of every busy slot."""
    own = uniforms[state.row, state.drawn]
    token, log_prob = draw_token(own, decoder.logits(hidden))
    drawn = state.drawn + state.busy
    place = state.row * length + state.drawn
    place = jnp.where(state.busy, place, rows * length)
    ended = jnp.isin(token, stops) | (drawn == length)
    found = state.found
    if table is not None:
      found = table[jnp.where(state.fresh, 0, found), token]
      ended |= found == len(table) - 1
    put = lambda log, new: jax.lax.dynamic_update_index_in_dim(
      log, new, state.steps, 0
    )
    return state._replace(
      drawn=drawn,
      busy=state.busy & ~ended,
      fresh=jnp.zeros_like(state.fresh),
      found=found,
      token=token,
      steps=state.steps + 1,
      log=jax.tree.map(put, state.log, (place, token, log_prob)),
    )

  def body(state: State) -> State:
    hidden, cache = decoder.step(
      state.token, state.busy & ~state.fresh, state.cache
    )
    state = state._replace(cache=cache)
    if slots == rows:
      return draw(state, hidden)
    hidden = jnp.where(state.fresh[:, None], state.hidden, hidden)
    return _refill(decoder, prompts, num, draw(state, hidden))

  state = _begin(decoder, prompts, num, length, slots)
  if table is not None:
    state = state._replace(found=jnp.zeros(slots, table.dtype))
  if slots == rows:  # else the loop's first step does it, among many
    state = draw(state, state.hidden)
  state = jax.lax.while_loop(lambda state: state.busy.any(), body, state)
  return _gather(state, (b, num, length), slots)


def _begin(
  decoder: Decoder, prompts: Prompts, num: int, length: int, slots: int
) -> State:
  """The first completions in their slots, nothing of them drawn yet."""
  b = prompts.tokens.shape[0]
  rows = b * num
  at_once = -(-slots // num)  # prompts
  hidden, prefix = decoder.prefill(
    prompts.tokens[:at_once], prompts.mask[:at_once]
  )
  width, pool, of_slot = num, None, jnp.arange(slots) // num
  if slots < rows:  # a slot's next prompt is its own
    width, pool = 1, (jnp.int32(0), hidden, prefix)
    prefix = jax.tree.map(lambda x: x[of_slot], prefix)
  steps = -(-rows // slots) * length
  log = lambda dtype: jnp.zeros((steps, slots), dtype)
  return State(
    cache=decoder.start(prefix, width, max(1, length - 1)),
    pool=pool,
    queued=jnp.int32(slots),
    row=jnp.arange(slots),
    drawn=jnp.zeros(slots, jnp.int32),
    busy=jnp.ones(slots, bool),
    fresh=jnp.ones(slots, bool),
    hidden=hidden[of_slot],
    found=None,
    token=jnp.zeros(slots, jnp.int32),
    steps=jnp.int32(0),
    log=(log(jnp.int32) + rows * length, log(jnp.int32), log(jnp.float32)),
  )


def _refill(
  decoder: Decoder, prompts: Prompts, num: int, state: State
) -> State:
  """Puts the next completions of the queue into the slots that are idle.

  The pool holds the prompts that the queue is at, as many as were read in one
  go at the start, and is read anew when the queue is past it.
  """
  b = prompts.tokens.shape[0]
  rows = b * num

  def read(pool, prompt):
    """The pool that begins at a prompt, or near the end, with the last ones."""
    n = len(pool[1])
    first = jnp.minimum(prompt, b - n)
    some = (
      jax.lax.dynamic_slice_in_dim(x, first, n)
      for x in (prompts.tokens, prompts.mask)
    )
    return (first, *decoder.prefill(*some))

  def one(state: State) -> State:
    slot = jnp.argmin(state.busy)
    prompt = state.queued // num
    pool = jax.lax.cond(
      prompt >= state.pool[0] + len(state.pool[1]),
      lambda pool: read(pool, prompt), lambda pool: pool, state.pool,
    )  # fmt: skip
    begun, hidden, prefix = pool
    i = prompt - begun
    return state._replace(
      cache=decoder.refill(state.cache, slot, prefix, i),
      pool=pool,
      queued=state.queued + 1,
      row=state.row.at[slot].set(state.queued),
      drawn=state.drawn.at[slot].set(0),
      busy=state.busy.at[slot].set(True),
      fresh=state.fresh.at[slot].set(True),
      hidden=state.hidden.at[slot].set(hidden[i]),
    )

  return jax.lax.while_loop(
    lambda state: ~state.busy.all() & (state.queued < rows), one, state
  )


def _gather(state: State, shape: tuple[int, int, int], slots: int) -> Rollout:
  """The rollout of what the slots drew, wherever they drew it."""
  b, num, length = shape
  place, *values = (x.reshape(-1) for x in state.log)

  def whole(value):
    empty = jnp.zeros(b * num * length, value.dtype)
    return empty.at[place].set(value, mode='drop').reshape(shape)

  token, log_prob = map(whole, values)
  spent = state.steps * slots / (b * num)
  return Rollout(
    completion=token,
    mask=whole(place < b * num * length),
    log_prob=log_prob,
    slot_steps=jnp.full((b, num), spent, jnp.float32),
  )


def _uniforms(key: Array, ids: Array, index: Array, length: int) -> Array:
  """Two numbers in [0, 1) for every token of every completion: [R, T, 2].

  R = len(ids) * len(index), the completions of a prompt together.
  """
  fold = jax.random.fold_in

  def of_token(prompt, k, t):
    return jax.random.uniform(fold(fold(fold(key, prompt), k), t), (2,))

  of_row = jax.vmap(of_token, (None, None, 0))
  of_prompt = jax.vmap(of_row, (None, 0, None))
  of_all = jax.vmap(of_prompt, (0, None, None))
  return of_all(ids, index, jnp.arange(length)).reshape(-1, length, 2)


def draw_token(uniform: Array, logits: Array) -> tuple[Array, Array]:
  """Draws from softmax(logits): uniform [R, 2], f32[R, V] -> token, log_prob.

  By inversion, first of a block of about sqrt(V) tokens and then within it, by
  a second number: float32 resolves the tail of a large vocabulary so, and there
  is no random number to make for each of its tokens.
  """
  r, v = logits.shape
  parts, blocks, size = _blocks(v)
  top = logits.max(-1, keepdims=True)
  p = jnp.exp(logits - top)
  p = p.reshape(r, parts, -1)
  pad = blocks * size - p.shape[-1]
  p = jnp.pad(p, ((0, 0), (0, 0), (0, pad))).reshape(r, -1, size)
  block, total = _invert(uniform[:, 0], p.sum(-1))
  inside = jnp.take_along_axis(p, block[:, None, None], 1)[:, 0]
  token, _ = _invert(uniform[:, 1], inside)
  token += block * size - block // blocks * pad
  chosen = jnp.take_along_axis(logits, token[:, None], -1)[:, 0]
  return token, chosen - top[:, 0] - jnp.log(total)


def _blocks(v: int) -> tuple[int, int, int]:
  """v tokens as equal parts, blocks of each part, and tokens of each block.

  About sqrt(v) blocks in all, the last of a part padded. A mesh that splits the
  vocabulary splits it between parts, so that no token has to move.
  """
  parts = math.gcd(v, 16)
  size = min(v // parts, 2 ** round(math.log2(v) / 2))
  return parts, -(-(v // parts) // size), size


def _invert(u: Array, p: Array) -> tuple[Array, Array]:
  """The index that u in [0, 1) falls on among p [R, N] >= 0, and their sum.

  Never one of mass 0, whatever the rounding.
  """
  n = p.shape[-1]
  # A product with a triangle: one operation where a scan would be many.
  upto = jnp.tril(jnp.ones((n, n), p.dtype))
  upto = jnp.einsum('RN,MN->RM', p, upto, precision=jax.lax.Precision.HIGHEST)
  upto = jnp.where(p > 0, upto, -1.0)
  total = upto.max(-1)
  return (upto > (u * total)[:, None]).argmax(-1).astype(jnp.int32), total
