"""Training on completions that were drawn once, with their rewards."""

import contextlib
import itertools
import json
import os
import shutil
import types

from conftest import core
import jax
import language
import numpy as np
import pytest
import several
import toy

from bond_jax.data import examples, stored
from bond_jax.data.tokenizer import Tokenizer
from bond_jax.devices import sharding
from bond_jax.errors import BadRow, UserError
from bond_jax.evaluation import draw
from bond_jax.rewards import calling
from bond_jax.runs import provenance
from bond_jax.training import checks, costs, distil, setups
from bond_jax.training.tasks import text_task
from bond_jax.types import Rollout

ALGORITHMS = {
  'qrpo': dict(num_policy=0, num_anchor=4, rows=4, transform='identity',
               kl_weight=0.5),
  'best_of_n': dict(n=3, anchor='fixed'),
  'bonbon': dict(n=3, sft_weight=0.05),
}  # fmt: skip
NUM, PROMPTS = 6, 40


def get_config(path='', name='qrpo', **args):
  config = toy.get_config(toy.folder())
  with config.unlocked():
    config.algorithm = dict(name=name, args=args or ALGORITHMS[name])
  config.data.stored = path
  return config


def lines(path):
  with open(path) as f:
    return [json.loads(line) for line in f]


def write(path, rows):
  with open(path, 'w') as f:
    f.writelines(json.dumps(row) + '\n' for row in rows)
  return str(path)


def draw_into(workdir):
  draw.main(toy.get_config(toy.folder()), workdir, n=NUM, prompts=PROMPTS)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  """A run in which completions of its training prompts have been drawn."""
  workdir = toy.before('train', str(tmp_path_factory.mktemp('drawn')))
  draw_into(workdir)
  return workdir


def file_of(workdir):
  return os.path.join(workdir, 'draw', 'completions.jsonl')


def train(workdir, config):
  if not os.path.exists(os.path.join(workdir, 'config.json')):
    toy.before('train', workdir, config)
  toy.run('train', config, workdir)
  return workdir


def folder(path):
  path.mkdir()
  return str(path)


@pytest.mark.parametrize('name', core(0, list(ALGORITHMS)))
def test_stored_completions_train_as_the_same_ones_drawn(
  tmp_path, monkeypatch, name
):
  """The sampler and the reward of one run are the stored rows of another."""
  config = get_config(name=name)
  config.train.update(dict(steps=4, save_every=2, rollouts=2, micro_batches=2))
  toy.finished()  # a run of its own
  seen, make = [], text_task.make

  def recording(run):
    task = make(run)

    def reward(prompts, drawn):
      seen.append((prompts, drawn, task.reward(prompts, drawn)))
      return seen[-1][2]

    return task._replace(reward=reward)

  with monkeypatch.context() as patch:
    patch.setattr(text_task, 'make', recording)
    one = train(folder(tmp_path / 'one'), config)
  assert len(seen) == 4
  rows, pieces = lines(os.path.join(toy.folder(), 'train.jsonl')), {}
  k = setups.make_algorithm(config).num_anchor
  for row in rows:  # those that are not visited have to have some
    row |= dict(completions=['a'] * k, rewards=[0] * k)
  tokenizer = text_task.load.load_tokenizer(config, one)
  for prompts, rollout, scored in seen:
    for b, i in enumerate(prompts.id):
      ids = [
        y[m].tolist() for y, m in zip(rollout.completion[b], rollout.mask[b])
      ]
      finished = [y[-1] == tokenizer.eos_id for y in ids]
      ids = [y[: len(y) - end] for y, end in zip(ids, finished)]
      texts = [tokenizer.decode(y) for y in ids]
      for text, y in zip(texts, ids):
        assert pieces.setdefault(text, y) == y
      value = scored.value[b].tolist()
      rows[i] |= dict(completions=texts, rewards=value, finished=finished)
  config.data.stored = write(tmp_path / 'stored.jsonl', rows)
  # A text has many encodings: here the one that was drawn, in its order.
  encode = Tokenizer.encode
  monkeypatch.setattr(
    Tokenizer,
    'encode',
    lambda self, text: pieces.get(text) or encode(self, text),
  )
  monkeypatch.setattr(stored, 'order', lambda *args: np.arange(args[-1]))
  other = train(folder(tmp_path / 'other'), config)
  a, b = (toy.saved(workdir, 'train', 4) for workdir in (one, other))
  assert a['data'] == b['data'] and a['rest']['step'] == 4
  jax.tree.map(np.testing.assert_array_equal, a, b)
  of_sampler = lambda row: {
    k: x for k, x in row.items() if k not in distil.OF_SAMPLER
  }
  assert toy.rows(other, 'train') == [*map(of_sampler, toy.rows(one, 'train'))]
  assert not {*distil.OF_SAMPLER} - {*toy.rows(one, 'train')[0]}


