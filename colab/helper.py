"""What the notebooks in colab/ share: commands to run, and runs to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import re
import subprocess
import sys
from typing import NamedTuple

from markupsafe import escape

from bond_jax.errors import UserError
from bond_jax.evaluation.report import page
from bond_jax.runs import files, log, show

# The progress line of a stage, on stderr; see `log.Writer`.
_PROGRESS = re.compile(r'\w[\w ]* +\d+/\d+  ')


class Html(NamedTuple):
  """HTML that a notebook shows as the value of a cell."""

  text: str

  def _repr_html_(self) -> str:
    return self.text

  def __repr__(self) -> str:
    return 'a table'


def run(module: str, *args: str) -> None:
  """Runs `python -m module *args`; a UserError if it fails.

  Shows its output, with the newest progress line alone. Commands with a config
  get the flags in NOTEBOOK_FLAGS as well, so that tests take small numbers.
  """
  if any(arg.startswith('--config=') for arg in args):
    args += tuple(os.environ.get('NOTEBOOK_FLAGS', '').split())
  # IPython is there only in notebooks.
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
    except KeyboardInterrupt:  # the process may not have got it
      process.terminate()
      raise
  display.clear_output(wait=True)
  print(''.join([progress, *kept]), end='')
  if process.returncode:
    last = kept[-1].strip() if kept else 'it printed nothing'
    raise UserError(f'{module} ended with {process.returncode}: {last}')


def summary(workdir: str) -> dict:
  """The numbers of a run that has been evaluated."""
  return files.read_json(os.path.join(workdir, 'summary.json'))


def side_by_side(workdir: str, count: int) -> Html:
  """The first completions of the test prompts, before and after."""
  rows = log.read_rows(os.path.join(workdir, 'completions.jsonl'))
  table = [('prompt', 'before', 'reward', 'after', 'reward')]
  for pair in page.side_by_side(rows, count):
    before, after = pair['before'], pair['after']
    row = [before['prompt']]
    for record in (before, after):
      row += [record['completion'], f'{record["reward"]:.2f}']
    table.append(row)
  return html_table(table)


def compare(runs: Mapping[str, str], keys: Mapping[str, str]) -> Html:
  """A table of some numbers of several runs.

  Args:
    runs: label of each -> its folder.
    keys: of their summaries -> label of the number.
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
      f'{escape(cell)}</{tag}>'
      for cell in row
    )
    return f'<tr>{cells}</tr>'

  head, *body = rows
  lines = [line(head, 'th'), *(line(row, 'td') for row in body)]
  return Html(f'<table>{"".join(lines)}</table>')
