"""A headless Chromium, driven by its DevTools protocol over two pipes.

`make browser` puts it into .browser (or the folder that $BROWSER names).
"""

import fcntl
import json
import os
import select
import subprocess
import time

FOLDER = os.environ.get('BROWSER') or os.path.join(
  os.path.dirname(os.path.dirname(os.path.abspath(__file__))), '.browser'
)
PATIENCE = 60  # seconds for one answer, on a busy machine
FLAGS = (
    # As root, and in a container, there is no sandbox; pages are our own.
    '--headless', '--no-sandbox', '--no-zygote', '--disable-gpu',
    '--disable-dev-shm-usage', '--hide-scrollbars', '--no-first-run',
    '--disable-background-networking', '--disable-component-update',
    '--remote-debugging-pipe',
)  # fmt: skip


def installed() -> bool:
  return os.path.exists(os.path.join(FOLDER, '.done'))


class Browser:
  """One process; `profile` is an empty folder that it may fill."""

  def __init__(self, profile: str):
    # The browser reads its 3 and writes its 4; the ends are moved above both.
    theirs, self._to = os.pipe()
    self._from, mine = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, mine)]
    program = [os.path.join(FOLDER, 'chromium'), *FLAGS]
    self._process = subprocess.Popen(
      [
        'bash', '-c', f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', 'bash',
        *program, f'--user-data-dir={profile}',
      ],
      pass_fds=ends, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
      env={
        **os.environ,
        'HOME': profile,
        'LD_LIBRARY_PATH': f'{FOLDER}:{os.path.join(FOLDER, "lib")}',
        'FONTCONFIG_FILE': os.path.join(FOLDER, 'fonts.conf'),
      },
    )  # fmt: skip
    for end in (theirs, mine, *ends):
      os.close(end)
    self._rest, self._count = b'', 0
    self.events: list[dict] = []

  def call(self, method: str, session: str | None = None, **params):
    """Sends a command and returns its result; events meanwhile are kept."""
    self._count += 1
    asked = {'id': self._count, 'method': method, 'params': params}
    if session:
      asked['sessionId'] = session
    os.write(self._to, json.dumps(asked).encode() + b'\0')
    while True:
      answer = self._read()
      if answer.get('id') != self._count:
        self.events.append(answer)
      elif 'error' in answer:
        raise RuntimeError(f'{method}: {answer["error"]}')
      else:
        return answer['result']

  def wait(self, method: str, session: str) -> None:
    """Returns when such an event has come, or had."""
    seen = 0
    while True:
      for event in self.events[seen:]:
        if (event['method'], event.get('sessionId')) == (method, session):
          return
      seen = len(self.events)
      self.events.append(self._read())

  def _read(self) -> dict:
    end = time.monotonic() + PATIENCE
    while b'\0' not in self._rest:
      left = max(0, end - time.monotonic())
      ready, _, _ = select.select([self._from], [], [], left)
      data = os.read(self._from, 1 << 16) if ready else b''
      if not data:
        code = self._process.poll()
        raise TimeoutError(f'no answer from the browser; exit status {code}')
      self._rest += data
    message, _, self._rest = self._rest.partition(b'\0')
    return json.loads(message)

  def close(self) -> None:
    self._process.kill()
    self._process.wait()
    os.close(self._to)
    os.close(self._from)


class Page:
  """A file, opened in a window of its own."""

  def __init__(
    self, browser: Browser, path: str, width=1200, dark=False, script=True
  ):
    self._browser = browser
    target = browser.call('Target.createTarget', url='about:blank')
    self.session = browser.call(
      'Target.attachToTarget', targetId=target['targetId'], flatten=True
    )['sessionId']
    self._target = target['targetId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')
    self.call(
        'Emulation.setDeviceMetricsOverride', width=width, height=800,
        deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    scheme = 'dark' if dark else 'light'
    self.call(
      'Emulation.setEmulatedMedia',
      features=[{'name': 'prefers-color-scheme', 'value': scheme}],
    )
    self.call('Emulation.setScriptExecutionDisabled', value=not script)
    self.url = f'file://{os.path.abspath(path)}'
    self.call('Page.navigate', url=self.url)
    browser.wait('Page.loadEventFired', self.session)

  def call(self, method: str, **params):
    return self._browser.call(method, self.session, **params)

  def run(self, expression: str):
    """The value of a JavaScript expression, JSON of any kind."""
    result = self.call(
        'Runtime.evaluate', expression=expression, returnByValue=True,
        awaitPromise=True,
    )  # fmt: skip
    if 'exceptionDetails' in result:
      raise RuntimeError(result['exceptionDetails'])
    return result['result'].get('value')

  def events(self, method: str) -> list[dict]:
    """Parameters of the events of this name so far."""
    self.run('0')  # what came before its answer has been read then
    return [
      event['params']
      for event in self._browser.events
      if (event['method'], event.get('sessionId')) == (method, self.session)
    ]

  def complaints(self) -> list[str]:
    """What the console shows in red or yellow."""
    logged = [e['entry']['text'] for e in self.events('Log.entryAdded')]
    said = self.events('Runtime.consoleAPICalled')
    thrown = self.events('Runtime.exceptionThrown')
    return [*logged, *map(str, said), *map(str, thrown)]

  def requests(self) -> list[str]:
    """Addresses that were asked for, less the page's own and data in it."""
    asked = [
      e['request']['url'] for e in self.events('Network.requestWillBeSent')
    ]
    return [u for u in asked if u != self.url and not u.startswith('data:')]

  def close(self) -> None:
    self._browser.call('Target.closeTarget', targetId=self._target)
