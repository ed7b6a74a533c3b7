"""What the settings of a config must be, by their names.

A config is a file of the user's, or the config.json of a run that somebody has
changed. What is wrong in it is said once, before anything is built; names that
are not here are the business of whoever reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import numbers
import re
from typing import Any

from bond_jax.errors import UserError

WHOLE, NUMBER, FLAG = 'a whole number', 'a number', 'True or False'
TEXT, TABLE = 'a text', 'a table of settings'
TEXTS, NUMBERS = 'a table of texts', 'a list of numbers'
NAMES = 'a list of texts'
_MOST = 2**53  # of whole numbers: beyond it they are no sizes and no counts

_MESH = dict(data=WHOLE, model=WHOLE)
_TOKENIZER = dict(path=TEXT, sha256=TEXT, vocab_size=WHOLE)
_OPTIMIZER = dict(
  learning_rate=NUMBER, warmup_steps=WHOLE, decay_to=NUMBER, b1=NUMBER,
  b2=NUMBER, epsilon=NUMBER, weight_decay=NUMBER, clip=NUMBER,
)  # fmt: skip
_REWARD = dict(function=TEXT, args=TABLE)
# Names that end with ? need not be there; '*' stands for any name.
_SIZES = {
  f'{name}?': WHOLE
  for name in ('vocab_size', 'features', 'layers', 'heads', 'kv_heads',
               'head_size', 'feed_forward', 'window')
}  # fmt: skip
_SOURCE = {
  'name': TEXT, 'weight?': NUMBER, 'fields?': TEXTS, 'splits?': TEXTS,
}  # fmt: skip
_RULES = dict(
  parts={'*': {**_REWARD, 'weight': NUMBER}}, missing_eos_penalty=NUMBER,
  length_penalty=NUMBER, failure=TEXT, retries=WHOLE, timeout=NUMBER,
  opponents=WHOLE,
)  # fmt: skip
_REWARD_MODEL = {
  'kind': TEXT,
  'model?': {'name?': TEXT, 'sizes?': _SIZES},
  'tokenizer?': _TOKENIZER,
  'optimizer?': _OPTIMIZER,
  'alphas?': NUMBERS,
  **{f'{name}?': TEXT for name in ('loss', 'pool', 'weights')},
  **{f'{name}?': NUMBER for name in
     ('dropout', 'margin', 'merge_dropout', 'min_gap')},
  **{f'{name}?': WHOLE for name in
     ('order', 'min_count', 'batch', 'length', 'members', 'partners',
      'save_every', 'steps')},
}  # fmt: skip
FIELDS = {
  'seed': WHOLE,
  'reference': TEXT,
  'save_failure': TEXT,
  'task': TEXT,
  'mesh': _MESH,
  'sampling_mesh': _MESH,
  'data': dict(
    name=TEXT, data_dir=TEXT, fields=TEXTS, splits=TEXTS, mix={'*': _SOURCE},
    **{'bad_rows?': TEXT},
  ),
  'weights': TEXT,
  'tokenizer': _TOKENIZER,
  'model': dict(
    name=TEXT, sizes=_SIZES, temperature=NUMBER, dtype=TEXT, scan=FLAG,
    remat=TEXT, lora=dict(rank=WHOLE, alpha=NUMBER, targets=TEXT, weights=TEXT,
                          exact_anchor=FLAG),
  ),
  'prompt': dict(kind=TEXT, length=WHOLE, longer=TEXT),
  'length': WHOLE,
  'stop': NAMES,
  'chunk': WHOLE,
  'slots': WHOLE,
  'sft': dict(
    steps=WHOLE, batch=WHOLE, target=TEXT, length=WHOLE, optimizer=_OPTIMIZER,
    save_every=WHOLE, validation_batches=WHOLE,
  ),
  'reward_model': _REWARD_MODEL,
  'reward': {**_REWARD, **_RULES},
  'gold': _REWARD,
  'algorithm': dict(name=TEXT, args=TABLE),
  'train': {
    'steps': WHOLE, 'batch': WHOLE, 'rollouts': WHOLE, 'epochs': WHOLE,
    'micro_batches': WHOLE, 'buckets': WHOLE, 'optimizer': _OPTIMIZER,
    'save_every': WHOLE, 'probe_prompts?': WHOLE, 'probe_completions?': WHOLE,
    'skip_limit': WHOLE,
    'watch': dict(kl=NUMBER, entropy=NUMBER, length=NUMBER, signal=NUMBER,
                  speed=NUMBER, stop=NAMES),
  },
  'evaluate': dict(
    prompts=WHOLE, policy_completions=WHOLE, reference_completions=WHOLE,
    at_once=WHOLE, samples_shown=WHOLE,
  ),
}  # fmt: skip


def functions(config: Any) -> list[str]:
  """Every module:function that nested settings name, and the task."""
  found = []
  for key, value in config.items() if isinstance(config, dict) else ():
    if key in ('function', 'task') and isinstance(value, str):
      found.append(value)
    found += functions(value)
  return sorted(set(found))


def check(config: Mapping[str, Any], needed: Sequence[str]) -> None:
  """A UserError for the first field that is missing or is something else.

  Args:
    config: nested dicts.
    needed: names at the top without which there is nothing to run; others may
      be missing, and are checked where they are there.
  """
  rule = {k if k in needed else f'{k}?': v for k, v in FIELDS.items()}
  _check(config, rule, 'config')


def _check(value: Any, rule: Any, name: str) -> None:
  if isinstance(rule, str):
    if not _is(value, rule):
      got = ' '.join(f'{value!r:.60}'.split())
      raise UserError(f'{name} is {got}, expected {rule}; correct it.')
    return
  _check(value, TABLE, name)
  for key, inner in rule.items():
    bare = key.removesuffix('?')
    for known in value if key == '*' else [bare] if bare in value else []:
      _check(value[known], inner, f'{name}.{known}')
    if key not in ('*', *value) and not key.endswith('?'):
      raise UserError(
        f'{name} has no {key!r}, which must be {_kind(inner)}; it has'
        f' {", ".join(map(str, value)) or "nothing"}. Take the field over from'
        ' a file in configs/.'
      )


def _kind(rule: Any) -> str:
  return rule if isinstance(rule, str) else TABLE


def _is(value: Any, rule: str) -> bool:
  """Whether a value is what a rule says."""
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if rule == WHOLE:
    whole = number and isinstance(value, numbers.Integral)
    return whole and abs(value) <= _MOST
  if rule == NUMBER:
    return number and (value in (math.inf, -math.inf) or abs(value) < 1e300)
  if rule in (TABLE, TEXTS):
    texts = isinstance(value, Mapping) and map(_is_text, value.values())
    return isinstance(value, Mapping) and (rule == TABLE or all(texts))
  if rule in (NUMBERS, NAMES):
    several = isinstance(value, list | tuple)
    each = NUMBER if rule == NUMBERS else TEXT
    return several and all(_is(x, each) for x in value)
  return isinstance(value, bool) if rule == FLAG else _is_text(value)


def _is_text(value: Any) -> bool:
  """Whether it is a text that a file may be called by."""
  return isinstance(value, str) and not re.search('[\0\ud800-\udfff]', value)
