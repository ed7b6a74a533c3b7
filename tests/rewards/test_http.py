"""Rewards that are asked over HTTP, of real servers on loopback."""

import contextlib
from http import server as http_server
import json
import socket
import subprocess
import sys
import threading
import time
import types

import ml_collections
import numpy as np
import pytest
import requests
import toy
import urllib3

from bond_jax.errors import UserError
from bond_jax.rewards import calling, http, make, serve, text
from bond_jax.runs.settings import defaults

PROMPTS = ['naïve 0', 'one', 'two', 'three', 'four', 'five', 'six']
COMPLETIONS = [[p[-1], p * 2] for p in PROMPTS]
CONTEXT = toy.context(COMPLETIONS)
VALUES = np.array([[i, i + 0.1] for i in range(7)])
BATCH = PROMPTS, COMPLETIONS, CONTEXT


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
  monkeypatch.setenv('NO_PROXY', '127.0.0.1')


@pytest.fixture
def waits(monkeypatch):
  """The seconds that were waited, without waiting."""
  found = []
  clock = types.SimpleNamespace(sleep=found.append, time=time.time)
  monkeypatch.setattr(urllib3.util.retry, 'time', clock)
  return found


@contextlib.contextmanager
def serving(act):
  """The URL of a server; act(handler, request, number) sees each request."""
  count = iter(range(10**6))

  class Handler(http_server.BaseHTTPRequestHandler):
    def do_POST(self):
      size = int(self.headers['Content-Length'])
      act(self, json.loads(self.rfile.read(size)), next(count))

    def log_message(self, *args):
      pass

  server = http_server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, args=[0.01]).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/score'
  finally:
    server.shutdown()
    server.server_close()


def send(handler, body, status=200, **headers):
  content = body if isinstance(body, bytes) else json.dumps(body).encode()
  handler.send_response(status)
  for name, value in {'Content-Length': len(content), **headers}.items():
    handler.send_header(name.replace('_', '-'), str(value))
  handler.end_headers()
  handler.wfile.write(content)


def well(handler, request):
  """What each prompt is worth, by its place in PROMPTS."""
  rows = [PROMPTS.index(p) for p in request['prompts']]
  send(handler, {'rewards': VALUES[rows].tolist()})


def ask(url, asked=BATCH, **args):
  return np.array(http.scorer(url, **args)(*asked))


def error(url, asked=BATCH, **args):
  """The line that a UserError says."""
  with pytest.raises(UserError) as e:
    ask(url, asked, **args)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_what_is_sent_is_all_that_a_reward_sees():
  seen = []

  def act(handler, request, number):
    seen.append((request, handler.headers['Content-Type']))
    send(handler, {'rewards': [[1, 2.5]]})

  context = CONTEXT._replace(
    rows=[{'id': np.int32(3), 'x': np.array([0.5, 1]), 'b': 'é'.encode()}],
    tokens=[[[1, 2], [3]]],
    finished=np.array([[True, False]]),
    turns=True,
  )
  with serving(act) as url:
    got = ask(url, (PROMPTS[:1], COMPLETIONS[:1], context))
  np.testing.assert_array_equal(got, [[1, 2.5]])
  sent = {
    'prompts': ['naïve 0'],
    'completions': [['0', 'naïve 0naïve 0']],
    'rows': [{'id': 3, 'x': [0.5, 1.0], 'b': 'é'}],
    'tokens': [[[1, 2], [3]]],
    'finished': [[True, False]],
    'turns': True,
  }
  assert seen == [(sent, 'application/json')]


@pytest.mark.parametrize('row', [{'x': {1, 2}}, {'x': float('nan')}])
def test_rows_that_json_does_not_have(row):
  context = CONTEXT._replace(rows=[{}] * 6 + [row])
  said = error('http://127.0.0.1:1/', (PROMPTS, COMPLETIONS, context), batch=2)
  assert 'cannot be sent as JSON' in said and "(prompt 6: 'six')" in said


