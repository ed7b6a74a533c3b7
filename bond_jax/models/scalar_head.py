"""A language model with one number at the end: of completions, or of texts.

Its parameters are a model's and, under `scalar_head`, a weight and a bias.
"""

import jax
import jax.numpy as jnp

from bond_jax.models.log_probs import join_rows
from bond_jax.types import Array, Params, Policy, Prompts


def init(policy: Policy, params: Params) -> Params:
  """Starts from the model's parameters and a head that says 0 everywhere."""
  token, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
  hidden = jax.eval_shape(policy.hidden, params, token, mask)
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
  tokens, valid = join_rows(prompts, completion, mask)
  hidden = policy.hidden(params['model'], tokens, valid)
  last = prompts.tokens.shape[1] - 1 + mask.sum(-1).reshape(-1, 1, 1)
  hidden = jnp.take_along_axis(hidden, last, 1)[:, 0].astype(jnp.float32)
  head = params['scalar_head']
  return (hidden @ head['w'] + head['b']).reshape(mask.shape[:2])


POOLS = ('last', 'mean')  # which hidden states `score` reads


def score(
  policy: Policy, params: Params, tokens: Array, mask: Array, pool: str
) -> Array:
  """The head on whole texts.

  Args:
    policy: the model.
    params: what `init` returned, trained.
    tokens: i32[R, L].
    mask: bool[R, L], False on padding, which may be anywhere.
    pool: 'last', the hidden state of the last token, or 'mean' of all: a small
      model learns more from these.

  Returns:
    f32[R].
  """
  hidden = policy.hidden(params['model'], tokens, mask)
  hidden = hidden.astype(jnp.float32)
  seen = mask
  if pool == 'last':
    place = jnp.cumsum(mask, -1)
    seen = mask & (place == place[:, -1:])
  weight = seen / seen.sum(-1, keepdims=True)
  head = params['scalar_head']
  # `where`: padding may hold anything, and 0 times that is not always 0.
  pooled = jnp.where(seen[..., None], hidden * weight[..., None], 0).sum(1)
  return pooled @ head['w'] + head['b']


def mean_score(
  policy: Policy, params: Params, tokens: Array, mask: Array, pool: str
) -> Array:
  """The mean over an ensemble; `params`: member -> its parameters."""
  scores = [score(policy, p, tokens, mask, pool) for p in params.values()]
  return sum(scores) / len(scores)
