"""Official checkpoints in and out, in every layout, and what is wrong with
those that cannot be read."""

import json
import math
import os
import pathlib
import resource
import shutil

from conftest import core, random_params, TINY
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from toy import listing

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.weights import official as weights
from bond_jax.weights import stacks

# After an error Orbax's own threads end late.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

MEDIA = np.full((3, 4), 7.0, np.float32)


def flatten(tree, prefix=''):
  """{'a/b': leaf} of nested dicts."""
  out = {}
  for key, x in tree.items():
    out |= flatten(x, f'{prefix}{key}/') if isinstance(x, dict) else {
      prefix + key: x
    }  # fmt: skip
  return out


def official(config, params, layout):
  """What the gemma library would write, with parameters for images."""
  tree = {k: dict(params[k]) for k in ('embedder', 'final_norm')}
  blocks = [layer for _, layer in gemma.layers(config, params)]
  tree |= {f'layer_{j}': block for j, block in enumerate(blocks)}
  tree['embedder'] |= {'mm_input_projection': {'w': MEDIA}}
  if layout == 'nested':
    return {**tree, 'vision_encoder': {'embedding': {'kernel': MEDIA}}}
  out = {'SigLiPFromPatches_0/embedding': {'kernel': MEDIA}}
  for name, x in flatten(tree).items():
    if '/mlp/' in name:
      name += '/w'
    module, _, leaf = name.rpartition('/')
    out.setdefault(f'transformer/{module}', {})[leaf] = x
  if layout == 'flat':
    return out
  period = len(config.pattern)
  modules = {k.split('/', 2)[2] for k in out if '/layer_' in k}
  for i in range(min(period, config.layers)):
    for module in modules:
      parts = [
        out.pop(f'transformer/layer_{j}/{module}')
        for j in range(i, config.layers, period)
      ]
      key = f'transformer/stacked_layers/attention_type_{i}/{module}'
      out[key] = {leaf: np.stack([p[leaf] for p in parts]) for leaf in parts[0]}
  return out


def write(tree, path, *, one_file_each=False):
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=not one_file_each)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
  return str(path)


def without(path, name, files='*'):
  """Deletes such files of the arrays whose name contains `name`."""
  gone = [
    f
    for f in pathlib.Path(path).rglob(files)
    if f.is_file() and name in str(f.parent)
  ]
  assert gone
  for f in gone:
    f.unlink()


def shardings(config, data=4, model=2):
  mesh = sharding.make_mesh(data, model)
  return sharding.tree_shardings(stacks.init_shapes(config), mesh)


def load(path, config, data=4, model=2, dtype='float32'):
  mesh = sharding.make_mesh(data, model)
  like = sharding.tree_structs(stacks.init_shapes(config), mesh, dtype)
  return weights.load(str(path), config, like)


