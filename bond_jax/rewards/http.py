"""A reward that runs elsewhere and is asked over HTTP.

What is sent is a JSON object: 'prompts' [B], 'completions' [B][K], and the
fields of `Context` by their names. What comes back is {"rewards": [B][K]}, or
{"wins": [B][K][K]} of a judge. docs/rewards.md says it in full;
`bond_jax.rewards.serve` is a server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent import futures
import datetime
from email import utils
import functools
import json
import logging
import os
import re
import threading
import time
from typing import Any, NamedTuple
from urllib import parse

import numpy as np
import requests
import urllib3

from bond_jax.errors import UserError
from bond_jax.rewards import calling
from bond_jax.rewards.answers import quote
from bond_jax.types import Context, PreferenceFn, RewardFn

# Of headers that are none it says so with a traceback.
logging.getLogger('urllib3.connection').setLevel(logging.ERROR)

KEYS = ('rewards', 'wins')  # of an answer, one of them

_MOST = 64 * 2**20  # bytes of an answer, unpacked
_LONGEST_WAIT = 60.0  # seconds; a server that asks for more is given up
_VARIABLE = re.compile(r'\$\{(\w+)\}')
_HEADER = re.compile(r'[!-~]([ -~]*[!-~])?')


class Server(NamedTuple):
  """Whom to ask, and how."""

  url: str
  name: str  # the URL without its query, which may hold a key: for messages
  headers: dict[str, str]
  hidden: list[str]  # what no message may repeat
  timeout: float
  retries: int


class Answer(NamedTuple):
  status: int
  retry_after: str | None
  body: bytes


def scorer(
  url: str,
  timeout: float = 10.0,
  retries: int = 3,
  concurrency: int = 8,
  batch: int = 32,
  headers: Mapping[str, str] | None = None,
) -> RewardFn | PreferenceFn:
  """Returns the reward, or the judge, that answers at a URL.

  Args:
    url: http:// or https://; redirects are not followed.
    timeout: of a request, from the connection to the last byte, in seconds.
    retries: further attempts, after 0.5, 1, 2 ... 30 seconds or the longer
      Retry-After of the answer, where the connection failed, the time was over,
      or the status was 429 or 5xx.
    concurrency: requests at a time.
    batch: prompts in one request.
    headers: further ones; ${NAME} in a value is the environment variable.
  """
  numbers = dict(retries=(retries, 0), concurrency=(concurrency, 1),
                 batch=(batch, 1))  # fmt: skip
  for name, (value, least) in numbers.items():
    if value < least:
      raise UserError(f'{name} of an HTTP reward is {value}, at least {least}.')
  if not timeout > 0:
    raise UserError(f'timeout of an HTTP reward is {timeout}, more than 0.')
  templates = dict(headers or {})
  sent = {k: _expanded(k, v) for k, v in templates.items()}
  secrets = [os.environ[n] for v in templates.values()
             for n in _VARIABLE.findall(v)]  # fmt: skip
  hidden = sorted({*sent.values(), *secrets} - {''}, key=len, reverse=True)
  server = Server(url, _shown(url), sent, hidden, timeout, retries)
  submit = calling.worker(concurrency)

  def http_reward(prompts, completions, context):
    parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
    bodies = [_body(p, prompts, completions, context) for p in parts]
    errors, over = [], threading.Event()

    def ask(part: slice, body: bytes):
      if over.is_set():
        return None
      where = quote(part.start, prompts)
      try:
        return _ask(server, body, len(prompts[part]), where, over)
      except UserError as e:
        errors.append(e)
        over.set()  # the others stop: nothing is in flight when this call ends
        return None

    asked = [submit(ask, *pair) for pair in zip(parts, bodies, strict=True)]
    answers = [future.result() for future in asked]
    if errors:
      raise errors[0]
    kinds = sorted({kind for kind, _ in answers})
    if len(kinds) > 1:
      raise UserError(
        f'{server.name} answered {" and ".join(kinds)} to one batch'
        f' ({quote(0, prompts)}).'
      )
    return [row for _, values in answers for row in values]

  http_reward.__name__ = server.name  # what scoring calls it
  return http_reward


# -- The request


def _shown(url: str) -> str:
  """The URL as messages show it; a UserError if it is none."""
  try:
    parts = parse.urlsplit(url)
    host, port = parts.hostname, parts.port
  except ValueError:
    parts, host, port = parse.urlsplit(''), None, None
  if parts.scheme not in ('http', 'https') or not host:
    raise UserError(
      f'url of an HTTP reward begins with {url[:8]!r}; expected'
      ' http://host:port/path or https://host/path.'
    )
  if '@' in parts.netloc:
    raise UserError(
      'url of an HTTP reward holds a user; configs are saved as they are, so'
      " give headers={'Authorization': 'Basic ${NAME}'} instead."
    )
  host = f'[{host}]' if ':' in host else host
  return f'{parts.scheme}://{host}{f":{port}" if port else ""}{parts.path}'


def _expanded(name: str, value: str) -> str:
  """A header with its environment variables; no message repeats a value."""

  def variable(match: re.Match) -> str:
    if match[1] not in os.environ:
      raise UserError(
        f'header {name} of an HTTP reward needs the environment variable'
        f' {match[1]}, which is not set; export it.'
      )
    return os.environ[match[1]]

  expanded = _VARIABLE.sub(variable, value)
  if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
    raise UserError(f'{name!r} is no name of an HTTP header.')
  if not _HEADER.fullmatch(expanded):
    raise UserError(
      f'header {name} of an HTTP reward is empty, begins or ends with white'
      ' space, or holds characters beyond ASCII; correct it or its variable.'
    )
  return expanded


def _body(part: slice, prompts, completions, context: Context) -> bytes:
  """The JSON of some of the prompts."""
  request = {
    'prompts': list(prompts[part]),
    'completions': [list(ys) for ys in completions[part]],
    'rows': [dict(row) for row in context.rows[part]],
    'tokens': [[list(y) for y in ys] for ys in context.tokens[part]],
    'finished': context.finished[part],
    'turns': context.turns,
  }
  try:
    return json.dumps(request, default=_plain, allow_nan=False).encode()
  except (TypeError, ValueError) as e:
    raise UserError(
      f'the rows of the data cannot be sent as JSON: {e}'
      f' ({quote(part.start, prompts)}).'
    ) from e


def _plain(value: Any) -> Any:
  """What JSON has in the place of numpy's numbers and of bytes."""
  if isinstance(value, np.generic | np.ndarray):
    return value.tolist()
  if isinstance(value, bytes):
    return value.decode('utf-8')
  raise TypeError(f'no JSON for {type(value).__name__}')


