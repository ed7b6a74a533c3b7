"""The readers that are fuzzed, each with what surrounds it when it is used.

A target's folder is its own; the input becomes a file in it, a command line,
or the answer of a server on loopback.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import io
import json
import os
import pathlib
import socketserver
import sys
import tarfile
import threading

from absl import flags
import folders
from fuzzing import Refused, Target
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors.numpy import save
import test_aggregate
import test_tokenizer
import test_weights
import toy

from bond_jax.data import (
  examples,
  movie_reviews,
  preferences,
  sources,
  tokenizer,
)
from bond_jax.devices import sharding
from bond_jax.evaluation import evaluate, history, sweep
from bond_jax.rewards import calling, http, judge, ridge, serve
from bond_jax.runs import command, log
from bond_jax.runs.settings import configs
from bond_jax.training import checks
from bond_jax.weights import official
from bond_jax.weights.huggingface import adapter as hf_adapter
from bond_jax.weights.huggingface import config_json as hf_config
from bond_jax.weights.huggingface import reader

Path = pathlib.Path
MESSAGES = [{'role': 'user', 'content': 'Is it good?'}]
ROWS = [
  [{'text': 'a fine film', 'rating': 1.5}, {'text': 'dull', 'rating': -2}],
  [{'messages': MESSAGES, 'chosen': 'yes it is', 'rejected': 'no'}] * 2,
  [{'prompt': 'Say.', 'chosen': 'good', 'rejected': 'bad', 'margin': 0.5}],
  [{'chosen': [*MESSAGES, {'role': 'assistant', 'content': 'yes'}],
    'rejected': [*MESSAGES, {'role': 'assistant', 'content': 'no'}]}],
  [{'conversations': [{'from': 'human', 'value': 'Is it good?'}],
    'chosen': [{'from': 'gpt', 'value': 'yes'}],
    'rejected': [{'role': 'model', 'content': [{'text': 'no'}]}]}],
  [{'chosen': '\n\nHuman: Is it?\n\nAssistant: yes',
    'rejected': '\n\nHuman: Is it?\n\nAssistant: no'}],
]  # fmt: skip


def _lines(rows) -> bytes:
  return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def _write(path: Path, content: bytes) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return str(path)


# -- Configs and commands


def _config(folder: Path):
  """The toy's config; its reward is one that needs no file."""
  rows = _lines([{'text': f'a b c {i}', 'rating': i} for i in range(3)])
  for split in ('train', 'validation', 'test'):
    _write(folder / f'{split}.jsonl', rows)
  config = toy.get_config(str(folder))
  config.reward.function = 'bond_jax.rewards.text:matches'
  config.reward.args = dict(pattern='good')
  return config


def config_json(folder: Path) -> Target:
  seed = _config(folder).to_json_best_effort().encode()

  def read(content):
    _write(folder / 'run' / 'config.json', content)
    checks.check(configs.read_config(str(folder / 'run')))

  return Target('config.json', 'json', [seed], read, 0.5)


def version_json(folder: Path) -> Target:
  seed = b'{"bond_jax": "0.1.0"}'

  def read(content):
    _write(folder / configs.VERSION, content)
    configs.check_version(str(folder))

  return Target('version.json', 'json', [seed], read, 0.5)


