"""The first stage: what it learns, and that a kill costs nothing."""

import functools
import json
import os
import shutil
import time

from conftest import core
import jax
import numpy as np
import pytest
import toy

from bond_jax.data import examples, sources
from bond_jax.errors import UserError
from bond_jax.models import policies
from bond_jax.models.log_probs import log_probs
from bond_jax.runs.settings import configs
from bond_jax.training import guard, sft
from bond_jax.weights import load


@pytest.fixture
def config():
  return toy.get_config(toy.folder())


@pytest.fixture
def workdir(tmp_path):
  return str(tmp_path / 'run')


def test_the_loss_is_nats_per_token_and_falls(config):
  first, *_, last = rows = toy.rows(toy.finished(), 'sft')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  tokenizer = load.load_tokenizer(config, toy.finished())
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  batches = examples.pairs(
      sources.rows(config, 'train'),
      examples.sentence(tokenizer, config.sft.length),
      length=config.sft.length, batch=config.sft.batch, seed=config.seed,
  )  # fmt: skip
  prompts, completion, mask = next(batches)
  # The whole row through the model at once, and a plain mean over its tokens.
  tokens = np.concatenate([prompts.tokens, completion[:, 0, :-1]], 1)
  seen = np.concatenate([prompts.mask, mask[:, 0, :-1]], 1)

  @jax.jit
  def law(key):
    params = policy.init(key)
    hidden = policy.hidden(params, tokens, seen)
    return jax.nn.log_softmax(policy.logits(params, hidden))

  table = jax.device_get(law(configs.key(config.seed, 'sft')))
  log_probs = np.take_along_axis(table, completion[:, 0, :, None], -1)[..., 0]
  expected = -log_probs[mask[:, 0]].mean()
  assert first['loss'] == pytest.approx(float(expected), rel=1e-5)
  assert last['loss'] < first['loss'] - 0.1


@pytest.mark.long
def test_resuming_is_going_on(config, workdir, monkeypatch):
  check = guard.check_finite

  def fails_at_5(row, step, folder):
    check(row, step, folder)
    if step == 5:
      raise RuntimeError('interrupted')

  with monkeypatch.context() as m:
    m.setattr(guard, 'check_finite', fails_at_5)
    with pytest.raises(RuntimeError, match='interrupted'):
      toy.run('sft', config, workdir)
  assert toy.steps(workdir, 'sft') == [3]
  assert not os.path.exists(f'{workdir}/sft/summary.json')
  toy.run('sft', config, workdir)
  toy.same_end(workdir, toy.finished(), 'sft')


@pytest.mark.long
def test_kill_9_from_outside(config, tmp_path):
  """Long enough that the kill lands somewhere within, also within a save."""
  args = [
    f'--config={toy.TESTS}/toy.py:{toy.folder()}',
    '--config.sft.steps=120',
    '--config.sft.save_every=10',
  ]
  killed, whole = str(tmp_path / 'killed'), str(tmp_path / 'whole')
  run = toy.command('sft', *args, f'--workdir={killed}')
  while not os.path.exists(f'{killed}/sft/checkpoints/20'):
    assert run.poll() is None, run.communicate()
    time.sleep(0.002)
  run.kill()
  assert run.wait() == -9
  run.communicate()
  assert not os.path.exists(f'{killed}/sft/summary.json')
  undisturbed = toy.command('sft', *args, f'--workdir={whole}')
  run = toy.command('sft', *args, f'--workdir={killed}')
  out, err = run.communicate()
  assert run.returncode == 0, err
  assert 'sft: goes on after step ' in out
  out, err = undisturbed.communicate()
  assert undisturbed.returncode == 0, err
  toy.same_end(killed, whole, 'sft', step=120)


@pytest.mark.filterwarnings('ignore:overflow')
@pytest.mark.parametrize(
  'rate, says, saved',
  core(
    1,
    [
      (
        1e30,
        'step 3 changed nothing: .* gradient nan',
        [1, 2],
      ),  # huge, then broken
      (1e39, 'step 1: validation_loss is nan', []),  # the loss is still good
    ],
  ),
)
def test_a_loss_that_is_no_number_stops_the_run(
  config, workdir, rate, says, saved
):
  config.sft.optimizer.learning_rate = rate
  config.sft.optimizer.warmup_steps = 2  # the rate of the first step is 0
  config.sft.save_every = 1
  with pytest.raises(UserError, match=says) as e:
    toy.run('sft', config, workdir)
  assert '\n' not in str(e.value)
  assert toy.steps(workdir, 'sft') == saved
  for step in saved:
    params = toy.saved(workdir, 'sft', step)['params']
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  assert [row['step'] for row in toy.rows(workdir, 'sft')] == saved


@pytest.mark.parametrize('content', core(1, [None, b'', b'no model']))
def test_a_corrupt_tokenizer_is_one_line(config, workdir, content):
  os.mkdir(workdir)
  path = os.path.join(workdir, 'tokenizer.model')
  shutil.copy(os.path.join(toy.finished(), 'tokenizer.model'), path)
  if content is None:
    os.truncate(path, 200)
  else:
    with open(path, 'wb') as f:
      f.write(content)
  before = toy.listing(workdir)
  with pytest.raises(UserError, match=r'tokenizer.model is not a Sentence'):
    toy.run('sft', config, workdir)
  after = toy.listing(workdir)
  assert after.pop('config.json') and after.pop('version.json')
  assert after == before


def test_answers_are_what_is_learnt(config, workdir, tmp_path):
  """The train stage's prompts in, and the loss is of the completions alone."""
  for split in ('train', 'validation', 'test'):
    with open(config.data.name.replace('{split}', split)) as f:
      rows = [json.loads(line) for line in f]
    with open(tmp_path / f'{split}.jsonl', 'w') as f:
      for row in rows:
        said, _, answer = row['text'].partition(' ')
        f.write(json.dumps({'said': said, 'answer': ' ' + answer}) + '\n')
  config.data.name = str(tmp_path / '{split}.jsonl')
  with config.unlocked():
    config.data.fields = dict(text='said', completion='answer')
  config.sft.target, config.prompt.kind = 'completion', 'text'
  config.prompt.length = 16
  toy.run('sft', config, workdir)
  rows = toy.rows(workdir, 'sft')
  assert rows[-1]['loss'] < rows[0]['loss'] - 0.1
  tokenizer = load.load_tokenizer(config, workdir)
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  prompts, completion, mask = next(
    sft.batches_of(config, tokenizer, sources.rows(config, 'train'))
  )
  assert mask[:, 0].sum(-1).max() > 2 and (prompts.mask.sum(-1) > 1).all()
  init = jax.jit(policy.init)(configs.key(config.seed, 'sft'))
  log_p = jax.jit(functools.partial(log_probs, policy, chunk=3))(
    init, prompts, completion, mask
  )
  expected = -np.asarray(log_p)[mask].mean()
  assert rows[0]['loss'] == pytest.approx(float(expected), rel=1e-5)