# -- The answer


def _ask(
  server: Server, body: bytes, count: int, where: str, over: threading.Event
) -> tuple[str, list[Any]]:
  """Which of KEYS was answered, and the values of `count` prompts.

  A UserError at the end of its attempts, or as soon as `over` is set.
  """
  for attempt in range(server.retries + 1):
    answer = None
    try:
      answer = _within(server.timeout, functools.partial(_post, server, body))
    except OverflowError:
      raise UserError(
        f'{server.name} answers more than {_MOST >> 20} MiB, which no rewards'
        f' are ({where}).'
      ) from None
    except (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError):
      said = f'gave no whole answer within {server.timeout:g} s'
    except urllib3.exceptions.HTTPError:
      said = 'cut its answer short'
    except OSError as e:
      said = f'gave no answer ({_cause(e)})'
    else:
      if 200 <= answer.status < 300:
        return _values(server, answer.body, count, where)
      said = f'answered {answer.status}, {_quoted(server, answer.body)}'
      if 300 <= answer.status < 400:
        said = f'answered {answer.status}, a redirect; give the address itself'
      if answer.status != 429 and answer.status < 500:
        raise UserError(f'{server.name} {said} ({where}).')
    if attempt < server.retries:
      wait = _wait(attempt, answer and answer.retry_after)
      if wait > _LONGEST_WAIT:
        raise UserError(
          f'{server.name} {said}, and asks to wait for {wait:.0f} s, more than'
          f' the {_LONGEST_WAIT:g} that are waited ({where}).'
        )
      _pause(wait, over)
  raise UserError(
    f'{server.name} {said}; that was attempt {server.retries + 1} of'
    f' {server.retries + 1} ({where}).'
  )


