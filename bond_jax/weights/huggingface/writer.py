"""Models as Hugging Face folders, for any server that reads them.

A folder appears under its name when it is complete, and an existing one stays
as it is. Tensors are written as they come: the host holds one at a time.
"""

from collections.abc import Iterable, Iterator
import contextlib
import json
import math
import os
import shutil
import struct
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.models import lora
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import files
from bond_jax.types import Array, Params
from bond_jax.weights import official, stacks
from bond_jax.weights.huggingface import config_json, layout, reader

_DTYPES = {'float32': 'F32', 'bfloat16': 'BF16'}
SHARD_BYTES = 5 * 10**9  # that a file of weights may have

# The official turns, as `tokenizer.chat` writes them.
_CHAT = """\
{%- if messages[0]['role'] == 'system' -%}
SYSTEM
{%- else -%}
  {%- set opening, turns = '', messages -%}
{%- endif -%}
{{ bos_token }}
{%- for turn in turns -%}
  {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('user and assistant must take turns, the user first') }}
  {%- endif -%}
  {{ '<start_of_turn>' + ('user' if turn['role'] == 'user' else 'model') }}
  {{- '\\n' + (opening if loop.first else '') + turn['content'] | trim }}
  {{- '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
_SYSTEM = """\
  {%- set opening = messages[0]['content'] | trim + '\\n\\n' -%}
  {%- set turns = messages[1:] -%}"""
_NO_SYSTEM = "  {{ raise_exception('this family has no system turn') }}"


def export(
  params: Params,
  config: gemma.Config,
  path: str,
  *,
  dtype: str,
  tokenizer_path: str | None = None,
  source: str | None = None,
  lora: Params | None = None,
  temperature: float = 1.0,
) -> None:
  """Writes a model, with what a server needs beside its weights.

  Args:
    params: the tree of models/gemma, arrays on any devices of this process.
    config: its sizes; rows of the embedding that no token uses are left out.
    path: the folder to make.
    dtype: of the weights, 'bfloat16' or 'float32'.
    tokenizer_path: a SentencePiece model; None: completions end with EOS.
    source: a Hugging Face folder whose tokenizer files are copied.
    lora: adapters to merge, in float32 and rounded once.
    temperature: of the policy.
  """
  if dtype not in _DTYPES:
    raise UserError(
      f'cannot export dtype {dtype!r}; known are {", ".join(_DTYPES)}.'
    )
  described = config_json.to_json(config, dtype)
  names, stop_ids = _tokenizer(tokenizer_path, source, described['model_type'])
  rows = config_json.vocab_rows(config)
  tensors = layout.tensors(config, rows)
  shapes = {f'model.{name}': shape for name, shape in tensors.items()}
  leaves = merged(config, params, lora or {})
  with new_folder(path, bytes_of(shapes, dtype)) as folder:
    _write_shards(folder, _tensors(config, leaves, dtype), shapes, dtype)
    for name, content in names.items():
      with open(os.path.join(folder, name), 'wb') as f:
        f.write(content)
    described['eos_token_id'] = stop_ids
    files.write_json(os.path.join(folder, 'config.json'), described)
    generation = dict(bos_token_id=2, eos_token_id=stop_ids, pad_token_id=0)
    # Readers cut the tail off unless told not to.
    law = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    path = os.path.join(folder, 'generation_config.json')
    files.write_json(path, generation | law)


def merged(
  config: gemma.Config, params: Params, adapters: Params
) -> Iterator[tuple[str, Array]]:
  """Yields (nested name, array), adapted ones in float32 with what is added."""
  beside: dict[str, dict[str, Any]] = {}
  for name, x in stacks.nested(config, adapters):
    weight, _ = layout.weight_of(name)
    beside.setdefault(weight, {})[tuple(name.split('/'))] = x
  for name, w in stacks.nested(config, params):
    if name in beside:
      key = tuple(name.split('/'))
      tree = traverse_util.unflatten_dict
      whole = lora.merge(
        config, tree({key: w.astype('float32')}), tree(beside.pop(name))
      )
      w = traverse_util.flatten_dict(whole)[key]
    yield name, w
  if beside:
    raise ValueError(f'adapters of weights that are not there: {list(beside)}')


@contextlib.contextmanager
def new_folder(path: str, size: int):
  """A temporary folder, renamed to `path` at the end of the block.

  An error inside removes what was written. `size`, in bytes, must be free.
  """
  if jax.process_count() > 1:
    raise UserError('export runs in one process: start it on one host alone.')
  path = os.path.abspath(path)
  if os.path.lexists(path):
    raise UserError(f'{path} exists; name a folder that does not.')
  temporary = f'{path}.{os.getpid()}.tmp'
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    official.check_space(path, size)
    os.mkdir(temporary)
    try:
      yield temporary
      if os.path.lexists(path):  # since we looked
        raise UserError(f'{path} exists; name a folder that does not.')
      os.rename(temporary, path)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise
  except OSError as e:
    raise UserError(
      f'cannot write {path}: {e.strerror or e}; nothing of it was kept.'
    ) from e


# -- Tensors


def _tensors(
  config: gemma.Config, leaves: Iterable[tuple[str, Array]], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, tensor) as Hugging Face has them."""
  for name, x in leaves:
    x = np.asarray(x)
    if name == 'embedder/input_embedding':
      x = x[: config_json.vocab_rows(config)]
    for part, copy in copies_of(layout.parts(config, name), x):
      yield f'model.{part.tensor}', copy.astype(dtype)


