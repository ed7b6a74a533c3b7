"""Gemma weights from a Hugging Face folder, straight into their shards.

Each device's slice is copied from a mapped file: beside the shards the host
holds one tensor's pages and one slice.
"""

from collections.abc import Mapping
import contextlib
import functools
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open, SafetensorError

from bond_jax.devices.sharding import put_on
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import files, paths
from bond_jax.types import Array, Params
from bond_jax.weights.huggingface import config_json, layout
from bond_jax.weights.stacks import assemble, differences

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
TOKENIZER_FILES = (
  'tokenizer.model', 'tokenizer.json', 'tokenizer_config.json',
  'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja',
  'chat_template.json',
)  # fmt: skip

# With one of these in a folder transformers computes another model: it adds an
# adapter, and reads the files of a distributed save first.
_RIVALS = re.compile(r'adapter_config\.json|shard-\d{5}-model-.*\.safetensors')
_REPOSITORY = re.compile(r'([\w.-]+/[\w.-]+)@([0-9a-f]{40})')
_SHARD = re.compile(r'[\w-][\w.-]*\.safetensors')  # beside its index
_DTYPES = ('F32', 'F16', 'BF16')


class Tensor(NamedTuple):
  """One tensor of a folder, not read yet."""

  file: str
  name: str
  shape: tuple[int, ...]
  dtype: str


def load(path: str, config: gemma.Config, like: Params) -> Params:
  """Loads the text model of a folder into the shards of `like`.

  Args:
    path: a local folder, or a repository as `resolve` takes it.
    config: the sizes that it must have. Rows of the embedding that no token
      uses are zero where the folder lacks them, and left out where it has more.
    like: the tree of models/gemma.py as jax.ShapeDtypeStruct with shardings.

  Returns:
    Arrays as in `like`. A UserError for a folder of another model, and for one
    that is damaged or incomplete.
  """
  folder = resolve(path)
  raw = read_config(folder)
  found = config_json.from_json(raw, os.path.join(folder, 'config.json'))
  check_sizes(folder, found, config)
  _check_rivals(folder, raw)
  tensors = _open(folder)
  prefix = _prefix(folder, tensors)
  _check_tensors(folder, tensors, prefix, config)
  _check_head(folder, raw, tensors, prefix)
  found = {k.removeprefix(prefix): x for k, x in tensors.items()}
  size = layout.sizes(config)
  return assemble(
    config,
    like,
    lambda name, struct: read_parts(
      found, layout.parts(config, name), size, struct
    ),
  )


def read_config(folder: str) -> dict[str, Any]:
  """The config.json of a folder; a UserError if it has no readable one."""
  return files.read_json(
    os.path.join(folder, 'config.json'),
    'it is no folder of a Hugging Face model',
  )


def resolve(path: str) -> str:
  """The local folder of `path`, downloading a repository if it is one.

  A repository is written owner/name@commit: a branch would be another model
  tomorrow.
  """
  path = paths.expanded(path)
  if os.path.isdir(path):
    return path
  match = _REPOSITORY.fullmatch(path)
  if not match:
    raise UserError(
      f'{path} is no folder here, and no Hugging Face repository with its'
      ' commit: owner/name@ and 40 hexadecimal digits.'
    )
  try:
    import huggingface_hub
  except ModuleNotFoundError as e:
    raise UserError(
      f'{path} is no folder here, and downloading needs the package'
      ' huggingface_hub: pip install huggingface_hub, or download it yourself'
      ' and name the folder.'
    ) from e
  try:
    return huggingface_hub.snapshot_download(
      match[1],
      revision=match[2],
      allow_patterns=[
        'config.json', 'generation_config.json', 'adapter_config.json',
        INDEX, '*.safetensors', *TOKENIZER_FILES,
        'vocab.*', 'merges.txt', '*.model',  # of tokenizers of other models
      ],
    )  # fmt: skip
  except Exception as e:
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
    raise UserError(
      f'cannot download {path}: {reason}; is the name right, and, for a gated'
      ' model, has its licence been accepted and "hf auth login" been run?'
    ) from e


