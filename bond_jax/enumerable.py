"""A language whose every completion is known, for a real transformer.

`python -m bond_jax.train --config=configs/enumerable.py:algorithm=jbond` trains
a Gemma-shaped policy with the ordinary loop on prompts of one token and
completions of a few, so few that the law of the policy over all of them is
computed at every probe: every KL, quantile and win rate below is exact.

Axes: X prompts, Y completions, T tokens at most. The vocabulary of the
completions is 0 ... V - 1, of which EOS ends one; prompt x is token V + x.
"""

from __future__ import annotations

from collections.abc import Callable
import itertools

import jax
import ml_collections
import numpy as np

from bond_jax import bandit, build, measures, sharding
from bond_jax.errors import UserError
from bond_jax.log_probs import log_probs
from bond_jax.types import Params, Policy, Prompts, Rollout

EOS = 1
MOST = 3000  # completions of a prompt, so that tables of pairs fit in memory


def completions(vocab: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Every completion: tokens i32[Y, T], 0 after EOS, and mask bool[Y, T]."""
  rows = []
  others = [v for v in range(vocab) if v != EOS]
  for size in range(length):
    rows += [(*y, EOS) for y in itertools.product(others, repeat=size)]
  rows += list(itertools.product(others, repeat=length))
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  return tokens, mask


def codes(tokens: np.ndarray, mask: np.ndarray, vocab: int) -> np.ndarray:
  """A number for every completion, by which it is found: [..., T] -> [...]."""
  digits = np.where(mask, tokens + 1, 0).astype(np.int64)
  return digits @ (vocab + 1) ** np.arange(tokens.shape[-1])


def reward_table(
  seed: int, prompts: int, tokens: np.ndarray, mask: np.ndarray, vocab: int
) -> np.ndarray:
  """f64[X, Y]: a random worth of each token at each place, and of each pair.

  What a prompt's completions are worth can be learnt token by token, almost:
  half of the variance is in pairs of neighbours.
  """
  rng = np.random.default_rng(seed)
  t = tokens.shape[1]
  single = rng.standard_normal((prompts, t, vocab))
  pair = rng.standard_normal((prompts, t, vocab, vocab))
  place = np.arange(t)
  worth = single[:, place, tokens]  # [X, Y, T]
  worth[:, :, 1:] += pair[:, place[1:], tokens[:, :-1], tokens[:, 1:]]
  return (worth * mask).sum(-1)


class Cycle:
  """The same prompts in every batch, in turn; ids are places in the batch."""

  def __init__(self, prompts: int, vocab: int, batch: int):
    tokens = vocab + np.arange(batch, dtype=np.int32)[:, None] % prompts
    self._batch = Prompts(
      tokens=tokens,
      mask=np.ones((batch, 1), bool),
      id=np.arange(batch, dtype=np.int32),
      weight=np.ones(batch, np.float32),
    )

  def __next__(self) -> Prompts:
    return self._batch

  def get_state(self) -> dict[str, int]:
    return {}  # there is no position

  def set_state(self, state: dict[str, int]) -> None:
    del state


def check(config: ml_collections.ConfigDict, mesh) -> None:
  """Refuses sizes that do not make a language."""
  del mesh
  settings = config.enumerable
  if settings.vocab < 2 or config.length < 1 or settings.prompts < 1:
    raise UserError(
      'enumerable.vocab must be 2 or more, length and enumerable.prompts 1 or'
      f' more; got {settings.vocab}, {config.length}, {settings.prompts}.'
    )
  count = sum((settings.vocab - 1) ** t for t in range(config.length + 1))
  if count > MOST:
    raise UserError(
      f'enumerable.vocab ({settings.vocab}) and length ({config.length}) make'
      f' {count} completions, which are compared in pairs; at most {MOST}.'
    )
  if not (settings.best_of >= 1 and settings.kl_weight > 0):
    raise UserError(
      'enumerable.best_of must be 1 or more, and enumerable.kl_weight above 0;'
      f' got {settings.best_of} and {settings.kl_weight}.'
    )
  if config.train.batch % settings.prompts:
    raise UserError(
      f'train.batch ({config.train.batch}) must be a multiple of'
      f' enumerable.prompts ({settings.prompts}): the prompts come in turn.'
    )
  make_policy(config)


def make_policy(config: ml_collections.ConfigDict) -> Policy:
  """The model with one more row of its embedding for each prompt."""
  settings = config.enumerable
  model = config.model.copy_and_resolve_references()
  with model.unlocked():
    model.sizes.vocab_size = settings.vocab + settings.prompts
  return build.make_policy(model, settings.vocab)


def exact_law(policy: Policy, prompts: int, vocab: int, length: int):
  """A function from params to log pi of every completion: f32[X, Y, T]."""
  tokens, mask = completions(vocab, length)
  each = Cycle(prompts, vocab, prompts).__next__()
  shape = (prompts, *tokens.shape)

  def law(params: Params):
    return log_probs(
        policy, params, each, np.broadcast_to(tokens, shape),
        np.broadcast_to(mask, shape), chunk=length,
    )  # fmt: skip

  return law


def make(config: ml_collections.ConfigDict, workdir: str, mesh) -> build.Task:
  """The task: reference and rewards are drawn by the seed of the language."""
  del workdir
  settings = config.enumerable
  sizes = settings.prompts, settings.vocab
  policy = make_policy(config)
  init = lambda: policy.init(build.key(settings.seed, 'reference'))
  shards = sharding.tree_shardings(jax.eval_shape(init), mesh)
  reference = jax.jit(init, out_shardings=shards)()
  tokens, mask = completions(settings.vocab, config.length)
  table = reward_table(
    settings.seed, settings.prompts, tokens, mask, settings.vocab
  )
  return build.Task(
    policy=policy,
    reference=reference,
    stop_ids=(EOS,),
    batches=Cycle(*sizes, config.train.batch),
    reward=lookup(table, tokens, mask, settings.vocab),
    make_probe=lambda: probe_of(
      jax.jit(exact_law(policy, *sizes, config.length)),
      reference,
      table,
      settings.best_of,
      settings.kl_weight,
    ),
  )


def lookup(table, tokens, mask, vocab: int):
  """The reward of drawn completions: (prompts, rollout) -> f32[B, K]."""
  known = codes(tokens, mask, vocab)
  order = np.argsort(known)

  def reward(prompts: Prompts, drawn: Rollout) -> np.ndarray:
    code = codes(drawn.completion, drawn.mask, vocab)
    y = order[np.searchsorted(known, code, sorter=order)]
    x = prompts.tokens[:, -1:] - vocab
    return table[x, y].astype(np.float32)

  return reward


def probe_of(
  law: Callable, reference: Params, table: np.ndarray, n: int, kl_weight: float
) -> Callable[[Params], dict[str, float]]:
  """The exact measures of a policy, its targets Best-of-n and WIND's limit."""

  def log_law(params):
    return np.asarray(law(params), np.float64).sum(-1)

  log_reference = log_law(reference)
  curve = best_of_n_curve(log_reference, table)
  equilibrium = bandit.wind_equilibrium(
    log_reference, bandit.win_matrix(table), kl_weight
  )

  def probe(params) -> dict[str, float]:
    log_policy = log_law(params)
    return {
      **exact_measures(log_policy, log_reference, table, n, curve),
      'equilibrium_kl': float(bandit.kl(equilibrium, log_policy).mean()),
    }

  return probe


def exact_measures(
  log_policy: np.ndarray,
  log_reference: np.ndarray,
  reward: np.ndarray,
  n: int,
  curve: measures.Curve,
) -> dict[str, float]:
  """What is said of a law, as means over prompts; laws and rewards [X, Y].

  backward_kl and forward_kl are to and from Best-of-n of the reference;
  log_quantile is E[log p_<=]; effective_n the N whose Best-of-N wins as often,
  and frontier_efficiency its KL over the policy's.
  """
  policy, mass = np.exp(log_policy), np.exp(log_reference)
  target = bandit.best_of_n(log_reference, reward, n)
  rate = win_rate(policy, mass, reward)
  at_most = (mass[:, None] * (reward[:, None] <= reward[:, :, None])).sum(-1)
  row = {
    'backward_kl': bandit.kl(log_policy, target).mean(),
    'forward_kl': bandit.kl(target, log_policy).mean(),
    'log_quantile': (policy * np.log(at_most)).sum(-1).mean(),
    'reward/validation': (policy * reward).sum(-1).mean(),
    'win_rate/reference': rate,
    'kl/reference': bandit.kl(log_policy, log_reference).mean(),
    'entropy': -(policy * log_policy).sum(-1).mean(),
  }
  effective_n = measures.effective_n(rate, curve)
  if effective_n is not None and row['kl/reference'] > 0:
    kl = np.interp(np.log(effective_n), np.log(curve.ns), curve.kl)
    row['effective_n'] = effective_n
    row['frontier_efficiency'] = kl / row['kl/reference']
  return {k: float(v) for k, v in row.items()}


def win_rate(policy, opponent, reward) -> float:
  """P(r(y) > r(y')) + half the ties, the mean over prompts."""
  more = reward[:, :, None] > reward[:, None, :]
  ties = reward[:, :, None] == reward[:, None, :]
  win = more + 0.5 * ties
  return float(np.einsum('xa,xab,xb->x', policy, win, opponent).mean())


def best_of_n_curve(log_reference, reward) -> measures.Curve:
  """The exact win rate and KL of Best-of-N, N from 1 to 1,000."""
  ns = np.geomspace(1, 1000, 120)
  mass = np.exp(log_reference)
  laws = [bandit.best_of_n(log_reference, reward, n) for n in ns]
  rates = [win_rate(np.exp(law), mass, reward) for law in laws]
  kls = [bandit.kl(law, log_reference).mean() for law in laws]
  none = np.zeros(len(ns))
  return measures.Curve(ns, np.array(rates), np.array(kls), none, none)
