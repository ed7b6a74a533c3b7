"""Numbers, times, tables and warnings as people read them."""

from collections.abc import Sequence
import sys
from typing import Any

from bond_jax.devices import hosts


def warn(line: str) -> None:
  """Prints a warning, once for all hosts."""
  if hosts.first():
    print(f'\nWARNING: {line}', file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
  """Writes seconds as 0:07, 12:34 or 1:02:03."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f'{hours}:{m:02d}:{s:02d}' if hours else f'{m}:{s:02d}'


def text(value: Any) -> str:
  """Writes a value for people: four digits, `n/a` for None, `a to b`."""
  if value is None:
    return 'n/a'
  if isinstance(value, bool | str):
    return str(value)
  if isinstance(value, int):
    return f'{value:,}'
  if isinstance(value, list | tuple):
    return ' to '.join(text(v) for v in value)
  if abs(value) >= 1000:
    return f'{value:,.0f}'
  return f'{value:.4g}'


def scalars(summary: dict[str, Any]) -> list[tuple]:
  """A table of the numbers and names in a summary."""
  plain = [(k, v) for k, v in summary.items() if not isinstance(v, dict)]
  return [('', 'value'), *plain]


def table(rows: Sequence[Sequence[Any]], title: str) -> None:
  """Prints a table: the first row is the head, the first column is text."""
  cells = [[text(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  rule = '-' * (sum(widths) + 3 * (len(widths) - 1))
  print(f'\n{title}\n{rule}')
  for i, row in enumerate(cells):
    parts = [row[0].ljust(widths[0])]
    parts += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
    print('   '.join(parts).rstrip())
    if i == 0:
      print(rule)
  print(rule, flush=True)
