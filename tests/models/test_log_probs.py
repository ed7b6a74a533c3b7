"""log pi(y | x): chunks, masks, gradients, and a law that sums to one."""

import dataclasses
import functools
import re

from conftest import core, random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.devices import sharding
from bond_jax.models import lora
from bond_jax.models.gemma import model as gemma
from bond_jax.models.log_probs import log_probs, tile
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


@pytest.mark.parametrize('chunk', [1, 3, 13, 42, 100])
def test_chunks_change_nothing(batch, chunk):
  """Of 6 rows x 7 positions: some rows, some positions of all, and all."""
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
    config, temperature=0.7, dtype='float32', scan=False, remat='none'
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
    config, temperature=1.0, dtype='float32', scan=False, remat='none'
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


def test_a_tile_is_what_the_chunk_allows():
  """And never the number of rows: memory is to depend on the chunk alone."""
  assert tile(6, 7, 100, 1) == (6, 7)
  assert tile(6, 7, 24, 1) == (6, 4)  # 4 and 3 positions
  assert tile(6, 7, 5, 1) == (3, 1)
  assert tile(6, 7, 1, 1) == (1, 1)
  assert tile(7, 5, 6, 1) == (1, 5)  # a prime number of rows
  assert tile(48, 7, 24, 8) == (48, 4)  # six rows on each of eight devices
  assert tile(48, 7, 1, 8) == (8, 1)
  for rows, t, chunk in ((4096, 1, 64), (16, 256, 64), (8, 512, 64)):
    assert np.prod(tile(rows, t, chunk, 1)) == 64


# Sizes that no other axis of the program has, so that a shape tells.
VOCAB, FEATURES = 1016, 48


def head(dtype, params=None):
  """A policy that is all head, Gemma 2's: its hidden states are parameters."""
  config = dataclasses.replace(
    TINY['gemma2'], vocab_size=VOCAB, used_vocab=1000, features=FEATURES
  )
  policy = gemma.make(
    config, temperature=0.7, dtype=dtype, scan=False, remat='none'
  )
  return policy._replace(hidden=lambda params, *_: params['hidden'])


