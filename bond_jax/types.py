"""The nouns of the program: what flows through one step, and who acts on it.

Axes, everywhere: B prompts, K completions of one prompt, M of them that enter
the loss, P prompt length, T completion length, V vocabulary, D features.
Log-probabilities are natural logarithms (nats) in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
Params = Any  # a pytree of arrays


class Context(NamedTuple):
  """What a reward may look at beside the text; K completions of B prompts."""

  rows: Sequence[
    Mapping[str, Any]
  ]  # [B], of the data: 'messages', 'answer' ...
  tokens: Sequence[Sequence[Sequence[int]]]  # [B][K], pieces of the completions
  finished: np.ndarray  # bool[B, K]; False: cut at T, without an end
  turns: bool  # the prompts are turns of a conversation, not openings of a text


# f(prompts[B], completions[B][K], context) -> [B, K], on text, on the host; or
# a dict of these, name -> [B, K]: the reward is their sum.
RewardFn = Callable[[Sequence[str], Sequence[Sequence[str]], Context], Any]
# The same, of pairs: [B, K, K], P(i beats j), with 1/2 on the diagonal. A dict
# of these is their mean.
PreferenceFn = RewardFn


class Prompts(NamedTuple):
  """A batch of prompts, left-padded."""

  tokens: Array  # i32[B, P]
  mask: Array  # bool[B, P], True on real tokens
  id: Array  # i32[B], the index in the data source, the same on every host
  weight: Array  # f32[B], 0 = a filler row that no mean may see


class Rollout(NamedTuple):
  """K completions of each prompt: the policy's first, then the anchor's."""

  completion: Array  # i32[B, K, T]
  mask: Array  # bool[B, K, T], True up to and including its end
  log_prob: Array  # f32[B, K, T], under the law sampled from; 0 after it
  # f32[B, K], slots times steps that it took to draw them, per completion
  slot_steps: Array


class Scores(NamedTuple):
  """What an algorithm may look at when it weighs a whole batch."""

  reward: Array  # f32[B, K]
  win: Array  # f32[B, K, K], win[i, j] = P(i beats j); 1/2 on ties
  index: Array  # i32[B, M], the completions that enter the loss
  log_sampled: Array  # f32[B, M, T], their log-probs when they were sampled
  log_anchor: Array  # f32[B, len(anchor_rows), T]
  log_reference: Array  # f32[B, len(reference_rows), T]
  log_quantile: Array  # f32[B, len(quantile_rows)], learned, below 0
  weight: Array  # f32[B]


Rows = Any  # a pytree with leading axis B: baselines, coefficients, targets


class AnchorRule(NamedTuple):
  """How the anchor follows the policy; see `anchors`."""

  # (anchor, view of the params, iteration, counted from 1) -> anchor
  update: Callable[[Params, Params, Array], Params]
  moves: bool  # False: the anchor is the reference, and no copy is kept
  # params -> what of them the anchor follows, itself parameters of the policy
  view: Callable[[Params], Params] = lambda params: params


class Algorithm(NamedTuple):
  """All that distinguishes one algorithm from another.

  `select` picks the M trained completions of each prompt. `weigh` sees the
  whole batch and no gradient; `loss` sees one micro-batch of the policy's
  per-token log-probs f32[b, M, T] and the matching rows, and returns f32[b].
  """

  num_policy: int  # completions per prompt from the policy
  num_anchor: int  # completions per prompt from the anchor
  select: Callable[[Array, Array], Array]  # reward, win -> i32[B, M]
  anchor_rows: tuple[int, ...]  # of the M rows: scored under the anchor
  reference_rows: tuple[int, ...]  # ... under the reference
  quantile_rows: tuple[int, ...]  # ... by the learned quantile
  weigh: Callable[[Scores], tuple[Rows, dict[str, Array]]]  # rows, metrics
  loss: Callable[[Array, Rows], Array]
  anchor: AnchorRule
  # Where the reference is what the policy starts from, nothing is left to do.
  needs_teacher: bool = False


class Decoder(NamedTuple):
  """A policy with its parameters, to draw completions from.

  The cache is the model's own affair. A prefix is what it remembers of B
  prompts, with leading axes B; rows decode completions, W of each prompt.
  """

  # left-padded tokens i32[B, P], mask bool[B, P] -> last hidden [B, D], prefix
  prefill: Callable[[Array, Array], tuple[Array, Any]]
  start: Callable[[Any, int, int], Any]  # prefix, W, new tokens -> cache
  # tokens i32[R], alive bool[R], cache -> hidden [R, D], cache
  step: Callable[[Array, Array, Any], tuple[Array, Any]]
  # cache, row, prefix, i -> cache: the row begins anew after prompt i; W = 1.
  # None: the model cannot, all rows are at the same step.
  refill: Callable[[Any, Array, Any, Array], Any] | None
  logits: Callable[[Array], Array]


class Policy(NamedTuple):
  """A language model as pure functions of its parameters.

  `hidden(params, tokens i32[R, S], mask bool[R, S])` returns f32-or-bf16
  [R, S, D]. `logits(params, hidden)` is float32 and already divided by the
  temperature: the law that is sampled is the law that is scored.
  """

  init: Callable[[Array], Params]  # key -> params
  hidden: Callable[[Params, Array, Array], Array]
  logits: Callable[[Params, Array], Array]
  prepare: Callable[[Params], Any]  # the parameters as the sampler wants them
  decoder: Callable[[Any], Decoder]  # over those
  vocab_size: int
  frozen_head: bool = False  # no gradient of `logits` by the parameters


class Frozen(NamedTuple):
  """Trees that no step changes and no checkpoint repeats."""

  reference: Params  # of a teacher, if there is one: whole, without a base
  base: Params  # weights under policy, anchor and reference alike; may be {}


class TrainState(NamedTuple):
  """All that the next step depends on, apart from the data iterator."""

  step: Array  # i32[], steps completed
  params: Params  # the policy
  anchor: Params  # float32, a view of params; {} when it never moves
  opt_state: Any
  aux: Any  # the learned quantile and its optimizer; {} where there is none
