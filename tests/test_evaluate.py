"""The last stage: what it draws, what it writes, and what it refuses."""

import functools
import json
import os
import re

import jax
import numpy as np
import pytest
import toy

from bond_jax import (
  build,
  data,
  evaluate,
  measures,
  metrics,
  origin,
  sharding,
)
from bond_jax import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.log_probs import log_probs
from bond_jax.types import Prompts, Rollout


@pytest.fixture
def config():
  return toy.get_config(toy.folder())


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / 'run'
  path.mkdir()
  return toy.before('evaluate', str(path))


def completions(workdir):
  with open(os.path.join(workdir, 'completions.jsonl'), encoding='utf-8') as f:
    return [json.loads(line) for line in f]


def judge(config, workdir, checkpoint):
  build.stage(
      'evaluate', evaluate.evaluate, config, workdir, folder='.',
      table=evaluate.headlines, checkpoint=checkpoint,
  )  # fmt: skip


def test_completions_hold_every_measure(config):
  rows, settings = completions(toy.finished()), config.evaluate
  counts = {'policy': 0, 'reference': 0}
  for row in rows:
    assert set(row) == set(measures.RECORD_KEYS)
    counts[row['who']] += 1
  assert counts == {
    'policy': settings.prompts * settings.policy_completions,
    'reference': settings.prompts * settings.reference_completions,
  }
  summary = toy.summary(toy.finished())
  for key, value in measures.summarise(rows).items():
    assert summary[key] == value, key
  assert len({row['id'] for row in rows}) == settings.prompts
  texts = {row['completion'] for row in rows}
  assert len(texts) > 0.9 * len(rows)  # no call repeats another's keys


def test_prompts_are_openings_of_the_test_split(config):
  with open(config.data.name.replace('{split}', 'test')) as f:
    texts = [json.loads(line)['text'] for line in f]
  for row in completions(toy.finished()):
    assert texts[row['id']].startswith(row['prompt'])
    assert row['prompt'] != ''


def test_scores_belong_to_the_texts_beside_them(config):
  rows = completions(toy.finished())[::17]
  for key, section in (('reward', config.reward), ('gold', config.gold)):
    judge = build.make_reward(config, section, toy.finished())
    texts = [[r['completion']] for r in rows]
    again = judge([r['prompt'] for r in rows], texts, toy.context(texts))
    np.testing.assert_allclose([r[key] for r in rows], again[:, 0], rtol=1e-5)


