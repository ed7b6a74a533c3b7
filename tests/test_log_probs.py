"""log pi(y | x): chunks, masks, gradients, and a law that sums to one."""

import dataclasses
import functools

from conftest import random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.log_probs import log_probs
from bond_jax.models import gemma
from bond_jax.types import Prompts


def make_prompts(rng, lengths, width, vocab):
  """Left-padded prompts, with garbage under the padding."""
  mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
  tokens = rng.integers(0, vocab, mask.shape)
  b = len(lengths)
  return Prompts(tokens, mask, np.arange(b), np.ones(b, np.float32))


def completions(rng, lengths, width, vocab):
  """[B, M, T] tokens, garbage after the end, and their mask."""
  mask = np.arange(width)[None, None] < np.array(lengths)[..., None]
  return rng.integers(0, vocab, mask.shape), mask


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  prompts = make_prompts(rng, [1, 3], 4, 5)
  return prompts, *completions(rng, [[7, 2, 1], [5, 7, 3]], 7, 5)


def plain(params, prompts, completion, mask):
  """The table's law, token by token, in loops."""
  out = np.zeros(mask.shape)
  for b, m in np.ndindex(mask.shape[:2]):
    tokens = list(prompts.tokens[b][prompts.mask[b]])
    for t in range(mask[b, m].sum()):
      logits = params[len(tokens) - 1, tokens[-1]]
      tokens.append(completion[b, m, t])
      out[b, m, t] = logits[tokens[-1]] - np.log(np.exp(logits).sum())
  return out


@pytest.mark.parametrize('chunk', [1, 3, 7, 100])
def test_chunks_change_nothing(batch, chunk):
  """7 positions: chunks that divide them, do not, and exceed them."""
  table = np.random.default_rng(1).standard_normal((12, 5, 5))
  policy = oracle.table_policy(5)
  out = jax.jit(functools.partial(log_probs, policy, chunk=chunk))(
    table.astype(np.float32), *batch
  )
  np.testing.assert_allclose(out, plain(table, *batch), atol=1e-5)
  assert (np.asarray(out)[~batch[2]] == 0).all()


def test_gradients_are_those_of_the_whole_softmax(batch):
  """And garbage after the end of a completion has no part in them."""
  config = dataclasses.replace(TINY['gemma2'], layers=1)
  params = random_params(config, 0)
  policy = gemma.make(
    config, temperature=0.7, dtype='float32', scan=False, remat=False
  )
  prompts, completion, mask = batch
  weight = np.random.default_rng(2).standard_normal(mask.shape)

  def whole(params, prompts, completion, mask):
    b, m, t = mask.shape
    repeat = lambda x: jnp.repeat(x, m, 0)
    rows = lambda x, y: jnp.concatenate([repeat(x), y.reshape(b * m, t)], 1)
    hidden = policy.hidden(
      params,
      rows(prompts.tokens, completion),
      rows(prompts.mask, mask),
    )
    log_p = jax.nn.log_softmax(policy.logits(params, hidden[:, -t - 1 : -1]))
    chosen = jax.nn.one_hot(completion.reshape(b * m, t), log_p.shape[-1])
    return (log_p * chosen).sum(-1).reshape(b, m, t) * mask

  @jax.jit
  def gradients(params, completion):
    args = prompts, completion, mask
    chunked = functools.partial(log_probs, policy, chunk=3)
    return [
      jax.value_and_grad(lambda p, f=f: (f(p, *args) * weight).sum())(params)
      for f in (chunked, whole)
    ]

  mine, expected = gradients(params, completion)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, mine, expected)
  other, _ = gradients(params, np.where(mask, completion, 4))
  jax.tree.map(np.testing.assert_array_equal, mine, other)


def test_probabilities_of_all_completions_sum_to_one():
  """Every sequence of at most three tokens over three, EOS = 1."""
  config = dataclasses.replace(TINY['gemma2'], used_vocab=3)
  policy = gemma.make(
    config, temperature=1.0, dtype='float32', scan=False, remat=False
  )
  tokens, mask = oracle.sequences(3, 3, 1)
  prompts = make_prompts(np.random.default_rng(0), [2, 3], 3, 3)
  tile = lambda x: np.tile(x[None], (2, 1, 1))
  out = jax.jit(functools.partial(log_probs, policy, chunk=2))(
    random_params(config, 3), prompts, tile(tokens), tile(mask)
  )
  mass = np.exp(np.asarray(out, np.float64).sum(-1))
  np.testing.assert_allclose(mass.sum(-1), 1, rtol=1e-5)
  assert abs(mass[0] - mass[1]).max() > 0.01  # two prompts, two laws