def _post(server: Server, body: bytes) -> Answer:
  """One request; an error unless all of the answer comes in time."""
  end = time.monotonic() + server.timeout
  with requests.post(
    server.url,
    data=body,
    headers={'Content-Type': 'application/json', **server.headers},
    auth=lambda request: request,  # else a .netrc replaces the header
    timeout=server.timeout,
    allow_redirects=False,  # they would carry the headers elsewhere
    stream=True,
  ) as response:
    read, pieces = response.raw.read1, []  # read() waits for a whole buffer
    left = _MOST  # however small it was packed
    while piece := read(2**16, decode_content=True):
      pieces.append(piece)
      left -= len(piece)
      if left < 0:
        raise OverflowError
      if time.monotonic() > end:
        raise TimeoutError
    later = response.headers.get('Retry-After')
    return Answer(response.status_code, later, b''.join(pieces))


def _within(seconds: float, work: Callable[[], Answer]) -> Answer:
  """Calls `work`, in a thread that is left behind when its time is over.

  The library's timeout is of each read alone: a server may take for ever over
  its headers, and so may the look-up of a name.
  """
  future: futures.Future = futures.Future()

  def run():
    try:
      future.set_result(work())
    except BaseException as e:  # pylint: disable=broad-except
      future.set_exception(e)

  threading.Thread(target=run, daemon=True).start()
  return future.result(seconds)


def _pause(seconds: float, over: threading.Event) -> None:
  if over.wait(seconds):
    raise UserError('another request of the same batch has failed.')


def _wait(attempt: int, retry_after: str | None) -> float:
  """Seconds before the next attempt, after `attempt` (from 0) has failed."""
  return max(min(2.0**attempt / 2, 30.0), _asked_for(retry_after))


def _asked_for(retry_after: str | None) -> float:
  """Retry-After in seconds: a number, or a date; 0 if it is neither."""
  text = (retry_after or '').strip()
  if re.fullmatch(r'\d+', text, re.ASCII):
    return float(text)
  try:
    date = utils.parsedate_to_datetime(text)
    now = datetime.datetime.now(date.tzinfo)
    return (date - now).total_seconds()
  except ValueError:
    return 0.0


def _values(
  server: Server, body: bytes, count: int, where: str
) -> tuple[str, list[Any]]:
  try:
    answer = json.loads(body)
  except (ValueError, RecursionError) as e:
    raise UserError(
      f'{server.name} answered no JSON, {_quoted(server, body)} ({where}).'
    ) from e
  found = [k for k in KEYS if isinstance(answer, dict) and k in answer]
  if len(found) != 1:
    raise UserError(
      f'{server.name} answered JSON without one of {" and ".join(KEYS)},'
      f' {_quoted(server, body)} ({where}).'
    )
  values = answer[found[0]]
  if not isinstance(values, list) or len(values) != count:
    got = len(values) if isinstance(values, list) else type(values).__name__
    raise UserError(
      f'{server.name} answered {got} in {found[0]!r}, expected a list of'
      f' {count}, one for each prompt ({where}).'
    )
  return found[0], values


def _quoted(server: Server, body: bytes) -> str:
  """The beginning of an answer, without what we sent in secret."""
  text = ' '.join(body.decode('utf-8', 'replace').split())
  for value in server.hidden:
    text = text.replace(value, '***')
  return repr(text[:200])


def _cause(error: BaseException) -> str:
  """The innermost error: those around it repeat the URL with its query."""
  while inner := error.__cause__ or error.__context__:
    error = inner
  return ' '.join(str(getattr(error, 'strerror', None) or error).split())
