"""What a run needs of a slice: its programs compiled, one after another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

from absl import flags
import jax
from jax.sharding import Mesh
import ml_collections

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import policies
from bond_jax.runs import command, environment, fields, files, show
from bond_jax.sizing import chips, hlo, programs
from bond_jax.training import setups, text_task
from bond_jax.training import step as step_lib
from bond_jax.weights import load

GIB = chips.GIB
CHILD = 'BOND_JAX_PLAN'  # in the environment of the process that compiles


# Of which no shape depends on the batch.
SAME = ('move_anchor', 'probe/draw', 'probe/score')


def plan(
  config: ml_collections.ConfigDict,
  topology: str,
  known: dict[str, programs.Compiled] | None = None,
) -> dict[str, Any]:
  """Compiles a run for a topology; the summary.

  `known` are the programs that another batch has left, and takes this one's.
  """
  known = {} if known is None else known
  devices, chip = chips.devices(topology)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  check(config, mesh)
  wanted, kept = programs.of_config(config, mesh)
  algorithm = setups.make_algorithm(config)
  rows, too_much = {}, {}
  for name, program in wanted.items():
    if program.there > chip.memory:  # without the program, even
      too_much[name] = program.there
      continue
    compiled = known.get(name)
    if compiled is None:
      print(f'compiling {name} for {topology} ...', flush=True)
      compiled = programs.compile_program(program)
    if not isinstance(compiled, programs.Compiled):
      too_much[name] = compiled
      continue
    if name in SAME:
      known[name] = compiled
    rows[name] = describe(compiled)
    if chip.flops and not name.startswith('probe'):
      rows[name]['least_seconds'] = programs.least_seconds(
        name, compiled, config, algorithm, kept, mesh, chip
      )
  code = sum(row['code_bytes'] for row in rows.values())
  for row in rows.values():  # all programs stay loaded
    row['peak_bytes'] += code - row['code_bytes']
  peak = max((row['peak_bytes'] for row in rows.values()), default=0)
  sampling_mesh = sharding.reshaped(mesh, **config.sampling_mesh)
  rank = config.model.lora.rank
  return {
    'fits': not too_much and peak <= chip.memory,
    'topology': topology,
    'chips': mesh.size,
    'mesh': dict(mesh.shape),
    'sampling_mesh': dict(sampling_mesh.shape),
    'model': config.model.name,
    'algorithm': config.algorithm.name,
    'trainable': f'LoRA, rank {rank}' if rank else 'all parameters',
    'param_dtype': str(jax.tree.leaves(kept['parameters'])[0].dtype),
    'batch': config.train.batch,
    'micro_batches': config.train.micro_batches,
    'prompt_length': config.prompt.length,
    'max_new_tokens': config.length,
    'slots': config.slots,
    'hbm_bytes': chip.memory,
    'peak_bytes': None if too_much else peak,
    'resident_bytes': {
      k: programs.bytes_of(v) for k, v in kept.items() if v != {}
    },
    'reference_on_chip': step_lib.reads_reference(algorithm),
    'programs': rows,
    'too_much': too_much,
  }


def describe(compiled: programs.Compiled) -> dict[str, Any]:
  """A compiled program as JSON."""
  sent = compiled.collectives
  largest = max(sent, key=lambda c: c.bytes, default=None)
  return {
    'peak_bytes': compiled.peak,
    'argument_bytes': compiled.arguments,
    'beside_bytes': compiled.beside,
    'temporary_bytes': compiled.temporaries,
    'code_bytes': compiled.code,
    'compile_seconds': round(compiled.seconds, 1),
    'collectives': {
      kind: {'times': times, 'bytes': size}
      for kind, (times, size) in hlo.totals(sent).items()
    },
    'largest_collective': largest and largest._asdict(),
  }


def check(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses what the run would refuse, of what does not need its data."""
  if config.task != 'text' or policies.is_library(config.model):
    raise UserError(
      f'a plan is made for models in {load.__name__} that are trained on'
      f' text; this config has task {config.task}, model {config.model.name}.'
    )
  needed = (*fields.NEEDED, *text_task.NEEDED)
  fields.check(config.to_dict(), needed, unset=True)
  settings = config.train
  sampling_mesh = sharding.reshaped(mesh, **config.sampling_mesh)
  sharding.check_batch(
    'train.batch', settings.batch, mesh, settings.micro_batches
  )
  for name, batch in (
    ('train.batch', settings.batch),
    ('train.probe_prompts', settings.probe_prompts),
  ):
    sharding.check_batch(name, batch, mesh, 1)
    sharding.check_batch(name, batch, sampling_mesh, 1)


