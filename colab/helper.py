"""What the notebooks in colab/ share: commands to run, and runs to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import re
import subprocess
import sys
from typing import NamedTuple

from bond_jax.errors import UserError
from bond_jax.evaluation.report import page
from bond_jax.runs import files, log, show

# How a stage says how far it is, on stderr; see `log.Writer`.
_PROGRESS = re.compile(r'\w[\w ]* +\d+/\d+  ')


class Html(NamedTuple):
  """What a notebook shows in the place of the value of a cell."""

  text: str

  def _repr_html_(self) -> str:
    return self.text

  def __repr__(self) -> str:
    return 'a table'


def run(module: str, *args: str) -> None:
  """Runs `python -m module *args`; a UserError if it fails.

  Shows what it prints and, while it works, the newest line of progress; of
  those the last one stays.
  """
  # Only where there are notebooks is there IPython.
  from IPython import display  # pylint: disable=import-outside-toplevel

  kept: list[str] = []
  progress = ''
  with subprocess.Popen(
    [sys.executable, '-m', module, *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    try:
      for line in process.stdout:
        if _PROGRESS.match(line):
          progress = line
        else:
          kept.append(line)
        display.clear_output(wait=True)
        print(''.join([*kept, progress]), end='')
    except KeyboardInterrupt:  # it may be ours alone
      process.terminate()
      raise
  display.clear_output(wait=True)
  print(''.join([progress, *kept]), end='')
  if process.returncode:
    said = kept[-1].strip() if kept else 'it said nothing'
    raise UserError(f'{module} ended with {process.returncode}: {said}')


def summary(workdir: str) -> dict:
  """The numbers of a run that has been evaluated."""
  return files.read_json(os.path.join(workdir, 'summary.json'))


def side_by_side(workdir: str, count: int) -> Html:
  """The first completions of the test prompts, before and after."""
  rows = log.read_rows(os.path.join(workdir, 'completions.jsonl'))
  table = [('prompt', 'before', 'reward', 'after', 'reward')]
  for pair in page.side_by_side(rows, count):
    before, after = pair['before'], pair['after']
    table.append(
      (
        before['prompt'],
        before['completion'],
        f'{before["reward"]:.2f}',
        after['completion'],
        f'{after["reward"]:.2f}',
      )
    )
  return html_table(table)


def compare(runs: Mapping[str, str], keys: Mapping[str, str]) -> Html:
  """A table of some numbers of several runs.

  Args:
    runs: what each is called -> its folder.
    keys: of their summaries -> what a number is called.
  """
  found = {name: summary(workdir) for name, workdir in runs.items()}
  rows = [
    (label, *(show.text(x.get(key)) for x in found.values()))
    for key, label in keys.items()
  ]
  return html_table([('', *found), *rows])


def html_table(rows: Sequence[Sequence[str]]) -> Html:
  """A table, the first row its head; every cell is text."""

  def line(row, tag):
    cells = ''.join(
      f'<{tag} style="text-align: left; vertical-align: top">'
      f'{page.escape(cell)}</{tag}>'
      for cell in row
    )
    return f'<tr>{cells}</tr>'

  head, *body = rows
  lines = [line(head, 'th'), *(line(row, 'td') for row in body)]
  return Html(f'<table>{"".join(lines)}</table>')
