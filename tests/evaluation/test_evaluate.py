"""The last stage: what it draws, what it writes, and what it refuses."""

import functools
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import toy

from bond_jax.data import examples, sources
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import completions, evaluate, history
from bond_jax.measures import aggregate
from bond_jax.models import policies
from bond_jax.models.log_probs import log_probs
from bond_jax.models.stops import Stop
from bond_jax.rewards import make
from bond_jax.runs import log
from bond_jax.training.tasks import text_task
from bond_jax.types import Prompts, Rollout
from bond_jax.weights import load as origin


@pytest.fixture
def config():
  return toy.get_config(toy.folder())


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / 'run'
  path.mkdir()
  return toy.before('evaluate', str(path))


def read_completions(workdir):
  with open(os.path.join(workdir, 'completions.jsonl'), encoding='utf-8') as f:
    return [json.loads(line) for line in f]


judge = evaluate.main


def test_completions_hold_every_measure(config):
  rows, settings = read_completions(toy.finished()), config.evaluate
  counts = {'policy': 0, 'reference': 0}
  for row in rows:
    assert set(row) == set(aggregate.RECORD_KEYS)
    counts[row['who']] += 1
  assert counts == {
    'policy': settings.prompts * settings.policy_completions,
    'reference': settings.prompts * settings.reference_completions,
  }
  summary = toy.summary(toy.finished())
  for key, value in aggregate.summarise(rows).items():
    assert summary[key] == value, key
  assert len({row['id'] for row in rows}) == settings.prompts
  texts = {row['completion'] for row in rows}
  assert len(texts) > 0.9 * len(rows)  # no call repeats another's keys


def test_an_evaluation_of_some_minutes(config, workdir):
  """Over at once: two of each side, in turn, of those that all would be."""
  config.evaluate.update(dict(minutes=1e-9, at_once=1))
  judge(config, workdir)
  key = lambda row: (row['who'], row['id'], row['completion'])
  drawn = [key(row) for row in read_completions(workdir)]
  assert [who for who, _, _ in drawn[:: config.evaluate.prompts]] == [
    'policy', 'reference', 'reference', 'policy'
  ]  # fmt: skip
  assert set(drawn) <= {key(row) for row in read_completions(toy.finished())}
  assert toy.summary(workdir)['win_rate'] > 0


def test_the_policy_is_extrapolated(config, workdir, capsys):
  """At 0 it is the reference; the reference's rewards are not drawn again."""
  judge(config, workdir, factors=[1, 0, 1.5])
  folder = os.path.join(workdir, 'evaluate', 'step_6_times_')
  drawn = read_completions(f'{folder}0')
  settings = config.evaluate
  assert len(drawn) == settings.prompts * settings.policy_completions
  for row in drawn:
    assert row['who'] == 'policy'
    assert row['log_policy'] == pytest.approx(row['log_reference'], abs=1e-4)
  found, own = toy.summary(f'{folder}1.5'), toy.summary(workdir)
  assert found['kl'] > 1.2 * own['kl'] and found['factor'] == 1.5
  assert found['reward_reference'] == own['reward_reference']
  assert completions.inputs_of(f'{folder}1.5')['factor'] == '1.5'
  assert sorted(own['extrapolated']) == ['0', '1.5']
  assert own['extrapolated']['1.5']['win_rate'] == found['win_rate']
  rows = capsys.readouterr().out.rpartition('extrapolated: see')[2].split('\n')
  assert [row.split()[0] for row in rows if row[:1].isdigit()] == [
    '0', '1', '1.5'
  ]  # fmt: skip
  with pytest.raises(UserError, match='leave --against out'):
    judge(config, workdir, against='x', factors=[2])


def test_a_law_without_entropy_is_told(config, workdir, capsys):
  judge(config, workdir, factors=[40])
  assert 'extrapolated by 40 the policy is' in capsys.readouterr().err


