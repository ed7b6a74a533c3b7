"""The stacked parameter tree of `models/gemma.py` as single arrays, and back.

Files hold one array per layer, or their own kind of stacks. Between them and
our tree every array bears its nested name, the gemma library's for it:
'layer_3/mlp/linear' for one layer of 'stacked_layers/attention_type_3/...'.
A config of None means a tree of the library's, which has those names already.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bond_jax.devices.sharding import path_name
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.models.gemma.configs import in_patterns
from bond_jax.types import Array, Params

Shape = tuple[int, ...]

STACKED = re.compile(r'stacked_layers/attention_type_(\d+)/(.+)')


def nested(
  config: gemma.Config | None, params: Params
) -> Iterator[tuple[str, Array | jax.ShapeDtypeStruct]]:
  """Yields (nested name, array), layer by layer; takes shapes as well.

  Arrays of a stacked layer are slices, split over the devices as the stack.
  """
  flat = {
    path_name(path): x
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  if config is None:
    yield from flat.items()
    return
  for name, x in flat.items():
    if not name.startswith(('stacked_layers/', 'layer_')):
      yield name, x
  period = len(config.pattern)
  stacked = in_patterns(config)
  for j in range(config.layers):
    prefix = f'layer_{j}/'
    if j < stacked:
      prefix = f'stacked_layers/attention_type_{j % period}/'
    for name, x in flat.items():
      if name.startswith(prefix):
        layer = _layer(x, j // period) if j < stacked else x
        yield f'layer_{j}/{name[len(prefix) :]}', layer


def assemble(
  config: gemma.Config,
  like: Params,
  read: Callable[[str, jax.ShapeDtypeStruct], Array],
) -> Params:
  """Builds the stacked tree from arrays with nested names.

  Args:
    config: sizes.
    like: the tree as jax.ShapeDtypeStruct, shardings included.
    read: (nested name, struct) -> that array, in the shape, dtype and sharding
      of the struct; that of one layer where `like` has a stack of them.

  Returns:
    Arrays as in `like`. A stack is allocated once and filled layer by layer.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, struct: assemble_leaf(config, path_name(path), struct, read),
    like,
  )


def check(
  path: str, found: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> None:
  """Raises a UserError unless both, nested name -> shape, are the same.

  It shows the first ten differences, and which known model this looks like.
  """
  if found == wanted:
    return
  known = {
    name: shapes(sizes)
    for name, sizes in gemma.CONFIGS.items()
    if (sizes.features,)
    in (found.get('final_norm/scale'), wanted.get('final_norm/scale'))
  }
  looks = [name for name, sizes in known.items() if sizes == found]
  says = [name for name, sizes in known.items() if sizes == wanted]
  cause = ''
  if looks:
    cause = f': this looks like {looks[0]}, the config says '
    cause += says[0] if says else 'something else'
  raise UserError(
    f'{path} does not hold the model of the config{cause}.'
    + differences(found, wanted)
  )


def differences(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
  """The first ten names that do not have the wanted shape, a line each."""
  names = [*wanted, *(name for name in found if name not in wanted)]
  pairs = [(k, found.get(k, 'absent'), wanted.get(k, 'absent')) for k in names]
  rows = [f'\n  {k}: found {a}, wanted {b}' for k, a, b in pairs if a != b]
  more = f'\n  and {len(rows) - 10} more' if len(rows) > 10 else ''
  return ''.join(rows[:10]) + more


@functools.lru_cache
def shapes(config: gemma.Config) -> dict[str, Shape]:
  """Nested name -> shape of every array."""
  return {k: x.shape for k, x in nested(config, init_shapes(config))}


@functools.lru_cache
def init_shapes(config: gemma.Config) -> Params:
  """The stacked tree as jax.ShapeDtypeStruct, float32; not to be changed."""
  return jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))


def assemble_leaf(
  config: gemma.Config | None,
  name: str,
  struct: jax.ShapeDtypeStruct,
  read: Callable[[str, jax.ShapeDtypeStruct], Array],
) -> Array:
  """One array of `assemble`, by its name in the stacked tree."""
  match = STACKED.fullmatch(name)
  if config is None or not match:
    return read(name, struct)
  whole = _zeros(struct.shape, struct.dtype, struct.sharding)()
  for g in range(struct.shape[0]):
    layer = g * len(config.pattern) + int(match[1])
    one = read(f'layer_{layer}/{match[2]}', _layer(struct, g))
    whole = _put(struct.sharding)(whole, one, g)
    whole.block_until_ready()  # or the next layer is read beside this one
  return whole


def _layer(stack, index: int):
  """One layer of a stack of layers, or the struct of one."""
  sharding = getattr(stack, 'sharding', None)
  if isinstance(sharding, NamedSharding):
    spec = PartitionSpec(*sharding.spec[1:])
    sharding = NamedSharding(sharding.mesh, spec)
  if isinstance(stack, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=sharding)
  if isinstance(sharding, NamedSharding):
    return _take(sharding)(stack, index)
  return stack[index]


@functools.lru_cache
def _zeros(shape, dtype, sharding):
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache
def _take(sharding):
  take = lambda stack, i: jax.lax.dynamic_index_in_dim(stack, i, 0, False)
  return jax.jit(take, out_shardings=sharding)


@functools.lru_cache
def _put(sharding):
  put = lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)
  return jax.jit(put, out_shardings=sharding, donate_argnums=0)
