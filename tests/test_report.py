"""The report: complete, self-contained, escaped, and honest about gaps."""

import html.parser
import re

import numpy as np
import pytest

from bond_jax import curves, figures, measures, report

EVIL = '<script src="x">alert(1)</script> & "quoted"'


def records():
  rng = np.random.default_rng(0)
  rows = []
  for x in range(24):
    for who, shift in (('reference', 0.0), ('policy', 1.5)):
      for a in range(8):
        rows.append(
          {
            'id': x,
            'prompt': f'opening {x} {EVIL}',
            'completion': f' {who} {a} {EVIL}',
            'reward': float(rng.normal() + shift),
            'gold': float(rng.normal() + shift),
            'log_policy': -20.0 + shift,
            'log_reference': -20.0,
            'who': who,
            'length': 9,
            'truncated': False,
          }
        )
  return rows


def train_rows():
  rows = []
  for step in range(1, 61):
    row = {
      'step': step,
      'reward/policy': step / 60,
      'reward/anchor': step / 90,
      'kl/policy_anchor': 0.1,
      'anchor/drift': step / 1000,
      'signal/fires': 0.3,
      'length/completion': 12.0,
      'loss': 0.1,
      'seconds/sample': 0.2,
      'seconds/reward': 0.01,
      'seconds/update': 0.7,
    }
    if step % 20 == 0:
      row |= {
        'kl/reference': step / 40,
        'win_rate/reference': 0.5 + step / 200,
        'seconds/evaluate': 3.0,
      }
    rows.append(row)
  return rows


SFT = [{'step': s, 'loss': 5 / s, 'validation_loss': 6 / s} for s in (1, 2, 3)]
MORE = {
  'steps': 60,
  'seconds': 75.0,
  'anchor_drift': 0.06,
  'signal_fires': 0.3,
  'compilations_after_first_step': 0,
}


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp('demo')
  rows = records()
  reference = measures.grid(rows, 'reference')['reward']
  path = report.write_report(
    str(folder),
    settings={'seed': 7, 'train': {'note': EVIL, 'rates': (0.3, 1.0)}},
    train=train_rows(),
    sft=SFT,
    summary=measures.summarise(rows) | MORE,
    curve=curves.best_of_n_curve(reference),
    samples=report.side_by_side(rows),
  )
  with open(path, encoding='utf-8') as f:
    return folder, f.read()


