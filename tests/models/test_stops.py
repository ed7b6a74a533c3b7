"""Stop strings: what they end is what their law says, wherever it is drawn."""

import functools
import itertools

import jax
import numpy as np
import oracle
import pytest
import scipy.stats
import toy
import turns

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import stops
from bond_jax.models.gemma import model as gemma
from bond_jax.models.log_probs import log_probs
from bond_jax.models.sampling import Limits, sample
from bond_jax.training import checks
from bond_jax.training.tasks import text_task
from bond_jax.types import Prompts, Rollout

EOS = 1
# Of a vocabulary of six: an end, and parts of the strings that are looked for.
PIECES, TEXTS = [b'b', b'', b'a', b'aa', b'xaay', b'ab'], ('aab', 'ya')


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """Bytes, digits, turns, and pieces of more than one character."""
  path = turns.vocabulary(str(tmp_path_factory.mktemp('stops')))
  return tokenizer_lib.load(path)


def meets(table, tokens):
  """bool[len(tokens)], whether the text after each contains a stop string."""
  state = itertools.accumulate(tokens, lambda s, i: int(table[s, i]), initial=0)
  return [s == len(table) - 1 for s in state][1:]


# -- the automaton ------------------------------------------------------------


@pytest.mark.parametrize(
  'texts',
  [
    ('\n',),
    ('good', 'film was'),
    ('everyone loved', 'loved', 'd i'),
    ('  ', ' a'),
    ('日本', 'é'),
    ('本\n', '▁'),
    ('<mask>', 'k><'),
  ],
)
def test_a_table_finds_what_the_text_contains(tokenizer, texts):
  """Bytes of a character, spaces, pieces without text, one within another."""
  rng = np.random.default_rng(0)
  table = stops.of(tokenizer, texts).table
  assert table.dtype == np.uint8 and table.shape[1] == tokenizer.vocab_size
  letters = set(''.join(texts).encode())
  pool = [
    i
    for i, piece in enumerate(tokenizer.pieces())
    if not piece or (letters & set(piece) and len(piece) < 8)
  ]
  whole = [tokenizer.encode(text) for text in texts]
  met = 0
  for _ in range(300):
    some = list(rng.choice(pool, rng.integers(1, 10)))
    begun = whole[rng.integers(len(whole))]
    place = rng.integers(len(some) + 1)
    some[place:place] = begun[: rng.integers(len(begun) + 1)]
    found = meets(table, some)
    for t, here in enumerate(found):
      said = tokenizer.decode(some[: t + 1])
      assert here == any(text in said for text in texts), (said, t)
    met += any(found)
  assert 30 < met < 300


def test_a_table_finds_what_brute_force_finds():
  """Strings and pieces of two letters: every kind of overlap."""
  rng = np.random.default_rng(0)
  word = lambda most: ''.join(rng.choice(['a', 'b'], rng.integers(1, most)))
  met = 0
  for _ in range(150):
    texts = [word(6) for _ in range(rng.integers(1, 4))]
    pieces = [b'', *(word(4).encode() for _ in range(5))]
    table = stops.make((), pieces, texts).table
    tokens = rng.integers(0, 6, 12)
    said = itertools.accumulate(pieces[i].decode() for i in tokens)
    expected = [any(text in here for text in texts) for here in said]
    assert meets(table, tokens) == expected
    met += expected[3] != expected[-1]
  assert met > 20


def test_a_space_is_there_whatever_the_vocabulary_does_at_the_start(tokenizer):
  pieces = tokenizer.pieces()
  assert b''.join(pieces[i] for i in tokenizer.encode(' a  é\n日')) == (
    ' a  é\n日'.encode()
  )
  assert not any(pieces[i] for i in (0, 1, 2, 5, 6))  # what only controls


@pytest.mark.parametrize(
  'texts, words',
  [
    (['\n', ''], 'not empty'),
    (['a\ufffd'], 'U+FFFD'),
    (['a' * 200, 'é' * 28], '256 bytes in 2 strings, at most 255'),
  ],
)
def test_what_ends_nothing_is_refused_before_a_stage_begins(texts, words):
  config = toy.get_config(toy.folder())
  with config.unlocked():
    config.stop = texts
  with pytest.raises(UserError) as e:
    checks.check(config)
  assert words in str(e.value) and 'stop' in str(e.value)


# -- completions --------------------------------------------------------------


