"""Paths as people type them: with ~, and relative to some folder."""

import os
import sys

from absl import flags

from bond_jax.errors import UserError


def expanded(path: str) -> str:
  """The path with a ~ at its head replaced, as a shell does it.

  A UserError if there is no such user.
  """
  found = os.path.expanduser(path)
  if found.startswith('~'):
    raise UserError(
      f'{path}: there is no home folder {path.partition("/")[0]}; for a folder'
      f' of that name here, give ./{path}.'
    )
  return found


class _Parser(flags.ArgumentParser):
  def parse(self, argument: str) -> str:
    if not argument or '://' in argument:
      return argument
    return os.path.normpath(expanded(argument))


def flag(
  name: str, default: str | None, doc: str, required: bool = False
) -> flags.FlagHolder:
  """Defines a flag that is a path: bash leaves the ~ of --name=~/x alone."""
  return flags.DEFINE(_Parser(), name, default, doc, required=required)


def home(workdir: str, started: str) -> str:
  """The folder that a run was `started` in, to which its paths are relative.

  The current one, if that is not known or not on this machine.
  """
  here = os.getcwd()
  if started in ('', here):
    return here
  there = os.path.isdir(started) and os.access(started, os.X_OK)
  print(
    f'{workdir} was started in {started!r}; its relative paths are taken from'
    f' {"there" if there else f"{here}, since that folder is not here"}.',
    file=sys.stderr,
  )
  return started if there else here


def go_to(folder: str) -> None:
  """Changes the current folder; flags that are paths keep their meaning."""
  here = os.getcwd()
  os.chdir(folder)
  for name in flags.FLAGS:
    given = flags.FLAGS[name]
    typed = isinstance(given.parser, _Parser) and given.value != given.default
    if typed and given.value and not os.path.isabs(given.value):
      given.value = os.path.relpath(os.path.join(here, given.value))
