"""The sampler draws from the law that is scored, whatever the batch."""

import dataclasses
import functools

from conftest import core, random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.stats

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import sampling
from bond_jax.models.gemma import model as gemma
from bond_jax.models.log_probs import log_probs
from bond_jax.models.sampling import draw_token, Limits, sample
from bond_jax.models.stops import Stop
from bond_jax.types import Prompts

EOS = 1
STOP = Stop((EOS,))
LENGTHS = [1, 5, 3, 2, 5, 4, 1, 2]
WIDTH = 5


@pytest.fixture(scope='module')
def model(tiny):
  config, params = tiny('gemma2')
  policy = gemma.make(
    config, temperature=0.8, dtype='float32', scan=False, remat='none'
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
      lambda num, slots: jax.jit(
          lambda params, prompts, key, first: sample(
              policy, params, prompts, key, Limits(6, STOP, slots), num=num,
              first=first,
          )
      )
  )  # fmt: skip
  return lambda prompts, num=3, first=0, slots=0: programs(num, slots)(
    params, prompts, jax.random.key(7), first
  )


@pytest.fixture(scope='module')
def drawn(draw, prompts):
  return draw(prompts)


def check_end(drawn, stop=EOS):
  """The mask is True up to and including the first EOS; 0 after it."""
  completion, mask, log_prob = map(np.asarray, drawn[:3])
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


@pytest.mark.long
def test_one_by_one_is_one_batch(draw, prompts, drawn):
  for i in range(8):
    same(draw(take(prompts, [i])), take(drawn, [i]))


@pytest.mark.long
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


@pytest.mark.parametrize('slots', core(2, [3, 100, 1, 5, 23, 24]))
def test_slots_do_not_matter(draw, prompts, drawn, slots):
  """24 completions, one after another or nearly all at once."""
  same(draw(prompts, slots=slots), drawn)


@pytest.mark.long
@pytest.mark.parametrize(
  'name, scan',
  [('gemma3', True), ('gemma3', False), ('gemma1_multi_head', True)],
)
def test_slots_do_not_matter_to_other_models(prompts, name, scan):
  """Windows that the prompt fills and that completions leave behind."""
  config = TINY[name]
  if name == 'gemma3':  # both kinds of layers, and one that is left over
    config = dataclasses.replace(config, layers=3, pattern=('local', 'global'))
  params = random_params(config, 0)
  policy = gemma.make(
    config, temperature=1.0, dtype='float32', scan=scan, remat='none'
  )
  prompts = prompts._replace(tokens=prompts.tokens % config.vocab_size)
  args = params, prompts, jax.random.key(1)
  draw = functools.partial(sample, policy, num=2)
  at_once, queued = (
    jax.jit(functools.partial(draw, limits=Limits(9, STOP, slots)))(*args)
    for slots in (0, 3)
  )
  same(at_once, queued)
  scored = jax.jit(functools.partial(log_probs, policy, chunk=9))(
    params, prompts, queued.completion, queued.mask
  )
  np.testing.assert_allclose(queued.log_prob, scored, atol=1e-5)


@pytest.mark.parametrize(
  'shape, sampling, slots, scan',
  core(
    1,
    [
      ((8, 1), (2, 4), 8, True),
      ((8, 1), (8, 1), 0, False),
      ((4, 2), (4, 2), 8, False),
      ((8, 1), (1, 8), 0, True),
      ((2, 4), (8, 1), 0, True),
    ],
  ),
)
def test_the_mesh_does_not_matter(
  tiny, prompts, drawn, shape, sampling, slots, scan
):
  """Parameters in their shards, prompts on the axis `data` of either mesh."""
  config, params = tiny('gemma2')
  policy = gemma.make(
    config, temperature=0.8, dtype='float32', scan=scan, remat='none'
  )
  whole = sharding.make_mesh(*shape)
  mesh = sharding.reshaped(whole, *sampling)
  program = jax.jit(
    lambda params, prompts: sample(
        policy, params, prompts, jax.random.key(7),
        Limits(6, STOP, slots, mesh), num=3,
    )
  )  # fmt: skip
  on_mesh = program(
    jax.device_put(params, sharding.tree_shardings(params, whole)),
    sharding.put_batch(prompts, whole),
  )
  assert len(on_mesh.completion.sharding.device_set) == 8
  same(jax.device_get(on_mesh), jax.device_get(drawn))


# -- with a table -------------------------------------------------------------


