"""Mixtures, shards and stopping: which prompts there are, in which order."""

import collections
import itertools
import json

import ml_collections
import numpy as np
import pytest
import test_tokenizer
import toy

from bond_jax.data import examples, sources
from bond_jax.errors import UserError
from bond_jax.training.tasks import text_task

# Of each source: rows, weight, and of how many rows one is too long.
SIZES = {'chat': (40, 3.0, 4), 'maths': (9, 1.0, 3), 'verse': (23, 0.5, 99)}
LENGTH = 6


def texts(name, count, every):
  """Rows whose text says which they are; every `every`-th is too long."""
  return [
    {'text': f'{name}{i}' + ' long' * 9 * (i % every == every - 1), 'n': i}
    for i in range(count)
  ]


def encode(row):
  """A stand-in for a tokenizer: letters, and None for what is too long."""
  pieces = [ord(c) % 50 for c in row['text']]
  return pieces[-LENGTH:] if ' ' not in row['text'] else None


def mixture(names=tuple(SIZES), **weights):
  return sources.Mixture(
    {
      name: (texts(name, count, every), weights.get(name, weight))
      for name, (count, weight, every) in SIZES.items()
      if name in names
    }
  )


def plain():
  return texts('chat', *SIZES['chat'][::2])


MAKERS = {'plain': plain, 'mixture': mixture}


def stream(rows, batch=8, seed=0):
  return examples.prompts(rows, encode, length=LENGTH, batch=batch, seed=seed)


def ids(it, count):
  return np.concatenate([next(it).id for _ in range(count)])


def test_a_mixture_is_its_sources_one_after_the_other():
  rows = mixture()
  assert len(rows) == 40 + 9 + 23
  for i, row in enumerate(rows):
    name = 'chat' if i < 40 else 'maths' if i < 49 else 'verse'
    start = {'chat': 0, 'maths': 40, 'verse': 49}[name]
    assert row['source'] == name and row['n'] == i - start
    assert row['text'].startswith(f'{name}{i - start}')
  assert rows[-1] == rows[71] and rows[np.int32(40)]['n'] == 0
  with pytest.raises(IndexError):
    rows[72]


def test_an_id_is_the_row_that_the_prompt_is_made_of():
  rows = mixture()
  for prompts in itertools.islice(stream(rows), 30):
    for i, tokens, mask in zip(prompts.id, prompts.tokens, prompts.mask):
      assert tokens[mask].tolist() == encode(rows[i])


@pytest.mark.parametrize(
  'weights',
  [{}, {'chat': 1, 'maths': 1, 'verse': 1}, {'chat': 0.11, 'verse': 0.29}],
)
def test_weights_are_shares_of_the_prompts_that_are_left(weights):
  rows = mixture(**weights)
  total = sum(part.weight for part in rows.parts)
  batches = 25
  drawn = collections.Counter(
    rows[i]['source'] for i in ids(stream(rows), batches)
  )
  for part in rows.parts:
    expected = 8 * batches * part.weight / total
    # Taking turns, not drawing lots: no further off than by rounding.
    assert abs(drawn[part.name] - expected) < 1 + 0.01 * expected


def test_each_source_has_epochs_of_its_own():
  rows = mixture()
  drawn = ids(stream(rows), 60)
  for part in rows.parts:
    end = part.start + len(part.rows)
    own = drawn[(part.start <= drawn) & (drawn < end)]
    kept = [part.start + i for i, r in enumerate(part.rows) if encode(r)]
    epochs = [own[k : k + len(kept)] for k in range(0, len(own), len(kept))]
    assert len(epochs) > 2
    for epoch in epochs[:-1]:
      assert sorted(epoch) == kept
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_another_source_changes_no_order_but_the_turns():
  def of_verse(names, seed=0):
    rows = mixture(names, verse=3.0)
    start = next(p.start for p in rows.parts if p.name == 'verse')
    drawn = ids(stream(rows, seed=seed), 12) - start
    return drawn[drawn >= 0][:40].tolist()  # it is the last one

  alone = of_verse(['verse'])
  assert alone == of_verse(SIZES) == of_verse(['maths', 'verse'])
  assert len(alone) == 40 and alone != of_verse(['verse'], seed=1)


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS.keys())
def test_stopped_anywhere_it_goes_on_without_a_gap(make):
  """Stops at random places, in the middle of epochs."""
  rng = np.random.default_rng(0)
  rows = make()
  for seed in range(2):
    expected = ids(stream(rows, 4, seed), 30).reshape(30, 4)
    state, done, got = None, 0, []
    while done < 30:
      batches = stream(rows, 4, seed)
      if state is not None:
        ids(batches, int(rng.integers(1, 3)))  # used before it is set
        batches.set_state(json.loads(state))
      for _ in range(min(30 - done, int(rng.integers(1, 12)))):
        got.append(next(batches).id)
        done += 1
      state = json.dumps(batches.get_state())
    np.testing.assert_array_equal(got, expected)