def test_prompts_are_openings_of_the_test_split(config):
  with open(config.data.name.replace('{split}', 'test')) as f:
    texts = [json.loads(line)['text'] for line in f]
  for row in read_completions(toy.finished()):
    assert texts[row['id']].startswith(row['prompt'])
    assert row['prompt'] != ''


def test_scores_belong_to_the_texts_beside_them(config):
  rows = read_completions(toy.finished())[::17]
  for key, section in (('reward', config.reward), ('gold', config.gold)):
    judge = make.make_reward(config, section, toy.finished())
    texts = [[r['completion']] for r in rows]
    again = judge([r['prompt'] for r in rows], texts, toy.context(texts))
    np.testing.assert_allclose([r[key] for r in rows], again[:, 0], rtol=1e-5)


def test_draws_are_scored_under_both_models(config):
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = origin.load_tokenizer(config, toy.finished())
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  own, other = (
    toy.saved(toy.finished(), stage, 6)['params'] for stage in ('train', 'sft')
  )
  prompts = examples.fixed_prompts(
    sources.rows(config, 'test'),
    origin.make_encoder(config, tokenizer),
    length=config.prompt.length,
    count=8,
  )
  draw = completions.make_draw(config, Stop(tokenizer.stop_ids), mesh)
  sides = [completions.Model(policy, params, {}) for params in (own, other)]
  drawn, here, there = draw(*sides, prompts, jax.random.key(3), 0, 2)
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
@pytest.mark.parametrize('killed', [None, 'judge', 'write'])
def test_records_of_a_side(config, tmp_path, who, own, other, killed):
  """Three completions of two prompts, two at once: each drawn once.

  Also if it is killed in the second call, and goes on with that.
  """
  texts = [row['text'] for row in sources.rows(config, 'train')]
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

  def judge(prompts, completions, context):
    if len(completions[0]) == 1 and killed == 'judge' and len(asked) == 2:
      raise KeyboardInterrupt
    return np.array([[len(c) for c in row] for row in completions])

  data_rows = [{'text': str(i)} for i in range(10)]
  read = functools.partial(text_task.texts, config, tokenizer, data_rows)
  path = tmp_path / 'completions.jsonl'
  collect = lambda: completions.collect(
    str(path), [completions.Side(who, 3, draw)],
    completions.make_judge({'reward': judge}, read, np.arange(2)), prompts,
    at_once=2, minutes=0,
    writer_of=lambda done: log.Writer(str(tmp_path), 'x', 3, done),
  )  # fmt: skip
  if killed == 'judge':
    with pytest.raises(KeyboardInterrupt):
      collect()
  elif killed == 'write':
    collect()
    path.write_bytes(path.read_bytes()[:-9])  # torn in the last of six lines
  rows = collect()
  assert asked == [(0, 2), (2, 1), *([(2, 1)] if killed else [])]
  assert rows == read_completions(str(tmp_path))
  watched = log.read_rows(str(tmp_path / 'metrics.jsonl'))
  assert [(r['step'], r['tokens/decoded']) for r in watched] == [
    (2, 10),
    (3, 5),
  ]
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
  for row in read_completions(workdir):
    texts[row['who']].setdefault(row['id'], []).append(row['completion'])
  pairs = [
    mine == other
    for i, first in texts['policy'].items()
    for mine, other in zip(first, texts['reference'][i], strict=False)
  ]
  assert np.mean(pairs) < 0.1  # with one key for both it would be 1