def test_visits_count_on():
  """Those of an iteration, and of the next: no two are alike."""
  seen, size = [], (2, 3)

  def known(prompts, visit):
    seen.append(visit)
    zeros = np.zeros((*size, 4), np.int32)
    drawn = Rollout(zeros, zeros > 0, zeros * 1.0, np.zeros(size))
    return drawn, np.full(size, visit)

  prompts = examples.padded([5, 7], [[2], [2]], 1)
  run = types.SimpleNamespace(
    batches=itertools.repeat(prompts), mesh=sharding.make_mesh(1, 1),
    stored=known, submit=lambda f, *args: f(*args),
    phase=lambda name: contextlib.nullcontext(),
  )  # fmt: skip
  for step in (0, 2):
    state = types.SimpleNamespace(step=np.int32(step))
    for index in range(2):
      *_, own, scored = distil._draw(run, state, index)
      assert own.tolist() == [0, 1] and scored.weight.tolist() == [1, 1]
      np.testing.assert_array_equal(scored.value, np.full(size, step + index))
  assert seen == [0, 1, 2, 3]


@pytest.mark.long
def test_a_run_that_was_killed_goes_on(drawn, tmp_path):
  """The reward is asked by probes alone: of the reference, at steps 3 and 6."""
  whole, killed = (folder(tmp_path / name) for name in ('whole', 'killed'))
  config = get_config(file_of(drawn))
  train(whole, config)
  toy.before('train', killed, config)
  toy.light(killed, 3, 'raise')
  with pytest.raises(UserError, match='the fuse has burnt down'):
    train(killed, config)
  assert toy.steps(killed, 'train') == [3]
  train(killed, config)
  toy.same_end(whole, killed, 'train')
  cost = toy.summary(whole, 'train')['cost']
  assert cost['decodes'] == cost['prefilled'] == cost['decoded'] == 0
  assert cost['trained_rows'] == 4 and cost['reference_rows'] == 4


@pytest.mark.long
def test_two_hosts_train_as_one(tmp_path):
  rng = np.random.default_rng(0)
  rows = lines(os.path.join(toy.folder(), 'train.jsonl'))[:PROMPTS]
  for row in rows:
    row['completions'] = [*rng.choice(toy.SUBJECTS.split(), NUM)]
    row['rewards'] = rng.normal(size=NUM).tolist()
    row['finished'] = [False] * NUM
  config = dict(
    algorithm=dict(name='qrpo', args=ALGORITHMS['qrpo']),
    stored=write(tmp_path / 'stored.jsonl', rows),
  )
  one = folder(tmp_path / 'one')
  for stage in ('sft', 'reward_model', 'train'):
    toy.run(stage, several.get_config(toy.folder(), 2, **config), one)
  left = shutil.ignore_patterns('train')
  two = str(shutil.copytree(one, tmp_path / 'two', ignore=left))
  command = several.run(toy.folder(), '2,1', f'train={two}')
  ended = several.launch(2, *command, CHANGES=json.dumps(config))
  assert ended.status == 0, ended.said
  ours, theirs = toy.rows(one, 'train'), toy.rows(two, 'train')
  assert [row['step'] for row in theirs] == list(range(1, 11))
  for a, b in zip(ours, theirs, strict=True):
    assert b == pytest.approx(a, rel=1e-4, abs=1e-4)


