"""The report of a run: PNGs and one self-contained report.html.

It computes no measure: what it shows was in the rows and the summary.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import os
import re
from typing import Any

import numpy as np

from bond_jax.evaluation.report import figures, style
from bond_jax.evaluation.report import samples as report_samples
from bond_jax.evaluation.report.cautions import cautions
from bond_jax.evaluation.report.samples import escape, side_by_side
from bond_jax.evaluation.report.words import (
  gold_name,
  opponent,
  sentence,
  shown,
)
from bond_jax.measures import curves
from bond_jax.runs.show import clock, text

__all__ = ['HEADLINES', 'opponent', 'sentence', 'side_by_side', 'write_report']

Rows = Sequence[Mapping[str, Any]]

# For the terminal: label, key in the summary, key of what follows it (an
# interval or an error).
HEADLINES = (
  ('Win rate against the reference', 'win_rate', 'win_rate_interval'),
  ('KL to the reference, nats', 'kl', 'kl_stderr'),
  ('Frontier efficiency', 'frontier_efficiency', None),
  ('Effective N', 'effective_n', None),
  ('Reward before', 'reward_reference', None),
  ('Reward after', 'reward_policy', None),
  ('Win rate by gold', 'gold_win_rate', 'gold_win_rate_interval'),
  ('Rewards that tie', 'tie_rate', None),
  ('Prompts with a signal', 'signal_fires', None),
  ('Anchor drift', 'anchor_drift', None),
  ('Steps', 'steps', None),
  ('Time, minutes : seconds', 'seconds', None),
)

# For the page: label, and the key, or those of the other side and of the
# policy. What is known of a key's error is under <key>_interval or _stderr.
CARDS = {
  'Outcome': (
    ('Win rate against {other}', 'win_rate'),
    ('Win rate at equal length', 'length_controlled_win_rate'),
    ('Win rate by {gold}', 'gold_win_rate'),
    ('KL to {other}, nats', 'kl'),
    ('Effective N', 'effective_n'),
    ('Frontier efficiency', 'frontier_efficiency'),
  ),
  'Beside {other}': (
    ('Reward', ('reward_reference', 'reward_policy')),
    ('Length, tokens', ('length_reference', 'length_policy')),
    ('Cut at the limit', ('truncated_reference', 'truncated_policy')),
    ('Entropy, nats per completion', ('entropy_reference', 'entropy_policy')),
    (
      'Distinct completions of a prompt',
      ('distinct_completions_reference', 'distinct_completions_policy'),
    ),
    ('Distinct word pairs', ('distinct_2_reference', 'distinct_2_policy')),
  ),
  'Training': (
    ('Rewards that tie', 'tie_rate'),
    ('Prompts with a signal', 'signal_fires'),
    ('Anchor drift', 'anchor_drift'),
    ('Steps', 'steps'),
    ('Tokens per second', 'tokens_per_second'),
    ('Time', 'seconds'),
  ),
}

# What the page opens with, of the settings and of the summary.
FACTS = {
  'Algorithm': 'algorithm.name',
  'Model': 'model.name',
  'Reward': 'reward.function',
  'Gold': 'gold.function',
  'Compared with': 'against',
  'Checkpoint': 'checkpoint',
  'Prompts judged': 'prompts',
  'Prompts per step': 'train.batch',
  'Learning rate': 'train.optimizer.learning_rate',
  'Length limit, tokens': 'length',
  'Seed': 'seed',
}

BEST_OF_N = ('frontier', 'quantiles', 'best_of_n')


def write_report(
  folder: str,
  *,
  settings: Mapping[str, Any],
  train: Rows,
  sft: Rows,
  summary: Mapping[str, Any],
  curve: curves.Curve | None,
  samples: Sequence[report_samples.Pair],
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
  title = escape(f'bond_jax: {os.path.basename(os.path.abspath(folder))}')
  gold, other = gold_name(settings), opponent(summary)
  first, later = (
    _figures(
      [d for d in drawings if (d.name in BEST_OF_N) == wanted],
      {k: why for k, why in missing.items() if (k in BEST_OF_N) == wanted},
    )
    for wanted in (True, False)
  )
  body = [
    f'<h1>{title}</h1>',
    _facts(flatten(settings) | dict(summary)),
    f'<p class="lead">{escape(sentence(summary))}</p>',
    _cautions(cautions(summary, train, gold)),
    _cards(summary, {'other': other, 'gold': gold}),
    f'<h2>Beside Best-of-N</h2>{first}',
    f'<h2>Curves</h2>{later}',
    f'<h2>Reward by length</h2>{_lengths(summary, other)}',
    '<h2>Samples</h2>',
    report_samples.section(samples, other),
    '<h2>All numbers</h2>',
    _table('Summary', flatten(summary), summary),
    '<h2>Settings</h2>',
    _table('Settings', flatten(settings), {}),
  ]
  path = os.path.join(folder, 'report.html')
  # What is half a character, say in a completion from elsewhere, becomes `?`.
  with open(path + '.tmp', 'w', encoding='utf-8', errors='replace') as f:
    f.write(style.page(title, '\n'.join(body)))
  os.replace(path + '.tmp', path)
  return path


def flatten(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Turns nested settings into `a.b.c` -> value."""
  flat = {}
  for key, value in settings.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _facts(flat: Mapping[str, Any]) -> str:
  found = [
    f'<div><dt>{label}</dt><dd>{_broken(flat[key])}</dd></div>'
    for label, key in FACTS.items()
    if flat.get(key) not in (None, '')
  ]
  return f'<dl class="facts">{"".join(found)}</dl>' if found else ''


