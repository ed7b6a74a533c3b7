"""The mesh, and where every array lives on it.

Two axes: `data` splits prompts, and parameters too (fully sharded data
parallelism); `model` splits heads, feed-forward columns and vocabulary. XLA
inserts the collectives; the numbers do not depend on the mesh.
"""

from collections.abc import Callable
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from bond_jax.errors import UserError
from bond_jax.types import Array

# A parameter larger than this must be split: norms are a few kilobytes.
WHOLE_BYTES = 2**24

# The first pattern found in a parameter's path decides. Axes that lead those of
# the rule (stacked layers, the 3 of qkv) are never split.
RULES = (
  # [V, D], by the vocabulary: the head then moves hidden states, not the table.
  (r'embedder/input_embedding$', P(('model', 'data'), None)),
  (r'embedder/input_embedding$', P('model', 'data')),
  (r'(q|qkv)_einsum/(w|lora_delta)$', P('model', 'data', None)),  # [N, D, H]
  (r'kv_einsum/(w|lora_delta)$', P(None, 'data', None)),  # [2, K, D, H]
  (r'attn_vec_einsum/(w|lora_delta)$', P('model', None, 'data')),  # [N, H, D]
  (r'gating_einsum(_lora_delta)?$', P(None, 'model', 'data')),  # [2, F, D]
  (r'linear(_lora_delta)?$', P('model', 'data')),  # [F, D]
  # Adapters, A [..., r] and B [..., r, ...]: as their weights where these are
  # split over `model`, and over `data` as FSDP splits anything.
  (r'attn_vec_einsum/lora_a$', P('model', None, 'data')),  # [N, H, r]
  (r'linear_lora_a$', P('model', 'data')),  # [F, r]
  (r'(q|kv|qkv|gating)_einsum.lora_a$', P('data', None)),  # [D, r]
  (r'(q|qkv)_einsum/lora_b$', P('data', 'model', None)),  # [r, N, H]
  (r'kv_einsum/lora_b$', P('data', None, None)),  # [r, K, H]
  (r'gating_einsum_lora_b$', P('data', 'model')),  # [r, F]
  (r'(attn_vec_einsum/|linear_)lora_b$', P(None, 'data')),  # [r, D]
  # What Gemma 3n and 4 have beside that; see models/library.py.
  (r'per_layer(_input)?_embeddings?$', P('model', None, 'data')),  # [V, L, P]
  (r'per_layer_(input|model)_projection/w$', P('data', None, 'model')),
  (r'per_layer_(input_gate|projection)/w$', P('data', 'model')),  # [D, P]
  (r'altup_(unembed_)?projection_\d$', P('data', 'model')),  # [D, D]
  (r'linear_(left|right)/w$', P('data', None)),
  (r'k_einsum/w$', P(None, 'data', None)),  # [K, D, H]
  (r'mlp/gating_einsum/w$', P('model', None, None, 'data')),  # [E, 2, F, D]
  (r'mlp/linear/w$', P('model', None, 'data')),  # [E, F, D]
  (r'(router_logits|modality_router)/w$', P('data', None)),  # [D, E]
  (r'(correction|prediction)_coefs$', P()),
  (r'scalar_head/[wb]$', P()),
  (r'scale$', P()),  # norms: a few hundred numbers
  (r'^(.*/)?(step|count)$', P()),  # optimizer and step counters
)


def _within_part(rule: P) -> P:
  """A rule without the axis `data`."""
  return P(
    *(
      tuple(a for a in axes if a != 'data')
      if isinstance(axes, tuple)
      else None if axes == 'data' else axes
      for axes in rule
    )
  )  # fmt: skip


# The same for parameters as the sampler holds them, `Policy.prepare`: whole on
# every part of `data`, since a sampler reads them for each token. Matrices are
# turned, what is summed over first; names that are not here are as above.
SAMPLER_RULES = (
  (r'(q|qkv)_einsum/(turned|lora_delta)$', P('model', None)),  # [D, N, H]
  (r'kv_einsum/(turned|lora_delta)$', P('model', None)),  # [D, 2, K, H]
  (r'attn_vec_einsum/turned$', P('model', None, None)),  # [N, H, D]
  (r'mlp/turned/\d$', P(None, 'model')),  # [D, F]
  (r'gating_einsum_lora_delta$', P(None, 'model')),  # [2, D, F]
  *((pattern, _within_part(rule)) for pattern, rule in RULES),
)


