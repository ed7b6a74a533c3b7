"""What the text stages do with rows before they load weights."""

import functools
import json

from conftest import core
import numpy as np
import pytest
import test_tokenizer
import toy

from bond_jax.data import examples, sources
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import evaluate
from bond_jax.reward_models import train
from bond_jax.runs import stages
from bond_jax.training import sft
from bond_jax.training.tasks import text_task
from bond_jax.types import Rollout

turn = lambda role, content: {'role': role, 'content': content}
WORDS = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
GOOD = [
  {'messages': [turn('user', w)], 'chosen': 'yes', 'rejected': 'no',
   'completion': 'yes'}
  for w in WORDS
]  # fmt: skip
MESH = sharding.make_mesh(1, 1)
STAGES = {
  'sft': sft.train,
  'reward_model': train.train,
  'train': text_task.make,
  'evaluate': lambda run: evaluate.evaluate(run, 'evaluate', checkpoint=1),
}


def run_of(config, workdir):
  rows = functools.partial(sources.rows, config)
  return stages.Run(config, workdir, MESH, rows)


@pytest.fixture
def config(tmp_path):
  """A run on conversations whose weights are nowhere."""
  content = test_tokenizer.with_turns().processor.serialized_model_proto()
  (tmp_path / 'words.model').write_bytes(content)
  config = toy.get_config(str(tmp_path))
  config.weights = str(tmp_path / 'no_weights')
  config.tokenizer.path = str(tmp_path / 'words.model')
  config.tokenizer.vocab_size = config.model.sizes.vocab_size = 120
  config.model.sizes.vocab_size = 128
  config.prompt.update(dict(kind='turn', length=48))
  config.sft.update(dict(target='completion', batch=4, validation_batches=2))
  config.train.update(dict(probe_prompts=4))
  config.evaluate.update(dict(prompts=4))
  with config.unlocked():
    config.reward_model = dict(
      kind='gemma', loss='bradley_terry', margin=0.0, min_gap=1.0, partners=2,
      weights=config.weights, pool='last', length=64, dropout=0.0,
      merge_dropout=0.0, members=1, steps=2, batch=4, micro_batches=1,
      save_every=2,
      optimizer=toy.OPTIMIZER,
    )  # fmt: skip
  for split in ('train', 'validation', 'test'):
    write(tmp_path, split, GOOD)
  return config


def write(folder, split, rows):
  path = folder / f'{split}.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


ROLES = [turn('user', 'a'), turn('user', 'b')]
CASES = [
  (stage, split, bad)
  for stage, splits, bad in (
    ('sft', ('train', 'validation'), {'messages': ROLES}),
    ('sft', ('train', 'validation'), {'completion': None}),
    ('train', ('train', 'validation', 'test'), {'messages': ROLES}),
    ('train', ('train', 'validation', 'test'), {'messages': None}),
    ('train', ('train',), {'messages': [turn('system', 'a'), *ROLES[:1]]}),
    ('evaluate', ('test',), {'messages': ROLES}),
    ('reward_model', ('train', 'validation', 'test'), {'messages': ROLES}),
    ('reward_model', ('train',), {'margin': 'wide'}),
    ('reward_model', ('train',), {'chosen': [turn('assistant', 'a')],
                                  'rejected': [ROLES[0], ROLES[1]]}),
  )
  for split in splits
]  # fmt: skip


@pytest.mark.parametrize(
  'stage, split, bad', core(6, CASES[::3] + CASES[1::3] + CASES[2::3])
)
def test_a_bad_row_is_named_before_weights_are_loaded(
  config, tmp_path, capsys, stage, split, bad
):
  if 'system' in str(bad):
    config.model.name = 'gemma2_2b'  # which has no turn for it
  if stage in ('train', 'evaluate'):
    with config.unlocked():
      del config.sft
  work = lambda: STAGES[stage](run_of(config, str(tmp_path)))
  weights = 'no_weights|has not finished'
  with pytest.raises(UserError, match=weights):  # what comes after the rows
    work()
  path = write(tmp_path, split, [*GOOD[:2], {**GOOD[2], **bad}, *GOOD[3:]])
  with pytest.raises(UserError, match=rf'{path}:3: .*bad_rows=.skip') as e:
    work()
  assert '\n' not in str(e.value)
  capsys.readouterr()
  config.data.bad_rows = 'skip'
  with pytest.raises(UserError, match=weights):
    work()
  if split == 'train':  # held-out prompts are the first good ones
    said = capsys.readouterr().out
    assert '1 of 8 rows are bad and left out; the first: ' in said
    assert f'{path}:3: ' in said


def test_a_vocabulary_needs_texts(config, tmp_path):
  """Of messages alone none is trained, which is said in one line."""
  config.tokenizer.path = ''
  with pytest.raises(UserError, match='a vocabulary is trained on') as e:
    sft.train(run_of(config, str(tmp_path)))
  assert str(e.value).startswith(f'{tmp_path}/train.jsonl:1: a row has no text')
  assert 'tokenizer.path' in str(e.value)


def test_a_number_is_no_part_of_a_vocabulary(config, tmp_path):
  write(tmp_path, 'train', [{'text': 'one two ' * 20, 'completion': 3}] * 9)
  config.tokenizer.update(dict(path='', vocab_size=20))
  rows = sources.rows(config, 'train')
  assert sft.load_vocabulary(config, str(tmp_path), rows).vocab_size == 20


# -- What the model reads is what the reward judges

TEXT, ASKED = 'everyone loved the film', 'the film was long'
BOTH = {'text': TEXT, 'messages': [turn('user', ASKED)]}
OF_TURNS = {'messages': BOTH['messages']}


@pytest.mark.parametrize('row', [BOTH, {'text': TEXT}, OF_TURNS])
@pytest.mark.parametrize(
  'kind, length, longer',
  [
    ('opening', 4, 'drop'),
    ('text', 99, 'drop'),
    ('text', 5, 'cut'),
    ('turn', 99, 'drop'),
    ('turn', 12, 'cut'),
  ],
)
def test_the_reward_is_given_what_the_model_reads(kind, length, longer, row):
  """The whole of it, where the model sees the end alone."""
  tok = test_tokenizer.with_turns()
  config = toy.get_config('')
  config.prompt.update(dict(kind=kind, length=length, longer=longer))
  encode = examples.encoder(
    kind, tok, length=length, system=False, longer=longer
  )
  read = lambda: examples.fixed_prompts([row], encode, length=length, count=1)
  if kind != 'turn' and 'text' not in row:
    with pytest.raises(UserError, match=f"no text, which prompt.kind '{kind}'"):
      read()
    return
  prompts = read()
  ones = np.ones((1, 1, 1), np.int32)
  drawn = Rollout(ones, ones == 1, ones * 0.0, ones[..., 0] * 1.0)
  (said,), _, context = text_task.texts(config, tok, [row], prompts, drawn)
  seen = tok.decode(prompts.tokens[0])
  assert context.turns == (kind == 'turn')
  if kind == 'turn':
    assert said == (ASKED if 'messages' in row else TEXT)
    whole = f'user\n{said}\nmodel\n'
  else:
    whole = TEXT
    assert said == (seen if kind == 'opening' else TEXT)
  if kind == 'opening':
    assert whole.startswith(seen) and seen
  else:
    assert whole.endswith(seen) and (seen == whole) == (longer == 'drop')