def _broken(value: Any) -> str:
  """A long name goes on in the next line after a dot, not within a word."""
  if isinstance(value, str):
    return re.sub(r'([.:/])', r'\1<wbr>', escape(value))
  return escape(_cell(value))


def _cautions(found: Sequence[str]) -> str:
  if not found:
    return '<p class="fine">Nothing suspicious was found in the numbers.</p>'
  items = ''.join(f'<li>{escape(line)}</li>' for line in found)
  return f'<div class="warn"><strong>Mind</strong><ul>{items}</ul></div>'


def _cards(summary: Mapping[str, Any], names: Mapping[str, str]) -> str:
  reference = names['other'] == 'the reference'
  beside = 'reference' if reference else 'other run'
  parts = []
  for title, cards in CARDS.items():
    made = ''.join(
      _card(label.format(**names), keys, summary, beside)
      for label, keys in cards
    )
    title = escape(title.format(**names))
    parts.append(f'<h3>{title}</h3><div class="cards">{made}</div>')
  return ''.join(parts)


def _card(label: str, keys: str | tuple[str, str], summary, beside) -> str:
  keys = (keys,) if isinstance(keys, str) else keys
  missing = [key for key in keys if summary.get(key) is None]
  if missing:
    value = 'n/a'
    small = shown(missing[0], summary).removeprefix('n/a, ')
  else:
    *before, value = (_short(key, summary[key]) for key in keys)
    small = f'{beside}: {before[0]}' if before else _error(keys[0], summary)
  return (
    f'<div class="card"><div class="label">{escape(label)}</div>'
    f'<div class="value">{escape(value)}</div>'
    f'<div class="small">{escape(small)}</div></div>'
  )


def _short(key: str, value: Any) -> str:
  if key == 'seconds':
    return clock(value)
  if isinstance(value, float) and abs(value) < 1000:
    return f'{value:.3g}'
  return text(value)


def _error(key: str, summary: Mapping[str, Any]) -> str:
  """The interval or the error of a key, if it has one."""
  interval = summary.get(f'{key}_interval')
  if interval is not None:
    return ' to '.join(f'{bound:.3g}' for bound in np.ravel(interval))
  error = summary.get(f'{key}_stderr')
  return '' if error is None else f'±\u00a0{error:.2g}'


def _figures(drawings, missing: Mapping[str, str]) -> str:
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
  lost = ''.join(
    f'<p class="fine">Figure {name.replace("_", " ")}: n/a, because'
    f' {escape(why)}.</p>'
    for name, why in missing.items()
  )
  return f'<div class="figures">{"".join(parts)}</div>{lost}'


def _table(name: str, flat: Mapping[str, Any], summary) -> str:
  rows = []
  for key, value in flat.items():
    if key == 'reward_by_length' or (key.endswith('_reason') and value is None):
      continue  # has a table of its own; has nothing to explain
    if summary and value is None:
      value = shown(key, flat)
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


def _lengths(summary: Mapping[str, Any], other: str) -> str:
  """The reward per bucket of length, so that length cannot pass for reward."""
  buckets = summary.get('reward_by_length')
  if not buckets:
    return f'<p>{escape(shown("reward_by_length", summary))}.</p>'
  rows = []
  for bucket in buckets:
    high = bucket['up_to']
    low = bucket['longer_than'] + 1
    cells = [f'{low} to {high}' if high else f'{low} or more']
    for who in ('reference', 'policy'):
      mean, share = bucket[f'reward_{who}'], bucket[f'share_{who}']
      cells.append('none' if mean is None else f'{mean:.3g} ({share:.0%})')
    rows.append(''.join(f'<td>{escape(cell)}</td>' for cell in cells))
  head = f'<th>tokens</th><th>{escape(other)}</th><th>the policy</th>'
  body = ''.join(f'<tr>{row}</tr>' for row in rows)
  return (
    '<p>Mean reward by length of the completion, with the share of all'
    f' completions.</p><table class="even"><tr>{head}</tr>{body}</table>'
  )
