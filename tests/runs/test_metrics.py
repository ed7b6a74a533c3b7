"""Writers: rows, times, resumption, the progress line, the compile counter."""

import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from bond_jax.devices import hosts
from bond_jax.errors import UserError
from bond_jax.runs import metrics


def strip_times(rows):
  return [
    {k: v for k, v in row.items() if not k.startswith('seconds/')}
    for row in rows
  ]


def write(folder, steps, resumed_at=None):
  with metrics.Writer(str(folder), 'train', 6, resumed_at) as writer:
    for step in steps:
      with writer.phase('sample'):
        pass
      writer.write(step, {'loss': jnp.float32(1 / step), 'truncated': step})


def test_rows_are_scalars_with_times(tmp_path):
  with metrics.Writer(str(tmp_path), 'train', 2) as writer:
    for _ in range(2):
      with writer.phase('sample'):
        time.sleep(0.02)
    writer.write(1, {'loss': jnp.float32(0.5), 'bad': float('nan'), 'n': 3})
    with writer.phase('update'):
      pass
    writer.write(2, {'loss': 2.0})
  rows = metrics.read_rows(tmp_path / 'metrics.jsonl')
  assert rows[0].pop('seconds/sample') >= 0.04
  assert rows[0] == {'step': 1, 'loss': 0.5, 'bad': None, 'n': 3}
  # The times of a row are its own, not those of the rows before.
  assert set(rows[1]) == {'step', 'loss', 'seconds/update'}


def test_resumed_file_is_the_undisturbed_one(tmp_path):
  write(tmp_path / 'whole', range(1, 7))
  write(tmp_path / 'cut', range(1, 6))
  path = tmp_path / 'cut' / 'metrics.jsonl'
  with open(path, 'a') as f:
    f.write('{"step": 6, "lo')  # killed while it wrote
  write(tmp_path / 'cut', range(4, 7), resumed_at=3)
  rows = metrics.read_rows(path)
  whole = metrics.read_rows(tmp_path / 'whole' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert strip_times(rows) == strip_times(whole)


def test_fresh_start_drops_everything(tmp_path):
  write(tmp_path, range(1, 5))
  write(tmp_path, [1])
  rows = metrics.read_rows(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1]


def test_phase_seconds_sums_rows(tmp_path):
  rows = [
    {'step': 1, 'seconds/sample': 1.0, 'loss': 9.0},
    {'step': 2, 'seconds/sample': 2.0, 'seconds/update': 0.5},
  ]
  assert metrics.phase_seconds(rows) == {'sample': 3.0, 'update': 0.5}


def test_tensorboard_has_the_scalars(tmp_path):
  write(tmp_path, [1, 2])
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert b'loss' in events.read_bytes()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, 'first', lambda: False)
  write(tmp_path / 'none', [1, 2])
  assert not (tmp_path / 'none').exists()


def test_compilations_counts_programs_by_name():
  @jax.jit
  def counted_program(x):
    return jnp.sin(x).sum()

  x, y = jnp.ones(3), jnp.ones(4)
  before = metrics.compilations()
  counted_program(x)
  counted_program(x + 1)
  assert metrics.compilations('counted_program') == 1
  counted_program(y)
  assert metrics.compilations('counted_program') == 2
  assert metrics.compilations('another') == 0
  assert metrics.compilations() >= before + 2


# Each phase lasts until it has been seen.
SLOW_COMPILE = """
import sys, time
import jax, jax.numpy as jnp
from bond_jax.runs import metrics

seen, show = [''], metrics._Line._print
def print_(self, line, **kwargs):
  show(self, line, **kwargs)
  seen.append(line)
metrics._Line._print = print_

def until(*texts):
  while not all(text in seen[-1] for text in texts):
    time.sleep(0.01)

with metrics.Writer(sys.argv[1], 'train', 3, show=['loss']) as writer:
  event = metrics._COMPILE
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
  root = str(pathlib.Path(metrics.__file__).parents[2])
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
  assert metrics.text(value) == expected


def test_clock():
  assert [metrics.clock(s) for s in (6.6, 754, 3723)] == [
    '0:07',
    '12:34',
    '1:02:03',
  ]


def test_table(capsys):
  metrics.table([('', 'before', 'after'), ('reward', 0.5, None)], 'Demo')
  assert capsys.readouterr().out == (
    '\nDemo\n-----------------------\n'
    '         before   after\n'
    '-----------------------\n'
    'reward      0.5     n/a\n'
    '-----------------------\n'
  )


def test_rows_are_json(tmp_path):
  write(tmp_path, [1])
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    json.loads(line, parse_constant=pytest.fail)


def open_files():
  folder = '/proc/self/fd'
  paths = [os.path.join(folder, name) for name in os.listdir(folder)]
  return {os.path.basename(os.readlink(p)) for p in paths if os.path.islink(p)}


def test_rows_are_in_a_closed_file_when_a_checkpoint_is_saved(tmp_path):
  """As on a file system that stores a file when it is closed."""
  path = tmp_path / 'metrics.jsonl'
  with metrics.Writer(str(tmp_path), 'x', 2) as writer:
    writer.write(1, {'loss': 1.0})
    assert path.name in open_files()
    writer.sync()
    assert path.name not in open_files()
    assert len(metrics.read_rows(str(path))) == 1
    writer.write(2, {'loss': 0.5})
  assert [row['step'] for row in metrics.read_rows(str(path))] == [1, 2]


@pytest.mark.parametrize('bad', [b'{"step"', b'3', b'\xff', b'[' * 10**5, b''])
def test_a_line_that_is_no_row_is_named(tmp_path, bad):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"st')
  with pytest.raises(UserError, match='x.jsonl:2 is no JSON object'):
    metrics.read_rows(str(path))
  with pytest.raises(UserError, match='nowhere .*No such file'):
    metrics.read_rows(str(tmp_path / 'nowhere'))


def test_numbers_of_rows_that_are_none_are_left_out():
  rows = [{'seconds/a': 1.5}, {'seconds/a': None}, {'seconds/a': 'x'}]
  assert metrics.phase_seconds(rows) == {'a': 1.5}
  assert all(map(metrics.is_number, (0, -1.5, 10**300)))
  strange = (True, None, '1', [1], float('nan'), float('inf'), 10**400)
  assert not any(map(metrics.is_number, strange))


def test_rows_without_a_step_do_not_survive_a_resumption(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": "x"}\n{}\n{"step": 2}\n{"step": 3}\n')
  metrics._drop_after(str(path), 2)
  assert [row['step'] for row in metrics.read_rows(str(path))] == [1, 2]
