"""Text to pieces and back."""

import io
import json
import os
import shutil

import pytest
import sentencepiece

from bond_jax.data import tokenizer
from bond_jax.errors import UserError

TEXTS = [
  f'{who} {verb} the {what}, and {n} times more.'
  for who in ('Nobody', 'Everyone', 'A café owner')
  for verb in ('loved', 'hated', 'forgot')
  for what in ('film', 'music', 'ending', 'popcorn')
  for n in (3, 14)
]


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  tokenizer.train(TEXTS, str(path), 96)
  return str(path)


def test_control_ids_are_those_of_gemma(path):
  tok = tokenizer.load(path)
  assert (tok.pad_id, tok.eos_id, tok.bos_id, tok.unk_id) == (0, 1, 2, 3)
  assert tok.vocab_size == 96
  assert tok.processor.id_to_piece([0, 1, 2, 3]) == [
      '<pad>', '</s>', '<s>', '<unk>',
  ]  # fmt: skip


def test_text_survives(path):
  tok = tokenizer.load(path)
  for text in TEXTS + ['the  film ', ' café']:
    ids = tok.encode(text)
    assert not {0, 1, 2, 3} & set(ids)
    assert tok.decode(ids) == text
    assert tok.decode([2, *ids, 1, 0, 0]) == text


def test_text_may_be_cut_between_any_two_pieces(path):
  tok = tokenizer.load(path)
  ids = tok.encode(TEXTS[0])
  for i in range(len(ids) + 1):
    assert tok.decode(ids[:i]) + tok.decode(ids[i:]) == TEXTS[0]


def test_unknown_characters_become_unk(path):
  tok = tokenizer.load(path)
  assert tok.unk_id in tok.encode('日')
  assert tok.decode(tok.encode('日')).strip()


def test_same_sentences_give_the_same_file(path, tmp_path):
  again = tokenizer.train(iter(TEXTS), str(tmp_path / 'a' / 'b.model'), 96)
  assert again.sha256 == tokenizer.load(path).sha256
  other = tokenizer.train(TEXTS[:12], str(tmp_path / 'c.model'), 64)
  assert other.sha256 != again.sha256
  assert sorted(os.listdir(tmp_path)) == ['a', 'c.model']


def test_ensure_trains_once(tmp_path):
  path = str(tmp_path / 'tokenizer.model')
  first = tokenizer.ensure(path, iter(TEXTS), 80)

  def untouched():
    raise AssertionError('read again')
    yield

  assert tokenizer.ensure(path, untouched(), 80).sha256 == first.sha256
  with pytest.raises(UserError, match='has 80 pieces, the config asks for 81'):
    tokenizer.ensure(path, untouched(), 81)


# What lies in a folder -> what is said of it.
BROKEN = {
  'empty': ({'tokenizer.model': b''}, 'not a SentencePiece model'),
  'text': ({'tokenizer.model': b'not a model'}, 'not a SentencePiece model'),
  'bytes': ({'tokenizer.model': b'\n\x80' * 40}, 'not a SentencePiece model'),
  'nothing': ({}, 'cannot read the tokenizer'),
  'tokenizer.json': ({'tokenizer.json': b'{}'}, 'json is in the format of'),
}


@pytest.mark.parametrize('what', BROKEN)
def test_what_is_no_vocabulary_is_one_line(tmp_path, what):
  """By its file or its folder. Nobody is told to delete somebody's file."""
  files, says = BROKEN[what]
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  for path in (tmp_path, tmp_path / 'tokenizer.model', *tmp_path.iterdir()):
    with pytest.raises(UserError, match=says) as e:
      tokenizer.load(str(path))
    assert 'tokenizer.model of the original release' in str(e.value)
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)
    assert 'elete' not in str(e.value) and 'sft' not in str(e.value)


@pytest.mark.parametrize('what', ['empty', 'text', 'bytes'])
def test_a_run_s_own_vocabulary_has_another_remedy(tmp_path, what):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(BROKEN[what][0]['tokenizer.model'])
  with pytest.raises(UserError, match='not a SentencePiece .*--workdir') as e:
    tokenizer.ensure(str(path), iter(TEXTS), 80)
  assert 'release' not in str(e.value) and 'elete' not in str(e.value)


def test_a_folder_that_holds_the_file(path):
  folder = os.path.dirname(path)
  assert tokenizer.load(folder).sha256 == tokenizer.load(path).sha256
  assert tokenizer.find(folder) == tokenizer.find(path) == path


@pytest.mark.parametrize(
  'added, says',
  [
    ([(2, '<s>'), (96, '<image_soft_token>'), (300, '<more>')], None),
    ([(40, '\t')], None),  # as the writers of tokenizer.json do
    ([(1, '</s>'), (4, '<think>')], "'<think>' as piece 4"),
    (None, 'cannot read .*tokenizer.json'),
    ([([], 'y')], 'cannot read .*tokenizer.json'),
  ],
)
def test_a_folder_with_two_vocabularies(path, tmp_path, added, says):
  """They must agree, because transformers would take the other one."""
  shutil.copy(path, tmp_path / 'tokenizer.model')
  rows = [{'id': i, 'content': x} for i, x in added or ()]
  text = 'no JSON' if added is None else json.dumps({'added_tokens': rows})
  (tmp_path / 'tokenizer.json').write_text(text)
  named = tokenizer.load(str(tmp_path / 'tokenizer.model'))
  if says is None:
    assert tokenizer.load(str(tmp_path)).sha256 == named.sha256
  else:
    with pytest.raises(UserError, match=says) as e:
      tokenizer.load(str(tmp_path))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('texts, size', [(TEXTS, 9), (TEXTS, 9999), ([], 96)])
