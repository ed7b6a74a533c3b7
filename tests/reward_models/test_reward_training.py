"""Our own reward model: what it learns from, that it learns, what it leaves."""

import collections
import functools
import json
import os
import signal

import jax
import numpy as np
import pytest
import test_tokenizer
import toy

from bond_jax.data import preferences, tokenizer
from bond_jax.devices import sharding
from bond_jax.errors import Stopped, UserError
from bond_jax.models import policies, scalar_head
from bond_jax.reward_models import train
from bond_jax.rewards import gemma as reward
from bond_jax.runs.settings import configs
from bond_jax.training import guard
from bond_jax.weights import load
from configs import demo_learned_reward

STEPS = 80


def get_config(**changes):
  """The toy's, with a reward model that has a vocabulary of its own."""
  config = toy.get_config(toy.folder())
  with config.unlocked():
    config.reward_model = demo_learned_reward.get_config().reward_model
  config.reward_model.update(
      dict(loss='bradley_terry', members=2, min_gap=0.8, partners=4, length=12,
           dropout=0.3, steps=STEPS, batch=16, save_every=20)
  )  # fmt: skip
  config.reward_model.optimizer.update(
    dict(learning_rate=1e-2, warmup_steps=5, decay_to=1.0)
  )
  config.reward_model.tokenizer.vocab_size = 160
  config.reward_model.model.sizes = dict(vocab_size=160)
  with config.unlocked():
    config.reward_model.update(changes)
  return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A workdir in which the reward model has been trained."""
  workdir = str(tmp_path_factory.mktemp('reward') / 'run')
  toy.run('reward_model', get_config(), workdir)
  return workdir


@pytest.fixture(scope='module')
def tok(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  return tokenizer.train(['good bad ' * 3, 'a film is so'], str(path), 24)


def read(rows, tok, min_gap=0.5, partners=2, **changes):
  pair = functools.partial(
    preferences.pairs_of, min_gap=min_gap, partners=partners, seed=0
  )
  kwargs = dict(turns=False, system=False, length=99, pair=pair)
  return preferences.read(rows, 'train', tok, **{**kwargs, **changes})


# -- The data


def test_preferences_go_on_from_the_text_before_them(tok):
  rows = [
    {'text': 'a film', 'chosen': ' is good', 'rejected': ' is bad'},
    {'text': 'so ' * 40, 'chosen': 'good', 'rejected': 'bad'},
    {'text': 'a', 'chosen': 'good', 'rejected': 'bad', 'margin': 2.5},
  ]
  got = read(rows, tok, length=24)
  assert got.texts == ['a film is good', 'a film is bad', 'agood', 'abad']
  assert got.pieces[0] == [2, *tok.encode('a film is good'), 1]
  np.testing.assert_array_equal(got.pairs, [[0, 1], [2, 3]])
  np.testing.assert_array_equal(got.gap, [1, 2.5])
  np.testing.assert_array_equal(got.unit, [0, 0, 1, 1])
  assert got.left_out == 1 and got.rating is None
  # Without a prompt they are whole texts; those of TFDS are bytes.
  whole = read([{'chosen': b'good', 'rejected': 'bad'}], tok)
  assert whole.texts == ['good', 'bad']


def test_answers_are_read_in_the_template_of_turns(tmp_path):
  pieces = ['<start_of_turn>', '<end_of_turn>']
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['user model hi yes no\n'] * 3),
      model_prefix=str(tmp_path / 't'), model_type='char', vocab_size=24,
      pad_id=0, eos_id=1, bos_id=2, unk_id=3, add_dummy_prefix=False,
      remove_extra_whitespaces=False, normalization_rule_name='identity',
      user_defined_symbols=pieces, hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  turns = tokenizer.load(str(tmp_path / 't.model'))
  messages = [{'role': 'user', 'content': 'hi'}]
  rows = [
    {'messages': messages, 'chosen': 'yes', 'rejected': 'no'},
    {'text': 'hi', 'chosen': 'yes', 'rejected': 'no'},
  ]
  got = read(rows, turns, turns=True)
  prompt = tokenizer.chat(turns, messages, system=False)
  for i, answer in enumerate(['yes', 'no'] * 2):
    assert got.texts[i] == answer
    expected = [*prompt, *turns.encode(answer), turns.end_of_turn]
    assert got.pieces[i] == expected
  rated = [
    {'messages': messages, 'text': t, 'rating': len(t)} for t in ['a', 'bb']
  ]
  assert read(rated, turns, turns=True).pieces[0][: len(prompt)] == prompt
  with pytest.raises(UserError, match="no 'messages'"):
    read([{'text': 'a', 'rating': 1}], turns, turns=True)


def test_answers_that_are_messages_bring_their_prompt(tmp_path):
  turn = lambda role, content: {'role': role, 'content': content}
  hi = turn('user', 'hi')
  yes, no = turn('assistant', 'yes'), turn('assistant', 'no')
  tok = test_tokenizer.with_turns()
  read_turns = lambda row: read([row], tok, turns=True)
  plain = read_turns({'messages': [hi], 'chosen': 'yes', 'rejected': 'no'})
  whole = {'chosen': [hi, yes], 'rejected': [hi, no]}
  for row in (
    whole,
    {'text': 'hi', **whole},
    {'text': 'hi', 'chosen': [yes], 'rejected': [no]},
    {'messages': [hi], 'chosen': [yes], 'rejected': [no]},
  ):
    got = read_turns(row)
    assert got.texts == ['yes', 'no'] and got.pieces == plain.pieces
  assert preferences.texts(whole) == ['hi', 'yes', 'hi', 'no']
  with pytest.raises(UserError, match='answer different messages'):
    read_turns({'chosen': [hi, yes], 'rejected': [turn('user', 'ho'), no]})


def test_held_out_texts_meet_more_others(tok):
  rows = [{'text': 'a film', 'rating': i} for i in range(40)]
  config = get_config(length=64)
  sources = dict.fromkeys(preferences.SPLITS, rows)
  mine = configs.of_reward_model(config)
  got = train.read_splits(config, mine, sources, tok)
  counts = {k: np.bincount(v.pairs.ravel()) for k, v in got.items()}
  assert counts['train'].max() == config.reward_model.partners == 4
  for split in ('validation', 'test'):
    assert counts[split].min() > 30  # almost all of the 39


def test_each_rating_is_paired_about_equally_often():
  rating = np.random.default_rng(0).normal(size=301).round(1)
  pairs = preferences.pairs_of(rating, min_gap=0.5, partners=6, seed=3)
  gap = rating[pairs[:, 0]] - rating[pairs[:, 1]]
  assert gap.min() >= 0.5 - 1e-12
  assert len(np.unique(pairs, axis=0)) == len(pairs)
  count = np.bincount(pairs.ravel(), minlength=len(rating))
  assert count.max() <= 6
  assert (count >= 4).mean() > 0.97 and count.mean() > 5.8
  pair = lambda seed: preferences.pairs_of(
    rating, min_gap=0.5, partners=6, seed=seed
  )
  np.testing.assert_array_equal(pair(3), pairs)
  assert not np.array_equal(pair(4)[: len(pairs)], pairs[: len(pair(4))])
  ties = preferences.pairs_of(np.ones(9), min_gap=0.0, partners=2, seed=0)
  assert ties.shape == (0, 2)


def batches(dropout=0.0, **changes):
  pieces = [[2, *range(10 * i, 10 * i + i), 1] for i in range(2, 8)]
  groups = np.array([[0, 1], [2, 3], [4, 5]])
  kwargs = dict(length=9, batch=1, dropout=dropout, seed=0)
  targets = np.array([0.5, 1.5, 2.5])
  return preferences.batches(
    lambda i, rng: pieces[i], groups, targets, **{**kwargs, **changes}
  )


def test_batches_hold_whole_pairs_and_their_targets():
  it = batches()
  seen = collections.Counter()
  for _ in range(6):
    tokens, mask, target = next(it)
    assert tokens.shape == mask.shape == (1, 2, 9)
    assert target.dtype == np.float32
    i = int(target[0])
    seen[i] += 1
    for j in range(2):
      n = 2 * i + j + 2
      expected = [2, *range(10 * n, 11 * n), 1]
      assert tokens[0, j][mask[0, j]].tolist() == expected
      assert not tokens[0, j][~mask[0, j]].any()
  assert seen == {0: 2, 1: 2, 2: 2}  # two epochs


def test_dropped_pieces_are_drawn_anew_and_never_the_ends():
  it, found = batches(dropout=0.5, batch=3), []
  for _ in range(4):
    tokens, mask, target = next(it)
    assert tokens.shape[-1] == 9 - 3  # 3 of the 7 inner pieces are gone
    place = int(np.argmax(target))  # of the pair of 6 and 7 pieces
    ids = tokens[place, 1][mask[place, 1]].tolist()
    assert len(ids) == 6 and ids[0] == 2 and ids[-1] == 1
    assert set(ids[1:-1]) <= set(range(70, 77))
    assert ids[1:-1] == sorted(ids[1:-1])
    found.append(tuple(ids))
  assert len(set(found)) > 1


def with_merges(path):
  """A byte-pair vocabulary that makes one piece of a common word."""
  words = ['a film that is good', 'a film that was bad'] * 9
  return tokenizer.train(words, str(path / 'merges.model'), 32)


def test_without_dropped_merges_pieces_are_as_usual(tmp_path):
  tok = with_merges(tmp_path)
  rng = np.random.default_rng(0)
  for text in ('a film that is good', ' bad  films ', 'é is unknown', ''):
    assert tok.encode_anew(text, drop=0.0, rng=rng) == tok.encode(text)
  assert len(tok.encode_anew('film good', drop=1.0, rng=rng)) == 9


def test_merges_are_dropped_as_often_as_sentencepiece_drops_them(tmp_path):
  tok, n = with_merges(tmp_path), 4000
  text, rng = 'that film is good', np.random.default_rng(0)
  ours = [len(tok.encode_anew(text, drop=0.3, rng=rng)) for _ in range(n)]
  theirs = [
    len(tok.processor.encode(text, enable_sampling=True, alpha=0.3,
                             nbest_size=-1)) for _ in range(n)
  ]  # fmt: skip
  error = np.sqrt((np.var(ours) + np.var(theirs)) / n)
  assert len(set(ours)) > 3
  assert abs(np.mean(ours) - np.mean(theirs)) < 5 * error


def test_texts_are_cut_anew_between_their_prompt_and_their_end(tmp_path):
  tok = with_merges(tmp_path)
  texts = ['a film that is good', 'bad']
  prompt = [2, 9, 9]
  pieces = [[*prompt, *tok.encode(t), 1] for t in texts]
  judged = preferences.Judged(texts, pieces, None, None, None, None, 0)

  def again(seed=0, length=99):
    rng = np.random.default_rng(seed)
    return [
      preferences.cut_anew(judged, i, tok, drop=0.5, length=length, rng=rng)
      for i in [0, 1] * 6
    ]

  got = again()
  assert got == again() != again(seed=1)
  for i, ids in enumerate(got):
    assert ids[:3] == prompt and ids[-1] == 1
    assert tok.decode(ids[3:-1]) == texts[i % 2]
  assert len({tuple(ids) for ids in got[::2]}) > 3
  size = len(pieces[0])
  assert max(map(len, got)) > size
  # Where a text would be too long, it is read as usual.
  short = again(length=size)
  assert max(map(len, short)) <= size and pieces[0] in short


@pytest.mark.parametrize('loss', ['regression', 'bradley_terry'])
def test_texts_that_are_cut_anew_keep_what_people_said(loss, tmp_path):
  tok = with_merges(tmp_path)
  rows = [
    {'text': text, 'rating': float(i)}
    for i, text in enumerate(['bad', 'film', 'a film', 'good'])
  ]
  judged = read(rows, tok)
  config = get_config(
    loss=loss, batch=8, members=1, dropout=0.0, merge_dropout=0.6
  )
  it, other = (train.make_batches(config, judged, tok) for _ in range(2))
  spread, usual = judged.rating.std(), 0
  for _ in range(12):
    batch = next(it)
    jax.tree.map(np.testing.assert_array_equal, batch, next(other))
    for tokens, mask, target in zip(*batch):
      texts = [tok.decode(t[m]) for t, m in zip(tokens, mask)]
      usual += tok.encode(texts[0]) == tokens[0][mask[0]][1:-1].tolist()
      said = [judged.rating[judged.texts.index(t)] for t in texts]
      if loss == 'regression':
        assert target == pytest.approx((said[0] - 1.5) / spread, abs=1e-6)
      else:
        assert target == pytest.approx((said[0] - said[1]) / spread, abs=1e-6)
  assert 0 < usual < 96


def test_batches_go_on_where_they_were():
  it, other = batches(dropout=0.5), batches(dropout=0.5)
  for _ in range(4):
    next(it)
  other.set_state(json.loads(json.dumps(it.get_state())))
  for _ in range(5):
    jax.tree.map(np.testing.assert_array_equal, next(it), next(other))


# -- The stage


def test_it_learns_what_people_prefer(finished):
  summary = toy.summary(finished, 'reward')
  assert summary['accuracy'] > 0.9
  low, high = summary['accuracy_interval']
  assert 0.9 < low <= summary['accuracy'] <= high <= 1
  assert summary['log_loss'] < 0.4
  assert summary['bag_of_words']['accuracy'] > 0.9  # the words say it all
  difference = summary['accuracy'] - summary['bag_of_words']['accuracy']
  assert summary['lead'] == pytest.approx(difference)
  assert summary['test_spearman'] > 0.6
  table = summary['calibration']
  assert sum(b['pairs'] for b in table) == summary['pairs']['test'] > 50
  assert summary['texts'] == {'train': 300, 'validation': 60, 'test': 60}


def test_the_best_checkpoint_is_the_one_that_is_used(finished):
  rows = toy.rows(finished, 'reward')
  saved = {r['step']: r['validation_accuracy'] for r in rows
           if 'validation_accuracy' in r}  # fmt: skip
  assert list(saved) == [20, 40, 60, 80]
  best = toy.summary(finished, 'reward')['best_step']
  assert saved[best] == max(saved.values()) >= saved[20]
  with open(f'{finished}/reward/model.json') as f:
    assert json.load(f)['step'] == best


def rows_of(split):
  return [json.loads(x) for x in open(f'{toy.folder()}/{split}.jsonl')]


def test_the_reward_is_the_model_that_was_trained(finished):
  """Text by text, without padding, from the parameters of the checkpoint."""
  texts = [row['text'] for row in rows_of('test')][:8]
  completions = [[t[4:], ' is bad'] for t in texts]
  given = toy.context(completions)
  prompts = [t[:4] for t in texts]
  got = reward.scalar_head(f'{finished}/reward', batch=8)(
    prompts, completions, given
  )
  assert got.shape == (8, 2)
  summary = toy.summary(finished, 'reward')
  params = toy.saved(finished, 'reward', summary['best_step'])['params']
  with open(f'{finished}/reward/model.json') as f:
    policy = reward.make_policy(json.load(f))
  tok = tokenizer.load(f'{finished}/reward/tokenizer.model')
  assert tok.vocab_size == 160
  score = jax.jit(scalar_head.score, static_argnums=(0, 4))
  for i, text in enumerate(texts):
    for j, whole in enumerate((text, text[:4] + ' is bad')):
      tokens = np.array([[2, *tok.encode(whole), 1]])
      alone = [
        score(policy, params[f'member_{m}'], tokens, tokens > 0, 'mean')[0]
        for m in range(2)
      ]
      assert alone[0] != alone[1]
      expected = float(sum(alone)) / 2 / summary['temperature']
      assert got[i, j] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_scores_are_those_that_the_summary_reports(finished):
  """The accuracy, from the outside; and whatever the batch, the same score."""
  rows, wide = rows_of('test'), reward.scalar_head(f'{finished}/reward')
  completions = [[row['text'] for row in rows]]
  got = wide([''], completions, toy.context(completions))[0]
  rating = np.array([row['rating'] for row in rows])
  pairs = preferences.pairs_of(rating, min_gap=0.8, partners=100, seed=0)
  summary = toy.summary(finished, 'reward')
  accuracy = (got[pairs[:, 0]] > got[pairs[:, 1]]).mean()
  assert accuracy == pytest.approx(summary['accuracy'], abs=1e-9)
  again = wide([''], completions, toy.context(completions))[0]
  np.testing.assert_array_equal(got, again)
  # Among other texts, and in batches of another size.
  small = reward.scalar_head(f'{finished}/reward', batch=8)
  other = [[*completions[0][::-1], 'x ' * 40]]
  np.testing.assert_allclose(
    small([''], other, toy.context(other))[0][:-1][::-1], got, atol=1e-4
  )


@pytest.mark.long
def test_resuming_is_going_on(finished, tmp_path, monkeypatch):
  check, workdir = guard.check_finite, str(tmp_path / 'run')

  def fails(row, step, folder):
    check(row, step, folder)
    if step == 45:
      raise RuntimeError('interrupted')

  with monkeypatch.context() as m:
    m.setattr(guard, 'check_finite', fails)
    with pytest.raises(RuntimeError, match='interrupted'):
      toy.run('reward_model', get_config(), workdir)
  assert max(toy.steps(workdir, 'reward')) == 40
  with pytest.raises(UserError, match='there is no reward model in'):
    reward.scalar_head(f'{workdir}/reward')
  toy.run('reward_model', get_config(), workdir)
  toy.same_end(workdir, finished, 'reward', step=STEPS)


@pytest.mark.long
def test_a_signal_costs_nothing(finished, tmp_path, monkeypatch):
  check, workdir = guard.check_finite, str(tmp_path / 'run')

  def signals(row, step, folder):
    check(row, step, folder)
    if step == 33:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as m:
    m.setattr(guard, 'check_finite', signals)
    with pytest.raises(Stopped, match='reward_model: SIGTERM: ended after'):
      toy.run('reward_model', get_config(), workdir)
  assert max(toy.steps(workdir, 'reward')) in (33, 34)
  toy.run('reward_model', get_config(), workdir)
  toy.same_end(workdir, finished, 'reward', step=STEPS)


@pytest.mark.long
def test_eight_devices_learn_the_same(finished, tmp_path, capsys):
  config, workdir = get_config(steps=10), str(tmp_path / 'run')
  config.mesh.update(dict(data=4, model=2))
  toy.run('reward_model', config, workdir)
  assert 'accuracy of a bag of words' in capsys.readouterr().out
  many = toy.rows(workdir, 'reward')
  for ours, theirs in zip(many, toy.rows(finished, 'reward'), strict=False):
    for key in ('loss', 'gradient_norm'):
      assert ours[key] == pytest.approx(theirs[key], rel=2e-3)


@pytest.mark.long
@pytest.mark.parametrize('loss', ['regression', 'margin'])
def test_the_other_losses_learn_too(loss, tmp_path):
  config, workdir = get_config(loss=loss, margin=0.5), str(tmp_path / 'run')
  toy.run('reward_model', config, workdir)
  assert toy.summary(workdir, 'reward')['accuracy'] > 0.9


@pytest.mark.long
def test_it_starts_from_the_sft_stage_and_takes_pairs(tmp_path):
  """On rows with chosen and rejected, with the run's own model."""
  for split in ('train', 'validation', 'test'):
    rows = rows_of(split)
    with open(tmp_path / f'{split}.jsonl', 'w') as f:
      for a, b in zip(rows[::2], rows[1::2]):
        low, high = sorted((a, b), key=lambda r: r['rating'])
        row = {'chosen': high['text'], 'rejected': low['text']}
        f.write(json.dumps(row) + '\n')
  config = get_config(weights='sft', steps=2, batch=8, length=64)
  with config.unlocked():
    del config.reward_model.tokenizer, config.reward_model.model
    config.reward_model.data = dict(name=str(tmp_path / '{split}.jsonl'))
  workdir = str(tmp_path / 'run')
  with pytest.raises(UserError, match='tokenizer.model.*sft stage'):
    toy.run('reward_model', config, workdir)
  toy.run('sft', config, workdir)
  toy.run('reward_model', config, workdir)
  summary = toy.summary(workdir, 'reward')
  assert summary['pairs'] == {'train': 150, 'validation': 30, 'test': 30}
  first, _ = toy.rows(workdir, 'reward')
  assert first['loss'] == pytest.approx(np.log(2))  # the head says 0
  # The rate of the first step is 0: what is there is the sft stage's.
  mesh = sharding.make_mesh(1, 1)
  mine = configs.of_reward_model(config)
  policy = policies.make_policy(mine.model, 96, full=True)
  theirs = load.load_params(policy, workdir, 'sft', 'last', mesh)
  optimizer = train.optimizer_lib.adam(steps=2, **config.reward_model.optimizer)
  state = train.init_state(config, mine, policy, optimizer, workdir, mesh)
  for member in state.params.values():
    jax.tree.map(np.testing.assert_array_equal, member['model'], theirs)
  assert len(state.params) == 2


