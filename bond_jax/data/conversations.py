"""The fields of a row: prompts and answers, in each way to write them.

A row is a dict. The program reads

  text                 the prompt, or the text that prompts are openings of
  messages             a prompt of turns, each with a role and a content
  prompt               either of these, in rows that have neither
  conversations        turns, in rows that have none of these
  chosen, rejected     two answers to it, texts or messages: a preference pair;
                       with messages, or whole texts, it needs no prompt.
                       Two transcripts of HH-RLHF hold one, if nothing else does

A field that is null, NaN or an empty list counts as absent. Rewards find all
other fields in `Context.rows`.
"""

from collections.abc import Mapping, Sequence
import contextlib
import math
import re
from typing import Any

from bond_jax.data import readers
from bond_jax.errors import BadRow

Row = dict[str, Any]
Messages = Sequence[dict[str, str]]  # of 'role' and 'content'

# Fields that count as absent where they are null.
_OURS = ('text', 'messages', 'prompt', 'conversations', 'chosen', 'rejected',
         'completion', 'margin', 'rating')  # fmt: skip
_ROLES = {'human': 'user', 'gpt': 'assistant'}  # of ShareGPT
_HUMAN, _ASSISTANT = '\n\nHuman:', '\n\nAssistant:'  # of HH-RLHF


def prompt_turns(row: Row) -> Messages:
  """The turns to answer: a row's messages, or its text as the user's.

  A BadRow if it has neither.
  """
  if messages := row.get('messages'):
    return messages
  if not isinstance(row.get('text'), str):
    why = ' (transcripts hold one if they differ in their last answers alone)'
    raise BadRow(
      'a row has neither messages nor a text: it may teach a reward model, but'
      f' there is no prompt in it{why if "chosen" in row else ""}.'
    )
  return [{'role': 'user', 'content': row['text']}]


def prepare(fields: Mapping[str, str], row: Any) -> Row:
  """The row under our names, with messages as ours; a BadRow if it is none.

  `fields`: our name -> the name in the row.
  """
  if not isinstance(row, dict):
    raise _no_row(row)
  row = _renamed(fields, row)
  row = {k: _listed(v) if k in _OURS else v for k, v in row.items()}
  row = {k: v for k, v in row.items() if k not in _OURS or not _is_null(v)}
  has_prompt = lambda: not {'text', 'messages'}.isdisjoint(row)
  for name in 'prompt', 'conversations':
    kind = {str: 'text', list: 'messages'}.get(type(row.get(name)))
    if kind and not has_prompt():
      row = {kind if k == name else k: v for k, v in row.items()}
  if not has_prompt() and (found := transcripts(row)):
    row['messages'] = found[0]
  return _checked(row)


def _renamed(fields: Mapping[str, str], row: Row) -> Row:
  for name, field in fields.items():
    if field not in row:
      raise BadRow(
        f'no field {field!r}, which data.fields calls {name!r}; it has'
        f' {", ".join(row)}.'
      )
  named = {name: row[field] for name, field in fields.items()}
  gone = set(fields.values())
  if not {'text', 'messages'}.isdisjoint(fields):
    gone |= {'text', 'messages'}
  return {k: v for k, v in row.items() if k not in gone} | named


def _is_null(value: Any) -> bool:
  if isinstance(value, float):  # pandas has NaN for null
    return math.isnan(value)
  return value is None or (isinstance(value, list) and not value)


def _listed(value: Any) -> Any:
  """A list of dicts, if the value is that as a dict of lists."""
  if isinstance(value, dict) and {*map(type, value.values())} <= {list, dict}:
    with contextlib.suppress(ValueError):  # of different lengths
      return readers.transposed(value)
  return value


def _no_row(row: Any) -> BadRow:
  known = ''
  if isinstance(row, dict):
    names = [k for k, v in row.items() if v is not None]
    known = f'; it has {", ".join(names) or "nothing"}'
  return BadRow(
    'expected an object with a string "text", or with "messages", a list of'
    ' objects with strings "role" and "content", or with "chosen" and'
    f' "rejected"{known}. data.fields gives fields these names.'
  )