def test_what_is_drawn(drawn):
  """Every row is read back, and its rewards are those of its texts."""
  rows = lines(file_of(drawn))
  summary = toy.summary(drawn, 'draw')
  assert summary['rows'] == len(rows)
  assert summary['rows'] + summary['left_out'] == PROMPTS
  assert 0.5 < summary['encoded_alike'] < 1
  config = get_config()
  train_rows = lines(os.path.join(toy.folder(), 'train.jsonl'))
  tokenizer = text_task.load.load_tokenizer(config, drawn)
  read = text_task.stored_reader(config, tokenizer, NUM)
  ask = draw.make.make_ask(config, 'reward', drawn)
  for row in rows:
    assert row['text'] == train_rows[row['id']]['text']
    assert len({*row['completions']}) > 1
    found = read(row)
    context = toy.context([row['completions']])
    opening = tokenizer.decode(tokenizer.encode(row['text'])[:2])  # after BOS
    scored = ask([opening], [row['completions']], context)
    np.testing.assert_allclose(found.reward, scored.value[0], rtol=1e-6)
    sizes = [len(y) for y in found.pieces]
    assert max(sizes) <= config.length
  finished = [x for row in rows for x in row['finished']]
  assert 0 < np.mean(finished) < 1


def test_a_row_that_cannot_be_read_back_is_not_written():
  class Texts:
    finished = np.ones((2, 1), bool)

  def read(row):
    if row['completions'] == ['long']:
      raise BadRow('too long')

  texts = None, [['long'], ['good']], Texts
  rows = [{'text': 'a', 'rating': 1}, {'text': 'b', 'rating': 2}]
  found = draw.records(rows, [0, 1], texts, np.ones((2, 1)), read)
  assert list(found) == [
    dict(id=1, text='b', completions=['good'], rewards=[1.0], finished=[True])
  ]


def test_drawing_goes_on_where_it_was_killed(drawn, tmp_path, capsys):
  workdir = toy.before('train', folder(tmp_path / 'run'))
  toy.light(workdir, 2, 'raise')  # calls are of 16 prompts
  with pytest.raises(UserError, match='the fuse has burnt down'):
    draw_into(workdir)
  with open(file_of(workdir)) as f:
    content = f.read()
  rows = lines(file_of(drawn))
  assert 10 < content.count('\n') <= 16
  with open(file_of(workdir), 'w') as f:  # the last row is torn
    f.write(content[:-20])
  capsys.readouterr()
  draw_into(workdir)
  done = rows[content.count('\n') - 2]['id'] + 1
  assert f'draw: goes on after {done} prompts\n' in capsys.readouterr().out
  assert lines(file_of(workdir)) == rows
  draw_into(workdir)
  assert 'draw: finished already' in capsys.readouterr().out
  with pytest.raises(UserError, match='n: 6 -> 5 asked for now'):
    draw.main(toy.get_config(toy.folder()), workdir, n=5, prompts=PROMPTS)


def test_rows_of_other_inputs_are_set_aside(tmp_path, capsys):
  path, where = str(tmp_path / 'completions.jsonl'), str(tmp_path)
  draw.completions.begin(path, where, {'n': '4'}, 'draw')
  write(path, [{'id': 0}])
  draw.completions.begin(path, where, {'n': '8'}, 'draw')
  assert f'draw: {path} was begun with other' in capsys.readouterr().out
  assert os.path.exists(f'{path}.before') and draw.begun(path, [0]) == 0


def test_a_reward_of_pairs_is_refused():
  judge = draw.numbers(lambda *texts: calling.known(np.zeros((1, 2, 2))))
  with pytest.raises(UserError, match='compares pairs'):
    judge([], [], None)


