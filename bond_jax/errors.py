"""The one error of the project that is the user's to mend; imports nothing."""


class UserError(Exception):
  """Something the user can mend: says what, got, allowed and remedy."""