def test_fixed_prompts_are_the_first_of_each_source_by_its_share():
  rows = mixture(chat=2, maths=1, verse=1)
  prompts = examples.fixed_prompts(rows, encode, length=LENGTH, count=16)
  # The 4th of every 4 chats and the 3rd of every 3 maths are too long.
  expected = {
    'chat': [0, 1, 2, 4, 5, 6, 8, 9],
    'maths': [0, 1, 3, 4],
    'verse': [0, 1, 2, 3],
  }
  found = collections.defaultdict(list)
  for i in prompts.id:
    found[rows[i]['source']].append(rows[i]['n'])
  assert found == expected
  with pytest.raises(UserError) as e:
    examples.fixed_prompts(rows, encode, length=LENGTH, count=32)
  assert str(e.value).startswith(
    "source 'maths' of the data has 6 distinct prompts of prompt.length 6; 32"
    ' are asked for of all sources.'
  )


def test_the_same_prompt_in_two_sources_is_fixed_once():
  same = [{'text': t} for t in 'abcd']
  rows = sources.Mixture({'a': (same, 1), 'b': ([*same, {'text': 'e'}], 1)})
  prompts = examples.fixed_prompts(rows, encode, length=LENGTH, count=4)
  # b's first is a's first, so b goes on to its second, and so on in turn.
  assert [rows[i]['text'] for i in prompts.id] == ['a', 'b', 'c', 'd']
  with pytest.raises(UserError, match="source 'a' .* has 2 distinct prompts"):
    examples.fixed_prompts(rows, encode, length=LENGTH, count=6)


def test_a_source_of_which_nothing_is_left_is_said():
  rows = sources.Mixture(
    {'chat': (plain(), 1.0), 'books': ([{'text': 'too long'}], 1.0)}
  )
  with pytest.raises(
    UserError, match="'books' of the data has no row that can"
  ):
    stream(rows)


def test_what_is_left_out_is_counted_and_said():
  counts = examples.count_left_out(mixture(), encode)
  assert counts == [
    ('chat', 40, 40, 10),
    ('maths', 9, 9, 3),
    ('verse', 23, 23, 0),
  ]
  assert examples.describe(counts, 'turn', 512, 'drop')[0] == (
    'data chat: 10 of 40 prompts are longer than prompt.length = 512 and left'
    ' out'
  )
  many = [examples.Count('', 2_345_678, 100_000, 1_234)]
  assert examples.describe(many, 'opening', 5, 'cut') == [
    'data: 1,234 of 100,000 prompts, a sample of 2,345,678, are not longer than'
    ' prompt.length = 5 and left out'
  ]
  (count,) = examples.count_left_out(plain(), encode, most=39)
  assert count[:3] == ('', 40, 39) and count.left_out in (9, 10)  # none twice


@pytest.mark.parametrize('weight', [0, -1.0, float('nan'), float('inf'), 'one'])
def test_a_wrong_weight_is_named(weight):
  with pytest.raises(UserError, match=r'data\.mix\.chat\.weight must be'):
    mixture(chat=weight)


@pytest.fixture
def config(tmp_path):
  """A run on two files and a part of a third, under other names."""
  config = toy.get_config(toy.folder())
  with open(tmp_path / 'x.jsonl', 'w') as f:
    for i in range(90):
      f.write(json.dumps({'question': 'The plot was ' + 'so ' * (i % 7)}))
      f.write('\n\n' if i % 9 == 0 else '\n')
  mix = dict(
    reviews=dict(name=config.data.name, weight=3.0),
    questions=dict(
      name=str(tmp_path / 'x.jsonl'),
      weight=1.0,
      fields=dict(text='question'),
      splits=dict(train='x[:50%]', validation='x[50%:]', test='x[50%:]'),
    ),
  )
  config.data.update(ml_collections.ConfigDict(dict(mix=mix)))
  return config


def test_a_config_mixes_sources(config):
  rows = sources.rows(config, 'validation')
  assert len(rows) == 45 + 60
  assert rows[0]['source'] == 'questions' and rows[0]['text'].startswith('The ')
  assert rows[45]['source'] == 'reviews' and 'rating' in rows[45]
  assert sources.empty_lines(rows) == 10
  config.data.mix.reviews.wait = 3
  with pytest.raises(
    UserError, match=r"data\.mix\.reviews: .*'wait'.* allowed"
  ):
    sources.rows(config, 'train')


@pytest.mark.parametrize(
  'longer, name, fate',
  [
    ('drop', 'prompts_left_out', 'left out'),
    ('cut', 'prompts_cut', 'cut on the left'),
  ],
)
def test_a_run_says_what_does_not_fit(config, capsys, longer, name, fate):
  tok = test_tokenizer.with_turns()
  encode = examples.encoder('text', tok, length=25, system=False)
  rows = sources.rows(config, 'train')
  prompt = ml_collections.ConfigDict(
    dict(kind='text', length=25, longer=longer)
  )
  facts = text_task.look_at(rows, encode, prompt)
  left_out = [
    sum(encode(row) is None for row in part.rows) for part in rows.parts
  ]
  assert 0 < left_out[0] < 45 and facts == {
    'prompts_looked_at': 345,
    name: sum(left_out),
    'bad_rows': 0,
    'empty_lines': 10,
  }
  end = f'prompts are longer than prompt.length = 25 and {fate}'
  assert capsys.readouterr().out.splitlines() == [
    f'data questions: {left_out[0]} of 45 {end}',
    f'data reviews: {left_out[1]} of 300 {end}',
    'data: 10 empty lines are skipped',
  ]
