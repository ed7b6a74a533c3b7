"""What weights are, from the files alone: sizes, vocabulary, turns or text."""

import os
import re
from typing import NamedTuple

from bond_jax.data import gguf
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import files
from bond_jax.weights import official

# In the names of releases that answer, instruction-tuned: 'gemma-3-1b-it'.
_ANSWERS = re.compile(r'(^|[-_.])it($|[-_./])', re.IGNORECASE)


class Weights(NamedTuple):
  """One checkpoint."""

  path: str
  sizes: gemma.Config
  tokenizer: str  # path of its vocabulary; '' where that is not known
  turns: bool  # whether it was tuned to answer


def identify(path: str, tokenizer: str) -> Weights:
  """Looks at weights, without reading their numbers.

  Args:
    path: as `official.load` takes it.
    tokenizer: path of the vocabulary; '' looks for it beside the weights.

  Returns:
    What they are. A UserError where the files do not say it.
  """
  found = look(path)
  found = found._replace(tokenizer=tokenizer or found.tokenizer)
  if not found.tokenizer:
    raise UserError(
      f'{path} has no {tokenizer_lib.FILE} beside it; give --tokenizer=PATH,'
      ' the SentencePiece file that came with the weights.'
    )
  return found


def look(path: str) -> Weights:
  """The same; the vocabulary is the one beside the weights, '' = none."""
  found = official.find(path)
  if gguf.is_file(found):
    from bond_jax.weights.gguf import reader

    header = gguf.read(found)
    turns = 'tokenizer.chat_template' in header.fields
    return Weights(path, reader.read_config(header), found, turns)
  if found.startswith('gs://') or not official.is_hugging_face(found):
    sizes, turns = official.sizes_of(found), bool(_ANSWERS.search(path))
    return Weights(path, sizes, _beside(found), turns)
  from bond_jax.weights.huggingface import config_json, reader

  folder = reader.resolve(found)
  file = os.path.join(folder, 'config.json')
  sizes = config_json.from_json(reader.read_config(folder), file)
  return Weights(path, sizes, _beside(folder), _has(folder))


def _has(folder: str) -> bool:
  """Whether a Hugging Face folder has a template of turns."""
  if os.path.exists(os.path.join(folder, 'chat_template.jinja')):
    return True
  file = os.path.join(folder, 'tokenizer_config.json')
  if not os.path.exists(file):
    return bool(_ANSWERS.search(os.path.basename(folder)))
  described = files.read_json(file, 'download it again')
  return bool(described.get('chat_template'))


def _beside(folder: str) -> str:
  """The vocabulary beside weights, or in the folder around; '' = none."""
  for place in folder, os.path.dirname(folder):
    file = os.path.join(place, tokenizer_lib.FILE)
    if os.path.exists(file):
      return file
  return ''