def command_line(folder: Path) -> Target:
  """Flags as `execute` parses them, and the config that they give."""
  path = _write(
    folder / 'config.py',
    b'import ml_collections\n'
    b"def get_config(x='1'):\n"
    b'  c = ml_collections.ConfigDict(dict(seed=int(x), weights="", rate=0.5,'
    b' train=dict(steps=4, batch=8), alphas=(1.0, 2.0), scan=False))\n'
    b'  c.get_ref("weights")\n  return c\n',
  )
  _write(folder / 'w' / 'config.json', b'{"seed": 0}')
  given = command.run_flags()
  known = set(flags.FLAGS)
  seeds = [
    f'--config={path}\n--workdir={folder}/w\n--config.train.batch=3',
    f'--config={path}:2\n--workdir={folder}/w\n--config.alphas=(1.0,)',
    f'--config={path}\n--workdir\n{folder}/w\n--noconfig.scan\n'
    '--config.train.steps=8\n--config.weights=x',
    f'--workdir={folder}/w',
    f'--workdir={folder}/x\n--config={folder}/w/config.json\n--config.seed=3',
  ]

  def read(content):
    words = content.decode('utf-8', 'surrogateescape').split('\n')
    said, before = io.StringIO(), sys.argv
    sys.argv = ['fuzz', *words]  # where ml_collections looks for overrides
    try:
      with contextlib.redirect_stderr(said):
        command._parse(sys.argv, 'Fuzz.')
      given()
    except SystemExit as e:
      if e.code not in (0, 1):  # of --help, which is no mistake
        raise Refused(said.getvalue().removesuffix('\n')) from e
    finally:
      sys.argv = before
      flags.FLAGS.unparse_flags()
      for name in set(flags.FLAGS) - known:
        flags.FLAGS.__delattr__(name)

  return Target('command line', 'words', [s.encode() for s in seeds], read)


# -- Data


@functools.cache
def _turns() -> tokenizer.Tokenizer:
  return test_tokenizer.with_turns()


def _use(rows) -> None:
  """What training and the reward model do with rows."""
  words = _turns()
  for i in range(min(len(rows), 4)):
    row = rows[i]
    preferences.texts(row)
    if 'text' in row:
      examples.encoder('text', words, length=9, system=True)(row)
    if 'text' in row or 'messages' in row:
      examples.encoder('turn', words, length=9, system=True)(row)
  preferences.read(
      rows, 'train', words, turns='messages' in rows[0], system=True, length=40,
      pair=functools.partial(
        preferences.pairs_of, min_gap=0.1, partners=1, seed=0
      ),
  )  # fmt: skip


def jsonl(folder: Path) -> Target:
  def read(content):
    path = _write(folder / 'x.jsonl', content)
    _use(sources.source(path, 'train', ''))

  seeds = [*map(_lines, ROWS), _lines([ROWS[0] + ROWS[1]])]  # an array, too
  return Target('rows .jsonl', 'lines', seeds, read)