def ends(tokens):
  """The number of tokens after which a completion ends, or None."""
  for t in range(len(tokens)):
    said = b''.join(PIECES[i] for i in tokens[: t + 1]).decode()
    if tokens[t] == EOS or any(text in said for text in TEXTS):
      return t + 1
  return None


def language(length):
  """All completions of at most `length` tokens: [Y, T] tokens, mask."""
  rows = set()
  for tokens in itertools.product(range(len(PIECES)), repeat=length):
    n = ends(tokens) or length
    rows.add((tokens[:n] + (0,) * (length - n), n))
  tokens, sizes = map(np.array, zip(*sorted(rows), strict=True))
  return tokens, np.arange(length)[None] < sizes[:, None]


def draw(table, prompts, num, slots=0):
  """Completions of prompts of one token, of at most as many as `table` has."""
  tokens = np.array(prompts)[:, None]
  batch = Prompts(tokens, tokens >= 0, np.arange(len(tokens)), None)
  program = functools.partial(
    sample, oracle.table_policy(len(PIECES)), num=num,
    limits=Limits(len(table), stops.make((EOS,), PIECES, TEXTS), slots),
  )  # fmt: skip
  table = table.astype(np.float32)
  return jax.device_get(jax.jit(program)(table, batch, jax.random.key(0)))


def test_the_law_with_stops_is_drawn():
  """Exact binomial tests of every completion's count; over keys, a right
  sampler fails with probability at most 1e-6 (Bonferroni)."""
  num, t, v = 20_000, 3, len(PIECES)
  theta = np.random.default_rng(1).standard_normal((t, v, v))
  drawn = draw(theta, [3], num)
  tokens, mask = language(t)
  log_p = jax.nn.log_softmax(theta, -1)
  before = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=3)
  log_p = np.where(mask, log_p[np.arange(t), before, tokens], 0.0)
  law = np.exp(log_p.sum(-1, dtype=np.float64))
  np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
  # Some end with a stop string alone, before the length and at it.
  by_text = [y for y, m in zip(tokens, mask, strict=True) if EOS not in y[m]]
  assert {ends(y) for y in by_text} == {2, 3, None}
  counted = 0
  for y, m, p, log in zip(tokens, mask, law, log_p, strict=True):
    same = (drawn.completion[0] == y).all(-1) & (drawn.mask[0] == m).all(-1)
    value = scipy.stats.binomtest(int(same.sum()), num, p).pvalue
    assert value > 1e-6 / len(law), (y, m, p)
    if same.any():  # its log-prob has that of the token that ends it
      of_first = drawn.log_prob[0][same.argmax()]
      np.testing.assert_allclose(of_first, log, atol=1e-5)
    counted += same.sum()
  assert counted == num


def test_a_string_across_the_prompt_ends_nothing():
  """The prompt 'aa' and 'b' make 'aab'; 'y', then 'a', would make 'ya'."""
  theta = np.full((3, len(PIECES), len(PIECES)), -1000.0)
  theta[:, 3, 0] = theta[:, 0, 0] = theta[:, 4, 2] = theta[:, 2, 0] = 0
  drawn = draw(theta, [3, 4], 1)
  np.testing.assert_array_equal(drawn.completion[:, 0], [[0] * 3, [2, 0, 0]])
  assert drawn.mask.all()


@pytest.mark.parametrize('slots', [1, 3, 7])
def test_a_slot_begins_anew(slots):
  """Completions that end within a string do not go on in the next one."""
  theta = np.random.default_rng(2).standard_normal((6, 6, 6))
  theta[..., EOS] += 1
  at_once, queued = (draw(theta, [0, 3, 4, 5], 5, n) for n in (0, slots))
  np.testing.assert_array_equal(at_once.completion, queued.completion)
  np.testing.assert_array_equal(at_once.mask, queued.mask)
  for y, m in zip(
    queued.completion.reshape(-1, 6), queued.mask.reshape(-1, 6), strict=True
  ):
    assert m.sum() == (ends(y[m]) or 6)


