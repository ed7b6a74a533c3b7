"""What rows say, however they are written: nulls, parts, transcripts."""

import functools
import math

import pyarrow as pa
import pyarrow.parquet
import pytest
from test_sources import says, write
import test_tokenizer

from bond_jax.data import examples, preferences, sources
from bond_jax.errors import BadRow

turn = lambda role, content: {'role': role, 'content': content}
HI, MORE, YES = (
  turn('user', 'hi'),
  turn('user', 'and'),
  turn('assistant', 'yes'),
)
TRANSCRIPTS = {
  'chosen': '\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and\n\nAssistant: a b',
  'rejected': '\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and\n\nAssistant: no',
}


@pytest.fixture(scope='module')
def tok():
  return test_tokenizer.with_turns()


def read(tmp_path, *rows, **how):
  return sources.source(write(tmp_path / 'x.jsonl', *rows), 'train', '', **how)


def judged(rows, tok, turns):
  pair = functools.partial(
    preferences.pairs_of, min_gap=0.1, partners=1, seed=0
  )
  return preferences.read(
    rows, 'train', tok, turns=turns, system=False, length=99, pair=pair
  )


# -- Null is absent


@pytest.mark.parametrize('null', [None, math.nan, []])
@pytest.mark.parametrize(
  'row, nulls',
  [
    ({'text': 'one'}, ('messages', 'prompt', 'chosen', 'rejected')),
    ({'messages': [HI]}, ('text', 'prompt', 'conversations', 'completion')),
    ({'prompt': 'one'}, ('text', 'messages')),
    ({'prompt': [HI]}, ('text', 'messages', 'conversations')),
    ({'conversations': [HI]}, ('text', 'messages', 'prompt')),
    ({'chosen': 'a', 'rejected': 'b'}, ('text', 'messages', 'margin')),
    ({'text': 'a', 'chosen': 'b', 'rejected': 'c'}, ('messages', 'rating')),
    ({'text': 'a', 'rating': 1.5}, ('messages', 'chosen', 'rejected')),
    (TRANSCRIPTS, ('text', 'messages', 'prompt')),
  ],
)
def test_a_null_is_as_if_it_were_not_there(tmp_path, tok, row, nulls, null):
  (plain,) = read(tmp_path, row)
  (found,) = rows = read(tmp_path, {**dict.fromkeys(nulls, null), **row})
  assert found == plain
  # A row that is nobody's, as the readers of rows may get it.
  bare = {**dict.fromkeys(nulls), **plain}
  assert preferences.texts(bare) == preferences.texts(plain)
  if 'chosen' in row:
    texts = judged(rows, tok, turns=False).texts
    assert judged([bare], tok, turns=False).texts == texts
  if {'text', 'messages'} & set(plain):
    encode = examples.encoder('turn', tok, length=99, system=False)
    assert encode(bare) == encode(plain)
    assert examples.last_words(bare) == examples.last_words(plain)


def test_files_with_different_columns_are_one_source(tmp_path):
  tables = {'text': ['one', 'two']}, {'messages': [[HI]]}
  for name, table in zip('ab', tables, strict=True):
    pa.parquet.write_table(pa.table(table), tmp_path / f'{name}.parquet')
  rows = sources.source(f'{tmp_path}/*.parquet', 'train', '')
  assert list(rows) == [{'text': 'one'}, {'text': 'two'}, {'messages': [HI]}]


def test_a_null_is_not_among_the_fields_that_a_row_has(tmp_path):
  for more in {}, {'messages': None}, {'chosen': None, 'id': None}:
    row = {'text': None, 'other': 1, **more}
    says(lambda row=row: read(tmp_path, row), 'it has other. data.fields')
  # What is not ours is for rewards, which may know what its null means.
  assert read(tmp_path, {'text': 'a', 'answer': None})[0]['answer'] is None


@pytest.mark.parametrize('kind', ['opening', 'text'])
def test_a_text_that_is_needed_is_missed_with_its_place(tmp_path, tok, kind):
  rows = read(tmp_path, {'text': 'a'}, {'text': None, 'messages': [HI]})
  encode = examples.encoder(kind, tok, length=1, system=False)
  line = says(lambda: list(sources.each(rows, encode)), 'a row has no text')
  assert line.startswith(f'{tmp_path}/x.jsonl:2: ')


# -- Messages in other words


@pytest.mark.parametrize(
  'messages',
  [
    [turn('user', [{'type': 'text', 'text': 'hi'}])],
    [turn('user', [{'type': 'text', 'text': ' h', 'image': None},
                   {'type': 'text', 'text': 'i\n'}])],
    [turn('user', [{'text': 'hi'}])],
    {'role': ['user'], 'content': ['hi']},
    {'role': ['user'], 'content': [{'type': ['text'], 'text': ['hi']}]},
    [{'from': 'human', 'value': 'hi'}],
    [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'yes'}],
  ],
)  # fmt: skip
@pytest.mark.parametrize('field', ['messages', 'prompt', 'conversations'])
def test_each_way_to_write_a_turn_is_the_turn(tmp_path, messages, field):
  assert read(tmp_path, {field: messages})[0]['messages'] == [HI]
  fields = {'messages': 'theirs'}
  found = read(tmp_path, {'theirs': messages}, fields=fields)[0]
  assert found['messages'] == [HI]