def same(a, b):
  """Bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path, tiny):
  """(config, parameters, folder) of a tiny Gemma 3, saved by ourselves."""
  config, params = tiny('gemma3')
  path = str(tmp_path / 'saved')
  weights.save_official(params, config, path)
  return config, params, path


@pytest.mark.parametrize(
  'name, layout',
  [
    *(('gemma3', layout) for layout in ('flat', 'nested', 'stacked')),
    ('gemma2', 'stacked'),
    ('gemma1_multi_head', 'flat'),
  ],
)
def test_every_layout_loads_into_its_shards(name, layout, tiny, tmp_path):
  """And no byte of the image parameters is read: there is none left."""
  config, params = tiny(name)
  tree = official(config, params, layout)
  path = write(tree, tmp_path / 'it', one_file_each=True)
  without(path, 'mm_input_projection')
  without(path, 'vision_encoder' if layout == 'nested' else 'SigLiP')
  loaded = load(path, config)
  same(loaded, params)
  wanted = shardings(config)
  assert jax.tree.map(lambda x: x.sharding, loaded) == wanted
  parts = loaded['embedder']['input_embedding'].addressable_shards
  rows, features = config.vocab_size, config.features
  half = rows // 2 if rows % 2 == 0 else rows
  assert {s.data.shape for s in parts} == {(half, features // 4)}


@pytest.mark.long
def test_other_meshes(saved):
  config, params, path = saved
  for data, model in ((8, 1), (2, 4), (4, 1)):  # the last on four of eight
    loaded = load(path, config, data, model)
    same(loaded, params)
    for x in jax.tree.leaves(loaded):
      assert len(x.sharding.device_set) == data * model


def test_stacks_of_another_pattern(tiny, tmp_path):
  """Five layers stacked in threes are our two pairs and one more."""
  config, params = tiny('gemma3')
  pairs = gemma.Config(**{**vars(config), 'pattern': ('local', 'global')})
  blocks = [layer for _, layer in gemma.layers(config, params)]
  stack = lambda *x: np.stack(x)
  expected = {
    **{k: params[k] for k in ('embedder', 'final_norm')},
    'stacked_layers': {
      'attention_type_0': jax.tree.map(stack, blocks[0], blocks[2]),
      'attention_type_1': jax.tree.map(stack, blocks[1], blocks[3]),
    },
    'layer_4': blocks[4],
  }
  path = write(official(config, params, 'stacked'), tmp_path / 'threes')
  same(load(path, pairs), expected)
  own = write(params, tmp_path / 'own')  # our tree as our runs keep it
  same(load(own, pairs), expected)
  same(load(own, config), params)


def test_the_parameters_of_a_training_run(tiny, tmp_path):
  config, params = tiny('gemma3')
  state = {
    'params': official(config, params, 'nested'),
    'opt_state': {'mu': MEDIA},
    'step': np.zeros((1,), np.int32),
  }
  write(state, tmp_path / 'run' / 'default')
  same(load(tmp_path / 'run', config), params)


@pytest.mark.parametrize(
  'stored, wanted',
  core(1, [('float32', 'bfloat16'), ('bfloat16', 'float32')]),
)
def test_dtype_is_the_wanted_one(stored, wanted, tiny, tmp_path):
  config, params = tiny('gemma3')
  params = jax.tree.map(lambda x: jnp.asarray(x, stored), params)
  path = write(official(config, params, 'flat'), tmp_path / 'it')
  loaded = load(path, config, dtype=wanted)
  assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {wanted}
  same(loaded, jax.tree.map(lambda x: x.astype(wanted), params))


@pytest.mark.parametrize(
  'name, dtype',
  core(1, [('gemma2', 'float32'), *((name, 'bfloat16') for name in TINY)]),
)
def test_saving_and_loading_changes_no_bit(name, dtype, tiny, tmp_path):
  """Saved from eight devices, loaded on four."""
  config, params = tiny(name)
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  placed = jax.device_put(params, shardings(config))
  path = str(tmp_path / 'new' / 'model')
  weights.save_official(placed, config, path)
  assert os.listdir(tmp_path / 'new') == ['model']
  tree = ocp.PyTreeCheckpointHandler().metadata(pathlib.Path(path)).tree
  expected = official(config, params, 'flat')
  expected.pop('SigLiPFromPatches_0/embedding')
  expected.pop('transformer/embedder/mm_input_projection')
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(tree) == shapes(expected)
  same(load(path, config, 4, 1, dtype), params)


def test_loaded_arrays_may_be_donated(saved):
  """No two devices share the memory of a replicated array."""
  config, params, path = saved
  loaded = load(path, config)
  double = jax.jit(
    lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0
  )
  expected = jax.tree.map(lambda x: 2 * x, params)
  for shard in double(loaded)['final_norm']['scale'].addressable_shards:
    np.testing.assert_array_equal(shard.data, expected['final_norm']['scale'])


# -- Trees and single arrays


@pytest.mark.parametrize('name', TINY)
def test_nested_names_and_back(name):
  config = TINY[name]
  params = jax.device_put(random_params(config, 1), shardings(config))
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    params,
  )
  arrays = dict(stacks.nested(config, params))
  for name, x in arrays.items():
    assert x.sharding.spec == sharding.spec(name, x.shape, x.sharding.mesh)
  tree = {k: params[k] for k in ('embedder', 'final_norm')}
  for j, (_, layer) in enumerate(gemma.layers(config, params)):
    tree[f'layer_{j}'] = layer
  same(arrays, flatten(tree))

  structs = dict(stacks.nested(config, like))
  asked = []

  def read(name, struct):
    x = arrays[name]
    got = (struct.shape, struct.dtype, struct.sharding)
    assert got == (x.shape, x.dtype, x.sharding)
    assert struct == structs[name]
    asked.append(name)
    return x

  back = stacks.assemble(config, like, read)
  assert sorted(asked) == sorted(arrays)
  same(back, params)
  assert jax.tree.map(lambda x: x.sharding, back) == shardings(config)


# -- What the user can mend


def refused(path, config, *words):
  """The message of the UserError, which contains `words`."""
  with pytest.raises(UserError) as e:
    load(path, config)
  message = str(e.value)
  for word in words:
    assert word in message, message
  return message


def test_paths_that_are_none(tmp_path, tiny):
  config, _ = tiny('gemma3')
  for name in ('gemma3_1b', str(tmp_path / 'none')):
    assert '\n' not in refused(name, config, name, 'gemma3_1b_it')
  refused('gemma_2b_it', config, 'Kaggle')
  refused('owner/model', config, 'owner/model', 'Hugging Face', 'commit')
  (tmp_path / 'empty').mkdir()
  message = refused(tmp_path / 'empty', config, 'no checkpoint', '_METADATA')
  assert '\n' not in message


def test_the_folder_above_the_checkpoint(saved):
  config, params, path = saved
  above = os.path.dirname(path)
  refused(above, config, 'name one of those in it: saved.')
  weights.save_official(params, config, f'{path}2')
  refused(above, config, 'name one of those in it: saved, saved2.')


def test_a_folder_with_two_checkpoints(saved):
  """Which one is meant nobody can tell."""
  config, params, path = saved
  weights.save_official(params, config, f'{path}/default')
  assert '\n' not in refused(path, config, path, 'two checkpoints', 'default')
  same(load(f'{path}/default', config), params)
  shutil.rmtree(f'{path}/default')
  for name in ('config.json', 'model-00001-of-00002.safetensors'):
    pathlib.Path(path, name).touch()
    message = refused(path, config, name, '(Orbax)', 'two checkpoints')
    assert '\n' not in message
    os.makedirs(f'{path}3')
    os.rename(path, f'{path}3/default')  # as a training run leaves it
    pathlib.Path(f'{path}3', name).touch()
    refused(f'{path}3', config, name, 'default/_METADATA (Orbax)')
    os.rename(f'{path}3/default', path)
    shutil.rmtree(f'{path}3')
    os.remove(os.path.join(path, name))


@pytest.mark.parametrize('other', ['nested', 'stacked'])
def test_an_array_in_two_layouts(tiny, tmp_path, other):
  config, params = tiny('gemma3')
  tree = official(config, params, 'flat')
  more = official(config, jax.tree.map(jnp.zeros_like, params), other)
  path = write({**more, **tree}, tmp_path / 'it')
  assert '\n' not in refused(path, config, path, 'twice')


def test_releases_have_addresses(tiny):
  assert weights.RELEASES['gemma4_26b_a4b_pt'].endswith('gemma4-26b-a4b-pt')
  assert weights.RELEASES['gemma3_270m_it'] == (
    'gs://gemma-data/checkpoints/gemma3-270m-it'
  )
  assert len(weights.RELEASES) == 28
  try:
    import gcsfs  # noqa: F401
  except ImportError:
    refused('gemma3_1b_it', tiny('gemma3')[0], 'gcsfs', 'gemma3-1b-it')


def test_weights_of_another_size(saved):
  config, _, path = saved
  other = gemma.Config(**{**vars(config), 'feed_forward': 25, 'layers': 6})
  row = 'layer_4/mlp/linear: found (24, 16), wanted (25, 16)'
  message = refused(path, other, path, row)
  # Two differ in each of five layers; eleven are missing from the sixth.
  assert message.count('\n') == 11 and message.endswith('and 11 more')


@pytest.mark.long
def test_sizes_are_those_of_the_reports():
  """Parameters beside the embedding; of Gemma 3 in millions."""
  reports = {
    'gemma_2b': 1_981_884_416,
    'gemma_7b': 7_751_248_896,
    'gemma2_2b': 2_024_517_888,
    'gemma2_9b': 8_324_201_984,
    'gemma2_27b': 26_047_480_320,
    'gemma3_1b': 698,
    'gemma3_4b': 3_209,
    'gemma3_12b': 10_759,
    'gemma3_27b': 25_600,
  }
  for name, expected in reports.items():
    sizes = stacks.shapes(gemma.CONFIGS[name])
    count = sum(map(math.prod, sizes.values()))
    count -= math.prod(sizes['embedder/input_embedding'])
    assert expected == (round(count / 1e6) if expected < 1e6 else count), name


def test_weights_that_look_like_another_model():
  shapes = stacks.shapes(gemma.CONFIGS['gemma3_4b'])
  with pytest.raises(UserError) as e:
    stacks.check('here', shapes, stacks.shapes(gemma.CONFIGS['gemma3_1b']))
  assert 'this looks like gemma3_4b, the config says gemma3_1b' in str(e.value)
  stacks.check('here', shapes, stacks.shapes(gemma.CONFIGS['gemma3_4b']))
  shapes = {k: v for k, v in shapes.items() if 'layer_3/attn' not in k}
  with pytest.raises(UserError, match='layer_3/attn.*found absent, wanted'):
    stacks.check('here', shapes, stacks.shapes(gemma.CONFIGS['gemma3_4b']))


def test_a_missing_array_is_not_zeros(tiny, tmp_path):
  config, params = tiny('gemma3')
  tree = official(config, params, 'flat')
  path = write(tree, tmp_path / 'it', one_file_each=True)
  without(path, 'layer_3/attn/q_einsum', files='[0-9]*')
  refused(path, config, 'layer_3/attn/q_einsum/w', path, 'incomplete')


def test_truncated_and_corrupt_files(saved):
  config, _, path = saved
  (data,) = pathlib.Path(path, 'd').iterdir()
  whole = data.read_bytes()
  data.write_bytes(whole[: len(whole) // 2])
  assert '\n' not in refused(path, config, path, 'fetch')
  data.write_bytes(os.urandom(len(whole)))
  assert '\n' not in refused(path, config, path, 'fetch')
  data.write_bytes(whole)
  load(path, config)
  marker = pathlib.Path(path, '_METADATA')
  marker.write_text(marker.read_text()[:50])
  assert '\n' not in refused(path, config, '_METADATA', 'fetch')


def test_metadata_that_names_no_array_is_one_line(saved):
  config, _, path = saved
  file = pathlib.Path(path, '_METADATA')
  metadata = json.loads(file.read_text())
  metadata['tree_metadata']['x'] = {'key_metadata': []}
  file.write_text(json.dumps(metadata))
  refused(path, config, '_METADATA', 'an array without a name')


def test_an_existing_folder_stays_as_it_is(saved):
  config, params, path = saved
  before = listing(path)
  with pytest.raises(UserError, match='saved exists; name a folder'):
    weights.save_official(params, config, path)
  assert listing(path) == before


def test_no_space(tmp_path):
  """Refused before the first byte: a table of four petabytes, in a few."""
  config = gemma.Config(**{**vars(TINY['gemma3']), 'vocab_size': 1 << 46})
  params = random_params(TINY['gemma3'], 0)
  huge = np.broadcast_to(np.float32(0), (1 << 46, 16))
  params['embedder']['input_embedding'] = huge
  with pytest.raises(UserError, match=r'needs \d{7}\.\d\d GB, and') as e:
    weights.save_official(params, config, str(tmp_path / 'new'))
  assert '\n' not in str(e.value)
  assert not os.listdir(tmp_path)


def test_a_write_that_fails_leaves_nothing(saved, tmp_path):
  """Files may not grow beyond 4 kB: what a full disk does, in the midst."""
  config, params, path = saved
  shutil.rmtree(path)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
  try:
    with pytest.raises(UserError, match='cannot write .*saved') as e:
      weights.save_official(params, config, path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(e.value)
  assert not os.listdir(tmp_path)
