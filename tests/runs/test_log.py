"""The rows of a stage: times, resumption, TensorBoard, damaged lines."""

import json
import os
import time

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from bond_jax.devices import hosts
from bond_jax.errors import UserError
from bond_jax.runs import log


def strip_times(rows):
  return [
    {k: v for k, v in row.items() if not k.startswith('seconds/')}
    for row in rows
  ]


def write(folder, steps, resumed_at=None):
  with log.Writer(str(folder), 'train', 6, resumed_at) as writer:
    for step in steps:
      with writer.phase('sample'):
        pass
      writer.write(step, {'loss': jnp.float32(1 / step), 'truncated': step})


def test_rows_are_scalars_with_times(tmp_path):
  with log.Writer(str(tmp_path), 'train', 2) as writer:
    for _ in range(2):
      with writer.phase('sample'):
        time.sleep(0.02)
    writer.write(1, {'loss': jnp.float32(0.5), 'bad': float('nan'), 'n': 3})
    with writer.phase('update'):
      pass
    writer.write(2, {'loss': 2.0})
  rows = log.read_rows(tmp_path / 'metrics.jsonl')
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
  rows = log.read_rows(path)
  whole = log.read_rows(tmp_path / 'whole' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert strip_times(rows) == strip_times(whole)


def test_fresh_start_drops_everything(tmp_path):
  write(tmp_path, range(1, 5))
  write(tmp_path, [1])
  rows = log.read_rows(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1]


def test_phase_seconds_sums_rows(tmp_path):
  rows = [
    {'step': 1, 'seconds/sample': 1.0, 'loss': 9.0},
    {'step': 2, 'seconds/sample': 2.0, 'seconds/update': 0.5},
  ]
  assert log.phase_seconds(rows) == {'sample': 3.0, 'update': 0.5}


def events(folder):
  """The steps and scalars of TensorBoard's files, in their order."""
  found = []
  for path in sorted(folder.glob('tensorboard/events.out.tfevents.*')):
    data = path.read_bytes()
    while data:  # length, its checksum, an event, its checksum
      end = 12 + int.from_bytes(data[:8], 'little')
      event = Event.FromString(data[12:end])
      data = data[end + 4 :]
      found.append((event.step, {v.tag: v.simple_value for v in
                                 event.summary.value}))  # fmt: skip
  return found


def test_tensorboard_has_the_scalars(tmp_path):
  write(tmp_path, [1, 2])
  found = events(tmp_path)
  assert (1, {'loss': 1.0}) in found and (2, {'loss': 0.5}) in found
  assert (2, {'truncated': 2.0}) in found


def test_a_board_that_cannot_be_written_stops_no_run(tmp_path, capsys):
  def full(_):
    raise OSError(28, 'No space left on device')

  with log.Writer(str(tmp_path), 'train', 6) as writer:
    writer._board.write_event = full
    for step in (1, 2):
      writer.write(step, {'loss': 1.0})
      writer.sync()
  said = capsys.readouterr().err
  assert said.count('which sees no later step') == 1
  assert len(log.read_rows(tmp_path / 'metrics.jsonl')) == 2


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, 'first', lambda: False)
  write(tmp_path / 'none', [1, 2])
  assert not (tmp_path / 'none').exists()


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
  with log.Writer(str(tmp_path), 'x', 2) as writer:
    writer.write(1, {'loss': 1.0})
    assert path.name in open_files()
    writer.sync()
    assert path.name not in open_files()
    assert len(log.read_rows(str(path))) == 1
    writer.write(2, {'loss': 0.5})
  assert [row['step'] for row in log.read_rows(str(path))] == [1, 2]


@pytest.mark.parametrize('bad', [b'{"step"', b'3', b'\xff', b'[' * 10**5, b''])
def test_a_line_that_is_no_row_is_named(tmp_path, bad):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"st')
  with pytest.raises(UserError, match='x.jsonl:2 is no JSON object'):
    log.read_rows(str(path))
  with pytest.raises(UserError, match='nowhere .*No such file'):
    log.read_rows(str(tmp_path / 'nowhere'))


def test_numbers_of_rows_that_are_none_are_left_out():
  rows = [{'seconds/a': 1.5}, {'seconds/a': None}, {'seconds/a': 'x'}]
  assert log.phase_seconds(rows) == {'a': 1.5}
  assert all(map(log.is_number, (0, -1.5, 10**300)))
  strange = (True, None, '1', [1], float('nan'), float('inf'), 10**400)
  assert not any(map(log.is_number, strange))


def test_rows_without_a_step_do_not_survive_a_resumption(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": "x"}\n{}\n{"step": 2}\n{"step": 3}\n')
  log._drop_after(str(path), 2)
  assert [row['step'] for row in log.read_rows(str(path))] == [1, 2]