def make_mesh(data: int, model: int, devices: Any = None) -> Mesh:
  """A mesh of data x model devices; data = -1 takes all that are left.

  `devices` are those that are here, or others that a program is compiled for.
  Of several slices of TPUs each has whole parts of `data`.
  """
  if model < 1 or (data < 1 and data != -1):
    raise UserError(
      f'mesh data={data} x model={model}: both must be 1 or more, data=-1'
      ' apart.'
    )
  devices = jax.devices() if devices is None else devices
  if data == -1:
    data = max(1, len(devices) // model)
  if data * model > len(devices) or len(devices) % (data * model):
    raise UserError(
      f'mesh data={data} x model={model} needs {data * model} devices, and'
      f' there are {len(devices)}; choose data and model whose product'
      ' divides that (data=-1 uses all).'
    )
  devices = devices[: data * model]
  names, types = ('data', 'model'), (AxisType.Auto,) * 2
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices == 1:
    return jax.make_mesh(
      (data, model), names, axis_types=types, devices=devices
    )
  if data % slices:
    raise UserError(
      f'mesh data={data} x model={model} is on {slices} slices, which split'
      f' `data`: it must be a multiple of {slices}.'
    )
  grid = mesh_utils.create_hybrid_device_mesh(
    (data // slices, model), (slices, 1), devices
  )
  return Mesh(grid, names, axis_types=types)


def reshaped(mesh: Mesh, data: int, model: int) -> Mesh:
  """A mesh of another shape over the devices of `mesh`, in the same order.

  Of data and model one may be -1, for all that the other leaves.
  """
  size = mesh.size
  if data == -1:
    data = size // max(1, model)
  elif model == -1:
    model = size // max(1, data)
  if data < 1 or model < 1 or data * model != size:
    raise UserError(
      f'sampling_mesh data={data} x model={model} has to use the {size} devices'
      ' of the mesh, all of them; data=-1 or model=-1 takes what is left.'
    )
  return Mesh(
    mesh.devices.reshape(data, model), mesh.axis_names,
    axis_types=mesh.axis_types,
  )  # fmt: skip


def path_name(path) -> str:
  """A key path as 'a/b/0/c'."""
  names = [getattr(k, 'key', getattr(k, 'name', None)) for k in path]
  indices = [getattr(k, 'idx', '') for k in path]
  return '/'.join(
    str(i if n is None else n) for n, i in zip(names, indices, strict=True)
  )


def spec(
  name: str, shape: tuple[int, ...], mesh: Mesh, rules: Any = RULES
) -> P:
  """The partition of one array; a UserError when no rule fits it.

  Of several rules for one name the first that divides the array decides. Of
  the last, an axis that the mesh does not divide stays whole: heads are few,
  and a model axis larger than their number may still split the rest.
  """
  found = [rule for pattern, rule in rules if re.search(pattern, name)]
  if not found:
    raise UserError(
      f'no sharding rule matches {name!r} of shape {shape}; add one to'
      ' bond_jax/devices/sharding.py:RULES.'
    )
  for rule in found:
    axes = (None,) * (len(shape) - len(rule)) + tuple(rule)
    whole = [_divides(n, a, mesh) for n, a in zip(shape, axes, strict=True)]
    if all(whole):
      break
  return P(*(a if ok else None for a, ok in zip(axes, whole, strict=True)))


def check_split(tree: Any, mesh: Mesh) -> None:
  """Refuses a tree of parameters of which a large array would not be split.

  A UserError for one of more than WHOLE_BYTES that is whole on every device.
  """

  def check(path, x):
    name, size = path_name(path), math.prod(x.shape) * x.dtype.itemsize
    shards = NamedSharding(mesh, spec(name, x.shape, mesh))
    whole = shards.shard_shape(x.shape) == x.shape
    if whole and mesh.size > 1 and size > WHOLE_BYTES:
      raise UserError(
        f'{name} of shape {x.shape} ({size / 1e6:.0f} MB) would be whole on'
        f' each of {mesh.size} devices: mesh {dict(mesh.shape)} divides none'
        ' of the axes that its rule in bond_jax/devices/sharding.py:RULES'
        ' splits; choose mesh.data and mesh.model that do.'
      )

  jax.tree_util.tree_map_with_path(check, tree)


def _divides(size: int, axes: Any, mesh: Mesh) -> bool:
  names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
  return size % math.prod(mesh.shape[name] for name in names) == 0


def for_sampler(tree: Any, mesh: Mesh) -> Any:
  """A tree as `Policy.prepare` gives it, in its shards, inside of `jit`."""

  def put(path, x):
    axes = spec(path_name(path), x.shape, mesh, rules=SAMPLER_RULES)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, axes))

  return jax.tree_util.tree_map_with_path(put, tree)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of a tree of arrays or their shapes."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec(path_name(path), x.shape, mesh)),
    tree,
  )


def tree_structs(tree: Any, mesh: Mesh, dtype: Any = None) -> Any:
  """The same as jax.ShapeDtypeStruct with them; a dtype replaces the tree's."""

  def struct(x, shards):
    wanted = x.dtype if dtype is None else jnp.dtype(dtype)
    return jax.ShapeDtypeStruct(x.shape, wanted, sharding=shards)

  return jax.tree.map(struct, tree, tree_shardings(tree, mesh))