def copies_of(parts: list[layout.Part], x: np.ndarray):
  """Yields (part, tensor) for every copy in one array."""
  copies = x if x.ndim > len(parts[0].axes) else x[None]
  for part, copy in zip(parts, copies, strict=True):
    yield part, layout.to_hf(part, copy)


def bytes_of(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
  return sum(map(math.prod, shapes.values())) * np.dtype(dtype).itemsize


def _write_shards(folder, tensors, shapes, dtype) -> None:
  """Writes all tensors into as many files as it takes, with an index."""
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  for name, shape in shapes.items():
    grown = {**shards[-1], name: shape}
    if shards[-1] and bytes_of(grown, dtype) > SHARD_BYTES:
      shards.append({name: shape})
    else:
      shards[-1] = grown
  if len(shards) == 1:
    write_tensors(os.path.join(folder, reader.SINGLE), tensors, shapes, dtype)
    return
  where = {}
  for i, part in enumerate(shards):
    file = f'model-{i + 1:05}-of-{len(shards):05}.safetensors'
    write_tensors(os.path.join(folder, file), tensors, part, dtype)
    where.update(dict.fromkeys(part, file))
  total = {'total_size': bytes_of(shapes, dtype)}
  files.write_json(
    os.path.join(folder, reader.INDEX), {'metadata': total, 'weight_map': where}
  )


def write_tensors(path: str, tensors, shapes, dtype: str) -> None:
  """Writes the next len(shapes) tensors as one safetensors file.

  The library's own writer wants all of them in memory: the format is the size
  of a JSON header in 8 bytes, the header, and the numbers.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, shape in shapes.items():
    start, end = end, end + bytes_of({name: shape}, dtype)
    header[name] = {
      'dtype': _DTYPES[dtype],
      'shape': shape,
      'data_offsets': [start, end],
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(text)))
    f.write(text)
    for name, shape in shapes.items():
      found, x = next(tensors)
      assert (found, x.shape) == (name, shape), (found, x.shape, name, shape)
      f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


# -- What lies beside the weights


def _tokenizer(
  tokenizer_path: str | None, source: str | None, model_type: str
) -> tuple[dict[str, bytes], list[int]]:
  """The tokenizer's files, and the ids that end a completion."""
  found = {}
  if source is not None:
    for name in reader.TOKENIZER_FILES:
      path = os.path.join(source, name)
      if os.path.exists(path):
        with open(path, 'rb') as f:
          found[name] = f.read()
  if tokenizer_path is None:
    return found, [1]
  tokenizer = tokenizer_lib.load(tokenizer_path)
  own = tokenizer_lib.content_of(tokenizer_path)
  if found.setdefault(tokenizer_lib.FILE, own) != own:
    raise UserError(
      f'{tokenizer_path} is not the tokenizer of {source}; export with one of'
      ' the two alone.'
    )
  if 'tokenizer_config.json' not in found:
    described = describe_tokenizer(tokenizer, model_type)
    found['tokenizer_config.json'] = json.dumps(described, indent=2).encode()
  return found, list(tokenizer.stop_ids)


def describe_tokenizer(
  tokenizer: tokenizer_lib.Tokenizer, model_type: str
) -> dict[str, Any]:
  """A tokenizer_config.json for a SentencePiece model of Gemma's kind."""
  piece = tokenizer.processor.id_to_piece
  mask = tokenizer.processor.piece_to_id('<mask>')
  described = {
    'tokenizer_class': 'GemmaTokenizer',
    'pad_token': piece(tokenizer.pad_id),
    'eos_token': piece(tokenizer.eos_id),
    'bos_token': piece(tokenizer.bos_id),
    'unk_token': piece(tokenizer.unk_id),
    # Else readers add a piece that the embedding has no row for.
    'mask_token': None if mask == tokenizer.unk_id else '<mask>',
    'add_bos_token': True,
    'add_eos_token': False,
    'clean_up_tokenization_spaces': False,
    'spaces_between_special_tokens': False,
  }
  if tokenizer.end_of_turn is not None:
    system = _SYSTEM if model_type == 'gemma3_text' else _NO_SYSTEM
    described['chat_template'] = _CHAT.replace('SYSTEM', system)
  return described
