"""The report of a run: PNGs and one self-contained report.html.

It computes no measure: what it shows was in the rows and the summary.
"""

from __future__ import annotations

import base64
import collections
from collections.abc import Mapping, Sequence
import html
import os
from typing import Any

import numpy as np

from bond_jax import curves, figures
from bond_jax.metrics import clock, text
from bond_jax.report_style import PAGE, STYLE

Rows = Sequence[Mapping[str, Any]]

# Label, key in the summary, key of what follows it (an interval or an error).
HEADLINES = (
  ('Win rate against the reference', 'win_rate', 'win_rate_interval'),
  ('KL to the reference, nats', 'kl', 'kl_stderr'),
  ('Frontier efficiency', 'frontier_efficiency', None),
  ('Effective N', 'effective_n', None),
  ('Reward before', 'reward_reference', None),
  ('Reward after', 'reward_policy', None),
  ('Win rate by VADER', 'gold_win_rate', 'gold_win_rate_interval'),
  ('Rewards that tie', 'tie_rate', None),
  ('Prompts with a signal', 'signal_fires', None),
  ('Anchor drift', 'anchor_drift', None),
  ('Steps', 'steps', None),
  ('Time, minutes : seconds', 'seconds', None),
)
_FRONTIER = ('effective_n', 'frontier_kl', 'frontier_efficiency')


def why_missing(key: str, summary: Mapping[str, Any]) -> str:
  """Says in plain words why `key` has no value."""
  if key in _FRONTIER and summary.get('frontier_reason'):
    return summary['frontier_reason']
  if key in summary:
    return 'it is not defined for this run'
  return 'this run did not report it'


def shown(key: str, summary: Mapping[str, Any]) -> str:
  """The value of a key of the summary as text, or `n/a, because ...`."""
  value = summary.get(key)
  if value is None:
    return f'n/a, because {why_missing(key, summary)}'
  return text(value)


def cautions(summary: Mapping[str, Any], train: Rows) -> list[str]:
  """What a reader should know before believing the numbers."""
  # A comparison with NaN is False: what is not known gives no caution.
  got = {k: np.nan if v is None else v for k, v in summary.items()}
  got = collections.defaultdict(lambda: np.nan, got)
  longer = got['length_policy'] / got['length_reference']
  gained = got['reward_policy'] > got['reward_reference']
  gold_high = np.max(got['gold_win_rate_interval'])
  broken = [r['step'] for r in train if 'loss' in r and r['loss'] is None]
  found = []

  def warn(holds, line):
    if holds:
      found.append(line)

  warn(
    got['signal_fires'] < 0.2,
    f'The reward gave a signal on only {got["signal_fires"]:.0%} of the'
    ' prompts; without ties J-BOND has one on a third of them. Rewards that'
    ' tie teach nothing: use a finer reward.',
  )
  warn(
    got['tie_rate'] > 0.1,
    f'{got["tie_rate"]:.0%} of the pairs of reference completions tie, so'
    ' the closed form of Best-of-N is wrong here; only the curve of this'
    ' task counts.',
  )
  warn(
    got['kl'] > 10,
    f'The KL to the reference is {got["kl"]:.1f} nats. Above 10 the policy'
    ' writes what the reference almost never would; look at the completions'
    ' before trusting the reward.',
  )
  warn(
    got['anchor_drift'] < 1e-6,
    'The anchor has not moved. Is its rate 0, or is it kept in bfloat16?',
  )
  warn(
    gained and (longer >= 2 or longer <= 0.5),
    f'The reward rose, but completions are {longer:.1f} times as long as'
    ' before: the reward may be measuring length.',
  )
  warn(
    got['win_rate'] > 0.5 and gold_high < 0.5,
    'The policy wins by the reward that trained it and loses by VADER, which'
    ' never did: the reward is being exploited.',
  )
  warn(
    got['distinct_2_policy'] < 0.5 * got['distinct_2_reference'],
    'The policy repeats itself: it has less than half of the distinct word'
    ' pairs of the reference.',
  )
  warn(
    got['truncated_policy'] > 0.5,
    f'{got["truncated_policy"]:.0%} of the completions were cut at the'
    ' length limit before they ended.',
  )
  warn(
    got['compilations_after_first_step'] > 0,
    'The training step was compiled again after the first step; some shape'
    ' changes from step to step.',
  )
  warn(
    bool(broken),
    f'The loss was not finite on {len(broken)} rows, the first at step'
    f' {broken[0] if broken else None}.',
  )
  return found


