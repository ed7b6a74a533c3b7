"""What is kept, what comes back, and what is refused."""

from conftest import core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.types import TrainState


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(data=4, model=2)


def state_of(seed, mesh):
  """A state with leaves of several shapes, dtypes and shardings."""
  rng = np.random.default_rng(seed)
  params = {
    'embedder': {'input_embedding': rng.normal(size=(8, 4)).astype('f4')},
    'final_norm': {'scale': rng.normal(size=(4,)).astype('f4')},
  }
  state = TrainState(
    step=np.int32(seed),
    params=params,
    anchor=jax.tree.map(lambda x: x / 3, params),
    opt_state=({'mu': params}, {'count': np.int32(seed + 1)}, {}),
    aux={},
  )
  return jax.device_put(state, sharding.tree_shardings(state, mesh))


def saved(folder, scores, mesh):
  """Saves steps 1, 2, ... with these scores; the state of step i is i's."""
  with checkpoint.manager(folder) as checkpoints:
    for step, score in enumerate(scores, 1):
      state = state_of(step, mesh)
      checkpoint.save(checkpoints, step, state, {'next': [step]}, score)
  return folder


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.structure(a) == jax.tree.structure(b)


def test_the_last_step_comes_back_into_its_shards(tmp_path, mesh):
  folder = saved(tmp_path, [0.1, 0.2], mesh)
  with checkpoint.manager(folder) as checkpoints:
    state, data = checkpoint.restore(checkpoints, state_of(9, mesh))
  same(state, state_of(2, mesh))
  assert data == {'next': [2]}
  like = state_of(9, mesh)
  assert all(
    jax.tree.leaves(
      jax.tree.map(lambda a, b: a.sharding == b.sharding, state, like)
    )
  )
  embedding = state.params['embedder']['input_embedding']
  assert embedding.addressable_shards[0].data.shape == (1, 4)


def test_the_policy_alone_comes_back_on_another_mesh(tmp_path, mesh):
  folder = saved(tmp_path, [0.1, 0.2], mesh)
  like = state_of(9, sharding.make_mesh(data=1, model=1)).params
  with checkpoint.manager(folder) as checkpoints:
    params = checkpoint.restore_params(checkpoints, like, 1)
  same(params, state_of(1, mesh).params)
  assert len(jax.tree.leaves(params)[0].sharding.device_set) == 1


@pytest.mark.parametrize(
  'scores, kept',
  core(
    2,
    [
      ([-0.5, -0.1, -0.2, -0.3, -0.4], [2, 4, 5]),  # losses with their sign
      ([0.1, 0.2, 0.3, 0.4, 0.5], [4, 5]),  # the best is the last
      ([0.5, 0.1, 0.2, 0.3, 0.4], [1, 4, 5]),  # the best is old
      ([0.1, 0.9, 0.2, 0.3, 0.4], [2, 4, 5]),
    ],
  ),
)
def test_the_last_two_and_the_best_stay(tmp_path, mesh, scores, kept):
  folder = saved(tmp_path, scores, mesh)
  with checkpoint.manager(folder) as checkpoints:
    assert sorted(checkpoints.all_steps()) == kept
    assert checkpoint.choose(checkpoints, 'last') == 5
    best = int(np.argmax(scores)) + 1
    assert checkpoint.choose(checkpoints, 'best') == best
    assert checkpoint.choose(checkpoints, str(kept[0])) == kept[0]


def test_one_saved_on_request_displaces_none(tmp_path, mesh):
  """It has no score: the newest until the next, and never the best."""
  scores = [0.5, 0.1, 0.2, None]
  folder = saved(tmp_path, scores, mesh)
  with checkpoint.manager(folder) as checkpoints:
    assert sorted(checkpoints.all_steps()) == [1, 2, 3, 4]
    assert checkpoint.choose(checkpoints, 'last') == 4
    assert checkpoint.choose(checkpoints, 'best') == 1
    checkpoint.save(checkpoints, 5, state_of(5, mesh), {}, 0.3)
  with checkpoint.manager(folder) as checkpoints:
    assert sorted(checkpoints.all_steps()) == [1, 3, 5]


def test_a_checkpoint_that_is_not_there(tmp_path, mesh):
  folder = saved(tmp_path, [0.1, 0.2], mesh)
  with checkpoint.manager(folder) as checkpoints:
    for which in ('3', '-1', 'first', '', '5.0'):
      with pytest.raises(UserError, match='there are 1, 2, .*"last".*"best"'):
        checkpoint.choose(checkpoints, which)


def test_a_folder_without_checkpoints(tmp_path):
  with (
    checkpoint.manager(tmp_path) as checkpoints,
    pytest.raises(UserError, match='holds no checkpoint'),
  ):
    checkpoint.choose(checkpoints, 'last')


def test_what_is_saved_may_be_donated_at_once(tmp_path, mesh):
  """The save is asynchronous, and the next step overwrites the state."""
  bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = state_of(1, mesh)
  with checkpoint.manager(tmp_path) as checkpoints:
    checkpoint.save(checkpoints, 1, state, {}, 0.0)
    for _ in range(20):
      state = bump(state)
    jax.block_until_ready(state)
  with checkpoint.manager(tmp_path) as checkpoints:
    restored, _ = checkpoint.restore(checkpoints, state_of(9, mesh))
  same(restored, state_of(1, mesh))
  assert not jnp.array_equal(
    state.params['final_norm']['scale'], restored.params['final_norm']['scale']
  )