def initialised(init: Callable[[Array], Any], key: Array, mesh: Mesh) -> Any:
  """init(key), created in its shards.

  CPUs do not optimise the program: it runs once, and to make random numbers
  fast takes XLA longer (22 s for the adapters of Gemma 3 270M, not 3).
  """
  shards = tree_shardings(jax.eval_shape(init, key), mesh)
  cpu = mesh.devices.flat[0].platform == 'cpu'
  options = {'xla_backend_optimization_level': 0} if cpu else None
  return jax.jit(init, out_shardings=shards, compiler_options=options)(key)


def to_host(tree: Any) -> Any:
  """The same arrays in the memory of the hosts, each shard with its device.

  CPUs have no other.
  """
  return _moved(tree, 'pinned_host')


def to_device(tree: Any) -> Any:
  """Arrays that `to_host` moved, on their devices."""
  return _moved(tree, 'device')


def _moved(tree: Any, kind: str) -> Any:
  if all(
    d.platform == 'cpu' for x in jax.tree.leaves(tree) for d in x.devices()
  ):
    return tree
  return _placed(tree, kind)


def _placed(tree: Any, kind: str) -> Any:
  shards = jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)
  return jax.jit(lambda tree: tree, out_shardings=shards)(tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def by_row(mesh: Mesh) -> NamedSharding:
  """Splits the leading axis over `data`."""
  return NamedSharding(mesh, P('data'))


def data_size(x: Array) -> int:
  """The parts into which the mesh splits the rows of x, inside of `jit`.

  The mesh is that of the arrays that the function was called with; 1 without
  one, or where it does not divide the rows.
  """
  size = jax.typeof(x).sharding.mesh.shape.get('data', 1)
  return 1 if len(x) % size else size


def split_rows(x: Array) -> Array:
  """x, its leading axis split over `data` and no other, inside of `jit`.

  Where XLA has to choose, it may follow the parameters instead, which `data`
  splits by features, and gather the rows of all devices on each.
  """
  return x if data_size(x) == 1 else _constrained(x, P('data'))


def whole(x: Array) -> Array:
  """x, all of it on each device, inside of `jit`."""
  return _constrained(x, P())


def split_last(x: Array) -> Array:
  """x, its last axis split over all devices where they divide it."""
  mesh = jax.typeof(x).sharding.mesh
  if x.shape[-1] % max(1, mesh.size):
    return x
  return _constrained(x, P(*(None,) * (x.ndim - 1), ('model', 'data')))


def _constrained(x: Array, axes: P) -> Array:
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, axes))


def check_batch(name: str, size: int, mesh: Mesh, micro_batches: int) -> None:
  """Refuses a batch that the mesh or the micro-batches do not divide."""
  if micro_batches < 1:
    raise UserError(
      f'{name} is split into micro-batches, 1 or more; got {micro_batches}.'
    )
  n = mesh.shape['data'] * micro_batches
  if size <= 0 or size % n:
    low, high = size - size % n, size + -size % n
    advice = f'{low} or {high}' if low > 0 else f'{max(high, n)}'
    raise UserError(
      f'{name} ({size}) must be a positive multiple of {n}, the'
      f" {mesh.shape['data']} devices on mesh axis 'data' times"
      f' {micro_batches} micro-batches; use {advice}.'
    )


def put_on(
  struct: jax.ShapeDtypeStruct,
  read: Callable[[tuple[slice, ...]], Callable[[], Any]],
) -> Array:
  """An array in the shape and the sharding of `struct`, read shard by shard.

  `read(slices)` starts to read a shard and returns a function that waits for
  its numbers. All are started first; each distinct shard is read once.
  """
  devices: dict[tuple, list] = {}
  where = struct.sharding.addressable_devices_indices_map(struct.shape)
  for device, index in where.items():
    bounds = tuple(
      s.indices(n)[:2] for s, n in zip(index, struct.shape, strict=True)
    )
    devices.setdefault(bounds, []).append(device)
  waits = {b: read(tuple(slice(*ends) for ends in b)) for b in devices}
  shards = []
  for bounds, owners in devices.items():
    found = waits.pop(bounds)()  # free again once it is on its devices
    shards += [jax.device_put(found, device) for device in owners]
  return jax.make_array_from_single_device_arrays(
    struct.shape, struct.sharding, shards
  )


def put_batch(tree: Any, mesh: Mesh) -> Any:
  """Host arrays with a leading batch axis, onto the mesh by rows.

  They are the whole batch on every host, which takes of it what it holds.
  """

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, by_row(mesh), lambda i: x[i])

  return jax.tree.map(put, tree)
