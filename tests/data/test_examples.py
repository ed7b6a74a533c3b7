"""Batches: their layout, order, and going on where one was."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import test_tokenizer

from bond_jax.data import examples, tokenizer
from bond_jax.errors import UserError

TEXTS = [
  f'{who} {verb} the {what}, {n} times.'
  for who in ('Nobody', 'Everyone', 'The owner')
  for verb in ('loved', 'hated', 'forgot')
  for what in ('film', 'music', 'ending')
  for n in ('many', 'few')
] + ['No', 'Yes', '']


@pytest.fixture(scope='module')
def tok(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  return tokenizer.train(TEXTS, str(path), 90)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'reviews.jsonl'
  rows = ''.join(json.dumps({'text': t}) + '\n' for t in TEXTS)
  path.write_text(rows, encoding='utf-8')
  return str(path)


@pytest.fixture(scope='module')
def rows(path):
  return examples.source(path, 'train', '')


def openings(rows, tok, length, **kwargs):
  encode = examples.encoder('opening', tok, length=length, system=False)
  return examples.prompts(rows, encode, length=length, **kwargs)


def fixed(rows, tok, length, **kwargs):
  encode = examples.encoder('opening', tok, length=length, system=False)
  return examples.fixed_prompts(rows, encode, length=length, **kwargs)


def _assert_equal(a, b):
  for x, y in zip(a, b, strict=True):
    if isinstance(x, tuple):
      _assert_equal(x, y)
    else:
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)


def test_jsonl_rows_are_in_order(rows):
  assert [row['text'] for row in rows] == TEXTS


def test_split_may_be_part_of_the_name(tmp_path):
  for split in ('train', 'test'):
    (tmp_path / f'{split}.jsonl').write_text(json.dumps({'text': split}))
  name = str(tmp_path / '{split}.jsonl')
  assert examples.source(name, 'test', '')[0]['text'] == 'test'


@pytest.mark.parametrize(
  'content, line, why',
  [
    (b'{"text": "a"}\n{"text"\n', ':2', 'not JSON'),
    (b'{"text": "a"}\n\n{"text"', ':3', 'not JSON'),
    (b'{"text": "a"}\n{"txt": "b"}', ':2', 'a string "text"'),
    (b'{"text": 3}', ':1', 'a string "text"'),
    (b'["text"]', ', row 0', 'a string "text"'),
    (b'{"messages": "a"}', ':1', '"messages", a list'),
    (b'{"messages": [{"role": "user"}]}', ':1', '"messages", a list'),
    (b'{"text": "a"}\n{"text": "caf\xe9"}', ':2', 'UTF-8'),
    (b'', '', 'is empty'),
    (b'\n', '', 'is empty'),
  ],
)
def test_malformed_jsonl_is_named_with_its_line(tmp_path, content, line, why):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(content)
  with pytest.raises(UserError) as e:
    examples.source(str(path), 'train', '')
  assert str(e.value).startswith(f'{path}{line}')
  assert why in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'name, why',
  [
    ('nope.jsonl', 'cannot read nope.jsonl'),
    ('no_such_builder', 'neither a TFDS builder, installed or prepared'),
    ('movie_reviews', 'python -m bond_jax.movie_reviews --data_dir='),
  ],
)
def test_missing_data_is_one_line(tmp_path, name, why):
  with pytest.raises(UserError, match=why):
    examples.source(name, 'train', str(tmp_path))


def sentences(rows, tok, *, length, batch, seed):
  make = examples.sentence(tok, length)
  return examples.pairs(rows, make, length=length, batch=batch, seed=seed)


def test_sentences_hold_the_text_and_its_end(rows, tok):
  it = sentences(rows, tok, length=9, batch=8, seed=0)
  cut = 0
  for prompts, completion, mask in itertools.islice(it, 20):
    np.testing.assert_array_equal(prompts.tokens, np.full((8, 1), 2, np.int32))
    assert prompts.mask.all() and prompts.mask.dtype == bool
    assert completion.shape == mask.shape == (8, 1, 9)
    assert (completion.dtype, mask.dtype) == (np.int32, bool)
    assert (prompts.weight == 1).all() and prompts.weight.dtype == np.float32
    for i, row, ok in zip(prompts.id, completion[:, 0], mask[:, 0]):
      pieces = tok.encode(TEXTS[i]) + [tok.eos_id]
      cut += len(pieces) > 9
      assert row[ok].tolist() == pieces[:9]
      assert (row[~ok] == tok.pad_id).all()
      assert not (np.diff(ok.astype(int)) > 0).any()  # padded on the right
  assert cut  # or the test has not seen a cut sentence


def test_each_epoch_holds_each_row_once_in_a_new_order(rows, tok):
  n = len(TEXTS)  # 57 rows in batches of 8: batches span epochs
  it = sentences(rows, tok, length=8, batch=8, seed=0)
  ids = np.concatenate([next(it)[0].id for _ in range(3 * n // 8 + 1)])
  epochs = [ids[k * n : (k + 1) * n].tolist() for k in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(n))
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeds_give_other_orders_not_shifted_epochs(rows, tok):
  def ids(seed, count):
    it = sentences(rows, tok, length=8, batch=len(TEXTS), seed=seed)
    return [tuple(next(it)[0].id) for _ in range(count)]

  assert ids(0, 2) == ids(0, 2)
  assert not set(ids(0, 4)) & set(ids(1, 4))


def test_openings_leave_something_to_write(rows, tok):
  it = openings(rows, tok, 5, batch=8, seed=0)
  seen = set()
  for prompts in itertools.islice(it, 40):
    assert prompts.tokens.shape == (8, 5) and prompts.tokens.dtype == np.int32
    assert prompts.mask.all() and (prompts.weight == 1).all()
    for i, row in zip(prompts.id, prompts.tokens):
      pieces = tok.encode(TEXTS[i])
      assert len(pieces) > 4
      assert row.tolist() == [tok.bos_id, *pieces[:4]]
      seen.add(i)
  long = {i for i, t in enumerate(TEXTS) if len(tok.encode(t)) > 4}
  assert seen == long and len(long) < len(TEXTS)


def test_fixed_openings_are_distinct_and_in_order(rows, tok):
  prompts = fixed(rows, tok, 5, count=9)
  heads = [tuple(row) for row in prompts.tokens]
  assert len(set(heads)) == 9
  assert (np.diff(prompts.id) > 0).all()
  assert prompts.id[-1] > 8  # or the test has not seen a repeated opening
  for i, head in zip(prompts.id, heads):
    assert list(head) == [tok.bos_id, *tok.encode(TEXTS[i])[:4]]
    earlier = [tok.encode(t)[:4] for t in TEXTS[:i]]
    assert list(head[1:]) not in earlier  # the first of its kind


def test_too_few_openings_are_said(rows, tok):
  with pytest.raises(UserError, match='distinct prompts of prompt.length 7'):
    fixed(rows, tok, 7, count=1000)
  with pytest.raises(UserError, match='no row that can be used: none fits'):
    openings(rows, tok, 100, batch=8, seed=0)


def test_one_piece_must_be_left_to_write(tok):
  rows = [{'text': TEXTS[0]}]
  n = len(tok.encode(TEXTS[0]))
  fixed(rows, tok, n, count=1)
  with pytest.raises(UserError, match=f'0 distinct prompts of .* {n + 1}'):
    fixed(rows, tok, n + 1, count=1)


def test_prompts_are_padded_on_the_left(tok):
  texts = ['No', TEXTS[0], 'Yes']
  pieces = [[tok.bos_id, *tok.encode(t)] for t in texts]
  width = len(pieces[1])
  encode = examples.encoder('text', tok, length=width, system=False)
  rows = [{'text': t} for t in texts]
  prompts = examples.fixed_prompts(rows, encode, length=width, count=3)
  for row, mask, expected in zip(
    prompts.tokens, prompts.mask, pieces, strict=True
  ):
    pad = width - len(expected)
    assert row.tolist() == [tok.pad_id] * pad + expected
    assert mask.tolist() == [False] * pad + [True] * len(expected)
  np.testing.assert_array_equal(prompts.id, [0, 1, 2])


def test_longer_texts_are_left_out(tok):
  texts = ['No', TEXTS[0]]
  width = len(tok.encode(TEXTS[0]))  # and BOS is one more
  encode = examples.encoder('text', tok, length=width, system=False)
  assert encode({'text': 'No'}) == [tok.bos_id, *tok.encode('No')]
  assert encode({'text': TEXTS[0]}) is None
  it = examples.prompts(
    [{'text': t} for t in texts], encode, length=width, batch=2, seed=0
  )
  assert next(it).id.tolist() == [0, 0]


def test_longer_texts_are_cut_on_the_left_if_asked(tok):
  """BOS stays, and the end; what is not longer is not touched."""
  pieces = tok.encode(TEXTS[0])
  for length in (1, 2, len(pieces), len(pieces) + 1):
    encode = examples.encoder(
      'text', tok, length=length, system=False, longer='cut'
    )
    found = encode({'text': TEXTS[0]})
    assert found[0] == tok.bos_id and len(found) == length
    assert found[1:] == pieces[len(pieces) - length + 1 :]
  assert encode({'text': 'No'}) == [tok.bos_id, *tok.encode('No')]
  with pytest.raises(UserError, match="longer is 'left'; known are drop, cut"):
    examples.encoder('text', tok, length=3, system=False, longer='left')


def test_turns_come_from_messages_or_from_a_text():
  tok = test_tokenizer.with_turns()
  encode = examples.encoder('turn', tok, length=99, system=True)
  messages = [{'role': 'user', 'content': 'The film?'}]
  expected = tokenizer.chat(tok, messages, system=True)
  assert encode({'text': 'The film?'}) == expected
  assert encode({'messages': messages, 'text': 'no'}) == expected
  messages = [{'role': 'system', 'content': 'Be short.'}, *messages]
  assert len(encode({'messages': messages})) > len(expected)
  with pytest.raises(UserError, match='no system turn'):
    examples.encoder('turn', tok, length=99, system=False)(
      {'messages': messages}
    )
  short = examples.encoder('turn', tok, length=len(expected) - 1, system=True)
  assert short({'text': 'The film?'}) is None
  with pytest.raises(UserError, match="take 'turn' for messages"):
    examples.encoder('text', tok, length=99, system=True)(
      {'messages': messages}
    )


@pytest.mark.parametrize(
  'kind, length, why',
  [('text', 0, 'must be 1 or more'), ('turns', 5, 'opening, text, turn')],
)
def test_wrong_settings_are_named(tok, kind, length, why):
  with pytest.raises(UserError, match=why):
    examples.encoder(kind, tok, length=length, system=False)


MAKERS = {
  'sentences': lambda rows, tok: sentences(
    rows, tok, length=16, batch=8, seed=3
  ),
  'openings': lambda rows, tok: openings(rows, tok, 5, batch=8, seed=3),
}


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS.keys())
def test_restored_iterator_goes_on(rows, tok, make):
  it = make(rows, tok)
  for _ in range(10):
    next(it)
  state = json.loads(json.dumps(it.get_state()))
  expected = [next(it) for _ in range(10)]
  other = make(rows, tok)
  next(other)
  other.set_state(state)
  _assert_equal([next(other) for _ in range(10)], expected)


@pytest.mark.long
def test_restored_in_another_process(path, rows, tok, tmp_path):
  (tmp_path / 'tok.model').write_bytes(tok.processor.serialized_model_proto())
  it = MAKERS['openings'](rows, tok)
  for _ in range(10):
    next(it)
  script = f"""
