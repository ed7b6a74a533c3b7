"""The model against a plain numpy one, and its masks by exact gradients."""

import dataclasses
import functools

from conftest import core, random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from bond_jax.models.gemma import model as gemma

SIZE = 7  # tokens of a row, padding apart


def make(config, **kwargs):
  defaults = dict(temperature=1.0, dtype='float32', scan=True, remat='none')
  return gemma.make(config, **{**defaults, **kwargs})


def content(config, rows=1, size=SIZE):
  high = config.used_vocab or config.vocab_size
  return np.random.default_rng(5).integers(0, high, (rows, size))


def layouts(row, width):
  """One row of tokens, padded right, left, and in the middle, with garbage."""
  mask = np.zeros((3, width), bool)
  mask[0, : len(row)] = mask[1, width - len(row) :] = True
  mask[2, [0, 1, 3, 4, 7, 8, 9][: len(row)]] = True
  tokens = np.full((3, width), 3)
  for i in range(3):
    tokens[i, mask[i]] = row
  return tokens, mask


def logits_of(config, params, tokens, mask, **kwargs):
  policy = make(config, **kwargs)
  hidden = policy.hidden(params, tokens, mask)
  return policy.logits(params, hidden)


def check_against_the_plain_model(config, params):
  """Padded right, left and in the middle; scanned and unrolled."""
  (row,) = content(config)
  tokens, mask = layouts(row, 10)
  forward = jax.jit(
    lambda params: [
      logits_of(config, params, tokens, mask, scan=scan)
      for scan in (True, False)
    ]
  )
  expected = oracle.gemma_logits(config, params, row)
  for out in map(np.asarray, forward(params)):
    assert out.dtype == np.float32 and np.isfinite(out).all()
    for mine, m in zip(out, mask, strict=True):
      used = mine[m][:, : config.used_vocab]
      np.testing.assert_allclose(used, expected, rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(mine[m], out[0, :SIZE], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', TINY)
def test_logits_are_those_of_the_plain_model(tiny, name):
  check_against_the_plain_model(*tiny(name))


def test_fewer_layers_than_the_pattern_has():
  config = dataclasses.replace(TINY['gemma3'], layers=2)
  check_against_the_plain_model(config, random_params(config, 0))


@pytest.mark.parametrize('name', core(1, ['gemma2', 'gemma3']))
def test_decoding_by_token_is_the_full_forward_pass(tiny, name):
  """Prefill of mixed prompt lengths, then one token at a time; some rows end.

  The cached path runs layer by layer, the other scans over patterns.
  """
  config, params = tiny(name)
  policy = make(config)
  prompt, new = 4, 5
  tokens = content(config, rows=3, size=prompt + new)
  mask = np.ones_like(tokens, bool)
  mask[0, :3] = mask[1, :1] = False  # prompts of 1, 3 and 4 tokens
  mask[1, -2:] = False  # a row that has ended

  @jax.jit
  def both(params):
    whole = policy.logits(params, policy.hidden(params, tokens, mask))
    one_by_one = oracle.forced(policy, params, tokens, mask, prompt)
    return whole[:, prompt - 1 :], one_by_one

  seen = mask[:, prompt - 1 :]
  whole, decoded = both(params)
  np.testing.assert_allclose(decoded[seen], whole[seen], rtol=1e-4, atol=1e-5)


def influence(config, params, mask):
  """[S, S]: how much position t's output moves with the token at s.

  Tokens are distinct, so that the embedding's rows tell them apart.
  """
  size = len(mask)
  tokens = np.arange(size)[None]

  def out(table):
    changed = {**params, 'embedder': {'input_embedding': table}}
    hidden = make(config).hidden(changed, tokens, mask[None])
    return (hidden[0] * np.linspace(1, 2, hidden.shape[-1])[None]).sum(-1)

  table = params['embedder']['input_embedding']
  return np.abs(jax.jit(jax.jacrev(out))(table)).sum(-1)[:, :size]


def test_a_token_sees_itself_and_its_past_alone():
  config = dataclasses.replace(
    TINY['gemma3'], layers=2, pattern=('local', 'global')
  )
  mask = np.ones(9, bool)
  mask[3] = False
  out = influence(config, random_params(config, 0), mask)
  seen = np.tril(np.ones((9, 9), bool)) & mask
  assert (out[mask][~seen[mask]] == 0).all()
  assert (out[mask][seen[mask]] > 0).all()


@pytest.mark.parametrize('layers', core(1, [2, 1]))
def test_a_local_layer_sees_its_window_and_no_further(layers):
  """The window counts positions: padding in between does not narrow it."""
  config = dataclasses.replace(
    TINY['gemma3'], layers=layers, pattern=('local',)
  )
  mask = np.ones(10, bool)
  mask[[3, 4]] = False
  out = influence(config, random_params(config, 0), mask)[mask][:, mask]
  back = np.subtract.outer(np.arange(8), np.arange(8))
  seen = (back >= 0) & (back <= layers * (config.window - 1))
  assert (out[~seen] == 0).all()
  assert (out[seen] > 0).all()


@pytest.mark.parametrize(
  'settings',
  core(1, [([(True, 'products')],), ([(False, 'all'), (True, 'all')],)]),
)
def test_remat_and_scan_change_no_gradient(settings):
  """One pattern, and a layer that is left over."""
  config = dataclasses.replace(
    TINY['gemma3'], layers=3, pattern=('local', 'global')
  )
  params = random_params(config, 0)
  tokens = content(config)

  @jax.jit
  def all_of_them(params):
    def loss(params, scan, remat):
      policy = make(config, scan=scan, remat=remat)
      hidden = policy.hidden(params, tokens, tokens >= 0)
      return (policy.logits(params, hidden) ** 2).mean()

    return [
      jax.value_and_grad(loss)(params, scan, remat)
      for scan, remat in [(False, 'none'), *settings]
    ]

  plain, *others = all_of_them(params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  for other in others:
    jax.tree.map(close, plain, other)


@pytest.mark.long
def test_what_a_backward_pass_computes_again():
  """Of products with weights all, or none; the CPU compiler counts them."""
  config = dataclasses.replace(TINY['gemma2'], features=64, feed_forward=256)
  params, tokens = random_params(config, 0), content(config)

  def operations(remat):
    policy = make(config, scan=False, remat=remat)
    loss = lambda params: policy.hidden(params, tokens, tokens >= 0).sum()
    program = jax.jit(jax.grad(loss)).lower(params).compile()
    return program.cost_analysis()['flops']

  none, products, all_ = map(operations, gemma.REMAT)
  assert none < products < none + 0.3 * (all_ - none)
  assert all_ > 1.2 * none
  with pytest.raises(ValueError, match='remat is .* known are none, products'):
    make(config, remat=True)


def test_rows_no_token_uses_have_probability_zero(tiny):
  config, params = tiny('gemma2')
  out = jax.jit(functools.partial(logits_of, config))(
    params, content(config), np.ones((1, SIZE), bool)
  )
  probability = np.asarray(jax.nn.softmax(out))
  assert (probability[..., config.used_vocab :] == 0).all()
  assert (probability[..., : config.used_vocab] > 0).all()


def test_temperature_divides_the_logits(tiny):
  """After the final softcap, which is part of the model."""
  config, params = tiny('gemma2')
  x = np.random.default_rng(0).standard_normal((2, config.features))
  at = jax.jit(
    lambda x: [
      make(config, temperature=t).logits(params, x)[:, : config.used_vocab]
      for t in (1.0, 0.5)
    ]
  )
  one, half = at(x.astype(np.float32))
  np.testing.assert_allclose(half, 2 * one, rtol=1e-6)
  with pytest.raises(ValueError, match='temperature'):
    make(config, temperature=-1.0)


def test_temperature_0_is_the_greedy_law(tiny):
  config, params = tiny('gemma2')
  x = np.random.default_rng(0).standard_normal((3, config.features))
  warm, cold = (
    make(config, temperature=t).logits(params, x.astype(np.float32))
    for t in (1.0, 0.0)
  )
  p = np.asarray(jax.nn.softmax(cold, -1))
  np.testing.assert_array_equal(p, np.eye(config.vocab_size)[warm.argmax(-1)])


def test_logits_are_float32_whatever_the_compute_dtype(tiny):
  config, params = tiny('gemma3')
  policy = make(config, dtype='bfloat16')

  def forward(params, tokens):
    hidden = policy.hidden(params, tokens, tokens >= 0)
    decoder = policy.decoder(policy.prepare(params))
    last, prefix = decoder.prefill(tokens, tokens >= 0)
    cache = decoder.start(prefix, 1, 3)
    logits = policy.logits(params, hidden), decoder.logits(last)
    return logits, (hidden, last, prefix.kv, cache.kv)

  logits, rest = jax.eval_shape(forward, params, content(config))
  assert {x.dtype for x in logits} == {jnp.dtype(jnp.float32)}
  assert {x.dtype for x in jax.tree.leaves(rest)} == {jnp.dtype(jnp.bfloat16)}


def size_of(config):
  shapes = jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))
  leaves = jax.tree.leaves(shapes)
  assert {x.dtype for x in leaves} == {jnp.dtype(jnp.float32)}
  return sum(x.size for x in leaves)


@pytest.mark.long
def test_parameter_counts_are_the_official_ones():
  assert round(size_of(gemma.CONFIGS['gemma3_270m']) / 1e9, 3) == 0.268
  assert round(size_of(gemma.CONFIGS['gemma3_1b']) / 1e9, 3) == 1.000


def test_the_demo_has_a_million_parameters():
  assert size_of(gemma.CONFIGS['gemma3_tiny']) >= 1_000_000


def test_init_is_random_in_every_layer():
  """Distinct matrices of the intended scale; norms start at zero."""
  config = TINY['gemma1_multi_head']  # few matrices: each compiles a generator
  params = jax.jit(functools.partial(gemma.init, config))(jax.random.key(0))
  gates = [p['mlp']['gating_einsum'] for _, p in gemma.layers(config, params)]
  assert len(gates) == config.layers
  assert len({float(g.sum()) for g in gates}) == config.layers
  np.testing.assert_allclose(np.std(gates), config.features**-0.5, rtol=0.1)
  assert not any(
    np.any(x)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == 'scale'
  )
