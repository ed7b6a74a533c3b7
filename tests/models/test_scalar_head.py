"""The scalar head: which hidden state it reads, and what cannot reach it."""

from conftest import core, random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bond_jax.models import scalar_head
from bond_jax.models.gemma import model as gemma
from bond_jax.types import Prompts

CONFIG = TINY['gemma2']
PROMPTS = [[4, 5], [3, 2, 9], [2, 6, 7, 3]]
# Two of each prompt. EOS is 1; those that end otherwise have been cut.
COMPLETIONS = [
  [[2, 3, 4], [6, 7, 1]],
  [[0, 1], [6, 9, 1]],
  [[1], [5, 1]],
]


@pytest.fixture(scope='module')
def model():
  """The policy, and parameters of which none is zero."""
  policy = gemma.make(
    CONFIG, temperature=1.0, dtype='float32', scan=False, remat='none'
  )
  params = jax.tree.map(jnp.asarray, random_params(CONFIG, 0))
  rng = np.random.default_rng(1)
  head = {'w': rng.standard_normal(CONFIG.features), 'b': np.float32(0.3)}
  head['w'] = head['w'].astype(np.float32)
  return policy, {'model': params, 'scalar_head': head}


def padded(left=4, right=3, junk=0):
  """The batch: prompts [3, left], completions and masks [3, 2, right]."""
  tokens = np.full((3, left), junk)
  completion = np.full((3, 2, right), junk)
  for i, (prompt, rows) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
    tokens[i, left - len(prompt) :] = prompt
    for j, row in enumerate(rows):
      completion[i, j, : len(row)] = row
  sizes = np.array([[len(row) for row in rows] for rows in COMPLETIONS])
  prompts = Prompts(
    tokens,
    np.arange(left) >= left - np.array([[len(p)] for p in PROMPTS]),
    np.arange(3),
    np.ones(3, np.float32),
  )
  return prompts, completion, np.arange(right) < sizes[..., None]


logits = jax.jit(scalar_head.logits, static_argnums=0)


def test_the_head_reads_the_last_token_that_is_there(model):
  """Row by row, without any padding: the last hidden state, EOS's included."""
  policy, params = model
  hidden_of = jax.jit(lambda *x: policy.hidden(params['model'], *x))
  expected = np.zeros((3, 2))
  for i, (prompt, rows) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
    for j, row in enumerate(rows):
      tokens = jnp.array([prompt + row])
      hidden = hidden_of(tokens, jnp.ones(tokens.shape, bool))
      head = params['scalar_head']
      expected[i, j] = hidden[0, -1] @ head['w'] + head['b']
  found = logits(*model, *padded())
  assert found.shape == (3, 2) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert np.ptp(expected) > 0.5


@pytest.mark.parametrize(
  'batch', [dict(left=6), dict(right=5), dict(junk=9)], ids=str
)
def test_padding_and_what_follows_the_end_change_nothing(model, batch):
  plain, other = (logits(*model, *padded(**kw)) for kw in ({}, batch))
  np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-5)


def test_it_starts_at_zero_with_parameters_of_its_own(model):
  policy, params = model
  start = scalar_head.init(policy, params['model'])
  assert jax.tree.structure(start) == jax.tree.structure(params)
  assert start['scalar_head']['w'].shape == (CONFIG.features,)
  assert not np.any(logits(policy, start, *padded()))
  for ours, theirs in zip(
    jax.tree.leaves(start['model']), jax.tree.leaves(params['model'])
  ):
    np.testing.assert_array_equal(ours, theirs)
    assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()


@pytest.mark.parametrize('pool', core(1, scalar_head.POOLS))
def test_a_text_is_scored_as_it_would_be_alone(model, pool):
  """Whatever the padding holds, and on whichever side of the text it is."""
  policy, params = model
  texts = [[2, 6, 7, 3, 1], [2, 9], [2, 4, 5, 1]]
  hidden_of = jax.jit(lambda *x: policy.hidden(params['model'], *x))
  head = params['scalar_head']
  expected = []
  for text in texts:
    tokens = jnp.array([text])
    hidden = hidden_of(tokens, tokens > 0)
    one = hidden[0, -1] if pool == 'last' else hidden[0].mean(0)
    expected.append(one @ head['w'] + head['b'])
  score = jax.jit(scalar_head.score, static_argnums=(0, 4))
  for left in (False, True):
    for junk, width in ((0, 5), (8, 7)):
      tokens = np.full((3, width), junk)
      mask = np.zeros((3, width), bool)
      for i, text in enumerate(texts):
        where = slice(width - len(text), None) if left else slice(len(text))
        tokens[i, where], mask[i, where] = text, True
      found = score(policy, params, tokens, mask, pool)
      assert found.dtype == jnp.float32
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert np.ptp(expected) > 0.3
