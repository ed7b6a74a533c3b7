"""Gemma weights from and to files, straight into the shards of a mesh.

Official checkpoints are Orbax folders in one of three layouts: *flat*, one key
per module ('transformer/layer_0/mlp/linear' -> 'w'), as most public releases
are; *nested*, as the gemma library initialises its models; *stacked*, like
flat, with the layers of one position in the attention pattern along a leading
axis. All become the tree of models/gemma by way of nested names,
'layer_0/mlp/linear', one array at a time.
"""

from collections.abc import Callable, Collection
import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import time
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from bond_jax.data import gguf
from bond_jax.devices.sharding import path_name, put_on
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import paths
from bond_jax.types import Array, Params
from bond_jax.weights.stacks import (
  assemble_leaf,
  check,
  nested,
  shapes,
  STACKED,
)

# Where the public releases lie; those of Gemma 1 are on Kaggle only.
_RELEASED = [n for n in gemma.CONFIGS if re.fullmatch(r'gemma[23]_\d+[bm]', n)]
_RELEASED += ['gemma3n_e2b', 'gemma3n_e4b', 'gemma4_e2b', 'gemma4_e4b']
_RELEASED += ['gemma4_26b_a4b', 'gemma4_31b']
RELEASES = {
  f'{name}_{kind}': (
    f'gs://gemma-data/checkpoints/{name.replace("_", "-")}-{kind}'
  )
  for name in _RELEASED
  for kind in ('pt', 'it')
}

# Image and sound: parameters that text models leave where they are.
_MEDIA = re.compile(
  r'(SigLiPFromPatches_0|vision_encoder|audio_encoder)/|embedder/(mm|audio)_'
)
_MARKER = '_METADATA'  # of an Orbax folder
_CHUNK = 16 * 2**20  # bytes; what a reader holds beside the shards it fills


def load(path: str, config: gemma.Config | None, like: Params) -> Params:
  """Loads a model from a checkpoint, a Hugging Face folder or a GGUF file.

  Each array goes into its shards as it is read; beside them the host holds at
  most the largest array. Every process reads its own shards alone.

  Args:
    path: a local folder or GGUF file, a gs:// address, a public release
      ('gemma3_1b_it') or a Hugging Face repository ('owner/name@commit').
    config: the sizes that the weights must have; None where `like` is a tree
      of the gemma library, of which only official checkpoints exist.
    like: the tree of `gemma.init`, or the library's, as jax.ShapeDtypeStruct,
      with the dtype and the shardings of the result.

  Returns:
    Arrays as in `like`. A UserError says what is wrong with a path, with
    weights of another model, and with damaged files.
  """
  path = find(path)
  is_file = gguf.is_file(path)
  if not is_file and (path.startswith('gs://') or not is_hugging_face(path)):
    return _load_official(path, config, like)
  if config is None:
    kind = 'in GGUF' if is_file else 'of Hugging Face'
    raise UserError(
      f'{path} is {kind}; models of the gemma library are read from its own'
      ' checkpoints.'
    )
  if is_file:
    from bond_jax.weights.gguf import reader
  else:
    from bond_jax.weights.huggingface import reader
  return reader.load(path, config, like)


def save_official(
  params: Params, config: gemma.Config | None, path: str
) -> None:
  """Writes the flat layout of the public releases, in the dtype of `params`.

  A tree of the gemma library (config None) is written nested, as it is. The
  folder appears when it is complete; an existing one is refused. Layers are
  unstacked on the devices, which need room for a second copy.
  """
  folder = epath.Path(path if '://' in path else os.path.abspath(path))
  if _check_access(folder, folder.exists):
    raise UserError(f'{path} exists; name a folder that does not.')
  if '://' not in path:
    check_space(str(folder), sum(x.nbytes for x in jax.tree.leaves(params)))
  tree = params if config is None else _flat(params, config)
  args = ocp.args.StandardSave(
    tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
  )
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      checkpointer.save(folder, args=args)
  except BaseException as e:
    if jax.process_index() == 0:  # what Orbax would have renamed in the end
      _remove(f'{folder}.orbax-checkpoint-tmp')
    if not isinstance(e, Exception):
      raise
    raise UserError(f'cannot write {path}: {_reason(e)}.') from e


def _remove(path: str) -> None:
  """Removes a folder into which threads of a failed save may still write."""
  for _ in range(20):
    shutil.rmtree(path, ignore_errors=True)
    time.sleep(0.05)
    if not os.path.exists(path):
      return


