"""Gemma weights from a GGUF file, straight into their shards.

Each device's slice is dequantised from the mapped file, in float32 and then in
the dtype of the result.
"""

import contextlib
import math
from typing import Any

import jax
import numpy as np

from bond_jax.data import gguf as gguf_file
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.types import Params
from bond_jax.weights.gguf import layout
from bond_jax.weights.huggingface import config_json, reader
from bond_jax.weights.huggingface import layout as hf_layout
from bond_jax.weights.stacks import assemble, differences

# Keys after the architecture that may be there beside layout.SETTINGS, and
# change no number; others that begin so are refused.
_READ = ('attention.', 'rope.')
_BESIDE = (
  'attention.sliding_window_pattern', 'attention.value_length',
  'rope.dimension_count', 'rope.scaling.type', 'rope.scaling.factor',
  'rope.scaling.original_context_length', 'rope.scaling.finetuned',
)  # fmt: skip


def load(path: str, config: gemma.Config, like: Params) -> Params:
  """Loads the model of a file into the shards of `like`.

  Args:
    path: of a local file.
    config: the sizes that it must have.
    like: the tree of models/gemma.py as jax.ShapeDtypeStruct with shardings.

  Returns:
    Arrays as in `like`. A UserError for a file of another model, of numbers
    that the gguf package does not dequantise, and for one that is damaged.
  """
  header = gguf_file.read(path)
  found = read_config(header)
  reader.check_sizes(path, found, config)
  architecture = header.fields['general.architecture']
  names = layout.tensor_names(found, architecture)
  _check_tensors(header, names, found, config)
  tensors = {k: _Tensor(header, name) for k, name in names.items()}
  size = hf_layout.sizes(config)

  def read(name: str, struct: jax.ShapeDtypeStruct):
    parts = hf_layout.parts(config, name)
    return reader.read_parts(
      tensors, parts, size, struct, contextlib.nullcontext
    )

  return assemble(config, like, read)


def read_config(header: gguf_file.Header) -> gemma.Config:
  """The model of a file; a UserError if we do not compute that."""
  path, fields = header.path, header.fields
  architecture = fields.get('general.architecture')
  if architecture not in layout.FAMILIES:
    raise UserError(
      f'{path} holds a model of architecture {architecture!r:.60}; readable are'
      f' {", ".join(layout.FAMILIES)}.'
    )
  prefix = f'{architecture}.'
  own = {k[len(prefix) :]: v for k, v in fields.items() if k.startswith(prefix)}
  _check_keys(path, prefix, own)
  table = header.tensors.get('token_embd.weight')
  raw: dict[str, Any] = {
    'model_type': layout.FAMILIES[architecture],
    'vocab_size': table.shape[0] if table else None,
    'rope_theta': 10_000.0,
    **{name: own[key] for key, name in layout.SETTINGS.items() if key in own},
  }
  if 'rope.scaling.type' in own and own['rope.scaling.type'] != 'none':
    raw['rope_scaling'] = {
      'rope_type': own['rope.scaling.type'],
      'factor': own.get('rope.scaling.factor'),
    }
  if architecture in layout.PERIODS:
    raw['layer_types'] = _layer_types(architecture, own)
  try:
    raw['query_pre_attn_scalar'] = layout.query_scalar(
      raw['num_hidden_layers'], raw['hidden_size'],
      raw['num_attention_heads'], raw['head_dim'],
    )  # fmt: skip
  except (KeyError, TypeError, ZeroDivisionError) as e:
    raise UserError(
      f'{path}: the sizes of the model are not whole ({e!r}); it was converted'
      ' by another program than that of llama.cpp, or is damaged.'
    ) from e
  return config_json.from_json(raw, path)


def _check_keys(path: str, prefix: str, own: dict[str, Any]) -> None:
  """Refuses settings that would change the numbers."""
  known = {*layout.SETTINGS, *_BESIDE}
  wrong = [k for k in own if k.startswith(_READ) and k not in known]
  head = own.get('attention.key_length')
  for key in 'attention.value_length', 'rope.dimension_count':
    if own.get(key, head) != head:
      wrong.append(key)
  if wrong:
    raise UserError(
      f'{path}: {prefix}{wrong[0]} is {own[wrong[0]]!r:.60}, not what the'
      ' releases of Gemma have; such a model cannot be loaded.'
    )


def _layer_types(architecture: str, own: dict[str, Any]) -> list[str]:
  """The kind of each layer, in the words of config.json."""
  layers = own.get('block_count')
  if not isinstance(layers, int) or not 0 < layers <= 1000:
    return []  # refused by its number
  if architecture == 'gemma3' and not own.get('attention.sliding_window'):
    return ['full_attention'] * layers
  period = own.get(
    'attention.sliding_window_pattern', layout.PERIODS[architecture]
  )
  if isinstance(period, int):
    period = max(1, period)
    period = [(j + 1) % period != 0 for j in range(layers)]
  return [
    'sliding_attention' if slides else 'full_attention' for slides in period
  ]


def _check_tensors(
  header: gguf_file.Header,
  names: dict[str, str],
  found: gemma.Config,
  config: gemma.Config,
) -> None:
  """A UserError with the first ten tensors that are not as they must be."""
  path, gguf = header.path, layout.library()
  # Rows beyond the vocabulary are never drawn.
  enough = found.vocab_size >= config_json.vocab_rows(config)
  rows = found.vocab_size if enough else config.vocab_size
  shapes = hf_layout.tensors(found, rows)
  wanted = {names[k]: shape for k, shape in shapes.items()}
  there = {k: x.shape for k, x in header.tensors.items()}
  if there != wanted:
    raise UserError(
      f'the tensors of {path} are not those of its settings, or not of the'
      f' vocabulary of the config:{differences(there, wanted)}'
    )
  for name, tensor in header.tensors.items():
    try:
      kind = gguf.GGMLQuantizationType(tensor.kind)
      block, size = gguf.GGML_QUANT_SIZES[kind]
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as e:
      raise UserError(
        f'{path}: {name} is quantised as {tensor.kind} ({e}), which the gguf'
        ' package does not read; take a file in F16, Q8_0 or a K quantisation.'
      ) from e
    end = tensor.start + math.prod(tensor.shape) // block * size
    if tensor.shape[-1] % block or end > len(header.content):
      raise UserError(
        f'{path} is cut or damaged: {name} ends at byte {end}, the file at'
        f' {len(header.content)}; download it again.'
      )


class _Tensor:
  """A tensor that is dequantised as it is cut, row by row."""

  def __init__(self, header: gguf_file.Header, name: str):
    gguf, tensor = layout.library(), header.tensors[name]
    self.kind = gguf.GGMLQuantizationType(tensor.kind)
    block, size = gguf.GGML_QUANT_SIZES[self.kind]
    self.shape, self.norm = tensor.shape, layout.is_norm(name)
    rows = math.prod(tensor.shape[:-1])
    width = tensor.shape[-1] // block * size
    end = tensor.start + rows * width
    self.rows = header.content[tensor.start : end].reshape(rows, width)

  def __getitem__(self, where: tuple[slice, ...]) -> np.ndarray:
    dequantize = layout.library().quants.dequantize
    if len(where) == 1:
      x = dequantize(self.rows, self.kind)[0][where[0]]
    else:
      x = dequantize(self.rows[where[0]], self.kind)[:, where[1]]
    return x - 1 if self.norm else x
