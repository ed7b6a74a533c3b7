"""The two ends of a run that need no traceback; imports nothing of ours."""

import re

_LONGEST = 4000  # characters; a file that is quoted may be one long name
# What ends a line, speaks to a terminal, turns the direction of the text, or
# is half a character. Lists of differences go on in lines of two spaces.
_UNSAFE = re.compile(
  '\n(?!  )|[\0-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


class UserError(Exception):
  """Something the user can mend: says what, got, allowed and remedy.

  It quotes files and answers of others: it stays one line, whatever they hold.
  """

  def __str__(self) -> str:
    text = super().__str__()
    if len(text) > _LONGEST:
      text = f'{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}'
    return _UNSAFE.sub(lambda m: m[0].encode('unicode_escape').decode(), text)


class BadRow(UserError):
  """A row of the data that cannot be used, whatever the settings are.

  Who knows where the row is puts that before it; see `sources.made`.
  """


def one_line(error: Exception) -> str:
  """The message on one line, of a traceback within it the last line alone."""
  text, _, trace = str(error).partition('Traceback (most recent call last)')
  line = text + (trace and trace.strip().splitlines()[-1])
  # The name under which ml_collections imports the file says nothing.
  return ' '.join(line.replace("module 'config_config'", '--config').split())


class Stopped(BaseException):
  """A run that ends because it was asked to; one line, no trace.

  Not an Exception: nobody's `except Exception` may take it for an error of
  theirs.

  Args:
    line: what was done, and what to do.
    status: that the process ends with.
    together: all hosts raise it, at the same place.
  """

  def __init__(self, line: str, status: int, together: bool = False):
    super().__init__(line)
    self.status, self.together = status, together
