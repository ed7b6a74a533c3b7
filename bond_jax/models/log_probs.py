"""log pi(y | x), per token, without ever holding a [B, T, V] array."""

import functools

import jax
import jax.numpy as jnp

from bond_jax.devices import sharding
from bond_jax.types import Array, Params, Policy, Prompts


def log_probs(
  policy: Policy,
  params: Params,
  prompts: Prompts,
  completion: Array,
  mask: Array,
  *,
  chunk: int,
) -> Array:
  """Scores completions under the very law that `sampling.sample` draws from.

  Args:
    policy: the model; its `logits` are float32 and hold the temperature.
    params: its parameters.
    prompts: B left-padded prompts of length P.
    completion: i32[B, M, T].
    mask: bool[B, M, T], True up to and including EOS.
    chunk: tokens whose logits exist at one time, on each device that holds
      rows of its own; a device of the `model` axis holds its part of them.

  Returns:
    f32[B, M, T], nats; 0 where the mask is False. The sum over the last axis
    is log pi(y | x).
  """
  b, m, t = completion.shape
  p = prompts.tokens.shape[1]
  tokens, valid = join_rows(prompts, completion, mask)
  completion, mask = tokens[:, p:], valid[:, p:]
  n = tokens_read(p, t)
  hidden = policy.hidden(params, tokens[:, :n], valid[:, :n])
  # [B M, T, D], at the position before each token.
  hidden = hidden[:, p - 1 : p + t - 1]

  def score(hidden, token):
    logits = policy.logits(params, sharding.whole(hidden))
    logits = sharding.split_last(logits)
    chosen = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)

  # So that the backward pass, too, holds the logits of one tile at most.
  score = _with_slope(score) if policy.frozen_head else jax.checkpoint(score)

  rows, positions = tile(b * m, t, chunk, sharding.data_size(tokens))
  into = functools.partial(_tiles, rows=rows, positions=positions)
  out = jax.lax.map(lambda x: score(*x), (into(hidden), into(completion)))
  # [T', R', R / R', T / T'] -> [R, T]
  out = out.reshape(-1, b * m // rows, rows, positions)
  out = out.transpose(2, 1, 0, 3).reshape(b * m, -1)[:, :t]
  return jnp.where(mask, out, 0.0).reshape(b, m, t)


def _with_slope(score):
  """The same function, whose slope by `hidden` is taken in the forward pass.

  Each number depends on its own row of `hidden`, [..., D], which so keeps one
  vector in the place of its logits: these are computed once, not twice, and
  once more in the product that gives the slope.
  """

  @jax.custom_vjp
  def same(hidden, token):
    return score(hidden, token)

  def forward(hidden, token):
    value, pull = jax.vjp(lambda x: score(x, token), hidden)
    return value, pull(jnp.ones_like(value))[0]

  def backward(slope, ct):
    return (ct[..., None] * slope).astype(slope.dtype), None

  same.defvjp(forward, backward)
  return same


def join_rows(
  prompts: Prompts, completion: Array, mask: Array
) -> tuple[Array, Array]:
  """Each completion [B, M, T] after its prompt: tokens, mask [B M, P + T]."""
  b, m, t = completion.shape
  completion, mask = completion.reshape(b * m, t), mask.reshape(b * m, t)
  tokens = jnp.concatenate([jnp.repeat(prompts.tokens, m, 0), completion], 1)
  return tokens, jnp.concatenate([jnp.repeat(prompts.mask, m, 0), mask], 1)


def tokens_read(prompt: int, length: int) -> int:
  """How many tokens of a row the model reads.

  The last one predicts nothing that is scored. It is read all the same where
  the row is a multiple of 128 with it: TPUs hold arrays in tiles of that, and a
  program for one token less took twice as long to compile.
  """
  return prompt + length - bool((prompt + length) % 128)


def tile(rows: int, positions: int, chunk: int, devices: int) -> tuple:
  """The rows and positions whose logits exist at one time.

  Args:
    rows: R, of which each device holds the same number.
    positions: T.
    chunk: at most so many tokens on a device, where that is possible.
    devices: over which the rows are split.

  Returns:
    Rows, which divide R, the same number on each device; and positions, about
    as many in the last tile as in the others.
  """
  each = rows // devices
  some = max(n for n in range(1, each + 1) if each % n == 0 and n <= chunk)
  times = -(-positions // max(1, min(positions, chunk // some)))
  return some * devices, -(-positions // times)


def _tiles(x: Array, rows: int, positions: int) -> Array:
  """[R, T, ...] -> [tiles, rows, positions, ...], the last padded with zeros.

  Neighbouring rows go to different tiles, so that each tile is spread over the
  devices as the rows are, and none has to move.
  """
  pad = -x.shape[1] % positions
  x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
  x = x.reshape(rows, len(x) // rows, -1, positions, *x.shape[2:])
  x = x.transpose(2, 1, 0, *range(3, x.ndim))
  return x.reshape(-1, *x.shape[2:])
