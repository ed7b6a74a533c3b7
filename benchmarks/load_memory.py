"""How much host memory loading a checkpoint takes beyond the shards it fills.

    PYTHONPATH=. python benchmarks/load_memory.py --out=runs/load_memory

Writes random weights of one model in bfloat16 (2.0 GB for the default, Gemma 3
1B) in several formats, loads each onto eight virtual CPU devices in a process
of its own, and reports the high-water mark of that process's resident memory,
less what it held before and less the shards, beside the largest array. On a
CPU the shards are host memory too; on an accelerator they are not.

`flat` is what `weights.save_official` writes; `flat, whole` and `stacked,
whole` hold each array, or each stack of layers, in one compressed piece, the
worst that a writer may do; `huggingface` is safetensors. Linux only. Needs
three times the size of the model on the disk at --out, and as much memory.
Writes summary.json.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import time

import jax
import ml_dtypes
import numpy as np

from bond_jax.devices import sharding
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import files, paths, show
from bond_jax.weights import official, stacks

FORMATS = ('flat', 'flat, whole', 'stacked, whole', 'huggingface')


def random_params(config: gemma.Config):
  """On the host, in bfloat16; no easier to compress than trained weights."""
  rng = np.random.default_rng(0)

  def draw(x):
    out = np.empty(x.shape, ml_dtypes.bfloat16)
    for row in out.reshape(-1, x.shape[-1] if x.ndim else 1):
      row[...] = rng.standard_normal(row.shape, np.float32)
    return out

  return jax.tree.map(draw, stacks.init_shapes(config))


def write(config: gemma.Config, form: str, path: str) -> None:
  params = random_params(config)
  if form == 'flat':
    official.save_official(params, config, path)
  elif form == 'huggingface':
    from bond_jax.weights.huggingface import writer

    writer.export(params, config, path, dtype='bfloat16')
  else:
    import orbax.checkpoint as ocp

    tree = params if form == 'stacked, whole' else dict(
      stacks.nested(config, params)
    )  # fmt: skip
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(os.path.abspath(path), args=ocp.args.PyTreeSave(tree))


def resident(field: str) -> int:
  """Bytes: VmRSS now, VmHWM at most since it was last set back."""
  with open('/proc/self/status') as f:
    for line in f:
      if line.startswith(field):
        return int(line.split()[1]) * 1024
  raise RuntimeError(f'no {field} in /proc/self/status')


def measure(config: gemma.Config, path: str, dtype: str) -> dict[str, float]:
  """Loads onto eight devices in this process; all sizes in bytes."""
  jax.config.update('jax_num_cpu_devices', 8)
  mesh = sharding.make_mesh(data=4, model=2)
  shapes = stacks.init_shapes(config)
  like = sharding.tree_structs(shapes, mesh, dtype)
  jax.device_put(np.zeros((8, 8)), sharding.by_row(mesh)).block_until_ready()
  before = resident('VmRSS')
  with open('/proc/self/clear_refs', 'w') as f:
    f.write('5')  # sets VmHWM back
  start = time.perf_counter()
  params = official.load(path, config, like)
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  peak = resident('VmHWM')
  leaves = jax.tree.leaves(params)
  shards = sum(s.data.nbytes for x in leaves for s in x.addressable_shards)
  largest = max(x.nbytes for x in leaves)
  return dict(
    before=before,
    peak=peak,
    shards=shards,
    largest=largest,
    above=peak - before - shards,
    ratio=(peak - before - shards) / largest,
    seconds=seconds,
  )


def alone(function, *args):
  """Calls it in a process of its own."""
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    return pool.apply(function, args)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=paths.expanded, required=True)
  parser.add_argument('--model', default='gemma3_1b', choices=gemma.CONFIGS)
  parser.add_argument('--layers', type=int, help='fewer, for a quick look')
  parser.add_argument('--vocab_size', type=int, help='smaller, the same')
  args = parser.parse_args()
  sizes = dict(layers=args.layers, vocab_size=args.vocab_size)
  config = dataclasses.replace(
    gemma.CONFIGS[args.model], **{k: v for k, v in sizes.items() if v}
  )
  os.makedirs(args.out, exist_ok=True)
  rows, found = [], {}
  for form in FORMATS:
    path = os.path.join(args.out, 'checkpoint')
    alone(write, config, form, path)
    for dtype in ('bfloat16', 'float32'):
      row = alone(measure, config, path, dtype)
      found[f'{form}, as {dtype}'] = row
      sizes = [row[k] / 1e6 for k in ('shards', 'largest', 'above')]
      rows.append((f'{form}, as {dtype}', *sizes, row['ratio'], row['seconds']))
      print(json.dumps({'format': form, 'dtype': dtype, **row}), flush=True)
    shutil.rmtree(path)
  files.write_json(
    os.path.join(args.out, 'summary.json'),
    {'model': args.model, 'config': dataclasses.asdict(config), 'rows': found},
  )
  head = ('', 'shards MB', 'largest array', 'above shards', 'ratio', 'seconds')
  show.table([head, *rows], f'in {args.out}')


if __name__ == '__main__':
  main()