def advice(found: dict[str, Any]) -> str:
  """What to try for a run that does not fit."""
  kept = sum(
    size
    for name, size in found['resident_bytes'].items()
    if name != 'reference' or found['reference_on_chip']
  )
  if kept > 0.9 * found['hbm_bytes']:
    return 'more chips, a larger mesh, or LoRA (model.lora.rank)'
  over = set(found['too_much']) | {
    name
    for name, row in found['programs'].items()
    if row['peak_bytes'] > found['hbm_bytes']
  }
  tips = []
  if over & {'rollout', 'probe/draw'}:
    tips.append(
      'sampling_mesh with a larger model axis, or fewer slots'
      f' (slots={max(1, (found["slots"] or found["batch"]) // 2)})'
    )
  if over & {'weigh', 'update', 'probe/score'}:
    tips.append(f'train.micro_batches={2 * found["micro_batches"]}')
  return ', '.join(tips) or 'more chips'


def verdict(found: dict[str, Any]) -> str:
  """Whether it fits, and if not why, and what to try."""
  gib = lambda x: f'{x / GIB:.2f} GiB'
  limit = gib(found['hbm_bytes'])
  if found['fits']:
    name, row = max(
      found['programs'].items(), key=lambda item: item[1]['peak_bytes']
    )
    return f'fits: at most {gib(row["peak_bytes"])} of {limit}, in {name}'
  needs = found['too_much'] | {
    name: row['peak_bytes']
    for name, row in found['programs'].items()
    if row['peak_bytes'] > found['hbm_bytes']
  }
  name = max(needs, key=needs.get)
  least = ' or more' if name in found['too_much'] else ''
  needed = f'{gib(needs[name])}{least}' if needs[name] else 'more than there is'
  others = f' ({", ".join(n for n in needs if n != name)} do not fit either)'
  return (
    f'does not fit: {name} needs {needed}, of {limit} per chip'
    f'{others if len(needs) > 1 else ""}; try {advice(found)}'
  )


def tables(found: dict[str, Any]) -> None:
  """Prints what a person wants to know of a plan."""
  large = sum(found['resident_bytes'].values()) > 0.1 * GIB
  unit, size = ('GiB', GIB) if large else ('MiB', 2**20)
  shown = lambda x: f'{x / size:.2f}'
  where = lambda name: (
    'hosts, but in move_anchor and probe/score'
    if name == 'reference' and not found['reference_on_chip']
    else 'chips'
  )
  show.table(
    [
      ('kept all the time', f'{unit} per chip', 'on'),
      *((k, shown(v), where(k)) for k, v in found['resident_bytes'].items()),
    ],
    f'{found["model"]}, {found["trainable"]}, {found["algorithm"]}: batch'
    f' {found["batch"]}, {found["prompt_length"]} + {found["max_new_tokens"]}'
    f' tokens, on {found["topology"]}',
  )
  head = (f'{unit} per chip', 'arguments', 'beside them', 'temporaries', 'peak',
          'of', 'compiled in s')  # fmt: skip
  rows = [
    (
      name,
      shown(row['argument_bytes']),
      shown(row['beside_bytes']),
      shown(row['temporary_bytes']),
      shown(row['peak_bytes']),
      shown(found['hbm_bytes']),
      row['compile_seconds'],
    )
    for name, row in found['programs'].items()
  ]
  rows += [
    (name, '', '', '', f'> {shown(least)}', shown(found['hbm_bytes']), '')
    for name, least in found['too_much'].items()
  ]
  show.table([head, *rows], 'memory')
  show.table(_sent(found), 'sent between chips, and the largest at one time')
  if seconds := _seconds(found):
    show.table(
      seconds,
      'least seconds of a step, from published peaks; all completions at full'
      ' length',
    )