def test_answers_are_put_in_the_order_of_the_prompts():
  """The first request is answered when the last one has been."""
  last = threading.Event()
  sizes = []

  def act(handler, request, number):
    sizes.append(len(request['prompts']))
    if request['prompts'][0] == PROMPTS[0]:
      assert last.wait(30)
    well(handler, request)
    if request['prompts'][-1] == PROMPTS[-1]:
      last.set()

  with serving(act) as url:
    np.testing.assert_array_equal(ask(url, batch=2, concurrency=2), VALUES)
  assert sorted(sizes) == [1, 2, 2, 2]


@pytest.mark.parametrize('most', [1, 3])
def test_requests_at_a_time(most):
  """As many as are allowed, counted by the server, and never more."""
  lock, now, found = threading.Lock(), set(), []
  all_here, too_many = threading.Barrier(most, timeout=30), threading.Event()

  def act(handler, request, number):
    with lock:
      now.add(number)
      found.append(len(now))
      if len(now) > most:
        too_many.set()
    if number < most:
      all_here.wait()
      too_many.wait(0.3)  # time for one more to come
    with lock:  # before it is answered: only then may the next one come
      now.remove(number)
    well(handler, request)

  with serving(act) as url:
    reward = http.scorer(url, batch=1, concurrency=most)
    for _ in range(3):
      np.testing.assert_array_equal(reward(*BATCH), VALUES)
  assert len(found) == 21 and max(found) == most


def test_a_judge_answers_wins():
  win = np.array([[[0.5, 0.75], [0.25, 0.5]]] * 7)
  win[3, 0, 1], win[3, 1, 0] = 0.125, 0.875

  def act(handler, request, number):
    rows = [PROMPTS.index(p) for p in request['prompts']]
    send(handler, {'wins': win[rows].tolist()})

  with serving(act) as url:
    got, _ = calling.call(http.scorer(url, batch=3), *BATCH)
  np.testing.assert_array_equal(got, win)


def refuse(handler, request, **how):
  send(handler, **{'body': b'no, not\nnow', **how})


def cut(handler, request):
  handler.connection.shutdown(socket.SHUT_RDWR)


def cut_in_the_middle(handler, request):
  handler.send_response(200)
  handler.send_header('Content-Length', '1000')
  handler.end_headers()
  handler.wfile.write(b'{"rewards": ')


def chunk_cut(handler, request):
  handler.wfile.write(
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"rew\r\n'
  )


def later(handler, request, **headers):
  refuse(handler, request, status=429, **headers)


@pytest.mark.parametrize(
  'fail, said',
  [
    (
      lambda *x: refuse(*x, status=500),
      "answered 500, 'no, not now' after 4 attempts",
    ),
    (later, "answered 429, 'no, not now' after 4 attempts"),
    (cut, 'gave no whole answer after 4 attempts: '),
  ],
)
def test_failures_that_pass(waits, fail, said):
  """Two of them are survived; at the fourth the run stops."""

  def twice(handler, request, number):
    fail(handler, request) if number < 2 else well(handler, request)

  with serving(twice) as url:
    np.testing.assert_array_equal(ask(url), VALUES)
  assert waits == [1]
  asked = []

  def always(handler, request, number):
    asked.append(number)
    fail(handler, request)

  with serving(always) as url:
    line = error(url)
  assert line.startswith(f'{url} {said}')
  assert line.endswith("(prompt 0: 'naïve 0').")
  assert len(asked) == 4 and waits == [1, 1, 2]


@pytest.mark.parametrize('fail', [cut_in_the_middle, chunk_cut])
def test_an_answer_that_is_cut_short(fail):
  with serving(lambda *x: fail(*x[:2])) as url:
    assert f'{url} gave no whole answer' in error(url)


def test_nobody_listens(waits):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{s.getsockname()[1]}/x?key=secret'
    line = error(url, retries=1)
  assert '/x gave no whole answer after 2 attempts: Connection refused' in line
  assert 'secret' not in line