# -- Checks, before anything is read


def check_sizes(path: str, found: gemma.Config, wanted: gemma.Config) -> None:
  """A UserError with the differences unless they are the same model."""
  a, b = config_json.essence(found), config_json.essence(wanted)
  rows = [f'{k}: found {a[k]}, wanted {b[k]}' for k in a if a[k] != b[k]]
  if rows:
    names = [
      config_json.known_as(c) or 'another model' for c in (found, wanted)
    ]
    raise UserError(
      f'{path} does not hold the model of the config: this looks like'
      f' {names[0]}, the config says {names[1]} ({"; ".join(rows[:10])}).'
    )


def _check_rivals(folder: str, raw: dict[str, Any]) -> None:
  """Refuses a folder that is another model to transformers than to us."""
  found = sorted(filter(_RIVALS.fullmatch, os.listdir(folder)))
  if raw.get('transformers_weights') is not None:
    found.append('transformers_weights in its config.json')
  if found:
    raise UserError(
      f'{folder} has {found[0]}, with which transformers computes another model'
      f' than {SINGLE} is; keep one of the two there (an adapter can be merged'
      ' with peft, or be named as model.lora.weights in a folder of its own).'
    )


def _open(folder: str) -> dict[str, Tensor]:
  """Every tensor of a folder by its name; reads the headers of all files.

  An index counts only where there is no single file, as in transformers: its
  save_pretrained leaves the index of an earlier save where it is.
  """
  single = os.path.join(folder, SINGLE)
  if os.path.exists(single):
    return headers(single)
  if not os.path.exists(os.path.join(folder, INDEX)):
    raise UserError(
      f'{folder} has neither {SINGLE} nor {INDEX}; weights in other formats'
      ' must be converted first, say by save_pretrained of transformers.'
    )
  index = files.read_json(os.path.join(folder, INDEX), 'download it again')
  where = index.get('weight_map')
  names = list(where.values()) if isinstance(where, dict) else []
  strange = [x for x in names or [None] if not _SHARD.fullmatch(str(x))]
  if strange:
    raise UserError(
      f'{folder}/{INDEX}: weight_map names {strange[0]!r:.60}, which is no'
      ' .safetensors file of that folder; download it again.'
    )
  tensors = {}
  for file in sorted(set(names)):
    tensors |= headers(os.path.join(folder, file))
  return tensors


def headers(path: str) -> dict[str, Tensor]:
  """Every tensor of one file by its name; a UserError if it is damaged."""
  tensors = {}
  with _damage(path), safe_open(path, framework='np') as f:
    for name in f.keys():  # noqa: SIM118 (it is no mapping)
      x = f.get_slice(name)
      tensors[name] = Tensor(path, name, tuple(x.get_shape()), x.get_dtype())
  return tensors


def _prefix(folder: str, tensors: dict[str, Tensor]) -> str:
  tables = [f'{prefix}embed_tokens.weight' for prefix in layout.PREFIXES]
  found = [name for name in tables if name in tensors]
  if len(found) == 1:
    return found[0].removesuffix('embed_tokens.weight')
  if found:
    raise UserError(
      f'{folder} holds two models, {" and ".join(found)}; keep one of them.'
    )
  raise UserError(
    f'{folder} has no tensor embed_tokens.weight under'
    f' {" or ".join(layout.PREFIXES)}; it has'
    f' {", ".join(sorted(tensors)[:3])} ...'
  )


def _check_tensors(folder, tensors, prefix, config) -> None:
  """A UserError with the first ten tensors that are not as they must be."""
  rows = tensors[f'{prefix}embed_tokens.weight'].shape[0]
  if rows < config_json.vocab_rows(config):  # further ones are never drawn
    rows = config.vocab_size
  shapes = layout.tensors(config, rows)
  wanted = {prefix + name: shape for name, shape in shapes.items()}
  found = {
    k: x.shape
    for k, x in tensors.items()
    if k.startswith(prefix) and not k.endswith('rotary_emb.inv_freq')
  }
  if found != wanted:
    raise UserError(
      f'the tensors of {folder} are not those of its config.json, or not of'
      f' the vocabulary of the config:{differences(found, wanted)}'
    )
  for name in wanted:
    check_dtype(tensors[name])


