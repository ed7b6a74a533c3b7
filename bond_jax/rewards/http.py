"""A reward that runs elsewhere and is asked over HTTP.

The schema of requests and answers is in docs/rewards.md;
`bond_jax.rewards.serve` is a server.
"""

from collections.abc import Mapping
import json
import logging
import os
import re
import time
from typing import Any, NamedTuple
from urllib import parse

import numpy as np
import requests
from requests import adapters
import urllib3

from bond_jax.errors import UserError
from bond_jax.rewards import calling
from bond_jax.rewards.answers import quote
from bond_jax.types import PreferenceFn, RewardFn

# Its warnings hold the query of a URL, and tracebacks.
logging.getLogger('urllib3').setLevel(logging.ERROR)

KEYS = ('rewards', 'wins')  # an answer holds one of them

_MOST = 64 * 2**20  # bytes of an answer, unpacked
_LONGEST_WAIT = 60  # seconds between attempts, whatever Retry-After asks for
_RETRIED = {429, *range(500, 600)}  # statuses
_VARIABLE = re.compile(r'\$\{(\w+)\}')
_HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_HEADER = re.compile(r'[!-~]([ -~]*[!-~])?')


class Server(NamedTuple):
  """Whom to ask, and how."""

  url: str
  name: str  # the URL without its query, which may hold a key: for messages
  headers: dict[str, str]
  hidden: list[str]  # secrets, which no message may repeat
  timeout: float
  retries: int


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
    timeout: seconds to connect, between two bytes of an answer, and from its
      headers to its last byte. `reward.timeout` bounds a whole call.
    retries: further attempts where there was no answer, or its status was 429
      or 5xx: at once, then after 1, 2, 4 ... 30 seconds, or after the answer's
      Retry-After, of which at most 60 seconds are waited.
    concurrency: requests at a time.
    batch: prompts in one request.
    headers: further ones; ${NAME} in a value is the environment variable.
  """
  if min(concurrency, batch) < 1 or retries < 0 or not timeout > 0:
    raise UserError(
      f'an HTTP reward has batch {batch} and concurrency {concurrency}, at'
      f' least 1, retries {retries}, at least 0,'
      f' and timeout {timeout}, more than 0.'
    )
  sent, hidden = _expanded(headers or {})
  server = Server(url, _shown(url), sent, hidden, timeout, retries)
  submit = calling.worker(concurrency)

  def http_reward(prompts, completions, context):
    batches, errors = [], []
    for start in range(0, len(prompts), batch):
      where = quote(start, prompts)
      index = range(start, min(start + batch, len(prompts)))
      some = calling.some(index, prompts, completions, context)
      batches.append((_body(*some, where), len(index), where))

    def ask(*request):
      if errors:  # the call has failed: ask no more
        return None
      try:
        return _ask(server, *request)
      except UserError as e:
        errors.append(e)
        return None

    calls = [submit(ask, *request) for request in batches]
    answers = [future.result() for future in calls]
    if errors:
      raise errors[0]
    kinds = sorted({kind for kind, _ in answers})
    if len(kinds) > 1:
      raise UserError(
        f'{server.name} answered {" and ".join(kinds)} to one batch'
        f' ({quote(0, prompts)}).'
      )
    return [row for _, values in answers for row in values]

  http_reward.__name__ = server.name  # for errors
  return http_reward


def _shown(url: str) -> str:
  """The URL as messages show it; a UserError if it is not one."""
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


def _expanded(
  templates: Mapping[str, str],
) -> tuple[dict[str, str], list[str]]:
  """The headers with their environment variables, and what to hide of them."""
  sent, secrets = {}, set()
  for name, template in templates.items():
    variables = _VARIABLE.findall(template)
    for variable in variables:
      if variable not in os.environ:
        raise UserError(
          f'header {name} of an HTTP reward needs the environment variable'
          f' {variable}, which is not set; export it.'
        )
    value = _VARIABLE.sub(lambda match: os.environ[match[1]], template)
    if not _HEADER_NAME.fullmatch(name):
      raise UserError(f'{name!r} is no name of an HTTP header.')
    if not _HEADER.fullmatch(value):
      raise UserError(
        f'header {name} of an HTTP reward is empty, begins or ends with white'
        ' space, or holds characters beyond ASCII; correct it or its variable.'
      )
    sent[name] = value
    secrets |= {value, *(os.environ[variable] for variable in variables)}
  return sent, sorted(secrets - {''}, key=len, reverse=True)


def _body(prompts, completions, context, where: str) -> bytes:
  """The JSON of a request."""
  request = {'prompts': prompts, 'completions': completions}
  request |= context._asdict()
  try:
    return json.dumps(request, default=_plain, allow_nan=False).encode()
  except (TypeError, ValueError) as e:
    raise UserError(
      f'the rows of the data cannot be sent as JSON: {e} ({where}).'
    ) from e


def _plain(value: Any) -> Any:
  """NumPy's numbers, mappings and bytes as JSON has them."""
  if isinstance(value, np.generic | np.ndarray):
    return value.tolist()
  if isinstance(value, bytes):
    return value.decode('utf-8')
  raise TypeError(f'no JSON for {type(value).__name__}')


