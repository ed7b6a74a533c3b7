"""The closed form of a step's operations, against XLA's own count."""

import dataclasses

from conftest import TINY
import jax
import jax.numpy as jnp
import pytest

from bond_jax.algorithms import jbond
from bond_jax.models.gemma import model as gemma
from bond_jax.models.log_probs import log_probs
from bond_jax.sizing import operations
from bond_jax.types import Prompts

P, T, BATCH = 3, 5, 8
# Wide enough that products outweigh all else.
SIZES = dataclasses.replace(
  TINY['gemma2'], vocab_size=2048, used_vocab=None, features=128,
  feed_forward=512, heads=4, kv_heads=2, head_size=32, window=64, layers=2,
)  # fmt: skip
JBOND = jbond.make(
  num_anchor=2, backward_weight=0.5, anchor_rate=0.02, drift_weight=0.0
)


def phases(algorithm=JBOND, sizes=SIZES, remat='none', epochs=1, teacher=None):
  return operations.phases(
    algorithm, sizes, prompt=P, length=T, epochs=epochs, remat=remat,
    teacher=teacher,
  )  # fmt: skip


def total(*args, **kwargs):
  return sum(part.flops for part in phases(*args, **kwargs).values())


def test_a_rollout_is_shared_by_its_epochs():
  one, two = phases(), phases(epochs=2)
  assert one['update'] == two['update']
  for name in ('rollout', 'weigh'):
    assert one[name] == pytest.approx([2 * x for x in two[name]])


def flops(f, *args):
  """As XLA counts them, before it fuses; of loops, one turn."""
  return jax.jit(f).lower(*args).cost_analysis()['flops']


@pytest.mark.parametrize('remat', ['none', 'all'])
def test_operations_are_those_that_xla_counts(remat):
  """Scored and trained rows, unrolled and in one tile; then one decoded token.

  What the closed form leaves out, norms and softmax, is some per cent here.
  """
  model = gemma.make(
    SIZES, temperature=1.0, dtype='float32', scan=False, remat=remat
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jnp.ones((BATCH, P), jnp.int32)
  prompts = Prompts(
    tokens, tokens > 0, jnp.arange(BATCH), jnp.ones(BATCH, jnp.float32)
  )
  shape = jax.ShapeDtypeStruct((BATCH, 1, T), jnp.int32)
  mask = jax.ShapeDtypeStruct((BATCH, 1, T), bool)

  def score(params, tokens, mask):
    return log_probs(model, params, prompts, tokens, mask, chunk=1024).sum()

  closed = parts(remat)
  forward = flops(score, params, shape, mask) / BATCH
  assert forward == pytest.approx(closed['scored'], rel=0.07)
  assert forward > closed['scored']
  both = flops(jax.value_and_grad(score), params, shape, mask) / BATCH
  assert both == pytest.approx(closed['trained'], rel=0.07)
  assert both > closed['trained']

  def decode(params, token, cache):
    decoder = model.decoder(params)
    hidden, _ = decoder.step(token, token > 0, cache)
    return decoder.logits(hidden)

  def begin(params):
    decoder = model.decoder(params)
    _, prefix = decoder.prefill(prompts.tokens, prompts.mask)
    return decoder.start(prefix, 1, T - 1)

  params = jax.eval_shape(model.prepare, params)
  cache = jax.eval_shape(begin, params)
  token = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  one = flops(decode, params, token, cache) / BATCH
  assert one == pytest.approx(closed['decoded'], rel=0.07)
  assert one > closed['decoded']


def parts(remat):
  """Of a scored row, a trained row and a decoded token, from whole steps."""
  only = lambda **changes: total(JBOND._replace(**changes), remat=remat)
  base = only()
  two = lambda reward, win: jnp.zeros((len(reward), 3), int)
  longer = only(num_policy=2) - base
  # A completion more: T - 1 tokens through the layers, T through the head.
  head = operations.work(SIZES).head
  return dict(
    scored=only(anchor_rows=(0, 1)) - only(anchor_rows=(0,)),
    trained=only(select=two) - base,
    decoded=(longer - head) / (T - 1),
  )


def test_a_teacher_does_its_own_work():
  """What is drawn from it and scored under it is as of a model of its size."""
  large = dataclasses.replace(SIZES, layers=5, features=256, kv_heads=1)
  fixed = JBOND._replace(
    reference_rows=(0, 1),
    select=lambda reward, win: jnp.zeros((len(reward), 2), int),
    anchor=JBOND.anchor._replace(moves=False),
  )
  found = phases(fixed, teacher=large)
  own = phases(fixed._replace(num_anchor=0))
  theirs = phases(fixed._replace(num_policy=0), sizes=large)
  add = lambda name: own['rollout'][name] + theirs['rollout'][name]
  assert found['rollout'].flops == pytest.approx(add(0))
  assert found['rollout'].cached == pytest.approx(add(2))
  times = operations.work(large).weights / operations.work(SIZES).weights
  assert found['rollout'].passes == pytest.approx(T + T * times)
  assert found['weigh'].flops == pytest.approx(theirs['weigh'].flops)
  assert found['weigh'].passes == pytest.approx(2 * times)
  assert found['update'] == own['update']
  # An anchor that moves is as large as the policy.
  moving = fixed._replace(anchor=JBOND.anchor, reference_rows=())
  assert phases(moving, teacher=large) == phases(moving)


def test_frozen_weights_have_no_gradient():
  """Of the three thirds of a trained row one is gone."""
  lora = dataclasses.replace(SIZES, lora_scale=1.0)
  full, less = total(), total(sizes=lora)
  row = P + T - 1
  layers = row * operations.work(SIZES).layers + operations.attention(
    SIZES, row, row
  )
  head = T * operations.work(SIZES).head
  assert full - less == pytest.approx(2 * (layers + head))


def test_weights_are_read_by_all_rows_at_once():
  """Two models' T passes; one pass that scores, two that train."""
  found = phases()
  passes = [part.passes for part in found.values()]
  assert passes == [2 * T, 1, 2]
  # Two models read the prompt's keys, three completions their own.
  keys = 2 * P + 3 * (T - 1)
  heads = SIZES.layers * SIZES.kv_heads * SIZES.head_size
  assert found['rollout'].cached == (T - 1) * keys * 2 * heads


def test_local_layers_keep_no_more_than_their_window():
  """Of two layers one is local: its columns are bounded, and so is the rest."""
  wide, narrow = (dataclasses.replace(SIZES, window=n) for n in (64, 2))
  assert operations.columns(wide, 10) == 20
  assert operations.columns(narrow, 10) == 12
  more, less = total(sizes=wide), total(sizes=narrow)
  fewer = (P - 2) + (T - 1 - 2)
  assert more - less == (
    3 * 4 * SIZES.heads * SIZES.head_size * (T - 1) * fewer
  )