@pytest.mark.parametrize(
  'messages, why',
  [
    ([HI, turn('user', [{'type': 'image', 'url': 'x'}])], 'messages[1] has a'),
    ([turn('user', ['hi'])], "a part 'hi'"),
    ([turn('user', None)], 'content of messages[0] is None'),
    ([turn(None, 'hi')], 'role of messages[0] is None'),
    ([HI, 'hi'], "messages[1] is 'hi'"),
    (HI, "it is {'role': 'user'"),
    ({'role': ['user'], 'content': []}, "it is {'role'"),
    ([{'from': 'human', 'value': None}], 'content of messages[0] is None'),
    ([{'from': ['human'], 'value': 'hi'}], "role of messages[0] is ['human']"),
    ([{'from': 'gpt', 'value': 'hi'}], 'no turn of a user'),
  ],
)
def test_what_is_no_turn_is_named_with_its_place(tmp_path, messages, why):
  line = says(
    lambda: read(tmp_path, {'text': 'a'}, {'messages': messages}), why
  )
  assert line.startswith(f'{tmp_path}/x.jsonl:2: ')


def test_answers_are_read_and_refused_as_messages_are(tmp_path, tok):
  pair = lambda said: {'text': 'hi', 'chosen': said, 'rejected': [YES]}
  for said in (
    [turn('assistant', [{'type': 'text', 'text': 'no'}])],
    [{'from': 'gpt', 'value': 'no'}],
    {'role': ['assistant'], 'content': ['no']},
  ):
    rows = read(tmp_path, pair(said))
    assert rows[0]['chosen'] == [turn('assistant', 'no')]
    assert judged(rows, tok, turns=True).texts == ['no', 'yes']
  wrong = pair([turn('assistant', [{'type': 'image'}])])
  says(lambda: read(tmp_path, wrong), 'x.jsonl:1: ', 'chosen[0] has a part')


def test_sharegpt_s_last_answer_is_no_prompt(tmp_path):
  said = [('system', 'Be brief.'), ('human', 'hi'), ('gpt', 'yes')]
  turns = lambda some: {
    'conversations': [{'from': who, 'value': text} for who, text in some]
  }
  rows = read(
    tmp_path,
    turns(said),
    turns([*said, ('human', 'and')]),
    {**turns(said), 'completion': 'mine'},
    turns([*said, ('gpt', 'more')]),
  )
  system = turn('system', 'Be brief.')
  assert list(rows) == [
    {'messages': [system, HI], 'completion': 'yes'},
    {'messages': [system, HI, YES, MORE]},
    {'messages': [system, HI], 'completion': 'mine'},
    {'messages': [system, HI]},  # of two answers neither is the one
  ]


# -- Transcripts of HH-RLHF


def test_transcripts_hold_a_prompt_and_two_answers(tmp_path, tok):
  rows = read(tmp_path, TRANSCRIPTS)
  asked = [HI, YES, MORE]
  assert rows[0] == {'messages': asked, **TRANSCRIPTS}
  plain = [{'messages': asked, 'chosen': 'a b', 'rejected': 'no'}]
  got, expected = (judged(x, tok, turns=True) for x in (rows, plain))
  assert got.texts == expected.texts == ['a b', 'no']
  assert got.pieces == expected.pieces
  # Whole texts, where there are no turns; nothing is in the vocabulary twice.
  whole = [*TRANSCRIPTS.values()]
  assert judged(rows, tok, turns=False).texts == whole
  assert preferences.texts(rows[0]) == whole


@pytest.mark.parametrize(
  'changes',
  [
    {'rejected': '\n\nHuman: ho\n\nAssistant: no'},
    {'chosen': '\n\nHuman: hi', 'rejected': '\n\nHuman: ho'},
    {'chosen': 'Human: hi\n\nAssistant: yes'},
  ],
)
def test_other_pairs_of_texts_hold_no_prompt(tmp_path, tok, changes):
  rows = read(tmp_path, {**TRANSCRIPTS, **changes})
  assert rows[0] == {**TRANSCRIPTS, **changes}
  encode = examples.encoder('turn', tok, length=99, system=False)
  with pytest.raises(BadRow, match='there is no prompt in it'):
    encode(rows[0])


@pytest.mark.parametrize('prompt', [{'text': 'x'}, {'messages': [HI]}])
def test_transcripts_beside_a_prompt_are_answers(tmp_path, tok, prompt):
  rows = read(tmp_path, {**prompt, **TRANSCRIPTS})
  assert rows[0] == {**prompt, **TRANSCRIPTS}
  got = judged(rows, tok, turns=True)
  assert got.texts == [*TRANSCRIPTS.values()]
