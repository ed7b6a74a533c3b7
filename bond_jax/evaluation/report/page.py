"""The report of a run: PNGs of its figures and one self-contained report.html.

page.html is its template. Nothing is measured here: all numbers are those of
the rows and of the summary.
"""

import base64
from collections.abc import Mapping, Sequence
import functools
import hashlib
import os
import re
from typing import Any

from flax import traverse_util
import jinja2
from markupsafe import escape, Markup
import numpy as np

from bond_jax.evaluation.report import figures
from bond_jax.evaluation.report.cautions import cautions
from bond_jax.evaluation.report.words import (
  gold_name,
  opponent,
  sentence,
  shown,
  why_missing,
)
from bond_jax.measures import curves
from bond_jax.runs import files
from bond_jax.runs.show import clock, text

_flat = functools.partial(traverse_util.flatten_dict, sep='.')
Rows = Sequence[Mapping[str, Any]]
Pair = Mapping[str, Mapping[str, Any]]

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
  ('Time of this evaluation', 'seconds', None),
  ('Time of all stages', 'all_seconds', None),
)

_sides = lambda key: (f'{key}_reference', f'{key}_policy')
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
    ('Reward', _sides('reward')),
    ('Length, tokens', _sides('length')),
    ('Cut at the limit', _sides('truncated')),
    ('Entropy, nats per completion', _sides('entropy')),
    ('Distinct completions of a prompt', _sides('distinct_completions')),
    ('Distinct word pairs', _sides('distinct_2')),
  ),
  'Training': (
    ('Rewards that tie', 'tie_rate'),
    ('Prompts with a signal', 'signal_fires'),
    ('Anchor drift', 'anchor_drift'),
    ('Steps', 'steps'),
    ('Tokens per second', 'tokens_per_second'),
    ('Time of all stages', 'seconds'),
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

BESIDE_BEST_OF_N = 'frontier', 'quantiles', 'best_of_n'  # the other are by step


def write_report(
  folder: str,
  *,
  settings: Mapping[str, Any],
  train: Rows,
  sft: Rows,
  summary: Mapping[str, Any],
  curve: curves.Curve | None,
  samples: Sequence[Pair],
) -> str:
  """Writes `folder`/report.html and a PNG of each figure beside it.

  Args:
    folder: exists.
    settings: the config, nested.
    train, sft: rows of the two metrics.jsonl.
    summary: of the whole run; for keys that are missing or None the page says
      why.
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
  beside, by_step = (
    (
      [d for d in drawings if (d.name in BESIDE_BEST_OF_N) == wanted],
      {k: x for k, x in missing.items() if (k in BESIDE_BEST_OF_N) == wanted},
    )
    for wanted in (True, False)
  )
  flat, gold, other = _flat(settings), gold_name(settings), opponent(summary)
  known = flat | dict(summary)
  page = _template().render(
    title=f'bond_jax: {os.path.basename(os.path.abspath(folder))}',
    facts={
      label: _cell(known[key])
      for label, key in FACTS.items()
      if known.get(key) not in (None, '')
    },
    sentence=sentence(summary),
    cautions=cautions(summary, train, gold),
    groups={
      title.format(other=other): [
        _card(label.format(other=other, gold=gold), keys, summary)
        for label, keys in cards
      ]
      for title, cards in CARDS.items()
    },
    beside_best_of_n=beside,
    by_step=by_step,
    other=other,
    lengths=_lengths(summary.get('reward_by_length') or ()),
    no_lengths=why_missing('reward_by_length', summary),
    samples=samples,
    numbers=_numbers(summary),
    settings={key: _cell(value) for key, value in flat.items()},
  )
  path = os.path.join(folder, 'report.html')
  with files.whole(path, 'wb') as f:
    # Half of a surrogate pair, say in a completion, is written as `?`.
    f.write(page.encode('utf-8', errors='replace'))
  return path


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    'base64': lambda data: base64.b64encode(data).decode(),
    'breakable': _breakable,
    'source': _source,
    'text': text,
  }
  return environment.get_template('page.html')


def _source(content: str) -> Markup:
  """The source of an inline text, for a content security policy."""
  digest = hashlib.sha256(content.encode()).digest()
  return Markup(f"'sha256-{base64.b64encode(digest).decode()}'")


def _breakable(value: str) -> Markup:
  """A long name goes on in the next line after a dot, not within a word."""
  # As a str: re of Python 3.11 joins what it has cut as its argument does, and
  # a Markup escapes.
  return Markup(re.sub(r'([.:/])', r'\1<wbr>', str(escape(value))))


def side_by_side(records: Rows, count: int = 20) -> list[Pair]:
  """Pairs each prompt's first reference completion with the policy's first.

  Returns dicts with 'before' and 'after', a record each, see
  `aggregate.RECORD_KEYS`, of the first `count` prompts.
  """
  pairs: dict[Any, dict[str, Mapping[str, Any]]] = {}
  sides = {'reference': 'before', 'policy': 'after'}
  for record in records:
    pairs.setdefault(record['id'], {}).setdefault(sides[record['who']], record)
  return [pair for pair in pairs.values() if len(pair) == 2][:count]


def _card(
  label: str, keys: str | tuple[str, str], summary: Mapping[str, Any]
) -> tuple[str, str, str]:
  """Label, value, and its error or the value of the other side."""
  *others, key = (keys,) if isinstance(keys, str) else keys
  for name in (*others, key):
    if summary.get(name) is None:
      return label, 'n/a', shown(name, summary).removeprefix('n/a, ')
  value = _short(key, summary[key])
  if others:
    side = 'reference' if opponent(summary) == 'the reference' else 'other run'
    return label, value, f'{side}: {_short(others[0], summary[others[0]])}'
  return label, value, _error(key, summary)


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


def _numbers(summary: Mapping[str, Any]) -> dict[str, str]:
  """The table of all numbers, with the reason for each that is None."""
  flat = _flat(summary)
  flat.pop('reward_by_length', None)  # has a table of its own
  return {
    key: shown(key, flat) if value is None else _cell(value)
    for key, value in flat.items()
    if value is not None or not key.endswith('_reason')
  }


def _cell(value: Any) -> str:
  """Settings are shown as they are; only measures are rounded."""
  if isinstance(value, float):
    return text(value)
  if isinstance(value, list | tuple):
    return ', '.join(_cell(v) for v in value)
  return str(value)


def _lengths(buckets: Rows) -> list[list[str]]:
  """Mean rewards per bucket of length: lengths, reference, policy."""
  rows = []
  for bucket in buckets:
    low, high = bucket['longer_than'] + 1, bucket['up_to']
    row = [f'{low} to {high}' if high else f'{low} or more']
    for who in ('reference', 'policy'):
      mean, share = bucket[f'reward_{who}'], bucket[f'share_{who}']
      row.append('none' if mean is None else f'{mean:.3g} ({share:.0%})')
    rows.append(row)
  return rows