def side_by_side(
  records: Rows, count: int = 20
) -> list[dict[str, Mapping[str, Any]]]:
  """Pairs each prompt's first reference completion with the policy's first.

  Args:
    records: rows of completions.jsonl, see `measures.RECORD_KEYS`.
    count: how many prompts, in the order of the rows.

  Returns:
    Dicts with 'before' and 'after', a record each.
  """
  pairs: dict[Any, dict[str, Mapping[str, Any]]] = {}
  sides = {'reference': 'before', 'policy': 'after'}
  for record in records:
    pairs.setdefault(record['id'], {}).setdefault(sides[record['who']], record)
  return [pair for pair in pairs.values() if len(pair) == 2][:count]


def flatten(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Turns nested settings into `a.b.c` -> value."""
  flat = {}
  for key, value in settings.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def write_report(
  folder: str,
  *,
  settings: Mapping[str, Any],
  train: Rows,
  sft: Rows,
  summary: Mapping[str, Any],
  curve: curves.Curve | None,
  samples: Sequence[Mapping[str, Mapping[str, Any]]],
) -> str:
  """Writes `folder`/report.html and a PNG of each figure beside it.

  Args:
    folder: exists.
    settings: the config, nested.
    train, sft: rows of the two metrics.jsonl.
    summary: of the whole run; keys that are missing or None are said to be.
    curve: the Best-of-N curve of this task; None leaves its plot out.
    samples: as `side_by_side` gives them.

  Returns:
    The path of the page.
  """
  data = figures.Data(train, sft, summary, curve)
  drawings, missing = figures.draw_all(data)
  for drawing in drawings:
    with open(os.path.join(folder, f'{drawing.name}.png'), 'wb') as f:
      f.write(drawing.light)
  title = f'bond_jax: {os.path.basename(os.path.abspath(folder))}'
  body = [
    f'<h1>{escape(title)}</h1>',
    f'<p class="lead">{escape(sentence(summary))}</p>',
    _cautions(cautions(summary, train)),
    _headlines(summary),
    '<h2>Curves</h2>',
    _figures(drawings, missing),
    '<h2>Before and after</h2>',
    _samples(samples),
    '<h2>All numbers</h2>',
    _lengths(summary.get('reward_by_length')),
    _table('Summary', flatten(summary), summary),
    '<h2>Settings</h2>',
    _table('Settings', flatten(settings), {}),
  ]
  path = os.path.join(folder, 'report.html')
  with open(path + '.tmp', 'w', encoding='utf-8') as f:
    f.write(PAGE.format(title=escape(title), style=STYLE, body='\n'.join(body)))
  os.replace(path + '.tmp', path)
  return path


def sentence(summary: Mapping[str, Any]) -> str:
  """The outcome in a few plain sentences."""
  if summary.get('win_rate') is None or summary.get('kl') is None:
    return f'No outcome: the win rate is {shown("win_rate", summary)}.'
  low, high = summary['win_rate_interval']
  said = (
    f'The policy beats the reference in {summary["win_rate"]:.1%} of the'
    f' comparisons on held-out prompts (95 % interval {low:.1%} to'
    f' {high:.1%}) and pays {summary["kl"]:.2f} nats of KL for it. '
  )
  if summary.get('frontier_efficiency') is None:
    why = why_missing('frontier_efficiency', summary)
    return said + f'No comparison with Best-of-N, because {why}.'
  return said + (
    f'Best-of-{summary["effective_n"]:.1f} of the reference wins as often for'
    f' {summary["frontier_kl"]:.2f} nats, so the frontier efficiency is'
    f' {summary["frontier_efficiency"]:.2f} (1 is as good as Best-of-N).'
  )


def escape(value: str) -> str:
  return html.escape(value, quote=True)


def _cautions(found: Sequence[str]) -> str:
  if not found:
    return '<p class="fine">Nothing suspicious was found in the numbers.</p>'
  items = ''.join(f'<li>{escape(line)}</li>' for line in found)
  return f'<div class="warn"><strong>Mind</strong><ul>{items}</ul></div>'


def _headlines(summary: Mapping[str, Any]) -> str:
  cards = []
  for label, key, extra in HEADLINES:
    value, small = shown(key, summary), ''
    if summary.get(key) is None:
      value, small = 'n/a', value.removeprefix('n/a, ')
    elif key == 'seconds':
      value = clock(summary[key])
    elif isinstance(summary[key], float):
      value = f'{summary[key]:.3g}'
    if extra and summary.get(extra) is not None:
      bounds = np.ravel(summary[extra])
      small = ('± ' if len(bounds) == 1 else '') + ' to '.join(
        f'{b:.3g}' for b in bounds
      )
    cards.append(
      f'<div class="card"><div class="label">{escape(label)}</div>'
      f'<div class="value">{escape(value)}</div>'
      f'<div class="small">{escape(small)}</div></div>'
    )
  return f'<div class="cards">{"".join(cards)}</div>'


def _figures(drawings, missing: Sequence[str]) -> str:
  parts = []
  for drawing in drawings:
    light, dark = (
      'data:image/png;base64,' + base64.b64encode(png).decode()
      for png in (drawing.light, drawing.dark)
    )
    parts.append(
      '<figure><picture>'
      f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
      f'<img src="{light}" alt="{escape(drawing.caption)}">'
      f'</picture><figcaption>{escape(drawing.caption)}</figcaption></figure>'
    )
  lost = ''
  if missing:
    names = ', '.join(name.replace('_', ' ') for name in missing)
    lost = (
      f'<p class="fine">Figures n/a, because this run has no rows for them:'
      f' {escape(names)}.</p>'
    )
  return f'<div class="figures">{"".join(parts)}</div>{lost}'


def _samples(samples: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
  if not samples:
    return '<p>n/a, because this run kept no completions.</p>'
  parts = []
  for sample in samples:
    cells = []
    for when in ('before', 'after'):
      record = sample[when]
      cells.append(
        f'<div class="side"><span class="when">{when}</span>'
        f'<p><span class="prompt">{escape(record["prompt"])}</span>'
        f'{escape(record["completion"])}</p>'
        f'<div class="small">reward {text(record["reward"])} · gold'
        f' {text(record["gold"])}</div></div>'
      )
    parts.append(f'<div class="pair">{"".join(cells)}</div>')
  return (
    f'<p>{len(samples)} openings that no stage has trained on, each with one'
    ' draw of the reference and one of the policy: the first ones, not the'
    f' best.</p>{"".join(parts)}'
  )


def _table(name: str, flat: Mapping[str, Any], summary) -> str:
  rows = []
  for key, value in flat.items():
    if key == 'reward_by_length' or (key, value) == ('frontier_reason', None):
      continue  # has a table of its own; has nothing to explain
    if summary and value is None:
      value = shown(key, summary)
    rows.append(
      f'<tr><th scope="row">{escape(key)}</th>'
      f'<td>{escape(_cell(value))}</td></tr>'
    )
  return (
    f'<details><summary>{name}, {len(rows)} rows</summary>'
    f'<table>{"".join(rows)}</table></details>'
  )


def _cell(value: Any) -> str:
  """Settings are shown as they are; only measures are rounded."""
  if isinstance(value, float):
    return text(value)
  if isinstance(value, list | tuple):
    return ', '.join(_cell(v) for v in value)
  return str(value)


def _lengths(buckets: Rows | None) -> str:
  """The reward per bucket of length, so that length cannot pass for reward."""
  if not buckets:
    return ''
  rows = []
  for bucket in buckets:
    high = bucket['up_to']
    low = bucket['longer_than'] + 1
    cells = [f'{low} to {high}' if high else f'{low} or more']
    for who in ('reference', 'policy'):
      mean, share = bucket[f'reward_{who}'], bucket[f'share_{who}']
      cells.append('none' if mean is None else f'{mean:.3g} ({share:.0%})')
    rows.append(''.join(f'<td>{escape(cell)}</td>' for cell in cells))
  head = '<th>tokens</th><th>before</th><th>after</th>'
  body = ''.join(f'<tr>{row}</tr>' for row in rows)
  return (
    '<p>Mean reward by length of the completion, with the share of all'
    f' completions.</p><table class="even"><tr>{head}</tr>{body}</table>'
  )