def test_the_next_attempt_waits_as_long_as_it_is_told(waits):
  def act(handler, request, number):
    well(handler, request) if number else later(
      handler, request, Retry_After='7'
    )

  with serving(act) as url:
    np.testing.assert_array_equal(ask(url), VALUES)
  assert waits == [7.0]
  with serving(lambda *x: later(*x[:2], Retry_After='1000')) as url:
    error(url, retries=1)
  assert waits == [7.0, 60]


@pytest.mark.parametrize('status', [301, 400, 401, 404, 422])
def test_other_answers_are_final(waits, status):
  asked = []

  def act(handler, request, number):
    asked.append(number)
    send(handler, b'x' * 300, status, Location='http://127.0.0.1:1/')

  with serving(act) as url:
    line = error(url, batch=4, concurrency=1)
  x = repr('x' * 200)
  if status == 301:
    x = 'a redirect; give the address itself'
  assert line == f"{url} answered {status}, {x} (prompt 0: 'naïve 0')."
  assert waits == [] and asked == [0]  # the second batch was not even asked


@pytest.mark.parametrize(
  'body, said',
  [
    (b'<html>hi', "answered '<html>hi', expected JSON with one of rewards and"),
    (b'\xff\xfe', 'expected JSON'),
    (b'', "answered '', expected JSON"),
    ([[1, 2]], "answered '[[1, 2]]', expected JSON"),
    ('rewards', 'expected JSON'),
    ({'reward': [[1, 2]]}, 'expected JSON'),
    ({'rewards': [], 'wins': []}, 'expected JSON'),
    ({'rewards': [[1, 2]]}, 'a list of 3, one for each prompt'),
    ({'rewards': 7}, 'a list of 3'),
    ({'rewards': None}, 'a list of 3'),
  ],
)
def test_wrong_answers_are_one_line(waits, body, said):
  def act(handler, request, number):
    if request['prompts'][0] == 'three':
      send(handler, body)
    else:
      well(handler, request)

  with serving(act) as url:
    line = error(url, batch=3)
  assert line.startswith(url) and said in line
  assert line.endswith("(prompt 3: 'three').") and waits == []


@pytest.mark.parametrize(
  'row, said',
  [
    ([1], 'returned list, expected .* (prompt 0'),
    ([1, None], 'returned object, expected numbers'),
    ([1, 'a'], 'returned <U'),
    ([float('nan'), 1], "nan for completion 0.*prompt 4: 'four'"),
  ],
)
def test_wrong_numbers_are_named_by_scoring(row, said):
  def act(handler, request, number):
    rows = [PROMPTS.index(p) for p in request['prompts']]
    values = [row if i == 4 else [0, 1] for i in rows]
    send(handler, {'rewards': values})

  with serving(act) as url:
    said = f'reward {url} .*{said}'.replace('(', r'\(').replace(')', r'\)')
    with pytest.raises(UserError, match=said):
      calling.call(http.scorer(url, batch=3), *BATCH)


def test_rewards_and_wins_in_one_batch():
  def act(handler, request, number):
    key = 'wins' if 'six' in request['prompts'] else 'rewards'
    send(handler, {key: [[0, 1]] * len(request['prompts'])})

  with serving(act) as url:
    line = error(url, batch=3)
  assert 'answered rewards and wins to one batch' in line


def drops(begin, piece, end):
  """Takes 20 seconds over a good answer; nobody should wait for its end."""

  def act(handler, over):
    for part in [begin, *[piece] * 200]:
      handler.wfile.write(part)
      if over.wait(0.1):
        return
    handler.wfile.write(end)
    over.set()

  return act


FINE = json.dumps({'rewards': VALUES.tolist()}).encode()


@pytest.mark.parametrize('head', [b'', b'HTTP/1.1 200 OK\r\n\r\n'])
def test_a_slow_answer_is_given_up(waits, head):
  """Late as a whole, or in drops; and its connection is closed."""
  over, closed = threading.Event(), threading.Event()

  def slow(handler, request, number):
    try:
      drops(head, b' ' * bool(head), FINE)(handler, over)
    except ConnectionError:
      closed.set()

  with serving(slow) as url:
    line = error(url, timeout=0.3, retries=0)
    assert not over.is_set() and (not head or closed.wait(60))
    over.set()
  assert f'{url} gave no whole answer: ' in line


