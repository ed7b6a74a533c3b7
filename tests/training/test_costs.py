"""The closed form of a step's cost, against the programs that a run has."""

import dataclasses
import functools

from conftest import random_params, TINY
import jax
import jax.numpy as jnp
import optax
import pytest
import toy

from bond_jax.algorithms import bond, jbond, wind
from bond_jax.devices import sharding
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.training import costs, distil, setups
from bond_jax.training import step as step_lib
from bond_jax.types import Frozen, Prompts
from configs import demo

P, T, BATCH, MICRO = 3, 5, 8, 2
# Wide enough that products outweigh all else.
SIZES = dataclasses.replace(
  TINY['gemma2'], vocab_size=2048, used_vocab=None, features=128,
  feed_forward=512, heads=4, kv_heads=2, head_size=32, window=64, layers=2,
)  # fmt: skip
JBOND = jbond.make(
  num_anchor=2, backward_weight=0.5, anchor_rate=0.02, drift_weight=0.0
)


def policy():
  return gemma.make(
    SIZES, temperature=1.0, dtype='float32', scan=False, remat='none'
  )


def cost(algorithm=JBOND, epochs=1):
  return costs.cost(algorithm, prompt=P, length=T, epochs=epochs)


def make_prompts(batch=BATCH):
  tokens = jnp.ones((batch, P), jnp.int32)
  return Prompts(
    tokens, tokens > 0, jnp.arange(batch), jnp.ones(batch, jnp.float32)
  )


def test_jbond_is_three_decodes_one_anchor_row_and_two_trained():
  found = cost()
  assert found.decodes == 3
  assert found.anchor_rows == 1
  assert found.reference_rows == 0 == found.quantile_rows
  assert found.trained_rows == 2
  assert found.decoded == 3 * T
  assert found.prefilled == 2 * P  # by the policy, and by the anchor


def test_a_rollout_is_shared_by_its_epochs():
  algorithm = wind.make(
      kl_weight=0.2, step_size=1.0, risk='squared', constant='fitted',
      num_anchor=4, rows=2,
  )  # fmt: skip
  one, two = (cost(algorithm, epochs=n) for n in (1, 2))
  assert (one.decodes, two.decodes) == (4, 2)
  assert (one.scored, two.scored) == (2 * two.scored, one.scored / 2)
  assert one.trained == two.trained == 2 * (P + T - 1)


LEARNED = dict(
    n=4, backward_weight=0.5, drift_weight=0.0, num_policy=1,
    quantile='learned', num_quantile=4, zero='half', second_term=False,
    anchor='fixed',
)  # fmt: skip


@pytest.mark.parametrize('name', ['jbond', 'learned'])
def test_tokens_are_those_that_the_programs_process(name):
  """Every call of the model is seen as the step is traced."""
  algorithm = JBOND if name == 'jbond' else bond.make(**LEARNED)
  seen, model = [], policy()

  def counted(name, f):
    def call(*args):
      tokens = args[1] if name == 'hidden' else args[0]
      seen.append((name, tokens.size))
      return f(*args)

    return call

  def decoder(params):
    plain = model.decoder(params)
    return plain._replace(
      prefill=counted('prefill', plain.prefill),
      step=counted('step', plain.step),
    )

  setup = step_lib.Setup(
      policy=model._replace(
          hidden=counted('hidden', model.hidden), decoder=decoder
      ), algorithm=algorithm,
      optimizer=optax.sgd(0.1), length=T, stop=Stop(()), rollouts=1, epochs=1,
      micro_batches=MICRO, chunk=1024,
  )  # fmt: skip
  frozen = Frozen(jax.tree.map(jnp.asarray, random_params(SIZES, 0)), {})
  state = step_lib.init_state(setup, frozen)
  prompts, key = make_prompts(), jax.random.key(1)

  def traced(f, *args):
    seen.clear()
    out = jax.eval_shape(functools.partial(f, setup, state, frozen), *args)
    return out, lambda kind: sum(n for name, n in seen if name == kind)

  found = cost(algorithm)
  drawn, tokens = traced(step_lib.rollout, prompts, key, 0)
  assert tokens('prefill') == found.prefilled * BATCH
  # Of the T tokens drawn the first is the prompt's; a loop is traced once.
  assert tokens('step') * T == found.decoded * BATCH
  assert drawn.mask.shape[1] == found.decodes
  reward = jnp.zeros(drawn.mask.shape[:2])
  (batch, _), tokens = traced(step_lib.weigh, prompts, drawn, reward)
  assert tokens('hidden') * MICRO == found.scored * BATCH
  assert batch.mask.shape[1] == found.trained_rows
  _, tokens = traced(step_lib.update, batch)
  assert tokens('hidden') * MICRO == found.trained * BATCH


@pytest.mark.parametrize('name', demo.ALGORITHMS)
def test_every_algorithm_has_a_cost(name):
  config = demo.get_config(f'algorithm={name}')
  found = costs.of_config(config, setups.make_algorithm(config))
  assert found.decodes > 0 and found.trained_rows > 0
  drawn = config.train.steps * config.train.batch * found.decodes
  assert drawn == 92_160  # as the config says of all


@pytest.mark.long
def test_a_run_counts_its_tokens_and_shows_its_cost():
  """Counted tokens are within what the closed form allows."""
  found = toy.summary(toy.finished(), 'train')['cost']
  assert (found['decodes'], found['trained_rows']) == (3, 2)
  for row in toy.rows(toy.finished(), 'train'):
    decoded = row['tokens/decoded']
    assert decoded == pytest.approx(8 * 3 * row['length/completion'])
    assert 0 < decoded <= 8 * found['decoded']
    assert 0 < row['tokens/trained'] <= 8 * 2 * 6
    assert row['tokens/trained'] < decoded


@pytest.mark.long
def test_counters_are_the_closed_form_where_nothing_ends():
  model, mesh = policy(), sharding.make_mesh(1, 1)
  setup = step_lib.Setup(
      policy=model, algorithm=JBOND, optimizer=optax.sgd(0.1), length=T,
      stop=Stop(()), rollouts=1, epochs=1, micro_batches=MICRO, chunk=1024,
  )  # fmt: skip
  frozen, key = (
    Frozen(jax.tree.map(jnp.asarray, random_params(SIZES, 0)), {}),
    jax.random.key(1),
  )
  state = distil.init_state(setup, frozen, mesh)
  programs = distil.make_programs(setup, mesh, state)
  prompts = sharding.put_batch(make_prompts(), mesh)
  drawn = programs.rollout(state, frozen, prompts, key, 0)
  reward = sharding.put_batch(drawn.completion[..., 0] % 7.0, mesh)
  batch, row = programs.weigh(state, frozen, prompts, drawn, reward)
  _, other = programs.update(state, frozen, batch)
  found = cost()
  assert row['tokens/decoded'] == BATCH * found.decoded
  prompts_read = found.trained_rows * (P - 1)
  assert other['tokens/trained'] == BATCH * (found.trained - prompts_read)
