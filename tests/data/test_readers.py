"""JSON in the ways in which files have it: lines, arrays, gzip, byte orders."""

import gzip
import json

import pytest
from test_sources import says

from bond_jax.data import sources

ROWS = [{'text': 'one'}, {'text': 'Où? 何?', 'n': 2}, {'text': 'three'}]
BOM = b'\xef\xbb\xbf'


def lines(rows, end='\n'):
  return end.join(json.dumps(r, ensure_ascii=False) for r in rows).encode()


def array(rows, end='\n', **how):
  text = json.dumps(rows, ensure_ascii=False, **how)
  return text.replace('\n', end).encode()


@pytest.mark.parametrize(
  'name, content, numbers',
  [
    ('x.jsonl', lines(ROWS), (1, 2, 3)),
    ('x.jsonl', BOM + lines(ROWS, '\r\n'), (1, 2, 3)),
    # Files with a mark of their own, one after the other.
    ('x.jsonl', BOM + b'\n' + lines(ROWS[:1]) + b'\n' + BOM + lines(ROWS[1:]),
     (2, 3, 4)),
    ('x.json', lines(ROWS), (1, 2, 3)),
    ('x.json', array(ROWS), None),
    ('x.json', BOM + b'\r\n' + array(ROWS, '\r\n', indent=1), None),
    ('x.jsonl', b' ' + array(ROWS), None),
    ('x.jsonl.gz', gzip.compress(lines(ROWS), mtime=0), (1, 2, 3)),
    ('x.json.gz', gzip.compress(BOM + array(ROWS), mtime=0), None),
  ],
)  # fmt: skip
def test_rows_and_their_lines(tmp_path, name, content, numbers):
  path = tmp_path / name
  path.write_bytes(content)
  rows = sources.source(str(path), 'train', '')
  assert list(rows) == ROWS and rows[-1] == ROWS[2]
  places = [rows.table.place(i) for i in range(3)]
  named = [f'{path}, row {i}' for i in range(3)]  # of an array
  assert places == [f'{path}:{n}' for n in numbers] if numbers else named


def test_many_files_of_several_kinds(tmp_path):
  (tmp_path / 'a.train.json').write_bytes(array(ROWS[:2]))
  (tmp_path / 'b.train.json').write_bytes(lines(ROWS[2:]))
  rows = sources.source(f'{tmp_path}/*.{{split}}.json', 'train', '')
  assert list(rows) == ROWS


@pytest.mark.parametrize(
  'name, content, place, why',
  [
    ('x.json', b'[\n{"text": "a"},\n]', ':3', 'not JSON'),
    ('x.json', b'[\n{"text": "a"},\n{"text": "b"', ':3', 'not JSON'),
    ('x.json', b'[{"text": "a"}\n{"text": "b"}]', ':2', 'not JSON'),
    ('x.json', b'\n[{"text": "a"}]\n[]', ':3', 'not JSON'),
    ('x.json', b'[\n\n{"text": "a"},\n{"txt": "b"}]', ', row 1', 'has txt'),
    ('x.json', b'[\n{"text": "caf\xe9"}]', ': ', 'UTF-8'),
    ('x.json', b'\n[' + b'[' * 100_000, ': ', 'not JSON'),
    ('x.json', rb'[{"text": "a \ud83d"}]', ', row 0', 'surrogates'),
    ('x.json', b'[ ]', ' is empty', 'one {"text": ...} per line'),
    ('x.json', b'{\n "data": [{"text": "a"}]}', ':1', 'not JSON'),
    ('x.jsonl', lines(ROWS).decode().encode('utf-16'), ':1', 'as UTF-8'),
    ('x.jsonl', lines(ROWS).decode().encode('utf-16-be'), ':1', 'not JSON'),
    (
      'x.jsonl.gz',
      gzip.compress(b'{"text": "a"}\n{"text"', mtime=0),
      ':2',
      'not JSON',
    ),
  ],
)
def test_what_is_no_json_is_named_with_its_line(
  tmp_path, name, content, place, why
):
  path = tmp_path / name
  path.write_bytes(content)
  line = says(lambda: sources.source(str(path), 'train', ''), why)
  assert line.startswith(f'{path}{place}')


@pytest.mark.parametrize(
  'content', [gzip.compress(lines(ROWS), mtime=0)[:-9], b'{}']
)
def test_what_is_no_gzip_is_one_line(tmp_path, content):
  path = tmp_path / 'x.jsonl.gz'
  path.write_bytes(content)
  says(lambda: sources.source(str(path), 'train', ''), f'cannot read {path}')
