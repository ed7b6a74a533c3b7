"""What a compiled program sends from device to device, read off its text.

A loop's body is there once and runs many times: its collectives count as often
as the loop runs, at most. A bound that the program does not contain, such as
the number of tokens until all completions have ended, has to be given.
"""

import collections
import math
import re
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
         'collective-permute')  # fmt: skip
_BYTES = {
  'pred': 1,
  **dict.fromkeys(('bf16', 'f16'), 2),
  **dict.fromkeys(('f64', 's64', 'u64', 'c64'), 8),
}
_OPERATION = re.compile(
  r'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+)'
  r' (?P<kind>[a-z-]+)\((?P<rest>.*)$'
)
_CALLED = re.compile(
  r'(calls|to_apply|body|condition|true_computation|false_computation)'
  r'=%?([\w.-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_ARRAY = re.compile(r'([a-z]+\d*)\[([\d,]*)\]')


class Collective(NamedTuple):
  kind: str
  bytes: float  # that a device receives in one of them
  times: float
  where: str  # in the source, for people


def collectives(text: str, loops: int = 1) -> list[Collective]:
  """Those of a compiled program, from its text.

  A loop whose end is not in the program runs `loops` times, at most.
  """
  computations, entry = _computations(text)
  times = _times(computations, entry, loops)
  found = {}
  for name, lines in computations.items():
    for line in lines:
      match = _OPERATION.match(line)
      kind = match and match['kind'].removesuffix('-start')
      if kind not in KINDS or not times[name]:
        continue
      # Parts of one collective, spread over other work, have its number.
      channel = re.search(r'channel_id=(\d+)', line)
      key = channel[1] if channel else (name, match['name'])
      where = re.search(r'op_name="([^"]*)"', line)
      size = _received(kind, match, line)
      if key not in found or found[key].times < times[name]:
        found[key] = Collective(
          kind, size, times[name], where[1][:160] if where else ''
        )
  return list(found.values())


def totals(found: list[Collective]) -> dict[str, tuple[float, float]]:
  """How many there are of each kind, and the bytes that they bring."""
  some = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
  return {
    kind: (sum(c.times for c in cs), sum(c.times * c.bytes for c in cs))
    for kind, cs in some.items()
    if cs
  }


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of every computation by its name, and the one that is entered."""
  found, entry, lines = {}, '', None
  for line in text.splitlines():
    head = re.match(r'^(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if head:
      lines = found.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      lines = None
    elif lines is not None:
      lines.append(line)
  return found, entry


def _times(computations, entry: str, loops: int) -> collections.Counter:
  """How often each computation runs, at most."""
  calls = collections.defaultdict(list)  # computation -> (called, times)
  for name, lines in computations.items():
    for line in lines:
      called = dict(_CALLED.findall(line))
      often = 1
      if 'body' in called:
        often = _trips(line, computations.get(called['condition'], []), loops)
      calls[name] += [(other, often) for other in called.values()]
      for branches in _BRANCHES.findall(line):
        calls[name] += [(b.strip(' %'), 1) for b in branches.split(',')]
  times = collections.Counter({entry: 1})
  # Callers come after what they call: backwards, each is known when it is due.
  order = list(computations)
  for name in [entry, *reversed([n for n in order if n != entry])]:
    for other, often in calls[name]:
      times[other] += times[name] * often
  return times


def _trips(line: str, condition: list[str], loops: int) -> int:
  """How often a loop runs: as its text says, or else `loops`."""
  if known := re.search(r'known_trip_count.*?"n":"(\d+)"', line):
    return int(known[1])
  root = next((x for x in condition if 'ROOT' in x), '')
  # A loop with another reason to end, say that all are done, has an AND here.
  if ' compare(' not in root or 'direction=LT' not in root:
    return loops
  constant = r'[su]32\[\].* constant\((\d+)\)'
  found = [x[1] for x in (re.search(constant, y) for y in condition) if x]
  return int(found[0]) if len(found) == 1 else loops


def _received(kind: str, match, line: str) -> float:
  arrays = [_size(*array) for array in _ARRAY.findall(match['shape'])]
  # What a start gives holds its input too.
  start = match['kind'].endswith('-start')
  size = max(arrays) if start and len(arrays) > 1 else sum(arrays)
  n = _group(line)
  if kind == 'all-reduce':  # a reduce-scatter, then an all-gather
    return 2 * size * (n - 1) / n
  if kind == 'reduce-scatter':
    return size * (n - 1)
  return size if kind == 'collective-permute' else size * (n - 1) / n


def _size(dtype: str, shape: str) -> int:
  return _BYTES.get(dtype, 4) * math.prod(int(d) for d in shape.split(',') if d)


def _group(line: str) -> int:
  """The number of devices among which a collective is."""
  if of_mesh := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", of_mesh[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", of_mesh[2]))
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]<=', line):
    return int(iota[1])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return len(listed[1].split(','))
  return 2
