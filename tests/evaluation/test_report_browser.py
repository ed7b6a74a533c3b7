"""The report in a real browser: it fits, it loads, it sorts, nothing escapes.

Needs the browser that `make browser` installs; without it, these are skipped.
"""

import browser
from markupsafe import escape
import pytest
import report_page

from bond_jax.evaluation.report import page as report

pytestmark = [
  pytest.mark.long,
  pytest.mark.skipif(
    not browser.installed(),
    reason=f'NO BROWSER in {browser.FOLDER}: "make browser" installs it',
  ),
]

# Every way in which a page can be wider than its window.
WIDER = """[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('[hidden]') && e.getClientRects().length)
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 99))"""
SHOWN = "[...document.querySelectorAll('.pair')].filter(e => !e.hidden)"


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
  running = browser.Browser(str(tmp_path_factory.mktemp('profile')))
  yield running
  running.close()


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  return report_page.write(tmp_path_factory.mktemp('demo'))


@pytest.fixture
def show(chromium):
  """Opens pages, and closes them after the test."""
  pages = []

  def opened(*args, **settings):
    pages.append(browser.Page(chromium, *args, **settings))
    return pages[-1]

  yield opened
  for page in pages:
    page.close()


def texts(page):
  """The shown pairs, top to bottom, each the numbers of its prompts."""
  return page.run(f"""{SHOWN}.sort((a, b) =>
    a.getBoundingClientRect().top - b.getBoundingClientRect().top)
    .map(e => e.querySelector('.prompt').textContent.split(' ')[1])""")


def choose(page, **values):
  """What a person would type and pick."""
  for name, value in values.items():
    page.run(f"""(() => {{
      const control = document.getElementById({name!r})
      control.value = {value!r}
      for (const kind of ['input', 'change'])
        control.dispatchEvent(new Event(kind, {{bubbles: true}}))
    }})()""")


@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize('width', [360, 1200])
def test_fits_and_loads_on_phone_and_desk(show, path, width, dark):
  page = show(path, width=width, dark=dark)
  assert page.complaints() == []
  assert page.requests() == []
  page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
  assert page.run('innerWidth') == width
  assert page.run('document.documentElement.scrollWidth') <= width
  assert page.run(WIDER) == []
  images = page.run("""[...document.images].map(image =>
    [image.complete, image.naturalWidth, image.getBoundingClientRect().width,
     image.currentSrc == image.src])""")
  assert len(images) == 11
  for complete, natural, shown, is_light in images:
    assert complete and natural > 300 and shown > 300
    assert is_light != dark
  paper = page.run('getComputedStyle(document.body).backgroundColor')
  assert paper == ('rgb(29, 33, 38)' if dark else 'rgb(255, 255, 255)')


def test_long_names_and_reasons_fit(show, tmp_path):
  reason = f'the interval of {"x" * 300} does not lie above 0.5'
  path = report_page.write(
    tmp_path,
    against='runs/' + 'a_run_with_a_very_long_name' * 4,
    win_rate_interval=[0.4, 0.6],
    effective_n=None,
    frontier_efficiency=None,
    frontier_reason=reason,
    signal_fires=0.01,
  )
  page = show(path, width=360)
  assert page.run(WIDER) == []
  assert page.run('document.documentElement.scrollWidth') <= 360
  assert reason in page.run('document.body.innerText')


def test_completions_are_text_and_run_nothing(show, path):
  page = show(path)
  page.run("""document.querySelectorAll('.pair *').forEach(e => {
    for (const kind of ['mouseover', 'focus', 'load', 'error'])
      e.dispatchEvent(new Event(kind))
    e.click()
  })""")
  choose(page, find='script', order='gain')
  assert page.run('typeof window.taken') == 'undefined'
  assert page.run("document.querySelectorAll('script').length") == 1
  elements = page.run("""[...new Set([...document.querySelectorAll('.pair *')]
    .map(e => e.tagName.toLowerCase()))].sort()""")
  assert elements == ['div', 'p', 'span']
  assert page.requests() == []
  assert page.complaints() == []
  prompts = page.run("""[...document.querySelectorAll('.side .prompt')]
    .map(e => e.textContent)""")
  assert len(prompts) == 40
  for attack in report_page.ATTACKS[:-1]:
    assert sum(prompt.endswith(f' {attack}') for prompt in prompts) == 4


@pytest.mark.parametrize('attack', report_page.ATTACKS[:8])
def test_what_would_escape_is_still_stopped(show, path, attack, tmp_path):
  """A page whose completions are not escaped: its policy alone holds."""
  raw = tmp_path / 'raw.html'
  escaped = str(escape(attack))
  page = report_page.read(path)
  assert escaped in page
  raw.write_text(page.replace(escaped, attack))
  opened = show(str(raw))
  opened.run("""document.querySelectorAll('main *').forEach(e => {
    for (const kind of ['mouseover', 'focus'])
      e.dispatchEvent(new Event(kind))
    if (e.tagName == 'A') e.click()
  })""")
  opened.run('new Promise(done => setTimeout(done, 50))')
  assert opened.run('typeof window.taken') == 'undefined'
  display = "getComputedStyle(document.querySelector('main')).display"
  assert opened.run(display) == 'block'


def test_the_attacks_work_without_the_policy(show, tmp_path):
  """So that the tests above can fail at all."""
  for attack in report_page.ATTACKS[:3]:
    raw = tmp_path / 'raw.html'
    raw.write_text(f'<p>{attack}</p>')
    page = show(str(raw))
    page.run("""new Promise(done => { let left = 500; const look = () =>
      window.taken || !left-- ? done() : setTimeout(look, 10); look() })""")
    assert page.run('typeof window.taken') == 'number', attack


def test_search_filters(show, path):
  page = show(path)
  said = "document.getElementById('shown').textContent"
  assert len(texts(page)) == 20
  choose(page, find='  oPENING 7 ')
  assert texts(page) == ['7']
  assert page.run(said) == '1 of 20 shown'
  choose(page, find='policy 0 <SCRIPT>')  # in completions too
  assert texts(page) == ['0', '10']
  choose(page, find='nowhere to be found')
  assert texts(page) == []
  choose(page, find='reward')  # a label of the page, in no text
  assert texts(page) == []
  choose(page, find='')
  assert texts(page) == [str(x) for x in range(20)]
  assert page.run(said) == '20 of 20 shown'


def test_sort_orders_by_the_change_in_reward(show, path):
  page = show(path)
  pairs = report.side_by_side(report_page.records())
  change = {
    str(p['after']['id']): p['after']['reward'] - p['before']['reward']
    for p in pairs
  }
  rising = sorted(change, key=change.get)
  choose(page, order='gain')
  assert texts(page) == rising[::-1]
  choose(page, order='loss')
  assert texts(page) == rising
  choose(page, find='<iframe')
  assert texts(page) == [x for x in rising if x in ('6', '16')]
  choose(page, order='drawn', find='')
  assert texts(page) == list(change)


def test_without_javascript_the_page_is_complete(show, path):
  page = show(path, width=360, script=False)
  assert len(texts(page)) == 20
  tools = "getComputedStyle(document.querySelector('.tools')).display"
  assert page.run(tools) == 'none'
  assert page.run('[...document.images].every(i => i.naturalWidth > 0)')
  assert page.run(WIDER) == []
  assert page.complaints() == []
  assert show(path).run(tools) == 'flex'
