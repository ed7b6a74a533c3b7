"""One step of Best-of-N distillation, as pure functions.

    sample -> reward -> select -> score -> update -> move the anchor

`rollout`, `weigh` (select and score), `update` and `move_anchor` run on the
device; the reward, on the host, comes after the first. An iteration is one of
each, or, for an algorithm that trains on the anchor's completions alone,
several rollouts, several epochs of updates on them, and one move of the
anchor. Nothing here knows which algorithm runs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from bond_jax.algorithms.parts import ops, quantiles
from bond_jax.models import lora, scalar_head
from bond_jax.models.log_probs import log_probs
from bond_jax.models.sampling import Limits, sample
from bond_jax.models.stops import Stop
from bond_jax.training import micro_batches, step_metrics
from bond_jax.training import optimizer as optimizer_lib
from bond_jax.types import (
  Algorithm,
  Array,
  Frozen,
  Params,
  Policy,
  Prompts,
  Rollout,
  Rows,
  Scores,
  TrainState,
)


class Setup(NamedTuple):
  """What a step needs and no step changes."""

  policy: Policy
  algorithm: Algorithm
  optimizer: optax.GradientTransformation
  length: int  # T, new tokens at most
  stop: Stop
  rollouts: int  # batches drawn per iteration
  epochs: int  # updates on each of them
  micro_batches: int
  chunk: int  # tokens whose logits exist at one time, on each device
  slots: int = 0  # completions decoded side by side; 0 = all of them
  mesh: Mesh | None = None  # None = one device
  # Its devices in the shape in which they sample.
  sampling_mesh: Mesh | None = None
  # Lengths to which a micro-batch is padded: P and T, or j / buckets of both.
  buckets: int = 1
  # Each iteration begins with a new optimizer, and its schedule.
  restart: bool = False
  # What the reference is called with, where it is another model: a teacher.
  teacher: Policy | None = None


class Batch(NamedTuple):
  """One batch, weighed: all that an update looks at."""

  prompts: Prompts
  completion: Array  # i32[B, M, T]
  mask: Array  # bool[B, M, T]
  log_sampled: Array  # f32[B, M, T]
  own: Array  # bool[B, M], drawn from the policy
  rows: Rows
  quantile_target: Array  # f32[B, len(quantile_rows)], for the learned one


def init_state(
  setup: Setup, frozen: Frozen, start: Params | None = None
) -> TrainState:
  """The state before step 0: the policy is the reference, and the anchor too.

  Where the reference is a teacher, both are `start`. They are copies, since
  state is donated.
  """
  anchor, params = {}, frozen.reference if start is None else start
  if setup.algorithm.anchor.moves:
    view = setup.algorithm.anchor.view(params)
    anchor = jax.tree.map(lambda x: x.astype(jnp.float32), view)
  aux = {}
  if setup.algorithm.quantile_rows:
    model = scalar_head.init(on_base(setup, frozen).policy, params)
    aux = {'params': model, 'opt_state': setup.optimizer.init(model)}
  return TrainState(
    step=jnp.int32(0),
    params=jax.tree.map(jnp.copy, params),
    anchor=jax.tree.map(jnp.copy, anchor),
    opt_state=setup.optimizer.init(params),
    aux=aux,
  )


def anchor_of(
  setup: Setup, state: TrainState, frozen: Frozen
) -> tuple[Policy, Params]:
  """The anchor, of a setup `on_base`: the reference where it never moves."""
  if setup.algorithm.anchor.moves:
    return setup.policy, state.anchor
  return reference_of(setup, frozen)


def reference_of(setup: Setup, frozen: Frozen) -> tuple[Policy, Params]:
  """The reference, of a setup `on_base`: the teacher if there is one."""
  return setup.teacher or setup.policy, frozen.reference


def reads_reference(algorithm: Algorithm) -> bool:
  """Whether a rollout, a weighing or an update looks at the reference."""
  return not algorithm.anchor.moves or bool(algorithm.reference_rows)


def on_base(setup: Setup, frozen: Frozen) -> Setup:
  """The setup whose policy is called with what is trained alone."""
  return setup._replace(policy=lora.over(setup.policy, frozen.base))


def rollout(
  setup: Setup,
  state: TrainState,
  frozen: Frozen,
  prompts: Prompts,
  key: Array,
  index: Array,
) -> Rollout:
  """Samples K completions of each prompt: the policy's, then the anchor's.

  `index` counts the rollouts of an iteration from 0. An iteration has at least
  as many steps, so that no two rollouts of a run share a key.
  """
  setup, algorithm = on_base(setup, frozen), setup.algorithm
  key = jax.random.fold_in(key, state.step + index)
  anchor = anchor_of(setup, state, frozen)
  limits = Limits(setup.length, setup.stop, setup.slots, setup.sampling_mesh)
  parts = []
  for (policy, params), num, first in (
    ((setup.policy, state.params), algorithm.num_policy, 0),
    (anchor, algorithm.num_anchor, algorithm.num_policy),
  ):
    if not num:
      continue
    # One after the other: a device holds the weights and cache of one sampler.
    params, parts = jax.lax.optimization_barrier((params, parts))
    drawn = sample(policy, params, prompts, key, limits, num=num, first=first)
    parts.append(drawn)
  return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts)


def score(
  setup: Setup,
  state: TrainState,
  frozen: Frozen,
  prompts: Prompts,
  drawn: Rollout,
  judged: Array,
) -> tuple[Rollout, Scores]:
  """Selects the M rows that enter the loss, and scores those named for it.

  `judged` are the rewards f32[B, K] of `drawn`, which are compared, or f32[B,
  K, K], the probabilities with which a judge prefers one to another: of these
  each is worth how often it beats the others (Borda).
  """
  setup, algorithm = on_base(setup, frozen), setup.algorithm
  if judged.ndim == 3:
    reward, win = ops.borda(judged), judged
  else:
    reward, win = judged, ops.win_matrix(judged)
  index = algorithm.select(reward, win)
  chosen = jax.tree.map(lambda x: ops.take_rows(x, index), drawn)

  def of_rows(f, rows, *shape):
    """f32[B, len(rows), *shape] of the selected rows, by micro-batches."""
    if not rows:
      return jnp.zeros((len(reward), 0, *shape), jnp.float32)
    some = jax.tree.map(lambda x: x[:, list(rows)], chosen)
    batches = micro_batches.split(
      (prompts, some.completion, some.mask), setup.micro_batches
    )
    one = lambda carry, part, size: (carry, f(size, *part))
    _, out = micro_batches.fold(
      setup.buckets, one, (), batches, batches[0].mask, batches[2]
    )
    return micro_batches.join(out)

  def log_quantile(size, *x):
    params, x = state.aux['params'], micro_batches.trim(size, *x)
    return jax.nn.log_sigmoid(scalar_head.logits(setup.policy, params, *x))

  log_of = lambda policy, params: functools.partial(
    log_policy_of, setup._replace(policy=policy), params
  )
  t = drawn.mask.shape[-1]
  anchor = anchor_of(setup, state, frozen)
  reference = reference_of(setup, frozen)
  scores = Scores(
    reward=reward,
    win=win,
    index=index,
    log_sampled=chosen.log_prob,
    log_anchor=of_rows(log_of(*anchor), algorithm.anchor_rows, t),
    log_reference=of_rows(log_of(*reference), algorithm.reference_rows, t),
    log_quantile=of_rows(log_quantile, algorithm.quantile_rows),
    weight=prompts.weight,
  )
  return chosen, scores


def weigh(
  setup: Setup,
  state: TrainState,
  frozen: Frozen,
  prompts: Prompts,
  drawn: Rollout,
  judged: Array,
) -> tuple[Batch, dict[str, Array]]:
  """A rollout and what it is worth, as a batch to train on; metrics of it.

  All of it is weighed at once: baselines may be means over all prompts.
  """
  algorithm = setup.algorithm
  if setup.buckets > 1 and setup.micro_batches > 1:
    shards = setup.mesh.shape['data'] if setup.mesh else 1
    prompts, drawn, judged = micro_batches.by_length(
      setup.micro_batches, shards, prompts, drawn, judged
    )
  chosen, scores = score(setup, state, frozen, prompts, drawn, judged)
  reward = scores.reward
  rows, metrics = algorithm.weigh(scores)
  mine = ops.take_rows(reward, scores.index[:, list(algorithm.quantile_rows)])
  target = quantiles.at_most(mine, reward[:, algorithm.num_policy :]).mean(-1)
  batch = Batch(
    prompts=prompts,
    completion=chosen.completion,
    mask=chosen.mask,
    log_sampled=chosen.log_prob,
    own=scores.index < algorithm.num_policy,
    # A filler row may hold anything, and 0 * NaN is NaN, in gradients too.
    rows=ops.keep_rows(jax.lax.stop_gradient(rows), prompts.weight > 0),
    quantile_target=target,
  )
  shown = step_metrics.of_rollout(
    prompts, drawn, reward, scores.win, setup.algorithm.num_policy,
    setup.stop.cut(drawn.completion, drawn.mask),
  )  # fmt: skip
  return batch, {**metrics, **shown}


def update(
  setup: Setup, state: TrainState, frozen: Frozen, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step on a batch: the state, its anchor unmoved, and metrics.

  Where the loss or the gradient is not finite nothing moves but the step, and
  `skipped` is 1.
  """
  setup = on_base(setup, frozen)
  loss = functools.partial(loss_of, setup)
  opt_state = state.opt_state
  if setup.restart:
    begins = state.step % (setup.rollouts * setup.epochs) == 0
    opt_state = jax.tree.map(
      functools.partial(jnp.where, begins),
      setup.optimizer.init(state.params),
      opt_state,
    )
  params, opt_state, metrics, log_policy = _descend(
    setup, loss, state.params, opt_state, batch
  )
  metrics['sampler_gap'] = step_metrics.sampler_gap(
    batch.own * batch.prompts.weight[:, None], batch.log_sampled, log_policy
  )
  aux = state.aux
  if setup.algorithm.quantile_rows:
    aux, metrics['quantile/loss'] = _update_quantile(setup, aux, batch)
  state = TrainState(state.step + 1, params, state.anchor, opt_state, aux)
  return state, metrics