def test_headers_hold_secrets(monkeypatch, waits):
  monkeypatch.setenv('MY_KEY', 'sesame-42')
  monkeypatch.setenv('NOTHING', '')

  def act(handler, request, number):
    key = handler.headers['Authorization']
    if handler.headers['X-Who'] == 'you':
      well(handler, request)
    else:
      send(handler, f'bad key {key} ({key[7:]})'.encode(), 401)

  key = {'Authorization': 'Bearer ${MY_KEY}'}
  with serving(act) as url:
    got = ask(url, headers={**key, 'X-Who': '${NOTHING}you'})
    np.testing.assert_array_equal(got, VALUES)
    line = error(url, headers={**key, 'X': '-${NOTHING}'})
    assert "answered 401, 'bad key *** (***)'" in line
  monkeypatch.delenv('MY_KEY')
  line = 'header Authorization .* variable MY_KEY, which is not set'
  with pytest.raises(UserError, match=line):
    http.scorer(url, headers=key)
  for bad in ('sesame\n', 'ключ', '777\t'):
    monkeypatch.setenv('MY_KEY', bad)
    with pytest.raises(UserError) as e:
      http.scorer(url, headers=key)
    assert str(e.value).startswith('header Authorization of an HTTP reward')
    assert bad.strip() not in str(e.value)
  with pytest.raises(UserError, match='no name of an HTTP header'):
    http.scorer(url, headers={'a b': 'c'})


@pytest.mark.parametrize(
  'args, said',
  [
    (dict(url='localhost:80'), "'localhos'; expected http://"),
    (dict(url='ftp://a/b'), "'ftp://a/'; expected http://"),
    (dict(url='http://a:port/'), 'expected http://'),
    (dict(url='http:///x'), 'expected http://'),
    (dict(url='http://me:word@a/'), 'holds a user; .* give headers='),
    (dict(timeout=0), 'timeout 0, more than 0'),
    (dict(retries=-1), 'retries -1, at least 0'),
    (dict(concurrency=0), 'concurrency 0, at least 1'),
    (dict(batch=0), 'batch 0 .* at least 1'),
  ],
)
def test_bad_arguments(args, said):
  with pytest.raises(UserError, match=said):
    http.scorer(**{'url': 'http://127.0.0.1:1/', **args})


def test_a_config_names_the_variable_alone(monkeypatch):
  monkeypatch.setenv('MY_KEY', 'sesame-42')

  def act(handler, request, number):
    assert handler.headers['Authorization'] == 'Bearer sesame-42'
    well(handler, request)

  with serving(act) as url:
    section = defaults.reward(
      'bond_jax.rewards.http:scorer',
      url=url,
      headers={'Authorization': 'Bearer ${MY_KEY}'},
    )
    config = ml_collections.ConfigDict(dict(reference='', reward=section))
    reward = make.make_reward(config, config.reward, '')
    np.testing.assert_array_equal(reward(*BATCH), VALUES)
  assert 'sesame' not in config.to_json_best_effort()


# -- Our server


@contextlib.contextmanager
def served(reward):
  with serve.serve(reward, '127.0.0.1', 0) as server:
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    try:
      yield f'http://127.0.0.1:{server.server_port}/'
    finally:
      server.shutdown()