def head_batch(dtype, rows=16, t=13):
  """Parameters and a batch for it, and the cotangent of its log-probs."""
  rng = np.random.default_rng(4)
  draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
  params = {
    'embedder': {'input_embedding': draw(VOCAB, FEATURES)},
    'hidden': draw(rows, t, FEATURES),
  }
  prompts = make_prompts(rng, [1] * (rows // 2), 1, 1000)
  lengths = rng.integers(1, t + 1, (rows // 2, 2))
  tokens, mask = completions(rng, lengths, t, 1000)
  return params, (prompts, tokens, mask), draw(rows // 2, 2, t)


def plain_head(policy, params, batch, weight):
  """[B, T, V] at once, in the plain way: the sum that is differentiated."""
  _, tokens, mask = batch
  logits = policy.logits(params, params['hidden'])
  log_p = jax.nn.log_softmax(logits, -1)
  index = tokens.reshape(*log_p.shape[:2], 1)
  chosen = jnp.take_along_axis(log_p, index, -1).reshape(mask.shape)
  return jnp.where(mask, chosen * weight, 0).sum()


def chunked_head(policy, params, batch, weight, chunk):
  return (log_probs(policy, params, *batch, chunk=chunk) * weight).sum()


@pytest.mark.parametrize(
  'mesh', core(1, [((4, 2),), ((1, 1),), ((8, 1),), ((1, 8),)])
)
def test_the_head_on_every_mesh(mesh):
  """Values, gradients, and what of the logits a device ever holds."""
  policy, chunk = head('float32'), 8
  params, batch, weight = head_batch(np.float32)
  plain = functools.partial(plain_head, policy)
  expected = jax.jit(jax.value_and_grad(plain))(params, batch, weight)
  mesh = sharding.make_mesh(*mesh)
  shards = sharding.tree_shardings({'embedder': params['embedder']}, mesh) | {
    'hidden': sharding.by_row(mesh)
  }
  placed = jax.device_put(params, shards)
  batch, weight = sharding.put_batch((batch, weight), mesh)
  mine = functools.partial(chunked_head, policy, chunk=chunk)
  program = (
    jax.jit(
      jax.value_and_grad(mine),
      out_shardings=(sharding.replicated(mesh), shards),
    )
    .lower(placed, batch, weight)
    .compile()
  )
  found = program(placed, batch, weight)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, found, expected)
  shapes = arrays(program.as_text())
  # Every device has its part of the table, and of the logits of as many tokens
  # as all of them may have.
  part = VOCAB // mesh.size
  if part != VOCAB:
    assert not {s for s in shapes if VOCAB in s}
  logits = {s for s in shapes if part in s and FEATURES not in s}
  tokens = {np.prod(s) // part for s in logits}
  assert tokens == {1, chunk * mesh.shape['data']}


def arrays(text):
  """The shapes of all arrays in a compiled program: those on one device."""
  found = re.findall(r'\b[a-z]+[0-9]*\[([0-9,]+)\]', text)
  return {tuple(map(int, s.split(','))) for s in found}


@pytest.mark.long
def test_rows_stay_on_their_devices_in_a_whole_model():
  """Eight do not divide the vocabulary: the embedding is split by features,
  which the hidden states must not follow."""
  mesh = sharding.make_mesh(8, 1)
  config = dataclasses.replace(
    TINY['gemma2'], vocab_size=1015, used_vocab=1000, features=FEATURES,
    layers=1, feed_forward=88,
  )  # fmt: skip
  policy = gemma.make(
    config, temperature=1.0, dtype='float32', scan=False, remat='none'
  )
  _, batch, weight = head_batch(np.float32)
  params = random_params(config, 0)
  shards = sharding.tree_shardings(params, mesh)
  batch, weight = sharding.put_batch((batch, weight), mesh)
  mine = functools.partial(chunked_head, policy, chunk=8)
  text = (
    jax.jit(jax.grad(mine), out_shardings=shards)
    .lower(jax.device_put(params, shards), batch, weight)
    .compile()
    .as_text()
  )
  inner = {s for s in arrays(text) if 88 in s and not {48, 6} & set(s)}
  rows = max(np.prod(s) // 88 for s in inner)
  assert rows == 16 // 8 * 13  # of one device, by positions


def test_the_head_in_double_precision(x64):
  """Its law alone: the softmax of Gemma's head is float32 by definition."""
  policy = oracle.table_policy(VOCAB)._replace(
    hidden=lambda params, *_: params['hidden'],
    logits=lambda params, x: (
      3 * jnp.tanh(x @ params['embedder']['input_embedding'].T)
    ),
  )
  params, batch, weight = head_batch(np.float64)
  plain = functools.partial(plain_head, policy)
  mine = functools.partial(chunked_head, policy, chunk=24)
  found, expected = (
    jax.jit(jax.value_and_grad(f))(params, batch, weight) for f in (mine, plain)
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
  jax.tree.map(close, found, expected)


@pytest.mark.long
def test_memory_depends_on_the_chunk_alone():
  """Four times the rows or positions, the same memory beside the hidden."""
  policy = head('float32')

  def temporary(rows, t, chunk):
    args = head_batch(np.float32, rows, t)
    mine = functools.partial(chunked_head, policy, chunk=chunk)
    memory = jax.jit(jax.grad(mine)).lower(*args).compile().memory_analysis()
    # Hidden states in tiles, and their gradient.
    return memory.temp_size_in_bytes - 2 * args[0]['hidden'].nbytes

  tile = 64 * VOCAB * 4
  small = temporary(16, 16, 64)
  for more in (temporary(64, 16, 64), temporary(16, 64, 64)):
    assert more - small < 0.5 * tile
  assert temporary(16, 16, 256) - small > 2 * tile


def test_a_frozen_embedding_has_no_gradient():
  """Only what is trained is differentiated, and accumulated, as in LoRA."""
  policy = head('float32')
  params, batch, weight = head_batch(np.float32)
  over = lora.over(policy, {'embedder': params['embedder']})
  tree = {'hidden': params['hidden']}
  mine = functools.partial(chunked_head, over, chunk=8)
  program = jax.jit(jax.grad(mine)).lower(tree, batch, weight)
  # The embedding's transpose product: [V, D] from [chunk, V] and [chunk, D].
  outputs = re.findall(r'dot_general.*-> tensor<(\S+?)xf32>', program.as_text())
  assert outputs and f'{VOCAB}x{FEATURES}' not in outputs


@pytest.mark.parametrize('chunk', [3, 100])
def test_over_a_frozen_head_logits_are_computed_once(batch, chunk):
  """The same numbers and gradients, for one product of the head less."""
  config = dataclasses.replace(
    TINY['gemma2'], layers=2, lora_scale=2.0, vocab_size=4000, used_vocab=3990
  )
  base = random_params(config, 0)
  policy = lora.make(
    config, temperature=0.7, dtype='float32', scan=False, remat='none',
    rank=2, alpha=4.0, targets='attn|mlp',
  )  # fmt: skip
  adapters = jax.tree.map(lambda x: x + 0.1, policy.init(jax.random.key(1)))
  weight = np.random.default_rng(2).standard_normal(batch[-1].shape)
  found = {}
  for once in False, True:

    @jax.jit
    def value_and_grad(adapters, base, once=once):
      own = lora.over(policy, base)
      assert own.frozen_head
      own = own._replace(frozen_head=once)

      def total(adapters):
        # Not linear in the log-probs, as WIND's squared risk.
        out = log_probs(own, adapters, *batch, chunk=chunk)
        return (weight * out**2).sum()

      return jax.value_and_grad(total)(adapters)

    program = value_and_grad.lower(adapters, base).compile()
    flops = program.cost_analysis()['flops']
    found[once] = jax.device_get(program(adapters, base)), flops
  (twice, more), (once, fewer) = found[False], found[True]
  largest = max(abs(x).max() for x in jax.tree.leaves(twice[1]))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6 * largest),
    twice, once,
  )  # fmt: skip
  assert all((abs(x) > 0).any() for x in jax.tree.leaves(once[1]))
  if chunk == 100:  # a product of the head, of 6 x 7 positions
    product = 2 * 42 * config.features * config.vocab_size
    assert 0.9 * product < more - fewer < 4 * product


def test_a_head_that_is_trained_is_not_frozen():
  policy = gemma.make(
    TINY['gemma3'], temperature=1.0, dtype='float32', scan=False, remat='none'
  )
  assert not policy.frozen_head
  assert not lora.over(policy, {}).frozen_head
