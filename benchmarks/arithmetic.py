"""What the benchmark computes from what it measured."""

from collections.abc import Sequence
import heapq
import math
import statistics


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
  """The median over rounds of ours / theirs, each pair of one round."""
  return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def geometric_mean(values: Sequence[float]) -> float:
  return math.exp(statistics.fmean(map(math.log, values)))


def order(names: Sequence[str], index: int) -> list[str]:
  """Who is measured after whom in one round: there, then back."""
  return list(names)[:: -1 if index % 2 else 1]


def repeats(seconds: float, least: float = 0.5) -> int:
  """Calls in one measurement, so that it takes `least` seconds or more."""
  return max(1, math.ceil(least / seconds))


def busy(lengths: Sequence[int], slots: int, refill: bool) -> float:
  """The share of decoded tokens that belong to a completion.

  A slot whose completion ends takes the next of the queue, or, without
  `refill`, waits for the longest of its batch.
  """
  if not refill:
    batches = [lengths[i : i + slots] for i in range(0, len(lengths), slots)]
    return sum(lengths) / sum(slots * max(x) for x in batches)
  free = [0] * slots  # when each slot is free again, in decoding steps
  for length in lengths:
    heapq.heapreplace(free, free[0] + length)
  return sum(lengths) / (slots * max(free))


def stop_rate(lengths: Sequence[int], longest: int) -> float:
  """Ends per token: the probability of a stop that was really there."""
  return sum(x < longest for x in lengths) / sum(lengths)


def number(value) -> str:
  """For a table: three significant digits, whole ones from a hundred up."""
  if isinstance(value, str):
    return value
  if value is None:
    return 'n/a'
  return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'


def markdown(rows: Sequence[Sequence]) -> str:
  """A table; its first row is the head."""
  head, *body = [[number(x) for x in row] for row in rows]
  lines = [head, ['---'] * len(head), *body]
  return '\n'.join(f'| {" | ".join(x)} |' for x in lines)
