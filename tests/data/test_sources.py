"""Rows: from every kind of place, under our names, or one line about them."""

import functools
import gzip
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import toy

from bond_jax.data import examples as data
from bond_jax.data import sources, tokenizer
from bond_jax.devices import sharding
from bond_jax.errors import BadRow, UserError
from bond_jax.training.tasks import text_task

FEATURES = {
  'document': tfds.features.Text(),
  'summary': tfds.features.Text(),
  'number': np.int32,
  'raw': tfds.features.Tensor(shape=(), dtype=np.object_),
  'tags': tfds.features.Sequence(tfds.features.Text()),
  'talk': tfds.features.Sequence(
    {'role': tfds.features.Text(), 'content': tfds.features.Text()}
  ),
}
TALK = [
  {'role': 'user', 'content': 'Où?'},
  {'role': 'assistant', 'content': 'Hier.'},
  {'role': 'user', 'content': '何?'},
]
# What the hub's preference data look like: answers repeat the conversation.
PAIRS = [
  {
    'prompt': f'Question {i}, “quoted”?',
    'chosen': [
      {'role': 'user', 'content': f'Question {i}, “quoted”?'},
      {'role': 'assistant', 'content': f'good {i}'},
    ],
    'rejected': [
      {'role': 'user', 'content': f'Question {i}, “quoted”?'},
      {'role': 'assistant', 'content': f'bad {i}'},
    ],
    'messages': [
      {'role': 'user', 'content': f'Question {i}, “quoted”?'},
      {'role': 'assistant', 'content': f'good {i}'},
    ],
    'score_chosen': i + 0.5,
  }
  for i in range(7)
]


class SmallNews(tfds.core.GeneratorBasedBuilder):
  """A builder that is nobody's but this test's."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict(FEATURES)
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(20), 'test': [(0, news(99))]}

  def _generate_examples(self, count):
    return ((i, news(i)) for i in range(count))


def news(i):
  return dict(
    document=f'Café number {i}.', summary=f'№ {i}', number=i, raw=b'\xff\xfe',
    tags=['a', 'ß'], talk=TALK,
  )  # fmt: skip


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  tfds.disable_progress_bar()
  builder = SmallNews(data_dir=str(folder), file_format='array_record')
  builder.download_and_prepare()
  return str(folder)


def says(call, *parts):
  """Calls, expects one line of error with all the parts, and returns it."""
  with pytest.raises(UserError) as e:
    call()
  line = str(e.value)
  assert '\n' not in line
  for part in parts:
    assert part in line
  return line


def write(path, *rows):
  path.write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows))
  return str(path)


def test_any_builder_with_the_text_under_any_name(data_dir):
  fields = dict(text='document', completion='summary')
  rows = sources.source('small_news', 'train', data_dir, fields=fields)
  found = sorted((rows[i] for i in range(len(rows))), key=lambda r: r['number'])
  assert [row['text'] for row in found] == [
    news(i)['document'] for i in range(20)
  ]
  for i, row in enumerate(found):
    assert set(row) == {
      'text', 'completion', 'number', 'raw', 'tags', 'talk'
    }  # fmt: skip
    assert row['completion'] == f'№ {i}' and row['raw'] == b'\xff\xfe'
    assert row['tags'] == ['a', 'ß'] and row['talk'] == TALK
  talks = sources.source(
    'small_news:1.0.0', 'test', data_dir, fields={'messages': 'talk'}
  )
  assert len(talks) == 1 and talks[0]['messages'] == TALK
  assert talks[0]['document'] == 'Café number 99.'


def test_a_builder_without_its_code_and_without_tensorflow(data_dir):
  script = f"""
import sys
from bond_jax.data import sources
rows = sources.source('small_news', 'train', {data_dir!r},
                      fields=dict(text='document'))
assert rows[3]['text'].startswith('Café')
assert 'tensorflow' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', script], check=True)