def table_draw(
  table, tokens, *, num, length, key=0, stop=STOP, policy=None, slots=0
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
      limits=Limits(length, stop, slots),
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
  drawn = table_draw(forced(4), [2, 3], num=1, length=3, stop=Stop((EOS, 3)))
  np.testing.assert_array_equal(drawn.completion, [[[1, 0, 0]], [[3, 0, 0]]])
  assert np.asarray(drawn.mask).sum() == 2


def test_sampling_stops_when_every_row_has_ended():
  calls = []
  policy = oracle.table_policy(5)

  def decoder(params):
    plain = policy.decoder(params)

    def step(*args):
      jax.debug.callback(lambda: calls.append(1))
      return plain.step(*args)

    return plain._replace(step=step)

  # Rows end after 1 and after 3 tokens, of 30 allowed.
  drawn = table_draw(
      np.concatenate([forced(3), np.tile(forced(1), (27, 1, 1))]), [2, 4],
      num=1, length=30, policy=policy._replace(decoder=decoder),
  )  # fmt: skip
  jax.block_until_ready(drawn)
  jax.effects_barrier()
  assert np.asarray(drawn.mask).sum() == 4
  assert len(calls) == 2  # the second token, and the third


@pytest.mark.parametrize('slots', core(1, [3, 1, 2, 5, 8]))
def test_a_slot_takes_the_next_completion_at_once(slots):
  """The steps that it takes are those of a queue of known lengths."""
  tokens = [2, 4, 3, 2, 3, 4, 2, 2]
  lengths = [{2: 1, 3: 6, 4: 6}[token] for token in tokens]
  drawn = table_draw(forced(6), tokens, num=1, length=6, slots=slots)
  np.testing.assert_array_equal(drawn.mask.sum(-1)[:, 0], lengths)
  free = [0] * slots
  for length in lengths:
    free[free.index(min(free))] += length
  np.testing.assert_allclose(drawn.slot_steps, max(free) * slots / len(tokens))


@pytest.mark.parametrize('v', [21, 22])  # one part, and two, padded
def test_the_law_of_a_draw_is_the_softmax(v):
  """The share of a fine grid of numbers that falls on each token."""
  rng = np.random.default_rng(0)
  logits = 2 * rng.standard_normal(v).astype(np.float32)
  logits[[0, 3, 8, 9, 10, 11, 12, 13, 14, 15, 20]] = -2.4e38
  grid = (np.arange(1024) + 0.5) / 1024
  uniform = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
  token, log_prob = jax.jit(draw_token)(
    uniform.astype(np.float32), np.broadcast_to(logits, (len(uniform), v))
  )
  law = np.asarray(jax.nn.softmax(logits))
  share = np.bincount(token, minlength=v) / len(token)
  # An interval holds as many points of the grid as it should, give or take 1.
  np.testing.assert_allclose(share, law, atol=2.1 / 1024)
  assert (share[law == 0] == 0).all()
  expected = np.asarray(jax.nn.log_softmax(logits))[token]
  np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


@pytest.mark.parametrize(
  'v', [1, 2, 11, 21, 22, 96, 1024, 8191, 32_003, 256_128, 262_144]
)
def test_blocks_hold_every_vocabulary_and_are_small(v):
  """Primes too: the triangles of a draw are about v numbers."""
  parts, blocks, size = sampling._blocks(v)
  assert v % parts == 0
  assert 0 <= parts * blocks * size - v < parts * size
  assert max(parts * blocks, size) <= 3 * v**0.5 + 16


def test_every_token_of_a_prime_vocabulary_is_drawn_as_its_law_says():
  """Uniform: two numbers, in the middle of a token's share, name it."""
  token, _ = jax.jit(draw_token)(
    np.stack(np.meshgrid(*2 * [(np.arange(96) + 0.5) / 96]), -1)
    .reshape(-1, 2)
    .astype(np.float32),
    np.zeros((96 * 96, 31), np.float32),
  )
  share = np.bincount(token, minlength=31) / 96**2
  np.testing.assert_allclose(share, 1 / 31, atol=2.1 / 96 / 8)


def test_a_token_without_mass_is_never_drawn():
  """Not by the smallest number nor by the largest, whatever the rounding."""
  rng = np.random.default_rng(0)
  logits = 3 * rng.standard_normal((500, 130)).astype(np.float32)
  logits[rng.random(logits.shape) < 0.9] = -2.4e38
  logits[:, 70] = 0  # at least one
  for u in (0.0, 1 - 2**-23):
    token, _ = jax.jit(draw_token)(np.full((500, 2), u, np.float32), logits)
    assert (logits[np.arange(500), token] > -1e38).all()


@pytest.mark.parametrize(
  'wrong, words',
  [
    (dict(length=0), 'length, .* must be 1 or more, got 0'),
    (dict(stop=Stop((1, 5))), r'stop ids \[5\] are not in the vocabulary of 5'),
    (dict(slots=-1), r'slots \(-1\) must be 0'),
  ],
)
def test_what_cannot_be_drawn_is_refused(wrong, words):
  with pytest.raises(UserError, match=words):
    table_draw(forced(4), [2], **{**dict(num=1, length=4), **wrong})


def test_a_model_without_refill_says_so():
  policy = oracle.table_policy(5)
  decoder = lambda params: policy.decoder(params)._replace(refill=None)
  with pytest.raises(UserError, match='draws all completions at once, got 1'):
    table_draw(
        forced(4), [2, 3], num=1, length=4, slots=1,
        policy=policy._replace(decoder=decoder),
    )  # fmt: skip


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
