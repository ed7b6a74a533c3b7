"""One step of Best-of-N distillation, as pure functions.

    sample -> reward -> select -> score -> update -> move the anchor

`rollout` and `update` run on the device; the reward, on the host, stands
between them. Nothing here knows which algorithm runs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bond_jax import ops
from bond_jax.log_probs import log_probs
from bond_jax.sampling import sample
from bond_jax.types import (
  Algorithm,
  Array,
  Frozen,
  Params,
  Policy,
  Prompts,
  Rollout,
  Scores,
  TrainState,
)


class Setup(NamedTuple):
  """What a step needs and no step changes."""

  policy: Policy
  algorithm: Algorithm
  optimizer: optax.GradientTransformation
  length: int  # T, new tokens at most
  stop_ids: tuple[int, ...]
  micro_batches: int
  chunk: int  # completion positions whose logits exist at one time


def init_state(setup: Setup, params: Params) -> TrainState:
  """The state before step 0; the anchor is a copy, since state is donated."""
  anchor = {}
  if setup.algorithm.anchor.moves:
    anchor = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  return TrainState(
    step=jnp.int32(0),
    params=jax.tree.map(jnp.copy, params),
    anchor=jax.tree.map(jnp.copy, anchor),
    opt_state=setup.optimizer.init(params),
    aux={},
  )


def rollout(
  setup: Setup, state: TrainState, frozen: Frozen, prompts: Prompts, key
) -> Rollout:
  """Samples K completions of each prompt: the policy's, then the anchor's."""
  algorithm = setup.algorithm
  key = jax.random.fold_in(key, state.step)
  anchor = state.anchor if algorithm.anchor.moves else frozen.reference
  parts = [
    sample(
      setup.policy,
      params,
      prompts,
      key,
      num=num,
      length=setup.length,
      stop_ids=setup.stop_ids,
      first=first,
    )
    for params, num, first in (
      (state.params, algorithm.num_policy, 0),
      (anchor, algorithm.num_anchor, algorithm.num_policy),
    )
    if num
  ]
  return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts)


def score(
  setup: Setup,
  state: TrainState,
  frozen: Frozen,
  prompts: Prompts,
  drawn: Rollout,
  reward: Array,
) -> tuple[Rollout, Scores]:
  """Selects the rows that enter the loss, and scores those named for it.

  `drawn` holds K completions per prompt and `reward`, f32[B, K], theirs.
  Returns the M selected completions, and their Scores.
  """
  algorithm = setup.algorithm
  win = ops.win_matrix(reward)
  index = algorithm.select(reward, win)
  chosen = jax.tree.map(lambda x: ops.take_rows(x, index), drawn)

  def log_of(params, rows):
    """f32[B, len(rows), T] of the selected rows, a micro-batch at a time."""
    if not rows:
      b, _, t = chosen.mask.shape
      return jnp.zeros((b, 0, t), jnp.float32)
    some = jax.tree.map(lambda x: x[:, list(rows)], chosen)
    batches = _split((prompts, some.completion, some.mask), setup)
    return _join(
      jax.lax.map(
        lambda x: log_probs(setup.policy, params, *x, chunk=setup.chunk),
        batches,
      )
    )

  anchor = state.anchor if algorithm.anchor.moves else frozen.reference
  scores = Scores(
    reward=reward,
    win=win,
    index=index,
    mask=chosen.mask,
    log_sampled=chosen.log_prob,
    log_anchor=log_of(anchor, algorithm.anchor_rows),
    log_reference=log_of(frozen.reference, algorithm.reference_rows),
    weight=prompts.weight,
  )
  return chosen, scores


def update(
  setup: Setup,
  state: TrainState,
  frozen: Frozen,
  prompts: Prompts,
  drawn: Rollout,
  reward: Array,
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step on a rewarded rollout, and one move of the anchor.

  The whole batch is weighed before it is split, and every micro-batch divides
  by the whole batch's weight: the accumulated gradient is exactly the
  gradient of the batch.

  Returns:
    The next state, and scalar metrics.
  """
  algorithm = setup.algorithm
  chosen, scores = score(setup, state, frozen, prompts, drawn, reward)
  rows, metrics = algorithm.weigh(scores)
  # A filler row may hold anything, and 0 * NaN is NaN, in gradients too.
  rows = ops.keep_rows(jax.lax.stop_gradient(rows), prompts.weight > 0)
  total = jnp.maximum(prompts.weight.sum(), 1e-9)

  def loss_fn(params, prompts, completion, mask, rows):
    log_policy = log_probs(
      setup.policy, params, prompts, completion, mask, chunk=setup.chunk
    )
    loss = algorithm.loss(log_policy, rows)
    return (prompts.weight * loss).sum() / total, log_policy

  def accumulate(gradient, batch):
    (loss, log_policy), g = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, *batch
    )
    return jax.tree.map(jnp.add, gradient, g), (loss, log_policy)

  gradient, (loss, log_policy) = jax.lax.scan(
    accumulate,
    jax.tree.map(jnp.zeros_like, state.params),
    _split((prompts, chosen.completion, chosen.mask, rows), setup),
  )
  changes, opt_state = setup.optimizer.update(
    gradient, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, changes)
  anchor, drift = state.anchor, jnp.float32(0)
  if algorithm.anchor.moves:
    anchor = algorithm.anchor.update(anchor, params, state.step)
    moved = jax.tree.map(jnp.subtract, anchor, frozen.reference)
    drift = optax.tree.norm(moved) / optax.tree.norm(frozen.reference)
  metrics = {
    **metrics,
    **rollout_metrics(setup, prompts, drawn, reward, scores.win),
    'loss': loss.sum(),
    'gradient_norm': optax.tree.norm(gradient),
    'anchor/drift': drift,
    'sampler_gap': sampler_gap(setup, scores, _join(log_policy)),
  }
  state = TrainState(state.step + 1, params, anchor, opt_state, state.aux)
  return state, metrics