def test_draws_are_scored_under_both_models(config):
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = origin.load_tokenizer(config, toy.finished())
  policy = origin.make_policy(config.model, config.tokenizer.vocab_size)
  own, other = (
    toy.saved(toy.finished(), stage, 6)['params'] for stage in ('train', 'sft')
  )
  prompts = data.fixed_prompts(
    build.rows(config, 'test'),
    origin.make_encoder(config, tokenizer),
    length=config.prompt.length,
    count=8,
  )
  draw = evaluate.make_draw(policy, config, tokenizer, mesh)
  drawn, here, there = draw({}, own, other, prompts, jax.random.key(3), 0, 2)
  score = jax.jit(
    lambda params: log_probs(
      policy, params, prompts, drawn.completion, drawn.mask, chunk=6
    )
  )
  for got, params in ((here, own), (there, other)):
    expected = score(params).sum(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(here - there).min() > 1e-4


@pytest.mark.parametrize(
  'who, own, other',
  [
    ('policy', 'log_policy', 'log_reference'),
    ('reference', 'log_reference', 'log_policy'),
  ],
)
def test_records_of_a_side(config, tmp_path, who, own, other):
  """Three completions of two prompts, two at once: each drawn once."""
  texts = [row['text'] for row in build.rows(config, 'train')]
  tokenizer = tokenizer_lib.train(texts, str(tmp_path / 'tokenizer.model'), 96)
  piece = tokenizer.encode('film')[0]
  prompts = Prompts(
    np.array([[2, piece], [2, 5]]), None, np.array([7, 9]), None
  )
  stream = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
  asked = []

  def draw(first, num):
    asked.append((first, num))
    completion = np.full((2, num, 3), piece)
    mask = np.ones((2, num, 3), bool)
    completion[1, :, 1], mask[1, :, 2] = tokenizer.eos_id, False
    part = stream[:, first : first + num]
    return Rollout(completion, mask, None, None), part, -part

  judge = lambda prompts, completions, context: np.array(
    [[len(c) for c in row] for row in completions]
  )
  data_rows = [{'text': str(i)} for i in range(10)]
  read = functools.partial(build.texts, config, tokenizer, data_rows)
  with metrics.Writer(str(tmp_path), 'x', 3) as writer:
    rows = list(
      evaluate.records(
        draw, read, {'reward': judge}, prompts, who=who, count=3,
        at_once=2, stop_ids=tokenizer.stop_ids, writer=writer, done=0,
        rows=np.arange(2),
      )
    )  # fmt: skip
  assert asked == [(0, 2), (2, 1)]
  assert sorted(r[own] for r in rows) == [1, 2, 3, 4, 5, 6]
  for row in rows:
    assert row[other] == -row[own]
    assert row['id'] == (7 if row[own] <= 3 else 9)
    assert row['prompt'] == tokenizer.decode([piece if row['id'] == 7 else 5])
    length = 3 if row['id'] == 7 else 2  # the EOS counts, and says nothing
    assert row['length'] == length
    assert row['truncated'] == (row['id'] == 7)
    words = tokenizer.decode([piece] * (3 if row['id'] == 7 else 1))
    assert row['completion'] == words
    assert row['reward'] == len(words)


def test_a_policy_equal_to_its_reference(config, workdir, monkeypatch):
  """No KL, no effective N but the reason, and draws of its own."""
  load = origin.load_params
  monkeypatch.setattr(
    origin,
    'load_params',
    lambda policy, workdir, stage, which, mesh: load(
      policy, workdir, 'sft', 'last', mesh
    ),
  )
  judge(config, workdir, 'last')
  summary = toy.summary(workdir)
  assert abs(summary['kl']) < 1e-4
  assert summary['frontier_efficiency'] is None
  # Of the win rate or, where chance would have that otherwise, of the KL.
  assert 'does not lie above 0' in summary['frontier_reason']
  texts = {'policy': {}, 'reference': {}}
  for row in completions(workdir):
    texts[row['who']].setdefault(row['id'], []).append(row['completion'])
  pairs = [
    mine == other
    for i, first in texts['policy'].items()
    for mine, other in zip(first, texts['reference'][i], strict=False)
  ]
  assert np.mean(pairs) < 0.1  # with one key for both it would be 1


def test_the_checkpoint_that_is_asked_for(config, workdir, monkeypatch):
  monkeypatch.setattr(evaluate, 'draw_report', lambda *_: None)  # slow
  judge(config, workdir, '3')
  assert toy.summary(workdir)['checkpoint'] == '3'
  other, same = completions(workdir), completions(toy.finished())
  pick = lambda rows, who, key: [r[key] for r in rows if r['who'] == who]
  for key in ('completion', 'log_reference', 'reward'):
    assert pick(other, 'reference', key) == pick(same, 'reference', key)
  for key in ('completion', 'log_policy'):
    assert pick(other, 'policy', key) != pick(same, 'policy', key)
  before = toy.listing(workdir)
  with pytest.raises(UserError, match="checkpoint: '3' -> 'last' asked for"):
    judge(config, workdir, 'last')
  assert toy.listing(workdir) == before


@pytest.mark.parametrize('checkpoint', ['5', 'worst'])
def test_a_checkpoint_that_does_not_exist(config, workdir, checkpoint):
  before = toy.listing(workdir)
  with pytest.raises(UserError, match=rf"'{checkpoint}' .* there are 3, 6,"):
    judge(config, workdir, checkpoint)
  assert toy.listing(workdir) == before


def test_an_unfinished_train_stage_is_refused(config, workdir):
  os.remove(f'{workdir}/train/summary.json')
  with pytest.raises(UserError, match='the train stage has not finished'):
    judge(config, workdir, 'last')


def test_a_reward_of_the_user_s_own_needs_no_reward_stage(config, workdir):
  os.remove(f'{workdir}/reward/summary.json')
  os.makedirs(f'{workdir}/evaluate')
  with open(f'{workdir}/evaluate/metrics.jsonl', 'w') as f:
    f.write('{"step": 1, "seconds/sample": 2.0}\n')
  found = evaluate.history(config, workdir)
  assert 'reward_test_pearson' not in found
  assert found['phase_seconds']['evaluate/sample'] == 2.0
  assert found['seconds'] == pytest.approx(sum(found['phase_seconds'].values()))


def test_a_reward_of_preferences_has_no_correlation(config, workdir):
  os.makedirs(f'{workdir}/evaluate')
  with open(f'{workdir}/evaluate/metrics.jsonl', 'w') as f:
    f.write('{"step": 1, "seconds/sample": 2.0}\n')
  path = f'{workdir}/reward/summary.json'
  assert evaluate.history(config, workdir)['reward_test_pearson'] > 0
  with open(path, 'w') as f:
    json.dump({'accuracy': 0.75, 'seconds': 1.0}, f)
  found = evaluate.history(config, workdir)
  assert found['reward_accuracy'] == 0.75
  assert 'reward_test_pearson' not in found


def test_the_report_is_one_file():
  with open(os.path.join(toy.finished(), 'report.html')) as f:
    page = f.read()
  assert 'http://' not in page
  assert 'https://' not in page
  sources = re.findall(r'(?:src|srcset|href)="([^"]{,30})', page)
  assert sources
  assert all(s.startswith('data:image/png;base64,') for s in sources)
  assert page.count('class="pair"') == 5
  pngs = [f for f in os.listdir(toy.finished()) if f.endswith('.png')]
  assert len(pngs) >= 6
