"""Autoregressive sampling: n completions of each prompt, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bond_jax.types import Array, Params, Policy, Prompts, Rollout


def sample(
  policy: Policy,
  params: Params,
  prompts: Prompts,
  key: Array,
  *,
  num: int,
  length: int,
  stop_ids: tuple[int, ...],
  first: int = 0,
) -> Rollout:
  """Draws `num` completions per prompt from the untruncated law.

  Each prompt is prefilled once and its cache shared by its completions. The
  key of completion k of prompt x at position t is `key` folded with the id of
  x, then `first + k`, then t: the draw does not depend on the batch it is
  part of, on the mesh, or on the number of hosts.

  Args:
    policy: the model; float32 logits, temperature included.
    params: its parameters.
    prompts: B left-padded prompts of length P.
    key: the key of this step; consumed.
    num: completions per prompt.
    length: T, the largest number of new tokens.
    stop_ids: tokens that end a completion, themselves part of it.
    first: the index of the first completion of each prompt.

  Returns:
    Rollout with K = num. Tokens after the end are 0, masked, of log-prob 0.
  """
  b = prompts.tokens.shape[0]
  rows = b * num
  keys = _row_keys(key, prompts.id, first + jnp.arange(num))

  def put(state, hidden, t):
    """Draws column t and writes it to the rows that have not ended."""
    token, log_prob = _draw(keys, policy.logits(params, hidden), t)
    alive = ~state['done']
    stopped = jnp.isin(token, jnp.array(stop_ids, jnp.int32))
    return dict(
      token=state['token'].at[:, t].set(jnp.where(alive, token, 0)),
      mask=state['mask'].at[:, t].set(alive),
      log_prob=state['log_prob'].at[:, t].set(jnp.where(alive, log_prob, 0.0)),
      done=state['done'] | stopped,
    )

  def more(carry):
    t, state, _ = carry
    return (t < length) & ~state['done'].all()

  def body(carry):
    t, state, cache = carry
    column = lambda x: jax.lax.dynamic_slice_in_dim(x, t - 1, 1, 1)
    # A row that has ended is fed a masked token: it has no position.
    hidden, cache = policy.hidden(
      params, column(state['token']), ~state['done'][:, None], cache
    )
    return t + 1, put(state, hidden[:, 0], t), cache

  cache = policy.init_cache(b, prompts.tokens.shape[1] + length - 1)
  hidden, cache = policy.hidden(params, prompts.tokens, prompts.mask, cache)
  cache = jax.tree.map(lambda x: jnp.repeat(x, num, 0) if x.ndim else x, cache)
  state = dict(
    token=jnp.zeros((rows, length), jnp.int32),
    mask=jnp.zeros((rows, length), bool),
    log_prob=jnp.zeros((rows, length), jnp.float32),
    done=jnp.zeros((rows,), bool),
  )
  state = put(state, jnp.repeat(hidden[:, -1], num, 0), 0)
  _, state, _ = jax.lax.while_loop(more, body, (jnp.int32(1), state, cache))
  shape = lambda x: x.reshape(b, num, length)
  return Rollout(*(shape(state[k]) for k in ('token', 'mask', 'log_prob')))


def _row_keys(key: Array, ids: Array, index: Array) -> Array:
  """The keys of all completions of all prompts, in row order: [B * num]."""
  fold = jax.random.fold_in
  keys = jax.vmap(lambda x: jax.vmap(lambda k: fold(fold(key, x), k))(index))(
    ids
  )
  return keys.reshape(-1)


def _draw(keys: Array, logits: Array, t: Array) -> tuple[Array, Array]:
  """The t-th token of each row: f32 logits [rows, V] -> token, log_prob."""
  token = jax.vmap(
    lambda k, row: jax.random.categorical(jax.random.fold_in(k, t), row)
  )(keys, logits)
  chosen = jnp.take_along_axis(logits, token[:, None], -1)[:, 0]
  return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, -1)