def parquet(folder: Path) -> Target:
  def content_of(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()

  def read(content):
    path = _write(folder / 'x.parquet', content)
    _use(sources.source(path, 'train', ''))

  return Target('rows .parquet', 'bytes', [*map(content_of, ROWS)], read)


def columns(folder: Path) -> Target:
  """Whole Parquet files, of values that no reader of ours expects."""

  def read(content):
    try:
      table = pa.Table.from_pylist([json.loads(x) for x in content.split(b'\n')
                                    if x.strip()])  # fmt: skip
      out = io.BytesIO()
      pyarrow.parquet.write_table(table, out)
    except Exception:  # there is no such table, so nobody can have it
      return
    path = _write(folder / 'x.parquet', out.getvalue())
    _use(sources.source(path, 'train', '', fields=None))

  return Target('columns .parquet', 'lines', [_lines(r) for r in ROWS], read)


def settings_of_data(folder: Path) -> Target:
  """data.name, fields and splits, of rows that are well."""
  _write(folder / 'x.jsonl', _lines(ROWS[0]))
  rest = {'validation': 'a[1:]', 'test': 'a[-1:]'}
  splits = {'train': 'a[:50%]', **rest}
  mixed = dict(name=f'{folder}/x.jsonl', weight=2, splits=splits)
  seeds = [
    dict(name='x.jsonl', fields={'text': 'text'},
         splits={'train': 'a[:1]', **rest}),
    dict(name='x.jsonl', fields={}, splits=splits, bad_rows='skip'),
    dict(name='x.jsonl', mix={'a': mixed}),
  ]  # fmt: skip

  def read(content):
    try:
      given = json.loads(content)
    except (ValueError, RecursionError):
      given = None
    config = _config(folder)
    if isinstance(given, dict) and given.get('name') == 'x.jsonl':
      given['name'] = f'{folder}/x.jsonl'
    raw = json.loads(config.to_json_best_effort())
    raw['data'] = raw['data'] | given if isinstance(given, dict) else given
    _write(folder / 'run' / 'config.json', json.dumps(raw).encode())
    checks.check(configs.read_config(str(folder / 'run')))

  seeds = [json.dumps(seed).encode() for seed in seeds]
  return Target('data settings', 'json', seeds, read, 0.5)


def archive(folder: Path) -> Target:
  def tar(name, content):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as f:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      f.addfile(info, io.BytesIO(content))
    return out.getvalue()

  rows = b'1\t0.5\tfine\n2\t-1.0\tdull\n'
  seed = tar(movie_reviews._INNER, tar(movie_reviews._MEMBER, rows))

  def read(content):
    path = _write(folder / 'x.tar.gz', content)
    list(movie_reviews.parse(movie_reviews.read_member(path)))

  return Target('movie reviews .tar.gz', 'bytes', [seed], read)


def ratings(folder: Path) -> Target:
  del folder
  read = lambda content: list(movie_reviews.parse(content))
  rows = b'1\t0.5\tfine\n2\t-1.0\tdull\n'
  return Target('movie reviews rows', 'bytes', [rows], read)


# -- Vocabularies and weights


def vocabulary(folder: Path) -> Target:
  seed = _turns().processor.serialized_model_proto()

  def read(content):
    words = tokenizer.load(_write(folder / 'tokenizer.model', content))
    ids = words.encode('Is it good? é')
    words.decode(ids)

  return Target('tokenizer.model', 'bytes', [seed], read)


def tokenizer_json(folder: Path) -> Target:
  words = _turns()
  _write(folder / tokenizer.FILE, words.processor.serialized_model_proto())
  rows = [{'id': i, 'content': words.processor.id_to_piece(i)} for i in (4, 5)]
  seed = json.dumps({'added_tokens': rows, 'model': {}}).encode()

  def read(content):
    _write(folder / 'tokenizer.json', content)
    tokenizer.load(str(folder))

  return Target('tokenizer.json', 'json', [seed], read)


def ridge_model(folder: Path) -> Target:
  processor = _turns().processor
  out = io.BytesIO()
  np.savez(
      out, keys=np.arange(3, 9), scale=np.ones(6), weight=np.ones(6),
      intercept=0.5, order=2, base=121,
      tokenizer=np.frombuffer(processor.serialized_model_proto(), np.uint8),
  )  # fmt: skip

  def read(content):
    path = _write(folder / 'model.npz', content)
    calling.call(
      ridge.ridge(path), ['a'], [['b', 'c']], toy.context([['b', 'c']])
    )

  return Target('reward model.npz', 'bytes', [out.getvalue()], read, 0.5)


def _like(name: str):
  mesh = sharding.make_mesh(1, 1)
  return folders.like_of(folders.CONFIGS[name], mesh)


def safetensors(folder: Path) -> Target:
  config, _ = folders.exported('gemma3', folder / 'model')
  path = folder / 'model' / reader.SINGLE
  seed = path.read_bytes()
  size = int.from_bytes(seed[:8], 'little')
  header, body = seed[8 : 8 + size], seed[8 + size :]

  def read(content):
    header = len(content).to_bytes(8, 'little') + content
    path.write_bytes(header + body)
    reader.load(str(folder / 'model'), config, _like('gemma3'))

  return Target('safetensors header', 'json', [header], read, 0.5)


def safetensors_bytes(folder: Path) -> Target:
  small = save({'a': np.ones((2, 3), np.float32), 'b': np.ones(4, np.int8)})
  # Headers that promise 10^18 bytes, of themselves and of a tensor.
  seeds = [small, (10**18).to_bytes(8, 'little') + small[8:]]
  seeds.append(small.replace(b'[2,3]', b'[1000000000,1000000000]'))

  def read(content):
    reader.headers(_write(folder / 'x.safetensors', content))

  return Target('safetensors bytes', 'bytes', seeds, read)


def hf_json(folder: Path) -> Target:
  seeds = []
  for name in ('gemma3', 'gemma2', 'gemma1_multi_query'):
    folders.exported(name, folder / name)
    seeds.append((folder / name / 'config.json').read_bytes())
  wrapped = json.loads(seeds[0]) | {
    'architectures': ['Gemma3ForConditionalGeneration'],
    'model_type': 'gemma3',
  }
  wrapped['text_config'] = json.loads(seeds[0])

  def read(content):
    _write(folder / 'x' / 'config.json', content)
    found = folders.config_of(folder / 'x')
    hf_config.known_as(found)

  seeds.append(json.dumps(wrapped).encode())
  return Target('HF config.json', 'json', seeds, read)


def hf_index(folder: Path) -> Target:
  path = folder / 'model'
  config, _ = folders.exported('gemma3', path, shard_bytes=6000)
  seed = (path / reader.INDEX).read_bytes()

  def read(content):
    (path / reader.INDEX).write_bytes(content)
    reader.load(str(path), config, _like('gemma3'))

  return Target('HF index', 'json', [seed], read, 0.5)


def adapter(folder: Path) -> Target:
  import test_hf_adapter as t

  config = t.sizes_of('gemma3')
  hf_adapter.export_adapter(
    t.adapters_of(config), config, str(folder / 'a'), base='x'
  )
  like = sharding.tree_structs(t.shapes_of(config), sharding.make_mesh(1, 1))
  seed = (folder / 'a' / hf_adapter.CONFIG).read_bytes()

  def read(content):
    (folder / 'a' / hf_adapter.CONFIG).write_bytes(content)
    hf_adapter.load_adapter(str(folder / 'a'), config, like)

  return Target('adapter_config.json', 'json', [seed], read, 0.3)


def _official(folder: Path):
  config, params = folders.params_of('gemma1_multi_query')
  path = folder / 'official'
  tree = test_weights.official(config, params, 'flat')
  test_weights.write(tree, path)
  like = _like('gemma1_multi_query')
  return path, lambda: official.load(str(path), config, like)


def orbax_metadata(folder: Path) -> Target:
  path, load = _official(folder)
  seed = (path / '_METADATA').read_bytes()

  def read(content):
    (path / '_METADATA').write_bytes(content)
    load()

  return Target('Orbax _METADATA', 'json', [seed], read, 0.15)


def orbax_manifest(folder: Path) -> Target:
  path, load = _official(folder)
  file = path / 'manifest.ocdbt'

  def read(content):
    file.write_bytes(content)
    load()

  seed = file.read_bytes()
  return Target('Orbax manifest', 'bytes', [seed], read, 0.15)


# -- Rewards

PROMPTS, COMPLETIONS = ['p', 'q'], [['a', 'b'], ['c', 'd']]
ASKED = PROMPTS, COMPLETIONS, toy.context(COMPLETIONS)
REPLIES = [
  {'rewards': [[0.5, 1], [-2, 3e5]]},
  {'wins': [[[0.5, 0.2], [0.8, 0.5]], [[0.5, 1], [0, 0.5]]]},
]


def read_request(file) -> None:
  """All of it: a socket with unread bytes is reset, not closed."""
  size = 0
  while (line := file.readline()).strip():
    name, _, value = line.partition(b':')
    size = int(value) if name.lower() == b'content-length' else size
  file.read(size)


class _Raw(socketserver.StreamRequestHandler):
  """Answers each request with the bytes that the server holds, and hangs up."""

  def handle(self):
    read_request(self.rfile)
    with contextlib.suppress(OSError):
      self.wfile.write(self.server.answer)


def _server(timeout: float = 5.0):
  """A server, and the reward that asks it."""
  os.environ['NO_PROXY'] = '127.0.0.1'
  server = socketserver.ThreadingTCPServer(('127.0.0.1', 0), _Raw)
  server.daemon_threads = True
  threading.Thread(
    target=server.serve_forever, args=[0.05], daemon=True
  ).start()
  url = f'http://127.0.0.1:{server.server_address[1]}/'
  return server, http.scorer(url, timeout=timeout, retries=0, concurrency=1)


def reply_body(folder: Path) -> Target:
  del folder
  server, reward = _server()

  def read(content):
    head = b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % len(content)
    server.answer = head + content
    calling.call(reward, *ASKED)

  seeds = [json.dumps(x).encode() for x in REPLIES]
  return Target('HTTP reply, JSON', 'json', seeds, read)


def reply_raw(folder: Path) -> Target:
  del folder
  server, reward = _server()
  body = json.dumps(REPLIES[0]).encode()
  heads = (
    b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n' % len(body),
    b'HTTP/1.0 200 OK\r\n',
    b'HTTP/1.1 429 Slow\r\nRetry-After: 3\r\nContent-Length: 0\r\n',
    b'HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n',
    b'HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n',
  )
  chunked = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
  chunked += b'%x\r\n%s\r\n0\r\n\r\n' % (len(body), body)

  def read(content):
    server.answer = content
    calling.call(reward, *ASKED)

  seeds = [*(head + b'\r\n' + body for head in heads), chunked]
  return Target('HTTP reply, bytes', 'bytes', seeds, read)


def judge_reply(folder: Path) -> Target:
  del folder
  seeds = [b'[0.5, 0.2, 0.1, 1]', b'[0, 1, 0.25, 0.75]']

  def read(content):
    try:
      said = json.loads(content)
    except (ValueError, RecursionError):
      return  # what a judge's function returns is no JSON of ours
    asked = judge.all_at_once(lambda pairs: said)
    calling.call(asked, *ASKED)

  return Target('judge replies', 'json', seeds, read)


def reward_values(folder: Path) -> Target:
  del folder
  seeds = [json.dumps(*x.values()).encode() for x in REPLIES]
  seeds.append(b'{"a": [[1, 2], [3, 4]], "b": [[0.5, 1], [2, 2]]}')

  def read(content):
    try:
      said = json.loads(content)
    except (ValueError, RecursionError):
      return
    calling.call(lambda *asked: said, *ASKED)

  return Target('reward values', 'json', seeds, read)


def served_request(folder: Path) -> Target:
  """What `rewards.serve` is asked: it answers 400, and goes on."""
  del folder
  seed = dict(
    prompts=PROMPTS, completions=COMPLETIONS, rows=[{}, {}], turns=False,
    tokens=[[[1], [2]]] * 2, finished=[[True] * 2] * 2,
  )  # fmt: skip

  def read(content):
    try:
      serve.read(content)
    except ValueError as e:  # answered as a line
      raise Refused(' '.join(f'{e}'.split())) from e

  return Target('served request', 'json', [json.dumps(seed).encode()], read)


# -- What runs have left


EVALUATION = {
  'checkpoint': 6, 'against': 'reference', 'kl': 1.2, 'kl_stderr': 0.1,
  'win_rate': 0.7, 'win_rate_interval': [0.6, 0.8], 'reward_policy': 0.4,
  'effective_n': 3.1, 'frontier_efficiency': 0.8, 'frontier_reason': None,
}  # fmt: skip
ROW = {
  'step': 3, 'kl/reference': 0.4, 'win_rate/reference': 0.6,
  'reward/validation': 0.1, 'seconds/sample': 0.2, 'tokens/decoded': 64,
}  # fmt: skip
LEFT = {
  'summary.json': EVALUATION,
  'evaluate/step_3/summary.json': EVALUATION | {'checkpoint': 3},
  'sft/summary.json': {
    'parameters': 99, 'validation_loss': 3.2, 'phase_seconds': {'fit': 2.5},
  },
  'reward/summary.json': {'seconds': 1.5, 'accuracy': 0.8, 'test_pearson': 0.5},
  'train/summary.json': {
    'steps': 6, 'anchor_drift': 0.3, 'signal_fires': 0.9,
    'compilations_after_first_step': 0,
  },
}  # fmt: skip


def _run(folder: Path) -> Path:
  """A run that has finished: what evaluate and --sweep read of it."""
  run = folder / 'runs' / 'a'
  config = toy.get_config(str(folder))
  _write(run / 'config.json', config.to_json_best_effort().encode())
  for name, value in LEFT.items():
    _write(run / name, json.dumps(value).encode())
  rows = [ROW, ROW | {'step': 6, 'kl/reference': 1.1}, {'step': 7}]
  _write(run / 'train' / 'metrics.jsonl', _lines(rows))
  _write(run / 'evaluate' / 'metrics.jsonl', _lines([ROW] * 3))
  return run


def _of_run(folder: Path, name: str, file: str, form: str, share: float, read):
  run = _run(folder)
  seed = (run / file).read_bytes()

  def one(content):
    (run / file).write_bytes(content)
    read(run)

  return Target(name, form, [seed], one, share)


def _told(run: Path) -> None:
  runs = {str(run): sweep.checkpoints(str(run))}
  if len(runs[str(run)].step):
    sweep.table(sweep.summarise(runs))


def sweep_metrics(folder: Path) -> Target:
  return _of_run(
    folder, '--sweep metrics.jsonl', 'train/metrics.jsonl', 'lines', 1.0, _told
  )


def sweep_summary(folder: Path) -> Target:
  return _of_run(
    folder, '--sweep summary.json', 'summary.json', 'json', 0.5, _told
  )


def sweep_whole(folder: Path) -> Target:
  """With its figure, which takes a second."""
  read = lambda run: sweep.sweep(f'{run.parent}/*', str(folder / 'out'))
  return _of_run(folder, '--sweep, drawn', 'summary.json', 'json', 0.03, read)


def completions_jsonl(folder: Path) -> Target:
  def read(content):
    path = _write(folder / 'completions.jsonl', content)
    evaluate.measure(str(folder), log.read_rows(path))

  seed = _lines(test_aggregate.best_of_n_records(2, prompts=3, size=2))
  return Target('completions.jsonl', 'lines', [seed], read, 0.2)


def stages(folder: Path, stage: str, file: str, form: str) -> Target:
  config = toy.get_config(str(folder))

  def read(run):
    own = log.read_rows(str(run / 'evaluate' / 'metrics.jsonl'))
    history.throughput(own)
    history.history(config, str(run), own)

  return _of_run(folder, f'{stage}/{file}', f'{stage}/{file}', form, 0.3, read)


_STAGES = (
  ('sft', 'summary.json', 'json'),
  ('reward', 'summary.json', 'json'),
  ('train', 'summary.json', 'json'),
  ('train', 'metrics.jsonl', 'lines'),
  ('evaluate', 'metrics.jsonl', 'lines'),
)

TARGETS: dict[str, Callable[[Path], Target]] = {
  f.__name__: f
  for f in (
    config_json, version_json, command_line, jsonl, parquet, columns,
    settings_of_data, archive, ratings, vocabulary, tokenizer_json,
    ridge_model, safetensors, safetensors_bytes, hf_json, hf_index, adapter,
    orbax_metadata, orbax_manifest, reply_body, reply_raw, judge_reply,
    reward_values, served_request, sweep_metrics, sweep_summary, sweep_whole,
    completions_jsonl,
  )
}  # fmt: skip
TARGETS |= {
  f'{stage}_{file.replace(".", "_")}': functools.partial(
    stages, stage=stage, file=file, form=form
  )
  for stage, file, form in _STAGES
}
