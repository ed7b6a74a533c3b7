"""log pi(y | x), per token, without ever holding a [B, T, V] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
    chunk: completion positions whose logits exist at one time.

  Returns:
    f32[B, M, T], nats; 0 where the mask is False. The sum over the last axis
    is log pi(y | x).
  """
  b, m, t = completion.shape
  p = prompts.tokens.shape[1]
  completion, mask = completion.reshape(b * m, t), mask.reshape(b * m, t)
  tokens = jnp.concatenate([jnp.repeat(prompts.tokens, m, 0), completion], 1)
  valid = jnp.concatenate([jnp.repeat(prompts.mask, m, 0), mask], 1)
  # The last token predicts nothing that is scored.
  hidden = policy.hidden(params, tokens[:, :-1], valid[:, :-1])
  hidden = hidden[:, p - 1 :]  # [B M, T, D], at the position before each token

  def score(hidden, token):
    logits = policy.logits(params, hidden)
    chosen = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)

  chunk = min(chunk, t)
  pad = -t % chunk
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  token = jnp.pad(completion, ((0, 0), (0, pad)))

  def chunks(x):  # [R, T, ...] -> [T / chunk, R, chunk, ...]
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  # Rematerialised, so that the backward pass holds one chunk's logits too.
  out = jax.lax.map(
    lambda args: jax.checkpoint(score)(*args), (chunks(hidden), chunks(token))
  )
  out = jnp.moveaxis(out, 0, 1).reshape(b * m, t + pad)[:, :t]
  return jnp.where(mask, out, 0.0).reshape(b, m, t)
