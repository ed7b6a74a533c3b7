"""The report: complete, self-contained, escaped, and honest about gaps."""

import html.parser
import re

import numpy as np
import pytest
import report_page

from bond_jax.evaluation import plotting
from bond_jax.evaluation.report import figures
from bond_jax.evaluation.report import page as report


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp('demo')
  return folder, report_page.read(report_page.write(folder))


class Tags(html.parser.HTMLParser):
  """Collects tags and checks that each one is closed."""

  def __init__(self, text):
    super().__init__()
    self.seen, self.open = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))
    if tag not in ('meta', 'img', 'source', 'input', 'wbr'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def without_images(text):
  return re.sub(r'data:image/png;base64,[^"]*', '', text)


def cards(text):
  """Label -> (value, what is below it)."""
  parts = [f'<div class="{x}">(.*?)</div>' for x in ('label', 'value', 'small')]
  found = re.findall(''.join(parts), text)
  return {label: (value, small) for label, value, small in found}


def test_page_is_well_formed_and_self_contained(page):
  _, text = page
  tags = Tags(text)
  assert not tags.open
  assert 'http:' not in text and 'https:' not in text
  assert 'url(' not in text
  names = [tag for tag, _ in tags.seen]
  assert names.count('script') == names.count('style') == 1
  for tag, attributes in tags.seen:
    assert tag not in ('link', 'iframe', 'object', 'svg', 'base', 'a')
    assert not any(name.startswith('on') for name in attributes)
    for name in ('src', 'srcset', 'href'):
      assert attributes.get(name, 'data:').startswith('data:')


def test_the_policy_names_the_script_and_the_style_of_the_page(page):
  _, text = page
  script = re.search(r'<script>(.*?)</script>', text, re.S)[1]
  style = re.search(r'<style>(.*?)</style>', text, re.S)[1]
  policy = re.search(r'Security-Policy" content="(.*?)"', text)[1]
  rules = dict(rule.split(maxsplit=1) for rule in policy.split('; '))
  assert rules == {
    'default-src': "'none'",
    'img-src': 'data:',
    'style-src': report._source(style),
    'script-src': report._source(script),
    'base-uri': "'none'",
    'form-action': "'none'",
  }
  assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules['script-src'])


def test_text_is_escaped(page):
  _, text = page
  assert text.count('<script') == 1
  attack = '&lt;script&gt;window.taken = 1&lt;/script&gt;'
  # Of prompts 0 and 10 the prompt and the completion, two sides; a setting.
  assert text.count(attack) == 2 * 2 * 2 + 1


def test_page_follows_the_colour_scheme_and_the_width(page):
  _, text = page
  assert text.count('prefers-color-scheme: dark') == len(figures.FIGURES) + 1
  assert 'name="viewport"' in text


def test_all_sections_are_there(page):
  _, text = page
  for title in (
    'Beside Best-of-N',
    'Curves',
    'Reward by length',
    'Samples',
    'All numbers',
    'Settings',
  ):
    assert f'<h2>{title}</h2>' in text
  assert text.count('class="pair"') == 20
  assert 'train.rates' in text
  assert '0.3, 1' in text
  assert 'n/a' not in without_images(text)
  assert '<dt>Checkpoint</dt><dd>last</dd>' in text
  assert '<dt>Gold</dt><dd>my.<wbr>judges:<wbr>kindness</dd>' in text


def test_cards_have_their_values_and_errors(page):
  found = cards(page[1])
  assert found['Effective N'][1] == '4.1 to 4.9'
  assert found['Frontier efficiency'][1] == '0.41 to 0.47'
  assert found['Win rate at equal length'] == ('0.8', '0.78 to 0.82')
  assert found['Entropy, nats per completion'] == ('19', 'reference: 20')
  value, error = found['KL to the reference, nats']
  assert value == '1.5'
  assert error == '±\u00a00'
  assert found['Time of all stages'] == ('1:15', '')
  assert found['Tokens per second'] == ('1,234', '')
  assert 'Win rate by gold (kindness)' in found
  assert 'VADER' not in page[1]


def test_every_figure_is_a_file_of_its_own(page):
  folder, _ = page
  names = {path.name for path in folder.iterdir()}
  assert names == {f'{name}.png' for name in figures.FIGURES} | {'report.html'}
  for name in figures.FIGURES:
    data = (folder / f'{name}.png').read_bytes()
    assert data.startswith(b'\x89PNG')


def empty(tmp_path, **summary):
  path = report.write_report(
    str(tmp_path),
    settings={},
    train=[],
    sft=[],
    summary=summary,
    curve=None,
    samples=[],
  )
  return report_page.read(path)


def test_empty_run_says_what_is_missing(tmp_path):
  text = empty(tmp_path)
  assert not Tags(text).open
  assert {value for value, _ in cards(text).values()} == {'n/a'}
  because = {small for _, small in cards(text).values()}
  assert because == {'because this run did not report it'}
  assert 'Figure quantiles: n/a, because this run did not report it.' in text
  assert 'Figure sft loss: n/a, because this run has no rows for it.' in text
  assert '<img' not in text


