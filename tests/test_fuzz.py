"""A few inputs of every fuzzed reader; `make fuzz` gives them thousands."""

import contextlib
import os
import pathlib
import random
import subprocess
import sys

import fuzz_targets
import fuzzing
import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest
import toy

from bond_jax.errors import UserError

SLOW = {'sweep_whole', 'orbax_metadata', 'orbax_manifest', 'safetensors',
        'hf_index', 'adapter', 'completions_jsonl', 'parquet'}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_cache_of_programs():
  """A reader that is given strange input writes nothing, programs neither."""
  for used in False, True:
    jax.config.update('jax_enable_compilation_cache', used)
    compilation_cache.reset_cache()
    if not used:
      yield


@pytest.fixture(scope='module')
def watch(tmp_path_factory):
  """One for all: a hook stays for the life of the process."""
  fuzzing.LIMIT = 60  # of seconds; this machine may be busy
  return fuzzing.Watch(str(tmp_path_factory.getbasetemp()))


@pytest.mark.long
@pytest.mark.parametrize('name', sorted(fuzz_targets.TARGETS))
def test_a_reader_takes_an_input_or_refuses_it(name, tmp_path, watch):
  target = fuzz_targets.TARGETS[name](tmp_path)
  assert fuzzing.judge(target, target.seeds[0], watch) == ('accepted', '')

  @hypothesis.seed(7)
  @hypothesis.settings(
    max_examples=3 if name in SLOW else 12, deadline=None, database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )  # fmt: skip
  @hypothesis.given(fuzzing.inputs(target))
  def run(data):
    outcome = fuzzing.judge(target, data, watch)
    assert outcome.kind in ('accepted', 'refused'), (outcome, data)

  run()


# -- The judge itself


def fails(read, watch):
  target = fuzzing.Target('x', 'bytes', [b''], read)
  return fuzzing.judge(target, b'', watch)


def test_a_traceback_is_seen_with_its_place(watch):
  outcome = fails(lambda _: {}['a'], watch)
  assert outcome.kind == 'traceback' and 'test_fuzz.py:' in outcome.said


def test_a_refusal_of_two_lines_is_seen(watch):
  def read(_):
    raise fuzzing.Refused('one\ntwo')

  assert fails(read, watch).kind == 'traceback'


def test_a_hang_is_ended(watch, monkeypatch):
  monkeypatch.setattr(fuzzing, 'LIMIT', 0.2)

  def read(_):
    while True:
      pass

  assert fails(read, watch).kind == 'hang'


@pytest.mark.parametrize(
  'do',
  [
    lambda path: pathlib.Path(path).write_text('x'),
    lambda path: os.open(path, os.O_RDWR),
    os.mkdir,
    os.remove,
    lambda path: os.rename(path, f'{path}2'),
    lambda path: subprocess.run([sys.executable, '--version']),
  ],
)
def test_a_write_outside_is_seen(do, watch):
  path = '/proc/self/nowhere'  # nobody can write there, which is no matter

  def read(_):
    with contextlib.suppress(OSError):
      do(path)

  assert fails(read, watch).kind == 'outside'


def test_reading_outside_and_writing_inside_are_fine(watch, tmp_path):
  def read(_):
    pathlib.Path(toy.ROOT, 'README.md').read_bytes()
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'y').write_text('z')

  assert fails(read, watch) == ('accepted', '')


@pytest.mark.parametrize('form', ['bytes', 'json', 'lines', 'words'])
def test_inputs_are_the_same_for_the_same_seed(form):
  seed = b'--a=1\n--b=2' if form == 'words' else b'{"a": [1, {"b": "c"}]}'
  target = fuzzing.Target('x', form, [seed], None)
  draw = lambda s: [fuzzing.mutated(target, r) for r in [random.Random(s)] * 30]
  assert draw(1) == draw(1) != draw(2)
  assert seed not in draw(1)[:3]


# -- What a UserError says stays one line


@hypothesis.given(st.text())
@hypothesis.settings(max_examples=200, deadline=None, database=None)
def test_a_user_error_is_one_line(text):
  said = str(UserError(f'a{text}b'))
  if '\n  ' not in text:
    assert len(said.splitlines()) == 1
  assert said.encode('utf-8') and '\x1b' not in said


def test_a_user_error_says_what_it_was_told():
  assert str(UserError('naïve: "a"; 1')) == 'naïve: "a"; 1'
  assert str(UserError('rows:\n  a: 1\n  b: 2')) == 'rows:\n  a: 1\n  b: 2'
  assert str(UserError('a\nb\x1b[2J\ud800')) == r'a\nb\x1b[2J\ud800'
  long = str(UserError('a' * 10**6 + 'z'))
  assert len(long) < 5000 and long.startswith('aa') and long.endswith('az')
