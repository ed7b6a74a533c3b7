"""The reward model's stage, on files of ratings."""

import json
import os
import signal

import numpy as np
import pytest
import toy
import turns

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import Stopped, UserError
from bond_jax.reward_models import ridge_fit, stage
from bond_jax.rewards import ridge
from bond_jax.runs import files, lock

WORDS = {'great': 2.5, 'fine': 1.0, 'odd': -0.5, 'dull': -1.5, 'awful': -3.0}
WHATS = ('film', 'music', 'ending', 'plot', 'cast', 'script', 'sound', 'light')


def _rows(split):
  """All pairs of words; a third of them held out, by their place."""
  pairs = [(a, b, w) for a in WORDS for b in WORDS for w in WHATS]
  place = {'train': (0, 1, 2, 3), 'validation': (4,), 'test': (5,)}[split]
  return [
    {'text': f'The {w} is {a} and {b}.', 'rating': WORDS[a] + WORDS[b]}
    for i, (a, b, w) in enumerate(pairs)
    if i % 6 in place
  ]


def _write(folder, split, rows):
  path = folder / f'{split}.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


@pytest.fixture
def config(tmp_path):
  for split in ('train', 'validation', 'test'):
    _write(tmp_path, split, _rows(split))
  config = toy.get_config(str(tmp_path))
  config.tokenizer.vocab_size = 80
  config.reward_model.update(
    dict(order=2, min_count=1, alphas=(0.01, 0.1, 100.0))
  )
  return config


def test_learns_ratings_that_it_has_not_seen(config, tmp_path, capsys):
  workdir = str(tmp_path / 'run')
  stage.main(config, workdir)
  summary = files.read_json(os.path.join(workdir, 'reward', 'summary.json'))
  assert summary['alpha'] in (0.01, 0.1, 100)
  assert summary['test_pearson'] > 0.97
  assert summary['test_spearman'] > 0.95
  assert summary['versions']['scikit-learn']
  assert summary['seconds'] > 0
  assert 'test_pearson' in capsys.readouterr().out
  assert sorted(os.listdir(os.path.join(workdir, 'reward'))) == [
    'model.npz',
    'summary.json',
  ]
  model = ridge.read(os.path.join(workdir, 'reward', 'model.npz'))
  test = _rows('test')
  got = ridge.predict(model, [r['text'] for r in test])
  ratings = [r['rating'] for r in test]
  np.testing.assert_allclose(
    np.corrcoef(got, ratings)[0, 1], summary['test_pearson'], rtol=1e-12
  )


def test_same_model_again(config, tmp_path):
  contents = []
  for name in ('a', 'b'):
    stage.main(config, str(tmp_path / name))
    with np.load(tmp_path / name / 'reward' / 'model.npz') as f:
      contents.append(dict(f))
  assert contents[0].keys() == contents[1].keys()
  for key in contents[0]:
    np.testing.assert_array_equal(contents[0][key], contents[1][key])


def test_finished_stage_does_nothing(config, tmp_path, capsys):
  workdir = tmp_path / 'run'
  stage.main(config, str(workdir))
  before = (workdir / 'reward' / 'model.npz').stat().st_mtime_ns
  capsys.readouterr()
  stage.main(config, str(workdir))
  assert 'finished already' in capsys.readouterr().out
  assert (workdir / 'reward' / 'model.npz').stat().st_mtime_ns == before


def test_other_config_is_refused(config, tmp_path):
  workdir = tmp_path / 'run'
  stage.main(config, str(workdir))
  config.reward_model.order = 1
  with pytest.raises(UserError, match='reward_model.order: 2 -> 1'):
    stage.main(config, str(workdir))


def test_interrupted_stage_is_done_again(config, tmp_path):
  workdir = tmp_path / 'run'
  stage.main(config, str(workdir))
  expected = (workdir / 'reward' / 'model.npz').read_bytes()
  (workdir / 'reward' / 'summary.json').unlink()
  (workdir / 'reward' / 'model.npz').write_bytes(b'half')
  stage.main(config, str(workdir))
  assert (workdir / 'reward' / 'model.npz').read_bytes() == expected


def test_ratings_are_asked_for(config, tmp_path):
  rows = _rows('validation')
  del rows[3]['rating']
  _write(tmp_path, 'validation', rows)
  where = r"validation\.jsonl:4: 'rating' is 'not there', expected a number"
  with pytest.raises(UserError, match=where):
    stage.main(config, str(tmp_path / 'run'))
  assert not os.listdir(tmp_path / 'run' / 'reward')


def test_one_file_for_all_splits_is_refused(config, tmp_path):
  config.data.name = str(tmp_path / 'train.jsonl')
  with pytest.raises(UserError, match='needs "{split}" in the name'):
    stage.main(config, str(tmp_path / 'run'))


@pytest.mark.parametrize(
  'key, value, why',
  [
    ('order', 10, 'do not fit 63 bits'),
    ('min_count', 10_000, 'no n-gram is in that many'),
  ],
)
def test_impossible_features_are_one_line(config, tmp_path, key, value, why):
  config.reward_model[key] = value
  with pytest.raises(UserError, match=why):
    stage.main(config, str(tmp_path / 'run'))


def test_constant_ratings_are_said(config, tmp_path):
  for split in ('train', 'validation', 'test'):
    _write(tmp_path, split, [{**r, 'rating': 1} for r in _rows(split)])
  with pytest.raises(UserError, match='are all ratings the same'):
    stage.main(config, str(tmp_path / 'run'))


def test_the_vocabulary_of_the_weights_is_read(config, tmp_path):
  """Where a run names one, the ridge takes it and trains none."""
  workdir, path = str(tmp_path / 'run'), str(turns.vocabulary(tmp_path))
  words = tokenizer_lib.load(path)
  config.tokenizer.update(path=path, vocab_size=words.vocab_size)
  config.model.sizes = {'vocab_size': words.vocab_size}
  stage.main(config, workdir)
  found = ridge.read(os.path.join(workdir, 'reward', 'model.npz'))
  assert found.tokenizer.sha256 == words.sha256
  assert not os.path.exists(os.path.join(workdir, 'tokenizer.model'))


def test_it_is_a_stage_as_all_others(config, tmp_path, monkeypatch):
  """One command at a time, checked before it begins, and ended by a signal."""
  workdir, build = str(tmp_path / 'run'), ridge_fit.build
  config.evaluate.prompts = 1
  with pytest.raises(UserError, match='config.evaluate.prompts is 1'):
    stage.main(config, workdir)
  assert not os.path.exists(workdir)
  config.evaluate.prompts = 2

  def signals(*args, **kwargs):
    with pytest.raises(
      UserError, match='is in use by .*, reward_model, started'
    ):
      lock.held(workdir, 'train').__enter__()
    os.kill(os.getpid(), signal.SIGTERM)
    return build(*args, **kwargs)

  monkeypatch.setattr(ridge_fit, 'build', signals)
  with pytest.raises(Stopped, match='SIGTERM: ended before anything'):
    stage.main(config, workdir)
  monkeypatch.undo()
  stage.main(config, workdir)
  assert os.listdir(os.path.join(workdir, 'reward'))