import json
from bond_jax.data import examples as data
from bond_jax.data import tokenizer
tok = tokenizer.load({str(tmp_path / 'tok.model')!r})
encode = data.encoder('opening', tok, length=5, system=False)
it = data.prompts(data.source({path!r}, '', ''), encode,
                  length=5, batch=8, seed=3)
it.set_state(json.loads({json.dumps(it.get_state())!r}))
print(json.dumps(next(it).tokens.tolist()))
"""
  out = subprocess.check_output([sys.executable, '-c', script], text=True)
  assert json.loads(out.splitlines()[-1]) == next(it).tokens.tolist()


@pytest.mark.long
def test_no_tensorflow(path):
  script = f"""
import sys
from bond_jax.data import examples as data
data.source({path!r}, '', '')
assert not [m for m in sys.modules if m.split('.')[0] == 'tensorflow']
"""
  subprocess.run([sys.executable, '-c', script], check=True)


@pytest.mark.parametrize('kind', ['opening', 'text', 'turn'])
def test_a_pair_alone_is_no_prompt(kind):
  tok = test_tokenizer.with_turns()
  encode = examples.encoder(kind, tok, length=9, system=False)
  row = {'chosen': 'a', 'rejected': 'b'}
  with pytest.raises(UserError, match=r'a row has (no text|neither messages)'):
    encode(row)
  with pytest.raises(UserError, match='a row has no text, which sft.target'):
    next(sentences([row], tok, length=9, batch=1, seed=0))


def test_answers_come_after_their_prompts():
  """In turns, and ended as a drawn answer ends; longer ones are cut."""
  tok = test_tokenizer.with_turns()
  rows = [{'text': t, 'completion': t[::-1]} for t in TEXTS if t]
  rows += [{'text': 'The film ' * 40, 'completion': 'too long a prompt'}]
  encode = examples.encoder('turn', tok, length=48, system=False)
  make = examples.answer(encode, tok, 12)
  settings = dict(prompt_length=48, length=12, batch=5, seed=3)
  batches = examples.pairs(rows, make, **settings)
  seen = []
  for _ in range(11):
    prompts, completion, mask = next(batches)
    assert completion.shape == mask.shape == (5, 1, 12)
    for b, i in enumerate(prompts.id):
      seen.append(i)
      assert prompts.tokens[b][prompts.mask[b]].tolist() == encode(rows[i])
      whole = [*tok.encode(rows[i]['completion']), tok.end_of_turn]
      assert completion[b][mask[b]].tolist() == whole[:12]
      assert (completion[b][~mask[b]] == tok.pad_id).all()
  assert len(set(seen)) == 55 == len(rows) - 2  # of 56 prompts, by fives
  # The same prompts in the same order as the train stage would see.
  others = examples.prompts(rows, encode, length=48, batch=5, seed=3)
  assert [i for _ in range(11) for i in next(others).id] == seen
  with pytest.raises(
    UserError, match="'completion'; its fields are text. Name"
  ):
    next(examples.pairs([{'text': 'a'}] * 9, make, **settings))


def test_an_answer_without_turns_ends_with_eos(tok):
  rows = [{'text': 'The film', 'completion': 'loved'}]
  encode = examples.encoder('text', tok, length=20, system=False)
  make = examples.answer(encode, tok, 20)
  prompts, completion, mask = next(
    examples.pairs(rows, make, prompt_length=20, length=20, batch=2, seed=0)
  )
  assert completion[0][mask[0]].tolist() == [*tok.encode('loved'), tok.eos_id]
  assert prompts.tokens[0][prompts.mask[0]].tolist() == encode(rows[0])
