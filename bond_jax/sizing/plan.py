"""What a run needs of a slice: its programs compiled, one after another."""

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
from bond_jax.runs import command, environment, files, show
from bond_jax.runs.settings import defaults
from bond_jax.sizing import chips, hlo, operations, programs
from bond_jax.training import checks, setups
from bond_jax.training import step as step_lib
from bond_jax.weights import teachers

GIB = chips.GIB
CHILD = 'BOND_JAX_PLAN'  # in the environment of the process that compiles


def plan(config: ml_collections.ConfigDict, topology: str) -> dict[str, Any]:
  """Compiles a run for a topology; the summary."""
  devices, chip = chips.devices(topology)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  check(config, mesh)
  wanted, kept = programs.of_config(config, mesh)
  size = {name: programs.bytes_of(tree) for name, tree in kept.items()}
  algorithm = setups.make_algorithm(config)
  teacher = teachers.find(config)
  rows, too_much = {}, {}
  for name, program in wanted.items():
    if program.resident > chip.memory:  # without the program, even
      too_much[name] = program.resident
      continue
    print(f'compiling {name} for {topology} ...', flush=True)
    row = programs.compile_program(program)
    if not isinstance(row, dict):
      too_much[name] = row
      continue
    rows[name] = row
    if chip.flops and not name.startswith('probe'):
      sent = sum(x['bytes'] for x in row['collectives'].values())
      row['least_seconds'] = operations.least_seconds(
        name,
        sent,
        config,
        algorithm,
        size,
        mesh,
        chip,
        teacher and teacher.sizes,
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
    'teacher': config.teacher,
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
    'resident_bytes': {k: size[k] for k, tree in kept.items() if tree != {}},
    'reference_on_chip': step_lib.reads_reference(algorithm),
    'programs': rows,
    'too_much': too_much,
  }


def check(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses what the run would refuse, of what does not need its data."""
  if config.task != 'text' or policies.is_library(config.model):
    raise UserError(
      'a plan is made for our own models trained on text; this config has task'
      f' {config.task}, model {config.model.name}.'
    )
  needed = (*defaults.COMMON, *defaults.TEXT_NEEDS)
  defaults.check(config.to_dict(), needed, unset=True)
  batch, micro_batches = config.train.batch, config.train.micro_batches
  sharding.check_batch('train.batch', batch, mesh, micro_batches)
  for over in mesh, sharding.reshaped(mesh, **config.sampling_mesh):
    for name in 'batch', 'probe_prompts':
      sharding.check_batch(f'train.{name}', config.train[name], over, 1)
  checks.check_teacher(config, setups.make_algorithm(config))
  teacher = teachers.find(config)
  if teacher and teacher.sizes is None:
    raise UserError(
      f'a plan is made for our own models; the teacher {teacher.name} is of the'
      ' gemma library.'
    )


def too_large(found: dict[str, Any]) -> dict[str, float]:
  """Bytes of the programs that are too large for a chip, at least."""
  return found['too_much'] | {
    name: row['peak_bytes']
    for name, row in found['programs'].items()
    if row['peak_bytes'] > found['hbm_bytes']
  }


def advice(found: dict[str, Any]) -> str:
  """What to try for a run that does not fit."""
  kept = sum(
    size
    for name, size in found['resident_bytes'].items()
    if name != 'reference' or found['reference_on_chip']
  )
  if kept > 0.9 * found['hbm_bytes']:
    return 'more chips, a larger mesh, or LoRA (model.lora.rank)'
  over, tips = set(too_large(found)), []
  if over & {'rollout', 'probe/draw', 'probe/draw_teacher'}:
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
    peaks = {k: row['peak_bytes'] for k, row in found['programs'].items()}
    name = max(peaks, key=peaks.get)
    return f'fits: at most {gib(peaks[name])} of {limit}, in {name}'
  needs = too_large(found)
  name = max(needs, key=needs.get)
  least = ' or more' if name in found['too_much'] else ''
  needed = f'{gib(needs[name])}{least}' if needs[name] else 'more than that'
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
  taught = f' of {found["teacher"]}' if found['teacher'] else ''
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
    f'{found["model"]}, {found["trainable"]}, {found["algorithm"]}{taught}:'
    f' batch {found["batch"]}, {found["prompt_length"]} +'
    f' {found["max_new_tokens"]} tokens, on {found["topology"]}',
  )
  columns = {
    'arguments': 'argument_bytes', 'beside them': 'beside_bytes',
    'temporaries': 'temporary_bytes', 'peak': 'peak_bytes',
  }  # fmt: skip
  limit = shown(found['hbm_bytes'])
  rows = [(f'{unit} per chip', *columns, 'of', 'compiled in s')]
  for name, row in found['programs'].items():
    parts = (shown(row[key]) for key in columns.values())
    rows.append((name, *parts, limit, row['compile_seconds']))
  for name, least in found['too_much'].items():
    rows.append((name, '', '', '', f'> {shown(least)}', limit, ''))
  show.table(rows, 'memory')
  rows = [('GB to each chip', *hlo.KINDS, 'largest')]
  for name, row in found['programs'].items():
    sent = [row['collectives'].get(k, {}).get('bytes', 0) for k in hlo.KINDS]
    sent.append((row['largest_collective'] or {}).get('bytes', 0))
    rows.append((name, *(f'{x / 1e9:.3g}' for x in sent)))
  show.table(rows, 'sent between chips, and the largest at one time')
  times = {k: row['least_seconds'] for k, row in found['programs'].items()
           if 'least_seconds' in row}  # fmt: skip
  if times:
    rows = [('', *times['rollout'], 'at least', 'bound by')]
    for name, parts in times.items():
      bound = max(parts, key=parts.get)
      shown_parts = (f'{x:.3g}' for x in (*parts.values(), parts[bound]))
      rows.append((name, *shown_parts, bound))
    total = sum(max(parts.values()) for parts in times.values())
    show.table(
      [*rows, ('step', '', '', '', f'{total:.3g}', '')],
      'least seconds of a step, from published peaks; all completions at full'
      ' length',
    )


def search(config: ml_collections.ConfigDict, topology: str) -> dict[str, Any]:
  """The plan of the largest batch that fits, to within a factor of two.

  The config's batch is doubled or halved. Micro-batches keep their size: a
  larger batch has more of them.
  """
  n = config.train.micro_batches
  size = config.train.batch // n

  def at(n: int) -> dict[str, Any]:
    with config.unlocked():
      config.train.batch, config.train.micro_batches = n * size, n
    print(f'batch {n * size}:', flush=True)
    found = plan(config, topology)
    print(f'batch {n * size} {verdict(found)}', flush=True)
    return found

  found = at(n)
  while not found['fits'] and n > 1:
    n //= 2
    found = at(n)
    if found['fits']:
      return found
  while found['fits'] and n < 4096:
    n *= 2
    larger = at(n)
    if not larger['fits']:
      break
    found = larger
  return found


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

  The TPU compiler ends its process where a check of its own fails.
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
    ' program named last above, by a mistake of its own or for lack of memory;'
    ' try another --config.sampling_mesh.model, or another libtpu.',
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