def test_what_is_none_has_its_reason(tmp_path):
  reasons = {
    'frontier_reason': 'it wins too seldom',
    'length_controlled_reason': 'all lengths are equal',
    'throughput_reason': 'nothing was timed',
  }
  text = empty(
    tmp_path,
    **reasons,
    effective_n=None,
    frontier_efficiency=None,
    length_controlled_win_rate=None,
    length_controlled_win_rate_interval=None,
    tokens_per_second=None,
    quantiles=None,
  )
  found = cards(text)
  for label, reason in (
    ('Effective N', 'it wins too seldom'),
    ('Frontier efficiency', 'it wins too seldom'),
    ('Win rate at equal length', 'all lengths are equal'),
    ('Tokens per second', 'nothing was timed'),
  ):
    assert found[label] == ('n/a', f'because {reason}')
  assert '<td>n/a, because all lengths are equal</td>' in text
  assert 'Figure quantiles: n/a, because it is not defined' in text


def test_against_another_run_says_so_everywhere(tmp_path):
  text = report_page.read(report_page.write(tmp_path, against='runs/sparse'))
  found = cards(text)
  assert 'Win rate against the run runs/sparse' in found
  assert 'KL to the run runs/sparse, nats' in found
  assert found['Length, tokens'][1] == 'other run: 9'
  assert '<h3>Beside the run runs/sparse</h3>' in text
  assert '<dt>Compared with</dt><dd>runs/<wbr>sparse</dd>' in text
  assert text.count('<div class="when">the run runs/sparse</div>') == 20
  assert '<th>the run runs/sparse</th>' in text
  assert 'the best of N samples of the run runs/sparse' in text
  assert 'Compared with the run runs/sparse, not with the reference' in text


def axes(draw, **changes):
  """The drawing of one figure, before it becomes a picture."""
  from matplotlib.figure import Figure

  ax = Figure().add_subplot()
  summary = report_page.MORE | changes
  data = figures.Data(report_page.train_rows(), [], summary, None)
  assert draw(ax, data, plotting.LIGHT)
  return ax


def test_win_rates_against_best_of_n_are_drawn_by_n():
  ax = axes(figures.best_of_n)
  assert [t.get_text() for t in ax.get_xticklabels()] == ['2', '4', '8', '16']
  half, points = ax.lines[0], ax.containers[0]
  np.testing.assert_allclose(half.get_ydata(), 0.5)
  np.testing.assert_allclose(points[0].get_ydata(), [0.68, 0.52, 0.36, 0.21])
  low, high = np.array(points[2][0].get_segments())[:, :, 1].T
  np.testing.assert_allclose(low, [0.66, 0.49, 0.33, 0.18])
  np.testing.assert_allclose(high, [0.71, 0.55, 0.39, 0.24])


def test_a_mean_that_rounding_puts_outside_its_interval_is_drawn():
  row = {'win_rate': 0.3, 'interval': [0.3 + 1e-16, 0.3 + 1e-16]}
  assert row['interval'][0] > row['win_rate']
  axes(figures.best_of_n, win_rate_against_best_of={'2': row})


def test_quantiles_are_drawn_as_densities():
  ax = axes(figures.quantiles)
  drawn = {p.get_label(): p.get_data() for p in ax.patches}
  found = report_page.MORE['quantiles']
  (line,) = ax.lines
  assert line.get_label() == 'the reference'
  np.testing.assert_array_equal(line.get_ydata(), [1, 1])
  for label, key in (('policy', 'policy'), ('Best-of-4.5', 'best_of_n')):
    np.testing.assert_allclose(drawn[label].values, found[key])
    np.testing.assert_allclose(drawn[label].edges, found['edges'])
  without = found | {'best_of_n': None, 'n': None}
  ax = axes(figures.quantiles, quantiles=without)
  assert not any('Best' in patch.get_label() for patch in ax.patches)


def contrast(one, other):
  """WCAG's contrast ratio of two colours, #rgb or #rrggbb."""

  def luminance(colour):
    digits = colour.lstrip('#')
    if len(digits) == 3:
      digits = ''.join(2 * d for d in digits)
    x = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return x @ [0.2126, 0.7152, 0.0722]

  high, low = sorted((luminance(one), luminance(other)), reverse=True)
  return (high + 0.05) / (low + 0.05)


def test_contrast_of_colours_known():
  assert contrast('#000', '#ffffff') == pytest.approx(21)
  assert contrast('#777777', '#fff') == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize('scheme', [0, 1])
def test_text_of_the_page_can_be_read_on_both_papers(page, scheme):
  blocks = re.findall(r':root \{(.*?)\}', page[1], re.S)
  colours = dict(re.findall(r'--(\w+): (#\w+)', blocks[scheme]))
  assert len(blocks) == 2 and len(colours) == 8
  for ink, papers in (
    ('ink', ('paper', 'card', 'warn')),
    ('dim', ('paper', 'card')),
    ('accent', ('paper',)),
  ):
    for paper in papers:
      assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


@pytest.mark.parametrize('look', [plotting.LIGHT, plotting.DARK])
def test_figures_can_be_read_on_both_papers(look):
  assert contrast(look['ink'], look['paper']) >= 4.5
  _, orange, *_ = look['colours']  # N is written in it
  assert contrast(orange, look['paper']) >= 4.5
  for colour in look['colours']:
    assert contrast(colour, look['paper']) >= 3


def test_side_by_side_pairs_first_draws_of_one_prompt():
  pairs = report.side_by_side(report_page.records(), count=3)
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