def loss_of(setup: Setup, params: Params, part: Batch, size):
  """The loss of each prompt f32[b], and log pi f32[b, M, T]: of a part."""
  log_policy = log_policy_of(
    setup, params, size, part.prompts, part.completion, part.mask
  )
  return setup.algorithm.loss(log_policy, part.rows), log_policy


def _update_quantile(setup: Setup, aux: Any, batch: Batch) -> tuple[Any, Array]:
  """One step of the learned quantile, on the rows that it was asked about."""
  rows = list(setup.algorithm.quantile_rows)

  def loss(params, part: Batch, size):
    x = part.completion[:, rows], part.mask[:, rows]
    x = micro_batches.trim(size, part.prompts, *x)
    logit = scalar_head.logits(setup.policy, params, *x)
    return quantiles.learned_loss(logit, part.quantile_target), logit

  params, opt_state, row, _ = _descend(
    setup, loss, aux['params'], aux['opt_state'], batch
  )
  return {'params': params, 'opt_state': opt_state}, row['loss']


def gradient_of(setup: Setup, loss, params: Params, batch: Batch):
  """The gradient of the weighted mean over prompts of loss(params, part, size).

  `loss` returns f32[b] and an array with that leading axis; it needs no more
  of the prompts and completions than `size`, see `micro_batches.fold`. Every
  micro-batch divides by the whole batch's weight: the accumulated gradient is
  exactly that of the batch. Returns it, the mean loss, and the arrays joined.
  """
  total = jnp.maximum(batch.prompts.weight.sum(), 1e-9)

  def share(params, part: Batch, size):
    value, array = loss(params, part, size)
    weight = part.prompts.weight
    return jnp.where(weight > 0, weight * value, 0.0).sum() / total, array

  def accumulate(gradient, part, size):
    one = jax.value_and_grad(share, has_aux=True)
    out, g = one(params, part, size)
    return jax.tree.map(jnp.add, gradient, g), out

  parts = micro_batches.split(batch, setup.micro_batches)
  zeros = jax.tree.map(jnp.zeros_like, params)
  gradient, (value, arrays) = micro_batches.fold(
    setup.buckets, accumulate, zeros, parts, parts.prompts.mask, parts.mask
  )
  return gradient, value.sum(), micro_batches.join(arrays)