def _ask(
  server: Server, body: bytes, count: int, where: str
) -> tuple[str, list[Any]]:
  """The key of an answer, one of KEYS, and its values for `count` prompts."""
  after = f' after {server.retries + 1} attempts' if server.retries else ''
  try:
    status, content = _post(server, body)
  except OverflowError:
    fault = f'answers more than {_MOST >> 20} MiB, which no rewards are'
  except (OSError, urllib3.exceptions.HTTPError) as e:
    fault = f'gave no whole answer{after}: {_cause(e)}'
  else:
    if 200 <= status < 300:
      return _values(server, content, count, where)
    fault = f'answered {status}, {_quoted(server, content)}'
    if 300 <= status < 400:
      fault = f'answered {status}, a redirect; give the address itself'
    elif status in _RETRIED:
      fault += after
  raise UserError(f'{server.name} {fault} ({where}).')


def _post(server: Server, body: bytes) -> tuple[int, bytes]:
  """The status and the body of an answer, once all of it is there."""
  retry = urllib3.Retry(
    server.retries,
    allowed_methods=None,  # POST as well
    status_forcelist=_RETRIED,
    backoff_factor=0.5,
    backoff_max=30,
    retry_after_max=_LONGEST_WAIT,
    raise_on_status=False,
  )
  with requests.Session() as session:
    for scheme in 'http://', 'https://':
      session.mount(scheme, adapters.HTTPAdapter(max_retries=retry))
    with session.post(
      server.url,
      data=body,
      headers={'Content-Type': 'application/json', **server.headers},
      auth=lambda request: request,  # else a .netrc replaces the header
      timeout=server.timeout,
      allow_redirects=False,  # they would carry the headers elsewhere
      stream=True,
    ) as response:
      end, left, pieces = time.monotonic() + server.timeout, _MOST, []
      # Not read(), which waits for a whole buffer.
      while piece := response.raw.read1(2**16, decode_content=True):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
          raise OverflowError
        if time.monotonic() > end:
          raise TimeoutError(f'it took more than {server.timeout:g} s')
      return response.status_code, b''.join(pieces)


def _values(
  server: Server, body: bytes, count: int, where: str
) -> tuple[str, list[Any]]:
  """The same as `_ask`, of the body of an answer."""
  try:
    answer = json.loads(body)
    [key] = [k for k in KEYS if k in answer]
    values = answer[key]
  except (ValueError, TypeError, RecursionError):
    values = None
  if isinstance(values, list) and len(values) == count:
    return key, values
  raise UserError(
    f'{server.name} answered {_quoted(server, body)}, expected JSON with one of'
    f' {" and ".join(KEYS)}, a list of {count}, one for each prompt ({where}).'
  )


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