def test_a_reward_in_another_process():
  """VADER's scores from there are VADER's scores from here."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'bond_jax.rewards.serve', '--port=0',
     '--function=bond_jax.rewards.text:vader', '--args={}'],
    cwd=toy.ROOT, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    line = process.stdout.readline()
    assert line.startswith('bond_jax.rewards.text:vader answers at http://')
    remote = http.scorer(line.split()[-1], batch=2, concurrency=2)
    prompts = ['I love', 'it is', 'so — dull but']
    texts = [
      [' it!', ' not it'],
      [' GREAT', ' awful…'],
      [' sad', ' it is good'],
    ]
    for turns in (False, True):
      asked = prompts, texts, toy.context(texts, turns=turns)
      here, _ = calling.call(text.vader(), *asked)
      there, _ = calling.call(remote, *asked)
      np.testing.assert_array_equal(there, here)
      assert len(np.unique(here)) >= 4
  finally:
    process.terminate()
    process.wait(30)
    process.stdout.close()


def test_a_served_reward_sees_the_context():
  def seen(prompts, completions, context):
    return {
      'length': [[len(y) for y in ys] for ys in context.tokens],
      'rest': context.finished * 10 + context.turns * 100
      + np.array([[row['bonus']] * 2 for row in context.rows]),
    }  # fmt: skip

  context = CONTEXT._replace(
    rows=[{'bonus': 1000 * i} for i in range(7)],
    finished=np.array([[True, False]] * 7),
    turns=True,
  )
  asked = PROMPTS, COMPLETIONS, context
  here, _ = calling.call(seen, *asked)
  assert here[6].tolist() == [6111, 6106]
  with served(seen) as url:
    np.testing.assert_array_equal(ask(url, asked, batch=3), here)


def test_a_served_judge_and_a_bare_question():
  def longer(prompts, completions, context):
    assert context.rows == [{}] and context.finished.all() and not context.turns
    n = np.array([[len(y) for y in ys] for ys in completions])
    return (np.sign(n[:, :, None] - n[:, None, :]) + 1) / 2

  with served(longer) as url:
    asked = {'prompts': ['a'], 'completions': [['', 'bc']]}
    got = requests.post(url, json=asked, timeout=30).json()
  assert got == {'wins': [[[0.5, 0], [1, 0.5]]]}


@pytest.mark.parametrize(
  'asked',
  [
    b'', b'{', b'[]', b'{}', b'{"prompts": ["a"]}',
    {'prompts': [], 'completions': []},
    {'prompts': ['a'], 'completions': [[]]},
    {'prompts': ['a'], 'completions': [[1]]},
    {'prompts': [1], 'completions': [['a']]},
    {'prompts': ['a'], 'completions': [['a'], ['b']]},
    {'prompts': ['a', 'b'], 'completions': [['a'], ['b', 'c']]},
    {'prompts': ['a'], 'completions': [['a']], 'rows': []},
    {'prompts': ['a'], 'completions': [['a']], 'tokens': [[1, 2]]},
    {'prompts': ['a'], 'completions': [['a']], 'finished': [[True, False]]},
  ],
)  # fmt: skip
def test_requests_that_are_not_understood(asked):
  with served(lambda *x: [[1]]) as url:
    body = asked if isinstance(asked, bytes) else json.dumps(asked)
    answer = requests.post(url, data=body, timeout=30)
    assert answer.status_code == 400
    assert answer.json()['error']
    fine = {'prompts': ['a'], 'completions': [['a']]}
    assert requests.post(url, json=fine, timeout=30).json() == {
      'rewards': [[1]]
    }


def test_a_served_reward_that_fails(capfd, waits):
  def bad(prompts, completions, context):
    raise KeyError('my fault')

  with served(bad) as url:
    line = error(url, retries=1)
  assert 'answered 500' in line and 'raised KeyError' in line
  assert 'after 2 attempts' in line
  said = capfd.readouterr().err.splitlines()
  assert len(said) == 2 and said[0].startswith('error: reward bad raised')


def test_what_cannot_be_served():
  vader = 'bond_jax.rewards.text:vader'
  with pytest.raises(UserError, match='--args is not JSON'):
    serve.make(vader, '{')
  with pytest.raises(UserError, match='--args is no JSON object'):
    serve.make(vader, '[]')
  with pytest.raises(UserError, match='vader: .*unexpected keyword'):
    serve.make(vader, '{"a": 1}')
  reward = serve.make('bond_jax.rewards.text:matches', '{"pattern": "b"}')
  assert reward(['a'], [['b']], None).tolist() == [[1]]
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    s.listen()
    port = s.getsockname()[1]
    with pytest.raises(UserError, match=f'port {port}: Address already in use'):
      serve.serve(reward, '127.0.0.1', port)
