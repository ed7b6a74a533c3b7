"""The words of a report: the outcome, names, and why a number is missing."""

from collections.abc import Mapping
from typing import Any

from bond_jax.runs.show import text

# Start of a key in the summary -> the key that says why it is None.
_REASONS = {
  'effective_n': 'frontier_reason',
  'frontier_': 'frontier_reason',
  'quantiles.': 'frontier_reason',
  'length_controlled': 'length_controlled_reason',
  'tokens_per_second': 'throughput_reason',
}
_ENOUGH = 64  # prompts; with fewer the intervals are too narrow


def why_missing(key: str, summary: Mapping[str, Any]) -> str:
  """Says in plain words why `key` has no value."""
  for start, reason in _REASONS.items():
    if key.startswith(start) and summary.get(reason):
      return summary[reason]
  if key in summary:
    return 'it is not defined for this run'
  return 'this run did not report it'


def shown(key: str, summary: Mapping[str, Any]) -> str:
  """The value of a key of the summary as text, or `n/a, because ...`."""
  value = summary.get(key)
  if value is None:
    return f'n/a, because {why_missing(key, summary)}'
  return text(value)


def opponent(summary: Mapping[str, Any]) -> str:
  """What the policy was compared with: the reference, or another run."""
  against = summary.get('against') or 'reference'
  return 'the reference' if against == 'reference' else f'the run {against}'


def gold_name(settings: Mapping[str, Any]) -> str:
  """`gold`, with the name of its function where the config has one."""
  function = (settings.get('gold') or {}).get('function')
  return f'gold ({function.rpartition(":")[2]})' if function else 'gold'


def sentence(summary: Mapping[str, Any]) -> str:
  """The outcome in a few plain sentences."""
  if summary.get('win_rate') is None or summary.get('kl') is None:
    return f'No outcome: the win rate is {shown("win_rate", summary)}.'
  other = opponent(summary)
  low, high = summary['win_rate_interval']
  outcome = (
    f'The policy beats {other} in {summary["win_rate"]:.1%} of the'
    f' comparisons on held-out prompts (95% interval {low:.1%} to'
    f' {high:.1%}) and pays {summary["kl"]:.2f} nats of KL for it. '
  )
  if other != 'the reference':
    outcome = f'Compared with {other}, not with the reference. {outcome}'
  return outcome + _frontier(summary, other) + _best_of(summary, other)


def _frontier(summary: Mapping[str, Any], other: str) -> str:
  if summary.get('frontier_efficiency') is None:
    why = why_missing('frontier_efficiency', summary)
    return f'No comparison with the KL of Best-of-N, because {why}.'
  words = (
    f'Best-of-{summary["effective_n"]:.1f} of {other} wins as often for'
    f' {summary["frontier_kl"]:.2f} nats, so the frontier efficiency is'
    f' {summary["frontier_efficiency"]:.2f} (1 is as good as Best-of-N).'
  )
  if (prompts := summary.get('prompts', _ENOUGH)) < _ENOUGH:
    words += (
      f' With {prompts} prompts the intervals of both are too narrow: set'
      f' evaluate.prompts to {_ENOUGH} or more.'
    )
  return words


def _best_of(summary: Mapping[str, Any], other: str) -> str:
  found = best_of(summary)
  if not found:
    return ''
  rates = ', '.join(f'{rate:.1%} against N = {n}' for n, rate, _ in found)
  return f' One sample against true Best-of-N of {other} wins {rates}.'


def best_of(summary: Mapping[str, Any]) -> list[tuple[int, float, list]]:
  """N, win rate and its interval of the comparisons with true Best-of-N."""
  rows = summary.get('win_rate_against_best_of') or {}
  return sorted(
    (int(n), row['win_rate'], row['interval'])
    for n, row in rows.items()
    if row and row['win_rate'] is not None
  )
