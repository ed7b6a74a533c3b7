"""A server of any reward over HTTP, so that it can run on another machine.

    python -m bond_jax.rewards.serve --function=bond_jax.rewards.text:vader

`--args` are the function's arguments as JSON. `--host=0.0.0.0` lets other
machines ask, all of them, without a password and unencrypted. The schema is in
docs/rewards.md.
"""

from collections.abc import Callable
from http import server as http_server
import json
import sys
import threading
from typing import Any

from absl import flags
import numpy as np

from bond_jax.errors import UserError
from bond_jax.rewards import calling
from bond_jax.rewards import make as make_lib
from bond_jax.runs import command
from bond_jax.runs.settings import fields
from bond_jax.types import Context, PreferenceFn, RewardFn

MOST = 64 * 2**20  # bytes of a request


class Server(http_server.ThreadingHTTPServer):
  request_queue_size = 128  # connections that wait; http.server has 5


def serve(reward: RewardFn | PreferenceFn, host: str, port: int) -> Server:
  """A server that answers with a reward once it is told to serve_forever.

  The reward is called for one request at a time, as in training. A request
  that is not understood is answered 400, a reward that fails 500, both with
  {"error": line}.
  """
  turn = threading.Lock()

  class Handler(http_server.BaseHTTPRequestHandler):
    timeout = 60  # seconds in which nothing comes

    def do_POST(self):
      try:
        size = int(self.headers['Content-Length'])
        if not 0 <= size <= MOST:
          self.close_connection = True
          raise ValueError(f'a request has 0 to {MOST} bytes, got {size}')
        texts = read(self.rfile.read(size))
      except (TypeError, ValueError) as e:  # also of a length that is no number
        return self._send(400, {'error': ' '.join(f'{e}'.split())})
      try:
        with turn:
          value, _ = calling.call(reward, *texts)
      except UserError as e:
        print(f'error: {e}', file=sys.stderr, flush=True)
        return self._send(500, {'error': str(e)})
      key = 'wins' if value.ndim == 3 else 'rewards'
      return self._send(200, {key: value.tolist()})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
      content = json.dumps(answer, ensure_ascii=False).encode()
      try:
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)
      except ConnectionError:
        pass  # the client has hung up

    def log_message(self, *args):
      del args

  try:
    return Server((host, port), Handler)
  except OSError as e:
    raise UserError(
      f'cannot serve at {host}, port {port}: {e.strerror}; give another --host'
      ' or --port (0 = any that is free).'
    ) from e


def read(body: bytes) -> tuple[list[str], list[list[str]], Context]:
  """The arguments of a reward; a ValueError for a body that has none."""
  try:
    given = json.loads(body)
  except RecursionError as e:
    raise ValueError('expected JSON, got brackets without an end') from e
  if not isinstance(given, dict) or 'prompts' not in given:
    raise ValueError('expected a JSON object with "prompts", "completions"')
  prompts, completions = given['prompts'], given.get('completions')
  _check('prompts', prompts, lambda x: isinstance(x, str))
  b = len(prompts)
  _check('completions', completions, lambda x: isinstance(x, list) and x, b)
  k = len(completions[0])
  for ys in completions:
    _check('completions', ys, lambda x: isinstance(x, str), k)
  rows = given.get('rows', [{}] * b)
  tokens = given.get('tokens', [[[]] * k] * b)
  finished = given.get('finished', [[True] * k] * b)
  _check('rows', rows, lambda x: isinstance(x, dict), b)
  for name, value in (('tokens', tokens), ('finished', finished)):
    _check(name, value, lambda x: isinstance(x, list) and len(x) == k, b)
  turns = bool(given.get('turns', False))
  context = Context(rows, tokens, np.array(finished, bool), turns)
  return prompts, completions, context


def _check(
  name: str, values: Any, good: Callable[[Any], Any], count: int | None = None
) -> None:
  if (
    not isinstance(values, list)
    or not values
    or count not in (None, len(values))
    or not all(map(good, values))
  ):
    raise ValueError(
      f'"{name}" is not as it must be: B prompts, K strings for each in'
      ' "completions", and B of everything else'
    )


def make(function: str, args: str) -> RewardFn | PreferenceFn:
  """The reward `module:function`, called with arguments that are JSON."""
  try:
    given = json.loads(args)
  except ValueError as e:
    raise UserError(f'--args is not JSON ({e}), got {args!r}.') from e
  if not isinstance(given, dict):
    raise UserError(f'--args is no JSON object, got {args!r}.')
  fields.check_arguments(
    f'reward {function}', make_lib.load(function), given, ' See --args.'
  )
  return make_lib.reward({'': make_lib.Part(function, given)})


def _run() -> None:
  function = flags.DEFINE_string(
    'function', None, 'module:function, which makes the reward.', required=True
  )
  args = flags.DEFINE_string('args', '{}', 'Its arguments, a JSON object.')
  host = flags.DEFINE_string('host', '127.0.0.1', 'The address to listen at.')
  port = flags.DEFINE_integer(
    'port', 8000, 'The port; 0 = any that is free.', 0, 65_535
  )

  def main():
    reward = make(function.value, args.value)
    with serve(reward, host.value, port.value) as server:
      where = f'http://{host.value}:{server.server_port}/'
      print(f'{function.value} answers at {where}', flush=True)
      server.serve_forever()

  command.execute(main, __doc__)


if __name__ == '__main__':
  _run()