def test_drawing_needs_a_text_task():
  with pytest.raises(UserError, match='no draw section'):
    draw.stages.check_stage('draw', language.get_config('jbond'), 'x')


@pytest.mark.parametrize('name, args, why', [
  ('jbond', toy.get_config(toy.TESTS).algorithm.args.to_dict(), 'fresh'),
  ('qrpo', ALGORITHMS['qrpo'] | dict(num_policy=1, rows=1), 'fresh'),
  ('best_of_n', dict(n=3, anchor='periodic:1'), 'an anchor that moves'),
  ('best_of_n', dict(n=3, anchor='ema:0.1'), 'an anchor that moves'),
])  # fmt: skip
def test_algorithms_that_need_fresh_ones_are_refused(drawn, name, args, why):
  config = get_config(file_of(drawn), name, **args)
  with pytest.raises(UserError, match=f'algorithm {name} .*{why}') as e:
    checks.check(config)
  assert 'qrpo with num_policy 0, best_of_n' in str(e.value)
  config.data.stored = ''
  checks.check(config)


@pytest.mark.parametrize('name', list(ALGORITHMS))
def test_algorithms_that_do_not_are_allowed(drawn, name):
  checks.check(get_config(file_of(drawn), name))


def test_no_row_is_both_trained_on_and_judged(tmp_path):
  config = get_config(os.path.join(toy.folder(), 'test.jsonl'))
  with pytest.raises(UserError, match='stored and test have 60 rows in common'):
    checks.check(config)


BAD = [
  {'rewards': [1.0]}, {'completions': None}, {'rewards': [float('nan')] * NUM},
  {'completions': ['a'] * 3, 'rewards': [1] * 3, 'finished': None},
  {'completions': ['the film is good'] * NUM, 'finished': None},
  {'completions': [[4, 5]] * NUM}, {'text': None},
]  # fmt: skip


@pytest.mark.parametrize('bad', BAD)
def test_a_bad_row_is_named_before_weights_are_loaded(
  drawn, tmp_path, capsys, monkeypatch, bad
):
  def no_weights(*args):
    raise UserError('weights are loaded')

  monkeypatch.setattr(text_task.load, 'load_frozen', no_weights)
  rows = lines(file_of(drawn))
  rows[2] |= bad
  path = write(tmp_path / 'stored.jsonl', rows)
  config = get_config(path)

  def make():
    return text_task.make(checks.open_run(config, drawn))

  with pytest.raises(UserError, match=rf'{path}:3: .*bad_rows=.skip') as e:
    make()
  assert '\n' not in str(e.value)
  config.data.bad_rows = 'skip'
  capsys.readouterr()
  with pytest.raises(UserError, match='weights are loaded'):
    make()
  count = len(rows)
  said = capsys.readouterr().out
  assert f'1 of {count} rows are bad and left out; the first: {path}:3' in said


def test_other_rows_are_not_gone_on_with(drawn, tmp_path):
  path = write(tmp_path / 'stored.jsonl', lines(file_of(drawn)))
  of = lambda stage: provenance.inputs(get_config(path), drawn, stage)
  before = of('train')
  assert f'data.stored {path}' in before
  assert f'data.stored {path}' not in {**of('sft'), **of('evaluate')}
  write(path, lines(path)[1:])
  changed = [k for k, x in of('train').items() if before[k] != x]
  assert changed == [f'data.stored {path}']
  without = provenance.inputs(get_config(), drawn, 'train')
  assert not any(k.startswith('data.stored') for k in without)


def test_costs_of_an_offline_run(drawn):
  config = get_config(file_of(drawn))
  algorithm = setups.make_algorithm(config)
  found = costs.of_config(config, algorithm)
  config.data.stored = ''
  drawing = costs.of_config(config, algorithm)
  assert drawing.decodes == 4
  assert found == drawing._replace(decodes=0, prefilled=0, decoded=0)