def test_the_checkpoint_that_is_asked_for(config, workdir, monkeypatch):
  """In a folder of its own; what is the last one is the run's."""
  monkeypatch.setattr(evaluate, 'draw_report', lambda *_: None)  # slow
  judge(config, workdir, '3')
  folder = os.path.join(workdir, 'evaluate', 'step_3')
  assert toy.summary(folder)['checkpoint'] == 3
  assert not os.path.exists(os.path.join(workdir, 'summary.json'))
  other = read_completions(folder)
  same = read_completions(toy.finished())
  pick = lambda rows, who, key: [r[key] for r in rows if r['who'] == who]
  for key in ('completion', 'log_reference', 'reward'):
    assert pick(other, 'reference', key) == pick(same, 'reference', key)
  for key in ('completion', 'log_policy'):
    assert pick(other, 'policy', key) != pick(same, 'policy', key)
  before = toy.listing(workdir)
  judge(config, workdir, '3')  # it is there
  assert toy.listing(workdir) == before
  judge(config, workdir, '6')  # the last
  assert toy.summary(workdir)['checkpoint'] == 6
  assert read_completions(workdir) == same
  assert toy.listing(folder) == {
    name.removeprefix('evaluate/step_3/'): content
    for name, content in before.items()
    if name.startswith('evaluate/step_3/')
  }


def test_a_killed_evaluation_goes_on(config, workdir, monkeypatch):
  """With the call that it was at, and to the same rows and numbers."""
  monkeypatch.setattr(evaluate, 'draw_report', lambda *_: None)
  append, written = completions.append, []

  def die(path, rows):
    if len(written) == 2:
      append(path, rows[:5])
      raise KeyboardInterrupt
    written.append(len(rows))
    append(path, rows)

  monkeypatch.setattr(completions, 'append', die)
  with pytest.raises(KeyboardInterrupt):
    judge(config, workdir)
  assert not os.path.exists(os.path.join(workdir, 'summary.json'))
  assert len(read_completions(workdir)) == 2 * 64 + 5
  drawn = []
  monkeypatch.setattr(
    completions, 'append',
    lambda path, rows: (drawn.append(len(rows)), append(path, rows)),
  )  # fmt: skip
  judge(config, workdir)
  assert drawn == [64]  # of 4 + 8 completions, 4 at once
  assert read_completions(workdir) == read_completions(toy.finished())
  numbers = lambda path: {
    k: v
    for k, v in toy.summary(path).items()
    if k not in ('tokens_per_second', 'throughput_reason')
  }
  assert numbers(workdir) == numbers(toy.finished())


def test_against_another_run(config, workdir, tmp_path, monkeypatch):
  """Itself: the same model, other draws; of another tokenizer: refused."""
  monkeypatch.setattr(evaluate, 'draw_report', lambda *_: None)
  judge(config, workdir, '3', toy.finished())
  folder = os.path.join(workdir, 'evaluate', 'step_3_against_finished_6')
  assert toy.summary(folder)['against'] == toy.finished()
  rows = read_completions(folder)
  judge(config, workdir, '3')
  plain = read_completions(os.path.join(workdir, 'evaluate', 'step_3'))
  pick = lambda rows, who, key: [r[key] for r in rows if r['who'] == who]
  # The policy's are the same; what it is compared with is not.
  assert pick(rows, 'policy', 'completion') == pick(
    plain, 'policy', 'completion'
  )
  for who, key in (
    ('policy', 'log_reference'), ('reference', 'log_reference'),
    ('reference', 'completion'),
  ):  # fmt: skip
    assert pick(rows, who, key) != pick(plain, who, key)
  # Against the run that it is a copy of, the two sides are one law.
  judge(config, workdir, '6', toy.finished())
  same = read_completions(
    os.path.join(workdir, 'evaluate', 'step_6_against_finished_6')
  )
  for row in same:
    assert row['log_policy'] == pytest.approx(row['log_reference'], abs=1e-4)
  other = shutil.copytree(workdir, tmp_path / 'other')
  texts = [row['text'] for row in sources.rows(config, 'test')]
  tokenizer_lib.train(texts, str(other / 'tokenizer.model'), 96)
  before = toy.listing(workdir)
  with pytest.raises(UserError, match='has another tokenizer .96 pieces'):
    judge(config, workdir, '6', str(other))
  summary = toy.listing(workdir).keys() - before.keys()
  assert not any('summary' in name for name in summary)