def _flat(params: Params, config: gemma.Config) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, array in nested(config, params):
    *module, leaf = f'transformer/{name}'.split('/')
    if module[-1] == 'mlp':
      module, leaf = [*module, leaf], 'w'
    tree.setdefault('/'.join(module), {})[leaf] = array
  return tree


# -- Reading official checkpoints


def _load_official(
  path: str, config: gemma.Config | None, like: Params
) -> Params:
  stores = _open(path)
  period, where, found = _places(path, stores)
  wanted = {_nested_name(k): x.shape for k, x in nested(config, like)}
  check(path, found, wanted)

  def read(key, first, struct):
    with _damage(path, key):
      return _read(stores[key][first], struct)

  def read_nested(name, struct):
    key, g = where[name]
    return read(key, slice(None) if g is None else g, struct)

  def leaf(path, struct):
    name = path_name(path)
    # A stack that cuts the layers as ours does: in one go. It may hold one
    # more layer, which we keep apart.
    if config and name in stores and period == len(config.pattern):
      return read(name, slice(0, struct.shape[0]), struct)
    return assemble_leaf(config, _nested_name(name), struct, read_nested)

  return jax.tree_util.tree_map_with_path(leaf, like)


def _places(path: str, stores: dict[str, ts.TensorStore]):
  """The period of stacked layers, and by nested name: where it is, its shape.

  Where it is: the array that holds it, and its index in the stack or None.
  """
  kinds = [int(m[1]) for m in map(STACKED.fullmatch, stores) if m]
  period = max(kinds, default=0) + 1
  where: dict[str, tuple[str, int | None]] = {}
  for key, store in stores.items():
    match = STACKED.fullmatch(key)
    places: dict[str, int | None] = {key: None}
    if match:
      layers = range(int(match[1]), store.shape[0] * period, period)
      places = {f'layer_{j}/{match[2]}': g for g, j in enumerate(layers)}
    _check_once(path, places.keys() & where.keys())
    where |= {name: (key, g) for name, g in places.items()}
  found = {
    name: stores[key].shape[0 if g is None else 1 :]
    for name, (key, g) in where.items()
  }
  return period, where, found


def sizes_of(path: str) -> gemma.Config:
  """The model that a checkpoint's shapes are of; a UserError if not ours."""
  path = find(path)
  _, _, found = _places(path, _open(path))
  for sizes in gemma.CONFIGS.values():
    if shapes(sizes) == found:
      return sizes
  raise UserError(
    f'{path} holds no model of {", ".join(gemma.CONFIGS)}, in their sizes as'
    ' released; such weights need a config that says what they are.'
  )


def _open(path: str) -> dict[str, ts.TensorStore]:
  """The arrays of an Orbax folder, of which none is read yet.

  They are under their nested names, or under 'stacked_layers/...'. Orbax tells
  where they lie, and tensorstore reads them: Orbax itself cannot restore one
  layer of a stack, casts on the host, and takes missing files for zeros.
  """
  folder = epath.Path(path)
  has = lambda folder: _check_access(folder, (folder / _MARKER).exists)
  inside = has(folder / 'default')  # of a training run
  if has(folder) and inside:
    raise UserError(
      f'{path} has {_MARKER}, and so has the folder default in it: two'
      f' checkpoints; name {path}/default, or a folder without it.'
    )
  if inside:
    folder /= 'default'
  elif not has(folder):
    names = [] if '://' in path else sorted(os.listdir(path))
    names = [f for f in names if os.path.exists(f'{path}/{f}/{_MARKER}')]
    raise UserError(
      f'{path} is no checkpoint: it has neither {_MARKER} (Orbax) nor'
      ' config.json and safetensors (Hugging Face)'
      + (f'; name one of those in it: {", ".join(names)}.' if names else '.')
    )
  with _damage(path, _MARKER):
    metadata = json.loads((folder / _MARKER).read_text())
    keys = [
      tuple(str(part['key']) for part in entry['key_metadata'])
      for entry in metadata['tree_metadata'].values()
    ]
    if () in keys:
      raise ValueError('an array without a name')
    use_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(folder)
  if any(key[0] == 'params' for key in keys):  # beside an optimizer's state
    keys = [key for key in keys if key[0] == 'params']
  context = ocp.type_handlers.get_ts_context(use_ocdbt=use_ocdbt)
  opening = {}
  for key in keys:
    info = ocp.type_handlers.ParamInfo(
      name='.'.join(key),
      parent_dir=folder,
      is_ocdbt_checkpoint=use_ocdbt,
      use_zarr3=metadata.get('use_zarr3', False),
      ts_context=context,
    )
    spec = ocp.type_handlers.get_json_tspec_read(
      info,
      use_ocdbt,
      # Old writers left arrays of zeros out; since then a gap is an error.
      raise_array_data_missing_error=metadata.get(
        'store_array_data_equal_to_fill_value', False
      ),
    )
    name = _nested_name('/'.join(key))
    if not _MEDIA.match(name):
      _check_once(path, {name} & opening.keys())
      opening[name] = ts.open(spec, open=True, context=context)
  stores = {}
  for name, future in opening.items():
    with _damage(path, name):
      stores[name] = future.result()
  return stores


