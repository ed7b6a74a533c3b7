"""The completions of a report, side by side, to search and to sort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import html
from typing import Any

from bond_jax.runs.show import text

Rows = Sequence[Mapping[str, Any]]
Pair = Mapping[str, Mapping[str, Any]]

# The script shows them: without it they would do nothing.
_TOOLS = """<div class="tools" hidden>
<input type="search" id="find" placeholder="Search prompts and completions"
 aria-label="Search prompts and completions">
<select id="order" aria-label="Order">
<option value="drawn">in the order of the prompts</option>
<option value="gain">largest gain in reward first</option>
<option value="loss">largest loss in reward first</option>
</select><output id="shown" class="small"></output></div>"""


def side_by_side(records: Rows, count: int = 20) -> list[Pair]:
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


def escape(value: str) -> str:
  return html.escape(value, quote=True)


def section(samples: Sequence[Pair], other: str) -> str:
  """HTML of all pairs; `other` is what the policy was compared with."""
  if not samples:
    return '<p>n/a, because this run kept no completions.</p>'
  pairs = '\n'.join(_pair(sample, other) for sample in samples)
  return (
    f'<p>{len(samples)} openings that no stage has trained on, each with one'
    f' draw of {escape(other)} and one of the policy: the first ones, not the'
    f' best.</p>{_TOOLS}<div class="pairs">{pairs}</div>'
  )


def _pair(sample: Pair, other: str) -> str:
  change = sample['after']['reward'] - sample['before']['reward']
  sides = ''.join(
    _side(sample[when], title)
    for when, title in (('before', other), ('after', 'the policy'))
  )
  return (
    f'<div class="pair" data-change="{change:.6g}">{sides}'
    f'<div class="change">reward {change:+.3g}</div></div>'
  )


def _side(record: Mapping[str, Any], title: str) -> str:
  length = f'{record["length"]} tokens'
  if record['truncated']:
    length += ', cut'
  return (
    f'<div class="side"><div class="when">{escape(title)}</div>'
    f'<p class="text"><span class="prompt">{escape(record["prompt"])}</span>'
    f'{escape(record["completion"])}</p>'
    f'<div class="small">reward {text(record["reward"])} · gold'
    f' {text(record["gold"])} · {length}</div></div>'
  )
