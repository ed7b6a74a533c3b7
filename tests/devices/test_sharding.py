"""Every parameter has a rule, and every mesh can hold it."""

from conftest import TINY
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.training import optimizer
from bond_jax.types import TrainState

CONFIGS = {**gemma.CONFIGS, **TINY}
MESHES = [(8, 1), (4, 2), (2, 4)]


def state_shapes(config):
  """The whole TrainState under Adam, as shapes."""
  adam = optimizer.adam(
      steps=10, learning_rate=1e-3, warmup_steps=2, decay_to=0.1, b1=0.9,
      b2=0.99, epsilon=1e-8, weight_decay=0.1, clip=1.0,
  )  # fmt: skip

  def init():
    params = gemma.init(config, jax.random.key(0))
    return TrainState(jnp.int32(0), params, params, adam.init(params), {})

  return jax.eval_shape(init)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_leaf_has_a_rule_that_divides(name):
  shapes = state_shapes(CONFIGS[name])
  for data, model in MESHES:
    mesh = sharding.make_mesh(data, model)
    shards = sharding.tree_shardings(shapes, mesh)
    jax.tree.map(lambda s, x: s.shard_shape(x.shape), shards, shapes)
    assert shards.step.is_fully_replicated
    assert shards.params == shards.anchor


@pytest.mark.parametrize('mesh', MESHES)
def test_the_large_parameters_are_split_over_all_devices(mesh):
  shapes = jax.eval_shape(
    lambda: gemma.init(gemma.CONFIGS['gemma3_1b'], jax.random.key(0))
  )
  shards = sharding.tree_shardings(shapes, sharding.make_mesh(*mesh))
  sizes = jax.tree.map(
    lambda s, x: (x.size, np.prod(s.shard_shape(x.shape))), shards, shapes
  )
  sizes = np.array(
    jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple))
  )
  sizes = sizes[sizes[:, 0] > 1e6]
  assert len(sizes) > 10
  # One key-value head: its projection is split over `data` alone.
  whole, parts = sizes.sum(0)
  assert parts < 1.1 * whole / 8
  assert (sizes[:, 1] <= sizes[:, 0] / mesh[0]).all()


def test_arrays_arrive_in_their_shards(tiny):
  _, params = tiny('gemma2')
  mesh = sharding.make_mesh(4, 2)
  placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
  embedding = placed['embedder']['input_embedding']
  assert {s.data.shape for s in embedding.addressable_shards} == {(11, 4)}
  np.testing.assert_array_equal(
    embedding, params['embedder']['input_embedding']
  )


def test_an_unknown_parameter_is_named():
  mesh = sharding.make_mesh(8, 1)
  tree = {'layer_0': {'attn': {'novel': {'w': jnp.zeros((2, 3))}}}}
  with pytest.raises(UserError, match=r'layer_0/attn/novel/w.*\(2, 3\)'):
    sharding.tree_shardings(tree, mesh)


def test_an_axis_that_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(2, 4)
  spec = sharding.spec('q_einsum/w', (6, 16, 4), mesh)
  assert tuple(spec) == (None, 'data', None)
  spec = sharding.spec('stacked_layers/x/q_einsum/w', (3, 8, 16, 4), mesh)
  assert tuple(spec) == (None, 'model', 'data', None)


def test_make_mesh():
  mesh = sharding.make_mesh(-1, 2)
  assert dict(mesh.shape) == {'data': 4, 'model': 2}
  assert dict(sharding.make_mesh(1, 1).shape) == {'data': 1, 'model': 1}
  for wrong in ((3, 1), (8, 2), (-1, 16)):
    with pytest.raises(UserError, match='there are 8'):
      sharding.make_mesh(*wrong)


def test_check_batch_names_the_nearest_sizes():
  mesh = sharding.make_mesh(4, 2)
  sharding.check_batch('train.batch', 24, mesh, 2)
  for size, advice in ((20, 'use 16 or 24'), (5, 'use 8'), (0, 'use 8')):
    with pytest.raises(UserError, match=advice) as e:
      sharding.check_batch('train.batch', size, mesh, 2)
    assert f'train.batch ({size})' in str(e.value)
    assert '\n' not in str(e.value)


def test_put_batch_splits_rows_over_data():
  mesh = sharding.make_mesh(4, 2)
  x = np.arange(16).reshape(8, 2)
  out = sharding.put_batch({'x': x}, mesh)['x']
  assert {s.data.shape for s in out.addressable_shards} == {(2, 2)}
  np.testing.assert_array_equal(out, x)


def test_nothing_large_is_whole_on_every_device():
  """A name of a large array that no axis of the mesh divides is an error."""
  mesh = sharding.make_mesh(8, 1)
  odd = {'mlp': {'linear': jax.ShapeDtypeStruct((4097, 1025), jnp.float32)}}
  with pytest.raises(UserError, match=r'mlp/linear .*17 MB.* each of 8'):
    sharding.check_split(odd, mesh)
  sharding.check_split(odd, sharding.make_mesh(1, 1))
  small = {'mlp': {'linear': jax.ShapeDtypeStruct((409, 105), jnp.float32)}}
  sharding.check_split(small, mesh)
  for config in gemma.CONFIGS.values():
    shapes = jax.eval_shape(lambda c=config: gemma.init(c, jax.random.key(0)))
    for shape in MESHES:
      sharding.check_split(shapes, sharding.make_mesh(*shape))


def test_a_mesh_is_reshaped_over_the_same_devices():
  mesh = sharding.make_mesh(4, 2)
  other = sharding.reshaped(mesh, 1, -1)
  assert dict(other.shape) == {'data': 1, 'model': 8}
  assert list(other.devices.flat) == list(mesh.devices.flat)
  assert dict(sharding.reshaped(mesh, -1, 2).shape) == {'data': 4, 'model': 2}
  for data, model in [(3, -1), (8, 2), (0, 8), (-1, -1)]:
    with pytest.raises(UserError, match='sampling_mesh .* the 8 devices'):
      sharding.reshaped(mesh, data, model)


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason='its CPU compiler cannot do that'
)
def test_what_rests_on_the_hosts_comes_back():
  """As on an accelerator; a CPU device has these kinds of memory too."""
  mesh = sharding.make_mesh(1, 1)
  tree = {'linear': jnp.arange(64.0).reshape(8, 8)}
  tree = jax.device_put(tree, sharding.tree_shardings(tree, mesh))
  there = sharding._placed(tree, 'pinned_host')
  assert there['linear'].sharding.memory_kind == 'pinned_host'
  back = sharding._placed(there, 'device')
  assert sharding.to_host(tree) is tree
  assert back['linear'].sharding == tree['linear'].sharding
  np.testing.assert_array_equal(back['linear'], tree['linear'])