class Tags(html.parser.HTMLParser):
  """Collects tags and checks that each one is closed."""

  def __init__(self, text):
    super().__init__()
    self.seen, self.open = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))
    if tag not in ('meta', 'img', 'source'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(page):
  _, text = page
  tags = Tags(text)
  assert not tags.open
  without_images = re.sub(r'data:image/png;base64,[^"]*', '', text)
  assert 'http' not in without_images
  assert '//' not in without_images
  assert 'url(' not in text
  for tag, attributes in tags.seen:
    assert tag not in ('script', 'link', 'iframe', 'object')
    for name in ('src', 'srcset', 'href'):
      assert attributes.get(name, 'data:').startswith('data:')


def test_text_is_escaped(page):
  _, text = page
  assert '<script' not in text
  assert text.count('&lt;script src=&quot;x&quot;&gt;alert(1)') == 20 * 4 + 1


def test_page_follows_the_colour_scheme_and_the_width(page):
  _, text = page
  assert text.count('prefers-color-scheme: dark') == len(figures.CAPTIONS) + 1
  assert 'name="viewport"' in text


def test_all_sections_are_there(page):
  _, text = page
  for title in (
    'Curves',
    'Before and after',
    'All numbers',
    'Settings',
  ):
    assert f'<h2>{title}</h2>' in text
  for label, _, _ in report.HEADLINES:
    assert label in text
  assert text.count('class="pair"') == 20
  assert 'train.rates' in text
  assert '0.3, 1' in text
  assert 'n/a' not in re.sub(r'base64,[^"]*', '', text)


def test_every_figure_is_a_file_of_its_own(page):
  folder, _ = page
  names = {path.name for path in folder.iterdir()}
  assert names == {f'{draw.__name__}.png' for draw in figures.CAPTIONS} | {
    'report.html'
  }
  for draw in figures.CAPTIONS:
    data = (folder / f'{draw.__name__}.png').read_bytes()
    assert data.startswith(b'\x89PNG')


def test_empty_run_says_what_is_missing(tmp_path):
  path = report.write_report(
    str(tmp_path),
    settings={},
    train=[],
    sft=[],
    summary={},
    curve=None,
    samples=[],
  )
  with open(path, encoding='utf-8') as f:
    text = f.read()
  assert not Tags(text).open
  missing = 'because this run did not report it'
  assert text.count(missing) == len(report.HEADLINES) + 1
  assert 'sft loss' in text
  assert '<img' not in text


def test_frontier_reason_is_given():
  summary = {
    'win_rate': 0.5,
    'win_rate_interval': [0.48, 0.52],
    'kl': 0.1,
    'effective_n': None,
    'frontier_efficiency': None,
    'frontier_reason': 'the interval reaches 0.5',
  }
  because = 'because the interval reaches 0.5'
  assert report.shown('effective_n', summary) == f'n/a, {because}'
  assert because in report.sentence(summary)
  assert report.shown('kl', summary) == '0.1'


GOOD = {
  'signal_fires': 0.33,
  'tie_rate': 0.01,
  'kl': 1.5,
  'anchor_drift': 0.01,
  'reward_policy': 2.0,
  'reward_reference': 1.0,
  'length_policy': 11.0,
  'length_reference': 10.0,
  'win_rate': 0.8,
  'gold_win_rate_interval': [0.6, 0.7],
  'distinct_2_policy': 0.5,
  'distinct_2_reference': 0.6,
  'truncated_policy': 0.1,
  'compilations_after_first_step': 0,
}


@pytest.mark.parametrize(
  'change, words',
  [
    ({'signal_fires': 0.14}, 'only 14% of the prompts'),
    ({'tie_rate': 0.38}, '38% of the pairs'),
    ({'kl': 12.0}, '12.0 nats'),
    ({'anchor_drift': 0.0}, 'anchor has not moved'),
    ({'length_policy': 20.0}, '2.0 times as long'),
    ({'length_policy': 4.0}, '0.4 times as long'),
    ({'gold_win_rate_interval': [0.3, 0.4]}, 'loses by VADER'),
    ({'distinct_2_policy': 0.2}, 'repeats itself'),
    ({'truncated_policy': 0.6}, '60% of the completions were cut'),
    ({'compilations_after_first_step': 1}, 'compiled again'),
  ],
)
def test_cautions(change, words):
  assert report.cautions(GOOD, [{'step': 1, 'loss': 0.1}]) == []
  (caution,) = report.cautions(GOOD | change, [])
  assert words in caution


def test_cautions_of_what_is_unknown():
  assert report.cautions({}, []) == []
  assert report.cautions(dict.fromkeys(GOOD), []) == []
  rows = [{'step': 3, 'loss': 0.1}, {'step': 4, 'loss': None}]
  assert 'step 4' in report.cautions({}, rows)[0]


def test_side_by_side_pairs_first_draws_of_one_prompt():
  pairs = report.side_by_side(records(), count=3)
  assert [p['before']['id'] for p in pairs] == [0, 1, 2]
  for pair in pairs:
    assert pair['before']['id'] == pair['after']['id']
    assert pair['before']['completion'].startswith(' reference 0 ')
    assert pair['after']['completion'].startswith(' policy 0 ')


def test_smooth_keeps_a_trend_to_its_ends():
  line = np.arange(100.0)
  np.testing.assert_allclose(figures.smooth(line), line)
  spike = np.zeros(100)
  spike[50] = 1
  assert figures.smooth(spike).max() == 0
