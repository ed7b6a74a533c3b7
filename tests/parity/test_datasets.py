"""Hugging Face datasets, saved to disk by their own library, as our rows."""

import os

os.environ['HF_HUB_OFFLINE'] = '1'  # this process asks nobody

import pytest

datasets = pytest.importorskip(
  'datasets', reason='needs the package datasets, see requirements-hf.txt'
)

import test_sources  # noqa: E402

from bond_jax.data import examples, sources  # noqa: E402

PAIRS, says = test_sources.PAIRS, test_sources.says
# The splits of the hub's preference data, as ours.
SPLITS = dict(
  train='train_prefs[2:]', validation='train_prefs[:2]', test='test_prefs'
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('saved') / 'pairs')
  rows = datasets.Dataset.from_list(PAIRS)
  kinds = {'train_prefs': rows, 'test_prefs': rows.select([0, 3])}
  # As numpy: how it is shown is saved with it, and is no matter of ours.
  datasets.DatasetDict(kinds).with_format('numpy').save_to_disk(folder)
  return folder


def test_preference_pairs_are_read_whole(folder):
  for split, expected in (
    ('train', PAIRS[2:]),
    ('validation', PAIRS[:2]),
    ('test', [PAIRS[0], PAIRS[3]]),
  ):
    rows = sources.source(
      f'hf:{folder}', split, '', fields=dict(text='prompt'), splits=SPLITS
    )
    kept = ('chosen', 'rejected', 'score_chosen')
    assert [dict(row) for row in rows] == [
      {'text': row['prompt'], **{k: row[k] for k in kept}} for row in expected
    ]


def test_prompts_come_from_it_and_go_on(folder):
  rows = sources.source(
    f'hf:{folder}', 'train', '', fields=dict(text='prompt'), splits=SPLITS
  )
  encode = lambda row: [ord(row['text'][9])]
  make = lambda: examples.prompts(rows, encode, length=1, batch=3, seed=0)
  it, other = make(), make()
  first = [next(it) for _ in range(4)]
  other.set_state(it.get_state())
  assert next(it).id.tolist() == next(other).id.tolist()
  ids = [int(i) for prompts in first for i in prompts.id]
  assert sorted(ids[:5]) == sorted(ids[5:10]) == list(range(5))


def test_one_split_alone(tmp_path):
  datasets.Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / 'train'))
  rows = sources.source(
    f'hf:{tmp_path}/{{split}}', 'train', '', fields=dict(text='prompt')
  )
  assert len(rows) == len(PAIRS) and rows[4]['text'] == PAIRS[4]['prompt']


def test_what_is_wrong_is_one_line(folder, tmp_path):
  read = lambda name, split='test', **fields: (
    lambda: sources.source(f'hf:{name}', split, '', fields=fields)
  )
  says(read(folder, 'validation'), "no split 'validation'", 'test_prefs, train')
  says(read(folder, 'test_prefs', text='x'), 'row 0', "no field 'x'", 'prompt')
  says(read(str(tmp_path)), f'cannot read hf:{tmp_path}')
  for name in ('owner/name', 'owner/name@main', 'name@' + 40 * 'a'):
    says(read(name), f'hf:{name}: no folder here', '40 hexadecimal digits')
  says(read(folder, 'test_prefs[5:]'), 'is empty', 'test_prefs[5:]')
  for name in ('owner/name', 'owner/name:subset'):
    name = f'{name}@{40 * "a"}'  # the hub, which is not asked here
    says(read(name), f'cannot read hf:{name}: ')


def test_one_split_by_two_names_is_one(folder):
  read = lambda name, split: sources.source(
    name, split, '', fields=dict(text='prompt'), splits=SPLITS
  )
  whole, part = f'hf:{folder}', f'hf:{folder}/train_prefs'
  rows = {
    'train': read(whole, 'train'),
    'validation': read(whole, 'validation'),
    'test': read(part, 'test_prefs'),
  }
  sources.check_apart(rows, ('train', 'validation'))
  for pair in ('train', 'test'), ('validation', 'test'):
    says(
      lambda pair=pair: sources.check_apart(rows, pair),
      f'the splits {" and ".join(pair)} have',
      f'of {folder}/train_prefs: ',
    )


def test_turns_as_a_table_of_lists_and_nulls(tmp_path):
  """As `Sequence` of a dict is saved; columns that a row lacks are null."""
  text = datasets.Value('string')
  features = datasets.Features(
    text=text, messages=datasets.Sequence({'role': text, 'content': text})
  )
  talk = {'role': ['user'], 'content': ['hi']}
  empty = {'role': [], 'content': []}
  given = {'text': [None, 'one'], 'messages': [talk, empty]}
  found = datasets.Dataset.from_dict(given, features=features)
  found.save_to_disk(str(tmp_path / 'x'))
  rows = sources.source(f'hf:{tmp_path}/x', 'train', '')
  messages = [{'role': 'user', 'content': 'hi'}]
  assert list(rows) == [{'messages': messages}, {'text': 'one'}]