def check_dtype(tensor: Tensor) -> None:
  """Refuses numbers that are not floats as we read them."""
  if tensor.dtype not in _DTYPES:
    raise UserError(
      f'{tensor.file}: {tensor.name} is of dtype {tensor.dtype}, readable are'
      f' {", ".join(_DTYPES)}; quantised weights cannot be loaded.'
    )


def _check_head(folder, raw, tensors, prefix) -> None:
  """Refuses a head that is not the embedding."""
  heads = [k for k in tensors if k.endswith('lm_head.weight')]
  if not heads and not raw.get('tie_word_embeddings', True):
    raise UserError(
      f'{folder}/config.json says that the head is not the embedding'
      ' (tie_word_embeddings), and there is no lm_head.weight; the export that'
      ' wrote it lost the head.'
    )
  for head in heads:
    if not _same(tensors[head], tensors[f'{prefix}embed_tokens.weight']):
      raise UserError(
        f'{folder}: {head} is not the embedding; the head of every Gemma is,'
        ' and a model with another one cannot be loaded.'
      )


def _same(a: Tensor, b: Tensor) -> bool:
  """Whether two tensors hold the same numbers."""
  if a.shape != b.shape:
    return False
  with _slices([a, b]) as (x, y):
    return np.array_equal(x[:], y[:])


# -- Reading


def read_parts(
  tensors: Mapping[str, Any],
  parts: list[layout.Part],
  size: dict[str, int],
  struct: jax.ShapeDtypeStruct,
  opened=None,
) -> Array:
  """One array, straight into its shards, of copies that lie at `parts`.

  Args:
    tensors: by the names that the parts have.
    parts: one for each copy, of the same axes.
    size: letter -> size of these axes.
    struct: shape, dtype and sharding of the array.
    opened: tensors -> context of what can be cut as numpy cuts; by default they
      are those of safetensors files.
  """
  found = [tensors[part.tensor] for part in parts]
  copies = len(struct.shape) - len(parts[0].axes)  # 1 if they have an axis

  def block(index: tuple[slice, ...]) -> np.ndarray:
    shape = [s.stop - s.start for s in index]
    chosen = index[0] if copies else slice(0, 1)
    letters = dict(zip(parts[0].axes, index[copies:], strict=True))
    if 'V' in letters:
      where = layout.slices(parts[0], size, letters)
      rows = where[0].indices(found[0].shape[0])[:2]
      if rows[1] - rows[0] == shape[0]:  # not copied once more
        return np.asarray(files[0][slice(*rows), where[1]], struct.dtype)
      out = np.zeros(shape, struct.dtype)  # of rows that the file lacks
      if rows[0] < rows[1]:
        out[: rows[1] - rows[0]] = files[0][slice(*rows), where[1]]
      return out
    out = np.empty(shape, struct.dtype)
    each = out if copies else out[None]
    for x, part, file in zip(each, parts[chosen], files[chosen], strict=True):
      where = layout.slices(part, size, letters)
      x[...] = layout.from_hf(part, size, letters, file[where])
    return out

  with (opened or _slices)(found) as files:
    return put_on(struct, lambda index: functools.partial(block, index))


@contextlib.contextmanager
def _slices(tensors: list[Tensor]):
  """Tensors to cut; their pages are unmapped at the end."""
  with _damage(tensors[0].file), contextlib.ExitStack() as stack:
    opened = [safe_open(x.file, framework='np') for x in tensors]
    found = zip(map(stack.enter_context, opened), tensors, strict=True)
    yield [f.get_slice(x.name) for f, x in found]


@contextlib.contextmanager
def _damage(path: str):
  """An error of reading as one line."""
  try:
    yield
  except (SafetensorError, OSError) as e:
    reason = ' '.join(str(e).split())
    raise UserError(
      f'{path} is absent, truncated or corrupt: {reason}; download it again.'
    ) from e