def test_impossible_vocabulary_is_one_line(tmp_path, texts, size):
  with pytest.raises(UserError) as e:
    tokenizer.train(texts, str(tmp_path / 'x.model'), size)
  assert f'vocabulary of {size} pieces' in str(e.value)
  assert '\n' not in str(e.value)
  assert not os.listdir(tmp_path)


# -- turns --------------------------------------------------------------------

HELLO = [
  {'role': 'user', 'content': ' The film?\n'},
  {'role': 'assistant', 'content': 'Everyone loved it.'},
  {'role': 'user', 'content': 'And the music?'},
]


def with_turns(
  *before: str, marks=('<start_of_turn>', '<end_of_turn>')
) -> tokenizer.Tokenizer:
  """A vocabulary in which turns have pieces of their own, after `before`."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, model_type='bpe',
    vocab_size=120, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    normalization_rule_name='identity', add_dummy_prefix=False,
    remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    user_defined_symbols=[*before, *marks, '\n', '\n\n'],
  )  # fmt: skip
  return tokenizer.parse(model.getvalue(), 'turns')


@pytest.mark.parametrize('before', [(), ('<one>',)])
def test_turn_ids_are_looked_up(before):
  tok = with_turns(*before)
  assert tok.start_of_turn == 4 + len(before)
  assert tok.end_of_turn == 5 + len(before)
  assert tok.stop_ids == (1, 5 + len(before))


def test_a_vocabulary_without_turns(path):
  tok = tokenizer.load(path)
  assert (tok.start_of_turn, tok.end_of_turn) == (None, None)
  assert tok.stop_ids == (1,)
  with pytest.raises(UserError, match='no pieces <start_of_turn>'):
    tokenizer.chat(tok, HELLO, system=False)


def test_turns_are_the_official_text():
  tok = with_turns()
  text = (
    '<start_of_turn>user\nThe film?<end_of_turn>\n'
    '<start_of_turn>model\nEveryone loved it.<end_of_turn>\n'
    '<start_of_turn>user\nAnd the music?<end_of_turn>\n'
    '<start_of_turn>model\n'
  )
  ids = tokenizer.chat(tok, HELLO, system=False)
  assert ids == [tok.bos_id, *tok.encode(text)]
  assert ids.count(tok.bos_id) == 1
  turns = [m | {'role': m['role'].replace('assistant', 'model')} for m in HELLO]
  assert tokenizer.chat(tok, turns, system=False) == ids


def test_the_system_speaks_before_the_user_or_not_at_all():
  tok = with_turns()
  messages = [{'role': 'system', 'content': 'Be short. '}, *HELLO]
  ids = tokenizer.chat(tok, messages, system=True)
  start = '<start_of_turn>user\nBe short.\n\nThe film?<end_of_turn>\n'
  start = [tok.bos_id, *tok.encode(start)]
  assert ids[: len(start)] == start
  rest = tokenizer.chat(tok, HELLO, system=True)
  assert ids[len(start) :] == rest[rest.index(tok.end_of_turn) + 2 :]
  with pytest.raises(UserError, match='no system turn'):
    tokenizer.chat(tok, messages, system=False)


def test_gemma_4_marks_turns_in_its_own_way():
  """A system has a turn; nothing else changes."""
  tok = with_turns(marks=('<|turn>', '<turn|>'))
  assert tok.stop_ids == (1, 5)
  messages = [{'role': 'system', 'content': 'Be short. '}, *HELLO]
  text = (
    '<|turn>system\nBe short.<turn|>\n<|turn>user\nThe film?<turn|>\n'
    '<|turn>model\nEveryone loved it.<turn|>\n'
    '<|turn>user\nAnd the music?<turn|>\n<|turn>model\n'
  )
  ids = tokenizer.chat(tok, messages, system=False)
  assert ids == tokenizer.chat(tok, messages, system=True)
  assert ids == [tok.bos_id, *tok.encode(text)]
  assert 'turn' not in tok.decode(ids)
  with pytest.raises(UserError, match='must take turns'):
    tokenizer.chat(tok, [messages[0], messages[0], *HELLO], system=False)


@pytest.mark.parametrize(
  'messages', [[], HELLO[:2], HELLO[1:], [HELLO[0], HELLO[0], HELLO[0]]]
)
def test_turns_must_alternate(messages):
  with pytest.raises(UserError, match='must take turns'):
    tokenizer.chat(with_turns(), messages, system=True)


def test_what_controls_is_not_text():
  tok = with_turns()
  ids = [2, 4, *tok.encode('the film'), 5, 1, 0]
  assert tok.decode(ids) == 'the film'


def test_another_vocabulary_is_named(path):
  right = tokenizer.load(path).sha256
  assert tokenizer.load(path, right).sha256 == right
  with pytest.raises(UserError, match=f'has the sha256 {right}.*another model'):
    tokenizer.load(path, 'f' * 64)
