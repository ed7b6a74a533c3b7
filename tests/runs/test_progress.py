"""The progress line, the compile counter, and tables for people."""

import os
import pathlib
import pty
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bond_jax.runs import progress, show


def test_compilations_counts_programs_by_name():
  @jax.jit
  def counted_program(x):
    return jnp.sin(x).sum()

  x, y = jnp.ones(3), jnp.ones(4)
  before = progress.compilations()
  counted_program(x)
  counted_program(x + 1)
  assert progress.compilations('counted_program') == 1
  counted_program(y)
  assert progress.compilations('counted_program') == 2
  assert progress.compilations('another') == 0
  assert progress.compilations() >= before + 2


# Each phase lasts until it has been seen.
SLOW_COMPILE = """
import sys, time
import jax, jax.numpy as jnp
from bond_jax.runs import log, progress

seen, show = [''], progress.Line._print
def print_(self, line, **kwargs):
  show(self, line, **kwargs)
  seen.append(line)
progress.Line._print = print_

def until(*texts):
  while not all(text in seen[-1] for text in texts):
    time.sleep(0.01)

with log.Writer(sys.argv[1], 'train', 3, show=['loss']) as writer:
  event = progress._COMPILE
  with writer.phase('update'):
    jax.monitoring.record_scalar(event, time.time(), fun_name='jit(step)')
    until('compiling')
    jax.monitoring.record_event_duration_secs(event, 1.0, fun_name='jit(step)')
  for step in (1, 2, 3):
    with writer.phase('update'):
      if sys.stderr.isatty():
        until(f'{step - 1}/3', 'update')
    writer.write(step, {'loss': step / 7})
"""


def environment():
  root = str(pathlib.Path(progress.__file__).parents[2])
  return os.environ | {'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu'}


def test_terminal_line_is_redrawn_in_place(tmp_path):
  main, side = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, '-c', SLOW_COMPILE, str(tmp_path)],
    stderr=side,
    env=environment() | {'COLUMNS': '200'},
  )
  os.close(side)
  seen = b''
  try:
    while piece := os.read(main, 4096):
      seen += piece
  except OSError:  # the terminal has closed
    pass
  assert process.wait() == 0
  lines = seen.decode().split('\r\x1b[K')
  for text in (r'compiling jit\(step\) \.\.\. \d:\d\d$',
               r'1/3 .*update \d:\d\d$', r' eta \d:\d\d'):  # fmt: skip
    assert any(re.search(text, line) for line in lines), text
  assert re.match(r'train    3/3  in \d:\d\d  loss 0.4286', lines[-1])
  assert seen.count(b'\n') == 1


def test_plain_output_is_lines(tmp_path):
  run = subprocess.run(
    [sys.executable, '-c', SLOW_COMPILE, str(tmp_path)],
    env=environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  lines = run.stderr.splitlines()
  assert '\x1b' not in run.stderr
  line = r'train    0/3  compiling jit\(step\) \.\.\. \d:\d\d'
  assert re.fullmatch(line, lines[0])
  assert lines[-1].startswith('train    3/3  in ')


@pytest.mark.parametrize(
  'value, expected',
  [
    (None, 'n/a'),
    (0.123456, '0.1235'),
    (12345.6, '12,346'),
    (4096, '4,096'),
    (True, 'True'),
    ([0.78, 0.82], '0.78 to 0.82'),
    (float('nan'), 'nan'),
    ('a', 'a'),
  ],
)
def test_text(value, expected):
  assert show.text(value) == expected


def test_clock():
  assert [show.clock(s) for s in (6.6, 754, 3723)] == [
    '0:07',
    '12:34',
    '1:02:03',
  ]


def test_table(capsys):
  show.table([('', 'before', 'after'), ('reward', 0.5, None)], 'Demo')
  assert capsys.readouterr().out == (
    '\nDemo\n-----------------------\n'
    '         before   after\n'
    '-----------------------\n'
    'reward      0.5     n/a\n'
    '-----------------------\n'
  )