def _checked(row: Row) -> Row:
  """The row with messages as ours; a BadRow if there is nothing to read."""
  if isinstance(row.get('text'), bytes):
    raise BadRow('the text is not UTF-8.')
  pair = [name for name in ('chosen', 'rejected') if name in row]
  texts = [name for name in pair if isinstance(row[name], str)]
  if 'messages' in row:
    row |= _conversation(row)
  elif not isinstance(row.get('text'), str) and (
    'text' in row or len(pair) < 2
  ):
    raise _no_row(row)
  if len(pair) == 1 or len(texts) == 1:
    raise BadRow(
      '"chosen" and "rejected" must both be strings or both be messages.'
    )
  return row | {k: _turns(row[k], k) for k in pair if k not in texts}


def _conversation(row: Row) -> Row:
  """The messages; of ShareGPT's without a last answer, the 'completion'."""
  turns = _turns(row['messages'], 'messages')
  if 'from' not in row['messages'][0]:
    return {'messages': turns}
  prompt = list(turns)
  while prompt and prompt[-1]['role'] == 'assistant':
    prompt.pop()
  if not prompt:
    raise BadRow('the conversation has no turn of a user.')
  found = {'messages': prompt}
  if len(prompt) == len(turns) - 1 and 'completion' not in row:
    found['completion'] = turns[-1]['content']
  return found


def _turns(value: Any, name: str) -> list[dict[str, Any]]:
  """Messages, however they are written, each with a role and a content."""

  def turn(k: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
      raise ValueError(f'{name}[{k}] is {message!r:.60}')
    if 'from' in message and 'role' not in message:
      role = message['from']
      role = _ROLES.get(role, role) if isinstance(role, str) else role
      message = {'role': role, 'content': message.get('value')}
    content = _listed(message.get('content'))
    if isinstance(content, list):
      message = {**message, 'content': _joined(content, f'{name}[{k}]')}
    for key in 'role', 'content':
      if not isinstance(message.get(key), str):
        raise ValueError(f'{key} of {name}[{k}] is {message.get(key)!r:.60}')
    return message

  try:
    if not isinstance(value, list) or not value:
      raise ValueError(f'it is {value!r:.60}')
    return [turn(k, message) for k, message in enumerate(value)]
  except ValueError as e:
    raise BadRow(
      f'expected "{name}", a list of objects with strings "role" and "content";'
      f' {e}.'
    ) from e


def _joined(parts: list[Any], name: str) -> str:
  """The texts that a content is made of, as Gemma's own template joins them."""
  for part in parts:
    kind = part.get('type', 'text') if isinstance(part, dict) else None
    if kind != 'text' or not isinstance(part.get('text'), str):
      raise BadRow(
        f'the content of {name} has a part {part!r:.60}; only'
        ' {"type": "text", "text": ...} can be read, no images.'
      )
  return ''.join(part['text'].strip() for part in parts)


def transcripts(row: Row) -> tuple[list[dict[str, str]], str, str] | None:
  """The turns and two answers that HH-RLHF has as 'chosen' and 'rejected'.

  None where these are no transcripts, or differ before the last answer, and
  where the row has another prompt.
  """
  talks = []
  for name in 'chosen', 'rejected':
    text = row.get(name)
    if not isinstance(text, str) or not text.startswith(_HUMAN):
      return None
    _, *pieces = re.split(f'({_HUMAN}|{_ASSISTANT})', text)
    talks.append(
      [
        {'role': 'user' if who == _HUMAN else 'assistant', 'content': x.strip()}
        for who, x in zip(pieces[::2], pieces[1::2], strict=True)
      ]
    )
  (*prompt, chosen), (*other, rejected) = talks
  if prompt != other or {chosen['role'], rejected['role']} != {'assistant'}:
    return None
  if row.get('text') is not None or (row.get('messages') or prompt) != prompt:
    return None
  return prompt, chosen['content'], rejected['content']
