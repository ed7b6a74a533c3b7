"""Puts the types and defaults of runs/settings/defaults.py into docs/config.md.

A row is | key | type | default | meaning | when to change it |.
"""

import os
import re

from bond_jax.runs.settings import defaults

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.path.join(ROOT, 'docs', 'config.md')
HEAD = '| key | type | default | meaning | change it |'
# Tables of the reward model's own: only what differs from the run's.
OWN = {f'reward_model.{name}': ('dict', '') for name in ('model', 'tokenizer')}


def settings(tree=defaults.TREE, above='') -> dict[str, tuple[str, str]]:
  """Dotted name -> its type and default, as the page has them; '' = none."""
  found = {}
  for name, part in tree.items():
    path = f'{above}{name}'
    if path == 'reward_model':
      for kind in part.values():
        found |= settings(kind, f'{path}.')
    elif not isinstance(part, defaults.Setting):
      found |= settings(part, f'{path}.')
    elif isinstance(part.default, type):
      found[path] = part.default.__name__, ''
    else:
      found[path] = type(part.default).__name__, f'`{part.default!r}`'
  return found | (OWN if not above else {})


def page(text: str) -> str:
  """The page with the types and defaults of the tree in its rows."""
  known = settings()

  def row(found):
    kind, default = known.get(found[1], (found[2], found[3]))
    return f'| `{found[1]}` | {kind} | {default or "none"} | '

  before, arguments, after = text.partition('## Arguments of the algorithms')
  before = re.sub(r'(?m)^\| `([\w.]+)` \| (\w+) \| (.*?) \| ', row, before)
  before = re.sub(r'(?m)^\| key \| type \| \w+ \|.*$', HEAD, before)
  return before + arguments + after


if __name__ == '__main__':
  with open(PATH, encoding='utf-8') as f:
    old = f.read()
  with open(PATH, 'w', encoding='utf-8') as f:
    f.write(page(old))