@pytest.mark.long
def test_devices_and_slots_do_not_matter_to_a_model(tiny):
  """And its log-probs are those of what was drawn, the end included."""
  config, params = tiny('gemma2')
  policy = gemma.make(
    config, temperature=1.0, dtype='float32', scan=False, remat='none'
  )
  rng = np.random.default_rng(0)
  prompts = Prompts(
    rng.integers(2, 17, (8, 4)), np.ones((8, 4), bool),
    np.arange(8, dtype=np.int32), np.ones(8, np.float32),
  )  # fmt: skip
  pieces = [b'', b'', *(PIECES[i % 6] or b'c' for i in range(15))]
  stop = stops.make((EOS,), pieces, TEXTS)

  def drawn(params, prompts, mesh=None, slots=0):
    program = functools.partial(
      sample, policy, num=3, limits=Limits(6, stop, slots, mesh)
    )
    return jax.device_get(jax.jit(program)(params, prompts, jax.random.key(7)))

  mesh = sharding.make_mesh(8, 1)
  alone, apart = (
    drawn(params, prompts),
    drawn(
      jax.device_put(params, sharding.tree_shardings(params, mesh)),
      sharding.put_batch(prompts, mesh), sharding.reshaped(mesh, 2, 4), 8,
    ),
  )  # fmt: skip
  np.testing.assert_array_equal(apart.completion, alone.completion)
  np.testing.assert_array_equal(apart.mask, alone.mask)
  scored = jax.jit(functools.partial(log_probs, policy, chunk=6))(
    params, prompts, apart.completion, apart.mask
  )
  np.testing.assert_allclose(apart.log_prob, scored, atol=1e-5)
  assert (apart.log_prob[apart.mask] < 0).all()
  by_text = 0
  for y, m in zip(
    apart.completion.reshape(-1, 6), apart.mask.reshape(-1, 6), strict=True
  ):
    met = meets(stop.table, y[m])
    assert not any(met[:-1])
    assert met[-1] or y[m][-1] == EOS or m.all()
    by_text += met[-1]
  assert 3 < by_text < 24


# -- what was cut -------------------------------------------------------------


def test_the_same_are_cut_here_and_on_devices():
  tokens, mask = language(4)
  stop = stops.make((EOS,), PIECES, TEXTS)
  expected = [ends(y[m]) is None for y, m in zip(tokens, mask, strict=True)]
  assert 0 < np.mean(expected) < mask[:, -1].mean()
  cut = stop.cut(tokens.reshape(1, -1, 4), mask.reshape(1, -1, 4))
  np.testing.assert_array_equal(cut[0], expected)
  there = jax.jit(stop.cut)(tokens[None], mask[None])
  np.testing.assert_array_equal(there, cut)
  alone = stops.Stop((EOS,)).cut(tokens, mask)
  np.testing.assert_array_equal(alone, mask[:, -1] & (tokens[:, -1] != EOS))


def test_as_many_states_as_a_byte_counts():
  """The last of 256 is a state like others, here and on devices."""
  stop = stops.make((), [b'x', b'a'], ['a' * 255])
  assert len(stop.table) == 256
  tokens = np.ones((2, 255), np.int32)
  tokens[1, 100] = 0
  mask = np.ones(tokens.shape, bool)
  for found in (stop.cut(tokens, mask), jax.jit(stop.cut)(tokens, mask)):
    np.testing.assert_array_equal(found, [False, True])


def test_a_reward_is_told_what_was_cut(tokenizer):
  config = toy.get_config(toy.folder())
  config.stop = ('loved',)
  words = ['everyone loved', 'everyone', 'it was good']
  length = len(tokenizer.encode(words[0]))
  ids = [tokenizer.encode(text)[:length] for text in words]
  mask = np.array([[np.arange(length) < len(y) for y in ids]])
  ids = np.array([[np.pad(y, (0, length - len(y))) for y in ids]])
  prompts = Prompts(np.array([[2]]), None, np.array([0]), None)
  _, texts, context = text_task.texts(
    config, tokenizer, [{}], prompts, Rollout(ids, mask, None, None)
  )
  assert texts[0][0] == words[0]
  np.testing.assert_array_equal(context.finished[0], [True, *~mask[0, 1:, -1]])


def test_without_strings_there_is_no_table(tokenizer):
  """Nor anything else in the program that draws."""
  assert stops.of(tokenizer, ()) == stops.Stop(tokenizer.stop_ids)

  def text(stop):
    policy, tokens = oracle.table_policy(6), np.array([[3], [4]])
    batch = Prompts(tokens, tokens >= 0, np.arange(2), None)
    program = functools.partial(
      sample, policy, num=2, limits=Limits(3, stop, 2)
    )
    table = np.zeros((3, 6, 6), np.float32)
    return jax.jit(program).lower(table, batch, jax.random.key(0)).as_text()

  plain, looking = (
    text(stops.make((EOS,), PIECES, texts)) for texts in ((), TEXTS)
  )
  assert plain == text(stops.Stop((EOS,)))
  assert 'xui8>' in looking and 'xui8>' not in plain