def _descend(setup: Setup, loss, params: Params, opt_state, batch: Batch):
  """`optimizer.descend` by `gradient_of`, and the arrays before the step."""
  gradient, value, arrays = gradient_of(setup, loss, params, batch)
  moved = optimizer_lib.descend(
    setup.optimizer, params, opt_state, gradient, value
  )
  return *moved, arrays


def move_anchor(
  setup: Setup, state: TrainState, frozen: Frozen
) -> tuple[TrainState, dict[str, Array]]:
  """The anchor's move, after all updates of an iteration.

  `anchor/drift` is its distance from the reference, against the norm of all
  weights that the reference is called with, the base among them. There is none
  to a teacher.
  """
  rule = setup.algorithm.anchor
  if not rule.moves:
    return state, {'anchor/drift': jnp.float32(0)}
  iteration = state.step // (setup.rollouts * setup.epochs)
  anchor = rule.update(state.anchor, rule.view(state.params), iteration)
  if setup.teacher:
    return state._replace(anchor=anchor), {}
  start = rule.view(frozen.reference)
  moved = jax.tree.map(jnp.subtract, anchor, start)
  whole = lora.join(frozen.base, start)
  whole = jax.tree.map(lambda x: x.astype(jnp.float32), whole)
  drift = optax.tree.norm(moved) / optax.tree.norm(whole)
  return state._replace(anchor=anchor), {'anchor/drift': drift}


def log_policy_of(
  setup: Setup, params: Params, size, prompts: Prompts, completion, mask
) -> Array:
  """log_probs of that much of the batch, as long as the whole: f32[b, M, T]."""
  some = micro_batches.trim(size, prompts, completion, mask)
  out = log_probs(setup.policy, params, *some, chunk=setup.chunk)
  return jnp.pad(out, ((0, 0), (0, 0), (0, mask.shape[-1] - out.shape[-1])))
