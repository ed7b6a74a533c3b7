"""Rules of settings: kinds and ranges, and their check against nested dicts.

In tables of rules, names that end with ? need not be there; '*' is any other
name. A name that no rule knows is refused: no code reads it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import difflib
import inspect
import math
import numbers
import re
from typing import Any, NamedTuple

from flax import traverse_util

from bond_jax.errors import UserError

_MOST = 2**53  # of whole numbers: beyond it they are no sizes and no counts


class Rule(NamedTuple):
  """What a setting may be: in words, and as a test of any value."""

  says: str
  allows: Callable[[Any], bool]


class Kinds(NamedTuple):
  """A section whose other names depend on its 'kind': (settings, example)."""

  of: Mapping[str, tuple[dict[str, Any], str]]


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
  return _is_number(value, numbers.Integral) and abs(value) <= _MOST


def _is_text(value: Any) -> bool:
  """Whether it is a text that a file may be called by."""
  return isinstance(value, str) and not re.search('[\0\ud800-\udfff]', value)


WHOLE = Rule('a whole number', _is_whole)
NUMBER = Rule('a finite number', lambda x: _is_number(x) and abs(x) < 1e300)
# Of limits, where infinity means none.
LIMIT = Rule('a number', lambda x: NUMBER.allows(x) or x == math.inf)
ANY = Rule('anything', lambda x: True)
FLAG = Rule('True or False', lambda x: isinstance(x, bool))
TEXT = Rule('a text', _is_text)
NAME = Rule('a text that is not empty', lambda x: _is_text(x) and x != '')
TABLE = Rule('a table of settings', lambda x: isinstance(x, Mapping))
EVEN = Rule(
  'an even whole number above 0', lambda x: COUNT.allows(x) and x % 2 == 0
)
SHA256 = Rule(
  'a sha256, 64 hexadecimal digits, or empty',
  lambda x: _is_text(x) and bool(re.fullmatch('([0-9a-f]{64})?', x)),
)


def at_least(low: float, kind: Rule = WHOLE) -> Rule:
  return Rule(
    f'{kind.says}, {low:g} or more', lambda x: kind.allows(x) and x >= low
  )


def above(low: float, kind: Rule = NUMBER) -> Rule:
  return Rule(
    f'{kind.says} above {low:g}', lambda x: kind.allows(x) and x > low
  )


def between(low: float, high: float) -> Rule:
  return Rule(
    f'a number from {low:g} to {high:g}',
    lambda x: NUMBER.allows(x) and low <= x <= high,
  )


def one_of(*names: str) -> Rule:
  quoted = [repr(name) for name in names]
  says = f'{", ".join(quoted[:-1])} or {quoted[-1]}'
  return Rule(says, lambda x: isinstance(x, str) and x in names)


def several(of: Rule, least: int = 0, example: str = '') -> Rule:
  """A list or tuple, each element as `of` says; `example` is shown."""
  return Rule(
    f'a list{" that is not empty" if least else ""}, of which each is'
    f' {of.says}{f"; written as in {example}" if example else ""}',
    lambda x: (
      isinstance(x, list | tuple) and len(x) >= least and all(map(of.allows, x))
    ),
  )


def optional(table: Mapping[str, Any]) -> dict[str, Any]:
  """The table of which nothing need be there."""
  return {f'{name}?': rule for name, rule in table.items()}


COUNT = at_least(1)
SHARE = between(0, 1)
PART = Rule(
  'a number, 0 or more and less than 1', lambda x: SHARE.allows(x) and x < 1
)


def of_arguments(function: Callable[..., Any]) -> dict[str, Rule]:
  """What the arguments of a function are, as their annotations say."""
  rules = {'int': WHOLE, 'float': NUMBER, 'bool': FLAG, 'str': TEXT}
  found = {}
  for name, argument in inspect.signature(function).parameters.items():
    kind = getattr(argument.annotation, '__name__', argument.annotation)
    optional_ = '' if argument.default is inspect.Parameter.empty else '?'
    found[name + optional_] = rules.get(kind, ANY)
  return found


def leaves(config: dict[str, Any]) -> dict[str, Any]:
  """Every setting in nested tables, by its dotted name."""
  return traverse_util.flatten_dict(config, sep='.')


def functions(config: dict[str, Any]) -> list[str]:
  """Every module:function that nested settings name."""
  named = (v for k, v in leaves(config).items() if k.endswith('.function'))
  return sorted({value for value in named if isinstance(value, str)})


def check(
  config: Mapping[str, Any],
  needed: Sequence[str] = (),
  *,
  rules: Mapping[str, Any],
  unset: bool = False,
) -> None:
  """A UserError for the first setting that is wrong, unknown or missing.

  Those that are `needed`, by dotted names, must be there although the `rules`
  (name -> Rule, Kinds or table of such) let them be missing. `unset`: a setting
  may be None, which none of the rules allows.
  """
  _check(config, rules, 'config', {f'config.{x}' for x in needed}, unset)


def _check(value: Any, rule: Any, name: str, needed, unset: bool) -> None:
  if value is None and unset:
    return
  kind = rule if isinstance(rule, Rule) else TABLE
  if not kind.allows(value):
    got = ' '.join(f'{value!r:.60}'.split())
    raise UserError(f'{name} is {got}, expected {kind.says}; correct it.')
  if kind is rule:
    return
  where = name
  if isinstance(rule, Kinds):
    rule, where = _of_kind(value, rule, name)
  names = {key.removesuffix('?'): inner for key, inner in rule.items()}
  for key in value:
    if key not in names and '*' not in names:
      raise UserError(
        f'{where} has {str(key)[:60]!r}, which nothing reads;'
        f' {nearest(key, names)}'
      )
  for key, inner in rule.items():
    bare = key.removesuffix('?')
    for known in value if key == '*' else [bare] if bare in value else []:
      _check(value[known], inner, f'{name}.{known}', needed, unset)
    optional_ = key == '*' or key.endswith('?')
    if bare not in value and not (optional_ and f'{name}.{bare}' not in needed):
      says = inner.says if isinstance(inner, Rule) else TABLE.says
      raise UserError(
        f'{where} has no {bare!r}, which must be {says}; it has'
        f' {", ".join(map(str, value)) or "nothing"}. Take the field over from'
        ' a file in configs/.'
      )


def _of_kind(value: Mapping[str, Any], rule: Kinds, name: str):
  """The table of the kind that a section has, and how errors call it."""
  kind = {'kind': one_of(*rule.of)}
  if not ('kind' in value and kind['kind'].allows(value['kind'])):
    return {**kind, '*': ANY}, name
  table, example = rule.of[value['kind']]
  return {**kind, **table}, f'{name} (kind {value["kind"]!r}, as in {example})'


def unknown(config: Mapping[str, Any], name: Sequence[str]) -> str:
  """What is said of a name that a config does not have; '' if it has it."""
  above = 'config'
  for key in name:
    known = config if isinstance(config, Mapping) else {}
    if key not in known:
      return f'{above} has no {key!r}; {nearest(key, known)}'
    config, above = config[key], f'{above}.{key}'
  return ''


def nearest(name: Any, known: Iterable[str]) -> str:
  """What a name that is not known was meant to be, or what is known."""
  known = sorted(known)
  if close := difflib.get_close_matches(str(name), known, 1):
    return f'did you mean {close[0]!r}?'
  return f'known are {", ".join(known) or "none"}.'


def check_arguments(
  name: str, function: Callable[..., Any], args, remedy: str = ''
) -> None:
  """A UserError if a function cannot be called with the args of a config."""
  signature = signature_of(function)
  try:
    signature.bind(**args)
  except TypeError as e:
    raise UserError(
      f'{name}: {e}; args in the config are {", ".join(args) or "empty"},'
      f' allowed are {", ".join(signature.parameters) or "none"}.{remedy}'
    ) from e


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
  """Of what is not written in Python, one that takes everything."""
  with contextlib.suppress(ValueError):
    return inspect.signature(function)
  return inspect.signature(lambda *args, **kwargs: None)