def rollout_metrics(
  setup: Setup, prompts: Prompts, drawn: Rollout, reward: Array, win: Array
) -> dict[str, Array]:
  """What the completions look like, the policy's and the anchor's apart."""
  mean = functools.partial(ops.weighted_mean, weight=prompts.weight)
  k, split = reward.shape[1], setup.algorithm.num_policy
  stops = jnp.array(setup.stop_ids, jnp.int32)
  last = drawn.mask[..., -1] & ~jnp.isin(drawn.completion[..., -1], stops)
  tied = ((win == 0.5).sum((-2, -1)) - k) / max(1, k * (k - 1))
  metrics = {
    'length/completion': mean(drawn.mask.sum(-1).mean(-1)),
    'truncated': mean(last.mean(-1)),
    'tie_rate': mean(tied),
  }
  if split:
    metrics['reward/policy'] = mean(reward[:, :split].mean(-1))
  if split < k:
    metrics['reward/anchor'] = mean(reward[:, split:].mean(-1))
  return metrics


def sampler_gap(setup: Setup, scores: Scores, log_policy: Array) -> Array:
  """Mean |log pi(y)| difference, nats per completion, sampler against trainer.

  Over the trained rows that the policy drew; rounding alone should be left.
  """
  own = (scores.index < setup.algorithm.num_policy) * scores.weight[:, None]
  gap = jnp.abs((log_policy - scores.log_sampled).sum(-1))
  gap = jnp.where(own > 0, own * gap, 0.0)  # a filler row may hold NaN
  return gap.sum() / jnp.maximum(own.sum(), 1e-9)


def _split(tree: Any, setup: Setup) -> Any:
  """[B, ...] -> [micro, B / micro, ...]; each part is spread over the mesh."""
  n = setup.micro_batches
  return jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), tree
  )


def _join(x: Array) -> Array:
  """The inverse of `_split`, for one array."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(-1, *x.shape[2:])
