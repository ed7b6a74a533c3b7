"""A language model with one number at the end, of a prompt and a completion.

Its parameters are a model's and, under `scalar_head`, a weight and a bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bond_jax.types import Array, Params, Policy, Prompts


def init(policy: Policy, params: Params) -> Params:
  """Starts from the model's parameters and a head that says 0 everywhere."""
  token, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
  hidden, _ = jax.eval_shape(policy.hidden, params, token, mask, None)
  head = {'w': jnp.zeros(hidden.shape[-1]), 'b': jnp.zeros(())}
  return {'model': jax.tree.map(jnp.copy, params), 'scalar_head': head}


def logits(
  policy: Policy,
  params: Params,
  prompts: Prompts,
  completion: Array,
  mask: Array,
) -> Array:
  """The head at the last token of each completion.

  Args:
    policy: the model.
    params: what `init` returned, trained.
    prompts: B left-padded prompts of length P.
    completion: i32[B, M, T].
    mask: bool[B, M, T], True up to and including EOS, at least once.

  Returns:
    f32[B, M].
  """
  b, m, t = completion.shape
  tokens = jnp.concatenate(
    [jnp.repeat(prompts.tokens, m, 0), completion.reshape(b * m, t)], 1
  )
  valid = jnp.concatenate(
    [jnp.repeat(prompts.mask, m, 0), mask.reshape(b * m, t)], 1
  )
  hidden, _ = policy.hidden(params['model'], tokens, valid, None)
  last = prompts.tokens.shape[1] - 1 + mask.sum(-1).reshape(-1, 1, 1)
  hidden = jnp.take_along_axis(hidden, last, 1)[:, 0].astype(jnp.float32)
  head = params['scalar_head']
  return (hidden @ head['w'] + head['b']).reshape(b, m)
