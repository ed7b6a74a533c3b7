"""What every command shares: flags, configs, and errors that fit one line."""

from collections.abc import Callable
import os
import re
import sys

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from bond_jax.devices import hosts
from bond_jax.errors import one_line, Stopped, UserError
from bond_jax.runs import paths
from bond_jax.runs.settings import configs, fields


def checkpoint_flag() -> flags.Flag:
  """--checkpoint, for the commands that read one, imported beside another."""
  if 'checkpoint' not in flags.FLAGS:
    flags.DEFINE_string(
      'checkpoint', 'last', 'Which: "last", "best" or the number of a step.'
    )
  return flags.FLAGS['checkpoint']


def extrapolate_flag() -> flags.FlagHolder:
  """--extrapolate, for the commands that use one policy."""
  return flags.DEFINE_float(
    'extrapolate', 1.0, 'Times the way from the reference to the policy.',
    lower_bound=0.0,
  )  # fmt: skip


def debugging() -> bool:
  """Whether this is a command that was given --debug."""
  return 'debug' in flags.FLAGS and bool(flags.FLAGS['debug'].value)


def run(
  main: Callable[[ml_collections.ConfigDict, str], None],
  doc: str,
  *,
  folder: str = 'workdir',
  partial: bool = False,
) -> None:
  """Runs `main(config, folder)` as a command; see `execute`, `run_flags`."""
  given = run_flags(folder, partial)
  execute(lambda: main(*given()), doc)


def run_flags(
  folder: str = 'workdir', partial: bool = False
) -> Callable[[], tuple[ml_collections.ConfigDict, str]]:
  """Defines --config and the flag `folder`; returns what gives both, parsed.

  Without --config it is that of the run in the workdir. `partial`: settings
  that have no default may be left unset.
  """
  config_file = config_flags.DEFINE_config_file(
    'config',
    None,
    'A configs/*.py file, with an optional ":argument", or a config.json.',
    lock_config=True,
  )
  flags.FLAGS['config'].parser = _Parser('config')
  path = paths.flag(folder, None, 'The folder of what is written.')
  if folder == 'workdir':
    flags.DEFINE_bool(
      'accept_changes', False, 'Go on although files that a run reads changed.'
    )

  def given():
    if not path.value:
      raise UserError(f'--{folder} is not set; it says where to write.')
    if flags.FLAGS['config'].present:
      config, file = _loaded(config_file, partial)
    elif folder == 'workdir':
      file = os.path.join(path.value, 'config.json')
      config = configs.read_config(path.value)
    else:
      raise UserError('--config is not set; give a configs/*.py file.')
    if file.endswith('.json'):
      _tell(config, file)
      where = os.path.dirname(file) or '.'
      paths.go_to(paths.home(where, configs.check_version(where)))
    return config, path.value

  return given


class _Parser(ConfigFileFlagParser):
  """Of --config: it may be the config.json of a run, too."""

  def parse(self, path):
    path = paths.expanded(path)
    if not path.endswith('.json'):
      return super().parse(path)
    return configs.read_config(
      os.path.dirname(path) or '.', os.path.basename(path)
    )


_left_behind = False  # a library's thread that may never end


def leave_threads() -> None:
  """Lets the process end although a thread of a library does not."""
  global _left_behind
  _left_behind = True


def _tell(config: ml_collections.ConfigDict, path: str) -> None:
  """Says which code beside ours a run's own config.json lets us call."""
  named = fields.functions(config.to_dict())
  if others := [x for x in named if not x.startswith('bond_jax.')]:
    print(
      f'{path} names {", ".join(map(repr, others))}: code that'
      ' is run; go on only if you trust that folder.',
      file=sys.stderr,
    )


def execute(main: Callable[[], None], doc: str) -> None:
  """Parses the flags and runs `main()`; exits 0 only when it worked.

  A UserError ends with one line on stderr and status 2; `--debug` shows the
  traceback instead. A run that was asked to stop ends with 143 (SIGTERM) or 130
  (Ctrl-C). Where `main` joins other hosts, all of them end so.
  """
  debug = flags.DEFINE_bool('debug', False, 'Show tracebacks of user errors.')

  def body(argv):
    status = run_main(argv)
    if _left_behind:  # Python would wait for it
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
    return status

  def run_main(argv):
    logging.set_verbosity(logging.WARNING)
    try:
      if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}')
      with hosts.together(debug.value):
        main()
    except UserError as e:
      if debug.value:
        raise
      print(f'error: {e}', file=sys.stderr)
      return 2
    except Stopped as e:
      print(e, file=sys.stderr)
      return e.status
    except KeyboardInterrupt:
      print('interrupted; the same command takes it up again', file=sys.stderr)
      return 130
    return 0

  app.run(body, flags_parser=lambda args: _parse(args, doc))


def _loaded(
  given: flags.FlagHolder, partial: bool
) -> tuple[ml_collections.ConfigDict, str]:
  """The config, and its file; a UserError if that could not be read."""
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    config = given.value
  except OSError:
    config = None
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'cannot read --config={path}; give a configs/*.py file.')
  settings = {} if partial else fields.leaves(config.to_dict())
  if unset := [f'--config.{k}' for k, v in settings.items() if v is None]:
    raise UserError(
      f'{", ".join(unset)}: not set. They have no default; {path} says what'
      ' they are.'
    )
  return config, paths.expanded(path)


def _parse(args: list[str], doc: str) -> list[str]:
  """Parses flags; an unknown key or flag is one line and status 2."""
  sys.modules['__main__'].__doc__ = doc
  try:
    for name in (arg.partition('=')[0] for arg in args[1:]):
      if name.startswith('-') and len(name) > 200:  # absl compares them all
        raise flags.Error(f'Unknown command line flag {name[:40]!r} ...')
    return flags.FLAGS(args)
  except (
    flags.Error,
    AttributeError,
    KeyError,
    OSError,
    SyntaxError,
    TypeError,
    UserError,
    ValueError,
  ) as e:
    error = UserError(_unknown_key(args) or one_line(e))
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _unknown_key(args: list[str]) -> str | None:
  """Finds the first override of a key that the config does not have."""
  text = '\0'.join(args)
  path = re.search(r'--?config[=\0]([^\0]+)', text)
  if not path and (given := re.search(r'--?(?:no)?config\.[^=\0]+', text)):
    return f'{given[0]} changes a config file; give that too, with --config.'
  try:
    config = flags.FLAGS['config'].parser.parse(path[1]).to_dict()
  except Exception:  # the config itself is the matter
    return None
  for name in re.findall(r'--?(?:no)?config\.([^=\0]+)', text):
    bare = re.sub(r'\[.*?\]', '', name)
    if message := fields.unknown(config, bare.split('.')):
      return f'--config.{name}: {message}'
  return None
