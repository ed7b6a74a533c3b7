"""What every setting of a config may be: its name, its kind and its range.

A config is a file of the user's, or the config.json of a run that somebody has
changed. What is wrong in it is said once, before anything is built. A name that
is not here is refused: no code reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import difflib
import inspect
import math
import numbers
import re
from typing import Any, NamedTuple

from bond_jax.errors import UserError

_MOST = 2**53  # of whole numbers: beyond it they are no sizes and no counts


class Rule(NamedTuple):
  """What a setting may be: in words, and as a test of any value."""

  says: str
  allows: Callable[[Any], bool]


class Kinds(NamedTuple):
  """A section whose other names depend on its 'kind': (settings, example)."""

  of: Mapping[str, tuple[dict[str, Any], str]]


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
  whole = _is_number(value) and isinstance(value, numbers.Integral)
  return whole and abs(value) <= _MOST


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
  'an even whole number above 0',
  lambda x: _is_whole(x) and x > 0 and x % 2 == 0,
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
PROMPTS = 'opening', 'text', 'turn'
LONGER = 'drop', 'cut'
BAD_ROWS = 'stop', 'skip'
DTYPES = 'float32', 'bfloat16'
REMAT = 'none', 'products', 'all'
POOLS = 'last', 'mean'
SPLITS = 'train', 'validation', 'test'
REWARD_FAILURES = 'stop', 'skip'
SAVE_FAILURES = 'stop', 'go_on'
WARNINGS = (
  'kl', 'entropy', 'length', 'signal', 'anchor', 'speed', 'skipped',
)  # fmt: skip

# In tables: names that end with ? need not be there; '*' is any other name.
_MESH = dict(data=WHOLE, model=WHOLE)  # sharding.make_mesh has their ranges
_TOKENIZER = dict(path=TEXT, sha256=SHA256, vocab_size=at_least(5))
_OPTIMIZER = dict(
  learning_rate=above(0), warmup_steps=at_least(0), decay_to=SHARE, b1=PART,
  b2=PART, epsilon=above(0), weight_decay=at_least(0, NUMBER),
  clip=above(0, LIMIT),
)  # fmt: skip
_NAMED = {
  'fields': {'*': TEXT},
  'splits': optional(dict.fromkeys(SPLITS, TEXT)),
}
_DATA = {
  'name': TEXT,
  'data_dir': TEXT,
  'bad_rows': one_of(*BAD_ROWS),
  **_NAMED,
  'mix': {'*': {'name': TEXT, 'weight?': above(0), **optional(_NAMED)}},
}
_SIZES = optional(dict(
  **dict.fromkeys(('vocab_size', 'features', 'layers', 'heads', 'kv_heads',
                   'feed_forward', 'window'), COUNT),
  **dict.fromkeys(('query_scale', 'attention_softcap', 'final_softcap',
                   'local_rope_base', 'global_rope_base', 'global_rope_scale'),
                  above(0)),
  **dict.fromkeys(('qk_norm', 'post_norms', 'gating_transposed'), FLAG),
  head_size=EVEN, pattern=several(one_of('local', 'global'), 1),
))  # fmt: skip
_LORA = dict(
  rank=at_least(0), alpha=at_least(0, NUMBER), targets=TEXT, weights=TEXT,
  exact_anchor=FLAG,
)  # fmt: skip
_MODEL = dict(
  name=NAME, sizes=_SIZES, temperature=at_least(0, NUMBER),
  dtype=one_of(*DTYPES), scan=FLAG, remat=one_of(*REMAT), lora=_LORA,
)  # fmt: skip
_PROMPT = dict(
  kind=one_of(*PROMPTS), length=at_least(2), longer=one_of(*LONGER)
)
_RIDGE = dict(
  order=COUNT, min_count=COUNT, alphas=several(at_least(0, NUMBER), 1)
)
_GEMMA = dict(
  loss=one_of('bradley_terry', 'margin', 'regression'),
  margin=at_least(0, NUMBER), min_gap=at_least(0, NUMBER), partners=COUNT,
  weights=NAME, pool=one_of(*POOLS), length=COUNT, dropout=PART,
  merge_dropout=PART, members=COUNT, steps=COUNT, batch=COUNT,
  optimizer=_OPTIMIZER, save_every=COUNT,
  **optional(dict(
    data=optional(_DATA), tokenizer=optional(_TOKENIZER),
    model=optional(_MODEL), prompt=optional(_PROMPT),
  )),
)  # fmt: skip
_REWARD = dict(function=TEXT, args=TABLE)
_RULES = dict(
  parts={'*': {**_REWARD, 'weight': NUMBER}}, missing_eos_penalty=NUMBER,
  length_penalty=NUMBER, failure=one_of(*REWARD_FAILURES), retries=at_least(0),
  timeout=between(0, 1e9), opponents=at_least(0),
)  # fmt: skip
_WATCH = dict(
  kl=at_least(0, LIMIT), entropy=SHARE, length=at_least(1, LIMIT), signal=SHARE,
  speed=at_least(1, LIMIT),
  stop=several(one_of(*WARNINGS), example="('kl', 'entropy')"),
)  # fmt: skip
FIELDS = optional(dict(
  seed=at_least(0), reference=NAME, save_failure=one_of(*SAVE_FAILURES),
  task=one_of('text', 'enumerable'), mesh=_MESH, sampling_mesh=_MESH,
  data=_DATA, weights=TEXT,
  tokenizer=_TOKENIZER, model=_MODEL, prompt=_PROMPT, length=COUNT,
  stop=several(NAME, example="('Question:',)"), chunk=COUNT, slots=at_least(0),
  sft=dict(
    steps=COUNT, batch=COUNT, target=one_of('text', 'completion'), length=COUNT,
    optimizer=_OPTIMIZER, save_every=COUNT, validation_batches=COUNT,
  ),
  reward_model=Kinds(dict(
    ridge=(_RIDGE, 'configs/demo.py'),
    gemma=(_GEMMA, 'configs/demo_learned_reward.py'),
  )),
  reward={**_REWARD, **_RULES}, gold=_REWARD,
  algorithm=dict(name=TEXT, args=TABLE),
  train={
    **dict(
      steps=COUNT, batch=COUNT, rollouts=COUNT, epochs=COUNT,
      micro_batches=COUNT, buckets=COUNT, optimizer=_OPTIMIZER,
      save_every=COUNT, skip_limit=at_least(0), watch=_WATCH,
    ),
    'probe_prompts?': COUNT, 'probe_completions?': COUNT,
  },
  evaluate=dict(
    prompts=at_least(2), policy_completions=COUNT,
    reference_completions=at_least(2), at_once=COUNT, samples_shown=at_least(0),
  ),
  enumerable=dict(
    seed=at_least(0), prompts=COUNT, vocab=at_least(2),
    best_of=at_least(1, NUMBER), kl_weight=at_least(0, NUMBER),
  ),
))  # fmt: skip


def of_arguments(function: Callable[..., Any]) -> dict[str, Rule]:
  """What the arguments of a function are, as their annotations say."""
  rules = {'int': WHOLE, 'float': NUMBER, 'bool': FLAG, 'str': TEXT}
  found = {}
  for name, argument in inspect.signature(function).parameters.items():
    kind = getattr(argument.annotation, '__name__', argument.annotation)
    optional_ = '' if argument.default is inspect.Parameter.empty else '?'
    found[name + optional_] = rules.get(kind, ANY)
  return found


def functions(config: Any) -> list[str]:
  """Every module:function that nested settings name."""
  found = []
  for key, value in config.items() if isinstance(config, dict) else ():
    if key == 'function' and isinstance(value, str):
      found.append(value)
    found += functions(value)
  return sorted(set(found))


def check(
  config: Mapping[str, Any],
  needed: Sequence[str] = (),
  *,
  rules: Mapping[str, Any] = FIELDS,
  unset: bool = False,
) -> None:
  """A UserError for the first setting that is wrong, unknown or missing.

  Args:
    config: nested dicts.
    needed: dotted names of settings that must be there although the rules let
      them be missing.
    rules: name -> Rule, Kinds or table of such.
    unset: a setting may be None, which none of the rules allows.
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


def unset(config: Mapping[str, Any], above: str) -> list[str]:
  """The names of all settings that are None still."""
  found = []
  for key, value in config.items():
    if isinstance(value, Mapping):
      found += unset(value, f'{above}.{key}')
    elif value is None:
      found.append(f'{above}.{key}')
  return found


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


# Of a config, whatever its task is.
NEEDED = ('seed', 'reference', 'save_failure', 'task', 'mesh', 'sampling_mesh',
          'model', 'length', 'chunk', 'slots', 'train',
          'algorithm')  # fmt: skip


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
  """Of what is not written in Python, one that takes everything."""
  try:
    return inspect.signature(function)
  except ValueError:
    return inspect.signature(lambda *args, **kwargs: None)
