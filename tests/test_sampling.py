"""The sampler draws from the law that is scored, whatever the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.stats

from bond_jax import sharding
from bond_jax.log_probs import log_probs
from bond_jax.models import gemma
from bond_jax.sampling import sample
from bond_jax.types import Prompts

EOS = 1
LENGTHS = [1, 5, 3, 2, 5, 4, 1, 2]
WIDTH = 5


@pytest.fixture(scope='module')
def model(tiny):
  config, params = tiny('gemma2')
  policy = gemma.make(
    config, temperature=0.8, dtype='float32', scan=False, remat=False
  )
  return policy, params


@pytest.fixture(scope='module')
def prompts():
  """Eight prompts of mixed lengths, ids in no order, garbage as padding."""
  rng = np.random.default_rng(0)
  mask = np.arange(WIDTH)[None] >= WIDTH - np.array(LENGTHS)[:, None]
  return Prompts(
    rng.integers(2, 17, mask.shape),
    mask,
    rng.permutation(100)[:8].astype(np.int32),
    np.ones(8, np.float32),
  )


@pytest.fixture(scope='module')
def draw(model):
  """One compiled program per shape: (prompts, first) -> Rollout."""
  policy, params = model
  programs = functools.cache(
      lambda num: jax.jit(
          lambda params, prompts, key, first: sample(
              policy, params, prompts, key,
              num=num, length=6, stop_ids=(EOS,), first=first,
          )
      )
  )  # fmt: skip
  return lambda prompts, num=3, first=0: programs(num)(
    params, prompts, jax.random.key(7), first
  )


@pytest.fixture(scope='module')
def drawn(draw, prompts):
  return draw(prompts)


def check_end(drawn, stop=EOS):
  """The mask is True up to and including the first EOS; 0 after it."""
  completion, mask, log_prob = map(np.asarray, drawn)
  stopped = completion == stop
  before = np.cumsum(stopped, -1) - stopped  # EOS seen before this position
  np.testing.assert_array_equal(mask, before == 0)
  assert (completion[~mask] == 0).all() and (log_prob[~mask] == 0).all()


def same(a, b):
  """Equal tokens; log-probs up to the rounding of another program."""
  np.testing.assert_array_equal(a.completion, b.completion)
  np.testing.assert_array_equal(a.mask, b.mask)
  np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-5)


def take(tree, rows):
  return jax.tree.map(lambda x: np.asarray(x)[rows], tree)


# -- with a model -------------------------------------------------------------


def test_log_prob_is_the_teacher_forced_one(model, prompts, drawn):
  policy, params = model
  check_end(drawn)
  lengths = np.asarray(drawn.mask).sum(-1)
  assert lengths.min() < 6 and lengths.max() == 6  # both ends are met
  scored = jax.jit(functools.partial(log_probs, policy, chunk=4))(
    params, prompts, drawn.completion, drawn.mask
  )
  np.testing.assert_allclose(drawn.log_prob, scored, atol=1e-5)
  assert (np.asarray(drawn.log_prob)[drawn.mask] < 0).all()


def test_completions_of_a_prompt_differ(drawn):
  completion = np.asarray(drawn.completion)
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert (completion[:, i] != completion[:, j]).any(-1).mean() > 0.5


def test_the_id_of_a_prompt_and_nothing_else_sets_its_draw(draw, prompts):
  """Equal texts: those of equal ids draw alike, others on their own."""
  ids = np.array([4, 9, 4, 1, 9, 2, 7, 4], np.int32)
  alike = take(prompts, [1] * 8)._replace(id=ids)
  completion = np.asarray(draw(alike).completion).reshape(8, -1)
  equal = (completion[:, None] == completion[None]).all(-1)
  np.testing.assert_array_equal(equal, ids[:, None] == ids[None])


def test_order_does_not_matter(draw, prompts, drawn):
  order = [3, 0, 7, 5, 1, 2, 6, 4]
  same(draw(take(prompts, order)), take(drawn, order))


def test_one_by_one_is_one_batch(draw, prompts, drawn):
  for i in range(8):
    same(draw(take(prompts, [i])), take(drawn, [i]))


def test_left_padding_does_not_matter(draw, prompts, drawn):
  wider = ((0, 0), (3, 0))
  padded = prompts._replace(
    tokens=np.pad(prompts.tokens, wider, constant_values=5),
    mask=np.pad(prompts.mask, wider),
  )
  same(draw(padded), drawn)


def test_first_offsets_give_disjoint_streams(draw, prompts, drawn):
  """num = 3 is three times num = 1, at first = 0, 1, 2."""
  for k in range(3):
    same(draw(prompts, 1, k), jax.tree.map(lambda x, k=k: x[:, [k]], drawn))


def test_eight_devices_draw_what_one_does(draw, prompts, drawn):
  mesh = sharding.make_mesh(8, 1)
  on_mesh = draw(sharding.put_batch(prompts, mesh))
  assert len(on_mesh.completion.sharding.device_set) == 8
  same(jax.device_get(on_mesh), jax.device_get(drawn))


# -- with a table -------------------------------------------------------------


def table_draw(
  table, tokens, *, num, length, key=0, stop_ids=(EOS,), policy=None
):
  """Completions of one-token prompts under a table [positions, V, V]."""
  tokens = np.array(tokens)[:, None]
  b = len(tokens)
  prompts = Prompts(
    tokens, tokens >= 0, np.arange(b, dtype=np.int32), np.ones(b)
  )
  program = jax.jit(
    functools.partial(
      sample,
      policy or oracle.table_policy(table.shape[-1]),
      num=num,
      length=length,
      stop_ids=stop_ids,
    )
  )
  return program(table.astype(np.float32), prompts, jax.random.key(key))


def forced(length):
  """After 2 comes EOS; 3 repeats for ever; 4 repeats until EOS comes last."""
  table = np.full((length, 5, 5), -100.0)
  table[:, 2, EOS] = table[:, 3, 3] = table[:-1, 4, 4] = table[-1, 4, EOS] = 0
  return table


def test_eos_first_never_and_last():
  drawn = table_draw(forced(4), [2, 3, 4], num=2, length=4)
  check_end(drawn)
  expected = [[1, 0, 0, 0], [3, 3, 3, 3], [4, 4, 4, 1]]
  for k in range(2):
    np.testing.assert_array_equal(drawn.completion[:, k], expected)
  np.testing.assert_array_equal(drawn.mask.sum(-1)[:, 0], [1, 4, 4])
  np.testing.assert_allclose(drawn.log_prob, 0, atol=1e-6)


def test_a_completion_of_one_token():
  drawn = table_draw(forced(4), [2, 3], num=1, length=1)
  np.testing.assert_array_equal(drawn.completion, [[[1]], [[3]]])
  assert np.asarray(drawn.mask).all()


def test_any_of_several_stop_ids_ends_a_completion():
  drawn = table_draw(forced(4), [2, 3], num=1, length=3, stop_ids=(EOS, 3))
  np.testing.assert_array_equal(drawn.completion, [[[1, 0, 0]], [[3, 0, 0]]])
  assert np.asarray(drawn.mask).sum() == 2


def test_sampling_stops_when_every_row_has_ended():
  calls = []
  policy = oracle.table_policy(5)

  def hidden(params, tokens, mask, cache):
    jax.debug.callback(lambda: calls.append(1))
    return policy.hidden(params, tokens, mask, cache)

  # Rows end after 1 and after 3 tokens, of 30 allowed.
  drawn = table_draw(
      np.concatenate([forced(3), np.tile(forced(1), (27, 1, 1))]), [2, 4],
      num=1, length=30, policy=policy._replace(hidden=hidden),
  )  # fmt: skip
  jax.block_until_ready(drawn)
  jax.effects_barrier()
  assert np.asarray(drawn.mask).sum() == 4
  assert len(calls) == 3  # the prompt, and two tokens


def test_frequencies_are_the_law():
  """Exact binomial tests of every sequence's count; over keys, a right
  sampler fails with probability at most 1e-6 (Bonferroni)."""
  num, vocab = 20_000, 4
  table = np.random.default_rng(0).standard_normal((2, vocab, vocab))
  drawn = table_draw(table, [0, 3], num=num, length=2)
  tokens, mask = oracle.sequences(vocab, 2, EOS)
  checked = 0
  for b, prompt in enumerate([0, 3]):
    # In the table the prompt is the token before the first.
    first = jax.nn.log_softmax(jnp.asarray(table[0, prompt]))[tokens[:, 0]]
    second = jax.nn.log_softmax(jnp.asarray(table[1]), -1)
    second = jnp.where(mask[:, 1], second[tokens[:, 0], tokens[:, 1]], 0)
    law = np.exp(np.asarray(first + second, np.float64))
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    completion = np.asarray(drawn.completion[b])
    for y, m, p in zip(tokens, mask, law, strict=True):
      count = int((completion == (y * m)[None]).all(-1).sum())
      value = scipy.stats.binomtest(count, num, p).pvalue
      assert value > 1e-6 / (2 * len(law)), (prompt, y, count, num * p)
      checked += count
  assert checked == 2 * num
