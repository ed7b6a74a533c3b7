"""Results as markdown, for docs/benchmarks.md."""

import math
import statistics

from benchmarks import arithmetic, peers, workloads


def report(found: dict) -> str:
  parts = [about(found)]
  for name, table in (
    ('sampling', sampling),
    ('step', step),
    ('head', head),
    ('real', real),
    ('real_step', step),
    ('large', large),
  ):
    if name in found:
      parts.append(table(found[name]))
  return '\n\n'.join(parts)


def about(found: dict) -> str:
  """Machine, versions, date; and who is missing."""
  versions = ', '.join(
    f'{peers.NAMES[name]}: '
    + ' '.join(f'{k} {v}' for k, v in x['versions'].items())
    for name, x in found.get('workers', {}).items()
  )
  lines = [
    f'{found["date"]}; {found["machine"]}; {found["rounds"]} rounds; load'
    f' average {found["load_before"]:.1f} before and'
    f' {found["load_after"]:.1f} after. {versions}'
  ]
  for name, why in found.get('skipped', {}).items():
    lines.append(f'{peers.NAMES[name]} is missing: {why}')
  return '\n'.join(lines)


def ratios(row: dict) -> dict[str, float]:
  """Peer -> the median over rounds of our rate / its rate."""
  ours = row.get('ours', {}).get('rate')
  if not ours:
    return {}
  return {
    name: arithmetic.ratio(ours, x['rate'])
    for name, x in row.items()
    if name != 'ours' and 'rate' in x
  }


def rates(row: dict) -> dict[str, float | None]:
  """Tokens per second of each, the median over rounds; None = not there."""
  rate = lambda name: row.get(name, {}).get('rate')
  return {k: statistics.median(rate(k)) if rate(k) else None
          for k in peers.SAMPLERS}  # fmt: skip


def sampling(found: dict) -> str:
  others = peers.SAMPLERS[1:]
  head = ('tokens per second', *map(peers.NAMES.get, peers.SAMPLERS))
  head += tuple(f'ours / {peers.NAMES[x]}' for x in others)
  rows = [(*head, 'ours / the best')]
  best = {}
  for name, row in found.items():
    by = ratios(row)
    best[name] = min(by.values(), default=None)
    rows.append((name, *rates(row).values(), *map(by.get, others), best[name]))
  lines = [arithmetic.markdown(rows)]
  fixed = [best.get(x.name) for x in workloads.FIXED]
  if all(fixed):
    mean = arithmetic.geometric_mean(fixed)
    lines.append(
      f'Batches of fixed length, n = 1: ours / the best, geometric mean'
      f' {mean:.3f}, least {min(fixed):.3f}.'
    )
  mix = found.get(workloads.MIX.name, {})
  seen = [(k, x) for k, x in mix.items() if 'busy' in x]
  if seen:
    said = ', '.join(
      f'{peers.NAMES[k]} {x["stop_rate"]:.5f} and {100 * x["busy"]:.0f} %'
      for k, x in seen
    )
    lines.append(
      f'Length mix: observed stops per token (1/64 = {1 / 64:.5f}) and slots'
      f' busy: {said}.'
    )
  return '\n\n'.join(lines)


def milliseconds(row: dict) -> float:
  return 1e3 * statistics.median(row['seconds'])


def step(found: dict) -> str:
  whole = found['step']
  rows = [('', 'milliseconds', 'ours / it')]
  if 'seconds' not in whole.get('ours', {}):
    return 'The J-BOND step did not run.'
  ours = whole['ours']['seconds']
  rows.append(('J-BOND step', milliseconds(whole['ours']), 1.0))
  parts = {k: v['ours'] for k, v in found.items() if k != 'step'}
  for name, part in parts.items():
    rows.append((f'its {name} alone', milliseconds(part), 'n/a'))
  # Of one round each: all parts, then the step.
  sums = [sum(x) for x in zip(*(p['seconds'] for p in parts.values()),
                              strict=True)]  # fmt: skip
  total = 1e3 * statistics.median(sums)
  rows.append(('sum of its parts', total, arithmetic.ratio(ours, sums)))
  for name, label in ('tunix', 'Tunix GRPO step'), ('trl', 'TRL RLOO step'):
    if 'seconds' in (theirs := whole.get(name, {})):
      by = arithmetic.ratio(ours, theirs['seconds'])
      rows.append((label, milliseconds(theirs), by))
  return arithmetic.markdown(rows)


def head(found: list[dict]) -> str:
  rows = [
    (
      'd', 'temporary MB', 'plain', 'plain / it', 'seconds', 'plain seconds',
      'it / plain',
    )
  ]  # fmt: skip
  for x in found:
    ours, plain = x['ours'], x['plain']
    rows.append(
      (
        str(x['d']),
        ours['temporary'] / 1e6,
        plain['temporary'] / 1e6,
        plain['temporary'] / ours['temporary'],
        statistics.median(ours['seconds']),
        statistics.median(plain['seconds']),
        arithmetic.ratio(ours['seconds'], plain['seconds']),
      )
    )
  return arithmetic.markdown(rows)


def real(found: dict) -> str:
  """Tokens per second of either dtype."""
  rows = [('tokens per second', 'dtype', 'ours', 'transformers', 'ratio')]
  for dtype in ('float32', 'bfloat16'):
    for name, row in found[dtype].items():
      by, rate = ratios(row).get('transformers'), rates(row)
      rows.append((name, dtype, rate['ours'], rate['transformers'], by))
  return arithmetic.markdown(rows)


def large(found: dict) -> str:
  """Tokens per second, and how near that is to what the device could do."""
  about, size = found['about'], found['workload']
  rows = [('', 'tokens per second', 'of the memory bandwidth', 'MFU')]
  for name, row in found['sample'].items():
    if 'rate' not in row:
      continue
    rate = statistics.median(row['rate'])
    seconds = statistics.median(row['seconds'])
    share = about['sample_bytes'] / seconds / (about['bandwidth'] or math.nan)
    share = share if about['bandwidth'] and name == 'ours' else None
    rows.append((f'sampling, {peers.NAMES[name]}', rate, share, 'n/a'))
  if 'rate' in found['train'].get('ours', {}):
    row = found['train']['ours']
    seconds = statistics.median(row['seconds'])
    peak = about['peak_flops']
    mfu = about['train_flops'] / seconds / peak if peak else None
    rate = statistics.median(row['rate'])
    rows.append(('training, bond_jax', rate, 'n/a', mfu))
  missing = [f'{peers.NAMES[k]} is missing: {v}'
             for k, v in found['skipped'].items()]  # fmt: skip
  title = f'{size["name"]} new tokens on {about["device"]}:'
  return '\n\n'.join([title, arithmetic.markdown(rows), *missing])