def test_what_is_wrong_with_a_builder_is_one_line(data_dir, tmp_path):
  read = lambda name, split='train', folder=data_dir, **fields: (
    lambda: sources.source(name, split, folder, fields=fields)
  )
  says(read('no_such_thing'), 'no_such_thing', 'neither a TFDS builder')
  says(read('small_news', 'val', text='summary'), "split 'val'", 'test, train')
  line = says(read('small_news'), 'small_news, row 0', 'string "text"')
  assert 'document, number' in line  # what there is
  says(read('small_news', text='doc'), "no field 'doc'", 'document')
  says(read('small_news', text='raw'), 'row 0', 'not UTF-8')
  says(read('small_news', text='number'), 'row 0', 'string "text"')
  shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
  info = next(tmp_path.rglob('dataset_info.json'))
  # As a builder is prepared unless one asks for another format.
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  says(
    read('small_news', folder=str(tmp_path), text='document'),
    'as tfrecord',
    "file_format='array_record').download_and_prepare()",
  )
  info.unlink()
  says(
    read('small_news', folder=str(tmp_path / 'no')),
    'small_news',
    "file_format='array_record').download_and_prepare()",
  )


@pytest.mark.long
def test_a_hundred_thousand_lines(tmp_path):
  """Unicode, empty lines, two files; rows are where they were written."""
  count, files = 0, []
  for name in ('b', 'a'):  # the names decide the order, not the clock
    lines = []
    for i in range(50_000):
      if i % 1000 == 7:
        lines.append('  ' if i % 2000 == 7 else '')
      text = f'{name} {i}: naïve 漢字 🙂 ' + 'long ' * (i % 5000 == 0) * 400
      lines.append(json.dumps({'text': text}, ensure_ascii=i % 2 == 0))
    files.append(tmp_path / f'{name}.train.jsonl')
    files[-1].write_text('\n'.join(lines), encoding='utf-8')
    count += len(lines) - 50
  rows = sources.source(f'{tmp_path}/*.{{split}}.jsonl', 'train', '')
  assert len(rows) == count == 100_000
  assert sources.empty_lines(rows) == 100
  for i in (0, 1, 7, 8, 1008, 49_999, 50_000, 50_007, 65_000, 99_999):
    name, number = 'ab'[i // 50_000], i % 50_000
    start = f'{name} {number}: naïve 漢字 🙂 '
    text = rows[i]['text']
    assert text.startswith(start)
    assert len(text) == len(start) + 2000 * (number % 5000 == 0)
  assert rows[-1] == rows[99_999]
  encode = lambda row: [1] * len(row['text']) if len(row['text']) < 99 else None
  some = [rows[i] for i in range(0, 100_000, 5)]
  assert data.count_left_out(some, encode) == [('', 20_000, 20_000, 20)]
  with pytest.raises(IndexError):
    rows[100_000]


def test_a_file_may_change_while_its_rows_are_used(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "a"}\n\n{"text": "b", "n": 1}\n')
  rows = sources.source(str(path), 'train', '')
  path.write_bytes(b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}\n')
  assert rows[1] == {'text': 'b', 'n': 1} and rows[1] is not rows[1]


@pytest.mark.parametrize(
  'content, place, why',
  [
    (b'\n{"text": "a"}\r\n \n{"text"', ':4', 'not JSON'),
    (b'\n{"text": "caf\xe9"}', ':2', 'not JSON in UTF-8'),
    (rb'{"text": "a \ud83d"}', ':1', 'surrogates'),
    (b'[' * 100_000, ': ', 'not JSON'),
    (b'{"txt": "a"}', ':1', 'it has txt'),
    (b'{"messages": []}', ':1', '"messages", a list'),
    (b'{"text": "a", "chosen": "b"}', ':1', '"chosen" and "rejected"'),
    (
      b'{"text": "", "chosen": "", "rejected": [{"role": "", "content": ""}]}',
      ':1',
      'both be strings or both be messages',
    ),
    (b' \n\r\n', ' is empty', 'one {"text": ...} per line'),
  ],
)
def test_a_bad_line_is_named_in_its_file(tmp_path, content, place, why):
  write(tmp_path / 'a.jsonl', {'text': 'fine'})
  (tmp_path / 'b.jsonl').write_bytes(content)
  line = says(lambda: sources.source(f'{tmp_path}/?.jsonl', '', ''), why)
  assert line.startswith(f'{tmp_path}/b.jsonl{place}')


def test_fields_are_renamed_and_unknown_ones_named(tmp_path):
  path = write(tmp_path / 'a.jsonl', *PAIRS)
  rows = sources.source(path, '', '', fields={'text': 'prompt'})
  # Their messages hold the answer as well: they are not the prompt.
  assert set(rows[2]) == {'text', 'chosen', 'rejected', 'score_chosen'}
  assert rows[2]['text'] == PAIRS[2]['prompt']
  fields = {'answer': 'score_chosen'}
  assert sources.source(path, '', '', fields=fields)[2] == {
    'answer': 2.5,
    **{k: v for k, v in PAIRS[2].items() if k != 'score_chosen'},
  }
  both = {'text': 'prompt', 'messages': 'chosen', 'answer': 'prompt'}
  row = sources.source(path, '', '', fields=both | {'chosen': 'chosen'})[0]
  assert row['text'] == row['answer'] == PAIRS[0]['prompt']
  assert row['messages'] == row['chosen'] == PAIRS[0]['chosen']
  says(
    lambda: sources.source(path, '', '', fields={'text': 'question'}),
    f'{path}:1',
    "no field 'question', which data.fields calls 'text'",
    'prompt, chosen, rejected, messages, score_chosen',
  )


def test_preferences_need_no_text(tmp_path):
  """As they are published: with a prompt of either kind, or with none."""
  turn = lambda role, content: {'role': role, 'content': content}
  hi, yes, no = turn('user', 'hi'), turn('assistant', 'y'), turn('model', 'n')
  pair, turns = (
    dict(chosen='a', rejected='b'),
    dict(chosen=[yes], rejected=[no]),
  )
  found = [
    ({'prompt': 'hi'}, {'text': 'hi'}),
    ({'prompt': [hi]}, {'messages': [hi]}),
    ({'prompt': 'hi', 'text': 'all'}, {'prompt': 'hi', 'text': 'all'}),
    ({}, {}),
  ]
  given = [{**theirs, **more} for theirs, _ in found for more in (pair, turns)]
  rows = sources.source(write(tmp_path / 'a.jsonl', *given), '', '')
  expected = [{**ours, **more} for _, ours in found for more in (pair, turns)]
  assert list(rows) == expected
  for wrong in ({'prompt': 3, **pair, 'chosen': None}, {'chosen': 'a'}):
    path = write(tmp_path / 'b.jsonl', wrong)
    says(
      lambda path=path: sources.source(path, '', ''), f'{path}:1', '"chosen"'
    )


def test_parquet_in_one_file_or_many(tmp_path):
  table = pa.Table.from_pylist(PAIRS)
  for k, part in enumerate((table[:3], table[3:])):
    pa.parquet.write_table(part, tmp_path / f'train_prefs-{k}.parquet')
  name = f'{tmp_path}/{{split}}-*.parquet'
  read = lambda split='train', **fields: sources.source(
    name, split, '', fields=fields, splits={'train': 'train_prefs'}
  )
  rows = read(text='prompt')
  assert len(rows) == 7
  for row, pair in zip(rows, PAIRS, strict=True):
    expected = {
      k: v for k, v in pair.items() if k not in ('prompt', 'messages')
    }
    assert row == {'text': pair['prompt'], **expected}
  assert rows[-1] == rows[6]
  says(lambda: read(text='x'), 'train_prefs-0.parquet, row 0', 'prompt, chosen')
  says(lambda: read('test'), f'no file matches {tmp_path}/test-*')


def test_bad_parquet_is_named_with_its_row(tmp_path):
  read = lambda name: sources.source(f'{tmp_path}/{name}.parquet', '', '')
  save = lambda name, table: pa.parquet.write_table(
    table, tmp_path / f'{name}.parquet'
  )
  save('a', pa.table({'text': ['fine']}))
  save('b', pa.table({'text': ['fine', None]}))
  rows = read('[ab]')
  assert rows[1]['text'] == 'fine'
  says(lambda: rows[2], f'{tmp_path}/b.parquet, row 1: ', 'string "text"')
  save('binary', pa.table({'text': [b'caf\xe9']}))
  says(lambda: read('binary'), 'binary.parquet, row 0', 'not UTF-8')
  broken = pa.array([b'caf\xe9']).view(pa.string())
  save('string', pa.table({'text': broken}))
  says(lambda: read('string'), 'string.parquet, row 0', 'not UTF-8')
  save('number', pa.table({'text': [3]}))
  says(lambda: read('number'), 'row 0', 'string "text"')
  says(lambda: read('[an]*'), 'a.parquet', 'different types', 'text')
  save('none', pa.table({'text': pa.array([], pa.string())}))
  says(lambda: read('none'), 'none.parquet is empty')
  (tmp_path / 'cut.parquet').write_bytes(b'PAR1')
  whole = (tmp_path / 'a.parquet').read_bytes()
  (tmp_path / 'name.parquet').write_bytes(whole.replace(b'text', b'te\xe4t'))
  says(lambda: read('name'), f'cannot read {tmp_path}/name.parquet', 'utf-8')
  says(lambda: read('cut'), f'cannot read {tmp_path}/cut.parquet')
  says(lambda: read('lost'), f'cannot read {tmp_path}/lost.parquet')


@pytest.mark.parametrize(
  'split, expected',
  [
    ('x', range(40)),
    ('x[:3]', [0, 1, 2]),
    ('x[37:]', [37, 38, 39]),
    ('x[-2:]', [38, 39]),
    ('x[5%:10%]', [2, 3]),
    ('x[:-90%]', [0, 1, 2, 3]),
  ],
)
def test_a_split_may_be_a_part_of_theirs(tmp_path, split, expected):
  write(tmp_path / 'x.jsonl', *({'text': str(i)} for i in range(40)))
  rows = sources.source(
    f'{tmp_path}/{{split}}.jsonl', 'test', '', splits={'test': split}
  )
  assert [int(row['text']) for row in rows] == list(expected)


@pytest.mark.parametrize(
  'split, why',
  [
    ('x[3]', "write a name, or rows of it as in 'train[:1000]'"),
    ('x[1.5%:]', 'write a name'),
    ('x[9:]', 'is empty'),
    ('y', 'cannot read'),
  ],
)
def test_a_wrong_part_is_said(tmp_path, split, why):
  write(tmp_path / 'x.jsonl', {'text': 'a'})
  name = f'{tmp_path}/{{split}}.jsonl'
  says(lambda: sources.source(name, 'test', '', splits={'test': split}), why)


def test_hugging_face_without_its_package_or_its_commit(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)  # importing it raises
  read = lambda: sources.source('hf:owner/name@main', 'train', '')
  says(read, 'pip install datasets', 'requirements-hf.txt')


def config(**data):
  config = toy.get_config('')
  config.data.update(ml_collections.ConfigDict(data))
  return config


def test_the_configs_of_the_page_are_configs(monkeypatch):
  """docs/data.md: each names sources in a way that `sources.rows` takes."""
  monkeypatch.syspath_prepend(toy.ROOT)
  with open(os.path.join(toy.ROOT, 'docs', 'data.md')) as f:
    blocks = re.findall(r'```python\n(.*?)```', f.read(), re.S)
  assert len(blocks) == 2
  opened = []
  monkeypatch.setattr(
    sources, 'source', lambda *args, **how: opened.append((args, how)) or [{}]
  )
  for block in blocks:
    names = {}
    exec(block, names)
    for split in ('train', 'test'):
      sources.rows(names['get_config'](), split)
  assert [args[0] for args, _ in opened] == [
    'hf:HuggingFaceH4/ultrafeedback_binarized@<commit>'
  ] * 2 + ['chat/{split}.jsonl', 'maths/*.parquet'] * 2
  assert opened[0][1]['splits']['test'] == 'test_prefs'


def test_a_config_names_fields_and_splits(tmp_path):
  path = write(tmp_path / 'a.jsonl', *PAIRS)
  held_out = dict(train='a[2:]', validation='a[:2]', test='a[:1]')
  name = str(pathlib.Path(path).with_name('{split}.jsonl'))
  made = config(name=name, fields=dict(text='prompt'), splits=held_out)
  sizes = [len(sources.rows(made, s)) for s in ('train', 'validation', 'test')]
  assert sizes == [5, 2, 1]
  assert sources.rows(made, 'train')[0]['text'] == PAIRS[2]['prompt']


# -- Rows that are bad


BAD = '{"text": 3}\nnot json\n{"text": "caf\\ud83d"}\n{"id": 1}\n'


def test_bad_rows_are_left_out_where_they_may_be(tmp_path):
  """The others keep their places, from which their ids come."""
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": 0}\n{"text": "a"}\n\n' + BAD + '{"text": "b"}\n')
  says(
    lambda: sources.source(str(path), '', ''), f'{path}:1: ', "bad_rows='skip'"
  )
  rows = sources.source(str(path), '', '', bad_rows='skip')
  assert len(rows) == 7
  bad = []
  found = list(sources.each(rows, lambda row: row['text'], bad=bad.append))
  assert found == ['a', 'b'] and rows[6]['text'] == 'b'
  places = [str(e).partition(': ')[0] for e in bad]
  assert places == [f'{path}:{k}' for k in (1, 4, 5, 6, 7)]
  encode = lambda row: [1, ord(row['text'])]
  made = data.prompts(rows, encode, length=2, batch=4, seed=0)
  assert sorted(next(made).id.tolist()) == [1, 1, 6, 6]
  bad = []
  assert data.count_left_out(rows, encode, bad=bad) == [('', 7, 7, 0)]
  assert len(bad) == 5
  assert data.fixed_prompts(rows, encode, length=2, count=2).id.tolist() == [
    1, 6
  ]  # fmt: skip


@pytest.mark.parametrize('name', ['x.jsonl', 'x.json', 'x.parquet', 'mixture'])
def test_what_an_encoder_refuses_has_a_place(tmp_path, name):
  """Bad for what it is used for; the same for every format."""
  given = [{'text': 'a'}, {'text': 'bad'}, {'text': 'c'}]
  path, place = str(tmp_path / name), ':2: '
  if name == 'x.json':
    pathlib.Path(path).write_text(json.dumps(given))
    place = ', row 1: '
  elif name == 'x.parquet':
    pa.parquet.write_table(pa.Table.from_pylist(given), path)
    place = ', row 1: '
  else:
    path = write(tmp_path / 'x.jsonl', *given)
  how = dict(name=path)
  if name == 'mixture':
    how['mix'] = dict(z=dict(name=path), a=dict(name=path))

  def encode(row):
    if row['text'] == 'bad':
      raise BadRow('it will not do.')
    return [1, ord(row['text'])]

  rows = sources.rows(config(**how), 'train')
  draw = lambda: data.prompts(rows, encode, length=2, batch=6, seed=0)
  for use in (
    lambda: data.count_left_out(rows, encode),
    lambda: data.fixed_prompts(rows, encode, length=2, count=3),
    lambda: list(sources.each(rows, encode)),
    lambda: next(draw()),
  ):
    line = says(use, 'it will not do.', "data.bad_rows='skip'")
    assert line.startswith(f'{path}{place}')
  rows, bad = sources.rows(config(**how, bad_rows='skip'), 'train'), []
  count, *_ = data.count_left_out(rows, encode, bad=bad)
  assert count == (count.name, 3, 3, 0) and len(bad) == len(rows) // 3
  good = {i for i in range(len(rows)) if i % 3 != 1}
  assert set(next(draw()).id.tolist()) == good


def test_where_every_row_is_bad_the_first_one_is_said(tmp_path):
  (tmp_path / 'x.jsonl').write_text(BAD)
  name = f'{tmp_path}/x.jsonl'
  read = lambda **how: sources.source(name, '', '', **how)
  says(lambda: read(bad_rows='skip'), 'all 4 rows are bad', f'{name}:1: ')
  says(lambda: read(bad_rows='drop'), "data.bad_rows is 'drop'", 'stop, skip')
  write(tmp_path / 'x.jsonl', {'text': 'a'})

  def refuse(row):
    raise BadRow('it will not do.')

  rows = read(bad_rows='skip')
  says(
    lambda: data.prompts(rows, refuse, length=2, batch=1, seed=0),
    f'no row that can be used: {name}:1: it will not do.',
  )
  says(
    lambda: data.fixed_prompts(rows, refuse, length=2, count=1),
    '0 distinct prompts',
  )
  words = tokenizer.train(['one two three'] * 50, str(tmp_path / 'words'), 24)
  write(tmp_path / 'x.jsonl', {'messages': TALK})
  says(
    lambda: data.pairs(
      read(bad_rows='skip'), data.sentence(words, 3), length=3, batch=1, seed=0
    ),
    'no row that can be used',
    f'{name}:1: a row has no text',
  )


# -- Splits that are apart


PLACES = ('x.jsonl', 'x.json', 'x.jsonl.gz', 'x.parquet', '?.jsonl',
          '{split}.jsonl', 'builder', 'mixture')  # fmt: skip


@pytest.fixture(params=PLACES)
def of_windows(request, tmp_path, data_dir):
  """A place with 20 rows; a function: windows of it -> a config on them."""
  kind, given = request.param, [{'text': str(i)} for i in range(20)]
  path, names, more = tmp_path / kind, ['x', 'x', 'x'], {}
  text = '\n'.join(map(json.dumps, given))
  if kind == 'x.json':
    path.write_text(json.dumps(given))
  elif kind == 'x.jsonl.gz':
    path.write_bytes(gzip.compress(text.encode()))
  elif kind == 'x.parquet':
    pa.parquet.write_table(pa.Table.from_pylist(given), path)
  elif kind == '?.jsonl':
    write(tmp_path / 'x.jsonl', *given[:8])
    write(tmp_path / 'y.jsonl', *given[8:])
  elif kind == 'builder':
    path, names = 'small_news', ['train'] * 3
    more = dict(data_dir=data_dir, fields={'text': 'summary'})
  else:
    path = tmp_path / 'x.jsonl'
    path.write_text(text)
  if kind == '{split}.jsonl':  # one file by two names
    path, names = tmp_path / kind, ['x', 'y', 'x']
    os.symlink(tmp_path / 'x.jsonl', tmp_path / 'y.jsonl')

  def config_of(windows):
    keys = 'train', 'validation', 'test'
    both = zip(names, windows, strict=True)
    splits = dict(zip(keys, map(''.join, both), strict=True))
    source = dict(name=str(path), splits=splits)
    if kind == 'mixture':
      other = dict(name=f'{toy.folder()}/{{split}}.jsonl')
      return config(mix=dict(a=source, b=other))
    return config(**source, **more)

  return config_of


@pytest.mark.parametrize(
  'windows, pair',
  [
    (('', '', ''), 'train and validation'),
    (('[:50%]', '[40%:60%]', '[60%:]'), 'train and validation'),
    (('[10:]', '[:10]', '[-1:]'), 'train and test'),
    (('[:10]', '[10:]', '[10:]'), None),
    (('[10%:]', '[:1]', '[1:2]'), None),
    (('[:8]', '[8:12]', '[12:]'), None),
  ],
)
def test_no_row_is_both_fitted_and_judged(of_windows, windows, pair):
  mesh = sharding.make_mesh(1, 1)
  made = of_windows(windows)
  rows = functools.partial(sources.rows, made)
  check = lambda: text_task.check(made, mesh, rows)
  if pair:
    says(check, f'the splits {pair} have', 'rows in common', '{split}', '[:5%]')
  else:
    check()


@pytest.mark.parametrize('stage', toy.STAGES)
def test_every_stage_refuses_rows_that_serve_twice(tmp_path, stage):
  made = config(name=f'{toy.folder()}/train.jsonl')
  run = lambda: toy.run(stage, made, str(tmp_path / 'run'))
  says(run, 'the splits train and validation have 300 rows in common')
  assert not (tmp_path / 'run').exists()


def test_a_reward_model_is_not_judged_where_it_is_chosen(tmp_path):
  made = config(
    name=f'{toy.folder()}/{{split}}.jsonl', splits=dict(test='validation')
  )
  run = lambda: toy.run('reward_model', made, str(tmp_path / 'run'))
  says(run, 'the splits validation and test have 60 rows in common')
