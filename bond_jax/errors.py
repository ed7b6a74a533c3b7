"""The two ends of a run that need no traceback; imports nothing."""


class UserError(Exception):
  """Something the user can mend: says what, got, allowed and remedy."""


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
