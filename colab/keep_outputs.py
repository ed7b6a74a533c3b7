"""Puts the outputs of colab/executed/*.ipynb into colab/*.ipynb.

    make notebooks notebooks-keep

Refuses a notebook that was executed before its source was changed, or after a
stage had been run that it runs. What says where and when it ran is left out, so
that the same outputs are the same file.
"""

import os
import pathlib
import sys

import nbformat

FOLDER = pathlib.Path(__file__).parent


def kept(source, executed, root: str):
  """`source` with the outputs of `executed`; a ValueError if it cannot be."""
  if [c.source for c in source.cells] != [c.source for c in executed.cells]:
    raise ValueError('its source has changed since; make notebooks first')
  if 'finished already' in str(executed):
    raise ValueError(
      'a stage of it had been run before: move its folder in runs/ away, and'
      ' make notebooks again'
    )
  for cell, done in zip(source.cells, executed.cells, strict=True):
    cell.metadata = {}
    if cell.cell_type == 'code':
      cell.outputs = [_clean(x, root) for x in done.outputs]
      cell.execution_count = done.execution_count
  return source


def _clean(output, root: str):
  """Without the name of the repository's folder, and without its metadata."""
  output = output.copy()
  if 'text' in output:
    output.text = output.text.replace(root + os.sep, '')
  if 'data' in output:
    output.metadata = {
      # An image's size is part of how it looks.
      kind: value
      for kind, value in output.metadata.items()
      if kind in output.data
    }
  return output


def main() -> int:
  failed = 0
  for path in sorted(FOLDER.glob('*.ipynb')):
    done = FOLDER / 'executed' / path.name
    try:
      source, executed = (nbformat.read(p, as_version=4) for p in (path, done))
      nbformat.write(kept(source, executed, str(FOLDER.parent.resolve())), path)
      print(f'{path.name}: {path.stat().st_size / 1e3:.0f} kB')
    except (OSError, ValueError) as e:
      print(f'error: {path.name}: {e}', file=sys.stderr)
      failed += 1
  return 2 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
