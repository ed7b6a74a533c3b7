"""Which shipped config fits which slice: docs/sizing.md.

    python -m benchmarks.sizing --out=runs/sizing

Makes the plan of every config on a slice of each generation of TPUs, one after
another, as `python -m bond_jax.plan` does; one that is there already is not
made again. Takes an hour or two on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys

from absl import app

from bond_jax.runs import files, paths
from bond_jax.sizing import chips

_OUT = paths.flag('out', None, 'Of the plans.', required=True)

# Config -> slices, smallest first; 'model=8' overrides sampling_mesh.model.
WANTED = {
  'gemma_7b': ['v5e:4x4', 'v4:2x2x2 model=8', 'v5p:2x2x1 model=4',
               'v6e:2x4 model=8'],
  'gemma2_2b': ['v5e:2x4', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2'],
  'gemma3_27b_lora': ['v5e:4x4', 'v4:2x2x2 model=8', 'v5p:2x2x1 model=4',
                      'v6e:2x4 model=8'],
  'gemma_2b': ['v5e:2x4', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2'],
  'gemma3_1b': ['v5e:2x2', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2'],
  'gemma3_270m': ['v5e:1x1', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:1x1'],
  'gemma3_4b_lora': ['v5e:2x4', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2'],
}  # fmt: skip
PAGE = 'docs/sizing.md'
HEAD = """# Which config fits which slice

Made by `make sizing`, which may be stopped and goes on (slices that are missing
here have not been planned yet), from what the TPU compiler says of every
program of a run (`python -m bond_jax.plan`), not from a run: J-BOND with the
settings of each config, batch 128, 512 + 512 tokens. Memory is of one chip, in
GiB: what is *kept* all the time, and *at worst*, with all that lives beside the
program of that moment, *of* what a program may have. *Update* compiled in so
many seconds on two CPU cores, some of them busy with other work. The least time
of a step follows from the chips' published peaks, with all completions at full
length; a real step takes longer. Compilers: {compilers}.

The plan of one config, with `--search` for the largest batch that fits and
`--config.…` for other settings:

    python -m bond_jax.plan --config=configs/gemma_7b_jbond.py \\
      --topology=v5e:4x4 --out=runs/plan

"""


def make(out: str, name: str, topology: str, *overrides: str) -> dict | None:
  """The summary of one plan, made in a process of its own; None if it fails."""
  folder = os.path.join(out, f'{name}-{topology.replace(":", "-")}')
  path = os.path.join(folder, 'summary.json')
  if not os.path.exists(path):
    args = [f'--config.sampling_mesh.{x}' for x in overrides]
    done = subprocess.run(
      [sys.executable, '-m', 'bond_jax.plan',
       f'--config=configs/{name}_jbond.py', f'--topology={topology}',
       f'--out={folder}', *args],
      check=False,
    )  # fmt: skip
    if done.returncode:
      return None
  return files.read_json(path)


def row(name: str, found: dict) -> list[str]:
  gib = lambda x: f'{x / chips.GIB:.2f}'
  worst = max(
    found['programs'], key=lambda n: found['programs'][n]['peak_bytes'],
    default='',
  )  # fmt: skip
  kept = sum(found['resident_bytes'].values())
  if not found['reference_on_chip']:
    kept -= found['resident_bytes']['reference']
  seconds = [
    max(p['least_seconds'].values())
    for p in found['programs'].values()
    if 'least_seconds' in p
  ]
  update = found['programs'].get('update', {})
  too_much = ', '.join(found['too_much'])
  mesh = found['sampling_mesh']
  return [
    f'`{name}_jbond.py`',
    found['topology'],
    f'{mesh["data"]} x {mesh["model"]}',
    'yes' if found['fits'] else '**no**',
    gib(kept),
    too_much or f'{gib(found["peak_bytes"])} ({worst})',
    gib(found['hbm_bytes']),
    f'{update.get("compile_seconds", "")}',
    '' if too_much else f'{sum(seconds):.1f}',
  ]


def page(rows: list[list[str]], compilers: set[str]) -> str:
  head = ['config', 'slice', 'sampling mesh', 'fits', 'kept', 'at worst', 'of',
          'update, s', 'step, s']  # fmt: skip
  lines = [head, ['---'] * len(head), *rows]
  table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  return HEAD.format(compilers=', '.join(sorted(compilers))) + table + '\n'


def main(_) -> None:
  rows, compilers = [], set()
  for i in range(max(map(len, WANTED.values()))):
    for name, slices in WANTED.items():
      if i < len(slices):
        found = make(_OUT.value, name, *slices[i].split())
        if not found:
          continue
        rows.append(row(name, found))
        used = found['versions']
        compilers |= {f'{x} {used[x]}' for x in ('jax', 'libtpu') if x in used}
        rows.sort(key=lambda x: list(WANTED).index(x[0].strip('`')[:-9]))
        with open(PAGE, 'w', encoding='utf-8') as f:
          f.write(page(rows, compilers))


if __name__ == '__main__':
  app.run(main)