# -- What is refused


@pytest.mark.parametrize(
  'changes, says',
  [
    (
      dict(data=dict(name=f'{toy.folder()}/train.jsonl')),
      'needs "{split}" in the name',
    ),
    (dict(weights='sft'), 'has no model or tokenizer of its own'),
    (dict(min_gap=99.0), 'no two ratings of the train split.*differ'),
    (dict(length=3), 'all 300 rows of the train split are longer'),
  ],
)
def test_a_wrong_section_is_one_line(changes, says, tmp_path):
  with pytest.raises(UserError, match=says) as e:
    toy.run('reward_model', get_config(**changes), str(tmp_path / 'run'))
  assert '\n' not in str(e.value)


def test_rows_without_judgements_are_one_line(tok):
  with pytest.raises(UserError, match='train split has the columns id, text'):
    read([{'text': 'a', 'id': 1}], tok)
  with pytest.raises(UserError, match="'rating' is 'x'"):
    read([{'text': 'a', 'rating': 1}, {'text': 'a', 'rating': 'x'}], tok)
  with pytest.raises(UserError, match="'rating' is 1000"):
    read([{'text': 'a', 'rating': 1}, {'text': 'a', 'rating': 10**400}], tok)
  both = {'chosen': 'a', 'rejected': 'b'}
  with pytest.raises(UserError, match="'rejected' is None"):
    read([both, {'chosen': 'a'}], tok)
  with pytest.raises(UserError, match='no two ratings .* 2 to 2'):
    read([{'text': 'a', 'rating': 2}] * 4, tok)


def test_regression_needs_ratings(tok):
  config = get_config(loss='regression')
  judged = read([{'chosen': 'good', 'rejected': 'bad'}], tok)
  with pytest.raises(UserError, match="'regression' needs rows"):
    train.make_batches(config, judged, tok)


def test_a_broken_or_misused_reward_is_one_line(finished, tmp_path):
  score = reward.scalar_head(f'{finished}/reward', batch=8)
  with pytest.raises(UserError, match='was trained on texts'):
    score(['a'], [['b']], toy.context([['b']], turns=True))
  path = tmp_path / 'model.json'
  for content in ('{', '{"library": ""}'):
    path.write_text(content)
    with pytest.raises(UserError, match='does not describe a reward model'):
      reward.scalar_head(str(tmp_path))