def _sent(found) -> list[tuple]:
  head = ('GB to each chip', *hlo.KINDS, 'largest')
  rows = []
  for name, row in found['programs'].items():
    of = lambda kind, row=row: row['collectives'].get(kind, {'bytes': 0})
    largest = row['largest_collective']
    rows.append(
      (
        name,
        *(f'{of(kind)["bytes"] / 1e9:.3g}' for kind in hlo.KINDS),
        f'{largest["bytes"] / 1e9:.3g}' if largest else 'none',
      )
    )
  return [head, *rows]


def _seconds(found) -> list[tuple]:
  rows, total = [], 0.0
  for name, row in found['programs'].items():
    if parts := row.get('least_seconds'):
      bound = max(parts, key=parts.get)
      total += parts[bound]
      shown = (f'{x:.3g}' for x in (*parts.values(), parts[bound]))
      rows.append((name, *shown, bound))
  if not rows:
    return []
  head = ('', 'compute', 'memory', 'interconnect', 'at least', 'bound by')
  return [head, *rows, ('step', '', '', '', f'{total:.3g}', '')]


def search(config: ml_collections.ConfigDict, topology: str) -> dict[str, Any]:
  """The plan of the largest batch that fits, to within an eighth.

  Micro-batches keep their size: there are more of them in a larger batch.
  """
  size = config.train.batch // config.train.micro_batches
  tried, known = {}, {}

  def fits(n: int) -> bool:
    if n not in tried:
      with config.unlocked():
        config.train.batch, config.train.micro_batches = n * size, n
      print(f'batch {n * size}:', flush=True)
      tried[n] = plan(config, topology, known=known)
      print(f'batch {n * size} {verdict(tried[n])}', flush=True)
    return tried[n]['fits']

  low, high = 0, config.train.micro_batches
  while high <= 4096 and fits(high):
    low, high = high, 2 * high
  while high > 1 and not low:
    if fits(high // 2):
      low = high // 2
    else:
      high //= 2
  while low and high - low > max(1, low // 8):
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return tried[low or 1]


def main(
  config: ml_collections.ConfigDict, out: str, topology: str, largest: bool
) -> None:
  if not topology:
    raise UserError(f'--topology is not set; give {chips.EXAMPLES}.')
  environment.configure_jax()
  try:
    os.makedirs(out, exist_ok=True)
  except OSError as e:
    raise UserError(
      f'cannot write to --out={out}: {e.strerror}; give another one.'
    ) from e
  with config.unlocked():
    # A schedule wants a number; no shape depends on it.
    config.train.steps = config.train.get('steps') or 1
  work = search if largest else plan
  found = work(config, topology)
  found['versions'] = environment.versions() | chips.compiler(topology)
  path = os.path.join(out, 'summary.json')
  files.write_json(path, found)
  tables(found)
  print(f'{verdict(found)}; see {path}')


def in_a_child(args: list[str]) -> int:
  """Makes the plan in a process of its own; the status to end with.

  A check of the TPU compiler that fails ends its process, with no exception.
  """
  command_line = [sys.executable, '-m', 'bond_jax.plan', *args]
  child = subprocess.Popen(command_line, env={**os.environ, CHILD: '1'})
  signal.signal(signal.SIGTERM, lambda *_: child.terminate())
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child has got it too
  status = child.wait()
  if status >= 0 or -status in (signal.SIGTERM, signal.SIGINT):
    return abs(status)
  print(
    f'error: the compiler was ended by {signal.Signals(-status).name} in the'
    ' program named last above: it is its own mistake, or the memory of this'
    ' machine. Try another --config.sampling_mesh.model, or another libtpu.',
    file=sys.stderr,
  )
  return 2


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  if CHILD not in os.environ:
    sys.exit(in_a_child(sys.argv[1:]))
  topology = flags.DEFINE_string(
    'topology', None, f'The devices: {chips.EXAMPLES}.'
  )
  largest = flags.DEFINE_bool(
    'search', False, 'Find the largest batch that fits.'
  )
  # The compiler needs none of the devices that may be here.
  jax.config.update('jax_platforms', 'cpu')
  command.run(
    lambda *given: main(*given, topology.value, largest.value),
    doc,
    folder='out',
    partial=True,
  )