def test_a_run_without_a_last_checkpoint_has_a_best_one(config, workdir):
  os.remove(f'{workdir}/train/summary.json')
  with pytest.raises(UserError, match='or give --checkpoint=best'):
    judge(config, workdir, 'last')
  assert 'anchor_drift' not in history.history(config, workdir, [])
  step = origin.find_step(workdir, 'train', 'best')
  assert evaluate.folder_of(workdir, step, 'reference') == (
    f'evaluate/step_{step}'
  )


def test_a_half_written_checkpoint_is_none(config, workdir):
  """What a kill leaves: a folder under a name that is not a step's yet."""
  folder = f'{workdir}/train/checkpoints'
  os.rename(f'{folder}/6', f'{folder}/6.orbax-checkpoint-tmp')
  assert origin.find_step(workdir, 'train', 'last') == 3
  shutil.rmtree(f'{folder}/3')
  with pytest.raises(UserError, match='holds no checkpoint; run the stage'):
    judge(config, workdir)


def test_a_tokenizer_of_another_size(config, workdir):
  texts = [row['text'] for row in sources.rows(config, 'train')]
  tokenizer_lib.train(texts, f'{workdir}/tokenizer.model', 80)
  with pytest.raises(UserError, match='has 80 pieces, the config asks for'):
    judge(config, workdir)


def test_throughput_is_the_median_and_needs_three_calls():
  row = lambda tokens, seconds: {'tokens/decoded': tokens,
                                 'seconds/sample': seconds}  # fmt: skip
  found = history.throughput([row(60, 30.0), row(60, 2.0), row(60, 3.0)])
  assert found == {'tokens_per_second': 20.0, 'throughput_reason': None}
  found = history.throughput([row(60, 30.0), row(60, 2.0)])
  assert found['tokens_per_second'] is None
  assert 'there were 2 calls' in found['throughput_reason']


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
  own = [{'step': 1, 'seconds/sample': 2.0}]
  found = history.history(config, workdir, own)
  assert 'reward_test_pearson' not in found
  assert found['phase_seconds']['evaluate/sample'] == 2.0
  assert found['seconds'] == pytest.approx(
    sum(found['phase_seconds'].values()), abs=0.01
  )


def test_a_reward_of_preferences_has_no_correlation(config, workdir):
  path = f'{workdir}/reward/summary.json'
  assert history.history(config, workdir, [])['reward_test_pearson'] > 0
  with open(path, 'w') as f:
    json.dump({'accuracy': 0.75, 'seconds': 1.0}, f)
  found = history.history(config, workdir, [])
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


def test_completions_that_are_no_table_are_one_line():
  with pytest.raises(
    UserError, match='F/completions.jsonl: completion 1 lacks'
  ):
    evaluate.measure('F', [{'id': 3}])


def test_what_stages_have_left_and_somebody_has_changed(tmp_path):
  """A field that is gone is named; rows without numbers have no rate."""
  (tmp_path / 'train').mkdir()
  path = tmp_path / 'train' / 'summary.json'
  assert history.stage_summary(str(tmp_path), 'train', 'steps') == {}
  path.write_text('{"steps": 6}')
  assert history.stage_summary(str(tmp_path), 'train', 'steps') == {'steps': 6}
  with pytest.raises(UserError, match='summary.json lacks drift, fires: '):
    history.stage_summary(str(tmp_path), 'train', 'steps', 'drift', 'fires')
  path.write_text('{"steps"')
  with pytest.raises(UserError, match='it is not a JSON object'):
    history.stage_summary(str(tmp_path), 'train')
  good = {'tokens/decoded': 8, 'seconds/sample': 2.0}
  strange = [{}, good | {'seconds/sample': 0}, good | {'seconds/sample': 'x'}]
  told = history.throughput([*strange, good, good, good])
  assert told['tokens_per_second'] == 4
  told = history.throughput([good, good, *strange])
  assert told['tokens_per_second'] is None