def _check_once(path: str, names: Collection[str]) -> None:
  """Refuses an array that a checkpoint holds in two layouts, or twice."""
  if names:
    raise UserError(
      f'{path} holds {min(names)} twice, in two layouts or under two prefixes;'
      ' save it again with one of them.'
    )


def _nested_name(key: str) -> str:
  name = re.sub(r'^(params/)?(transformer/)?', '', key)
  return re.sub(r'(/mlp/(?:linear|gating_einsum))/w$', r'\1', name)


def _read(store: ts.TensorStore, struct: jax.ShapeDtypeStruct) -> Array:
  """Reads an array into the shards of `struct`, and casts it there."""
  # All at once: shards that lie in one chunk of the file share its reading.
  array = put_on(struct, lambda index: store[index].read().result)
  if array.dtype == struct.dtype:
    return array
  return _cast(struct.dtype, struct.sharding)(array)


@functools.lru_cache
def _cast(dtype, sharding):
  return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)


# -- Paths and errors


def find(path: str) -> str:
  """The folder, address or repository that `path` means."""
  path = paths.expanded(path)
  if os.path.isdir(path) or (gguf.is_file(path) and os.path.exists(path)):
    return os.path.abspath(path)
  if path.startswith('gs://') or re.fullmatch(r'[\w-][\w.-]*/[^/]+', path):
    return path
  if path in RELEASES:
    return RELEASES[path]
  if re.fullmatch(r'gemma_[27]b_(pt|it)', path):
    raise UserError(
      f'{path}: Gemma 1 is released on Kaggle; download its Flax weights and'
      ' name the folder.'
    )
  raise UserError(
    f'{path} is no folder or GGUF file here, no gs:// address, no Hugging Face'
    f' repository and no public release; known are {", ".join(RELEASES)}.'
  )


def is_hugging_face(path: str) -> bool:
  """Whether a path is of Hugging Face; refuses a folder that is both."""
  if not os.path.isdir(path):
    return True  # a repository
  found = [
    n for n in os.listdir(path) if n == 'config.json' or '.safetensors' in n
  ]
  inside = [_MARKER, f'default/{_MARKER}']
  inside = [n for n in inside if os.path.exists(os.path.join(path, n))]
  if found and inside:
    raise UserError(
      f'{path} has {found[0]} (Hugging Face) and {inside[0]} (Orbax): two'
      ' checkpoints in one folder; name a folder that holds one of them.'
    )
  return bool(found)


def _check_access(folder: epath.Path, ask: Callable[[], bool]) -> bool:
  """What `ask` returns; a UserError where the folder cannot be asked."""
  try:
    return ask()
  except ImportError as e:
    raise UserError(
      f'{folder}: gs:// needs the package gcsfs; pip install gcsfs, or copy'
      ' the folder here and name it.'
    ) from e
  except Exception as e:
    raise UserError(f'cannot read {folder}: {_reason(e)}.') from e


def check_space(path: str, size: int) -> None:
  """Refuses a local path on a disk without `size` free bytes."""
  parent = next(p for p in pathlib.Path(path).parents if p.exists())
  free = shutil.disk_usage(parent).free
  if free < size:
    raise UserError(
      f'cannot write {path}: it needs {size / 1e9:.2f} GB, and'
      f' {free / 1e9:.2f} GB are free in {parent}; name another disk.'
    )


@contextlib.contextmanager
def _damage(path: str, name: str):
  """An error of reading `name` as one line."""
  try:
    yield
  except jax.errors.JaxRuntimeError:  # of a device, not of the file
    raise
  except Exception as e:
    raise UserError(
      f'cannot read {name} in {path} ({_reason(e)}): it is damaged, incomplete'
      ' or out of reach; fetch the checkpoint again.'
    ) from e


def _reason(error: BaseException) -> str:
  line = (str(error).splitlines() or [''])[0]
  return f'{type(error).__name__}: {line[:200]}'
