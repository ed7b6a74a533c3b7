"""Exact answers: laws small enough to enumerate, and a plain Gemma in numpy.

A law over sequences is a table of logits theta [T, V, V]: position, previous
token (0 before the first), next token. Axes: Y all sequences of the law, X
prompts (each with a table of its own), K completions, N tuples of completions.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bond_jax.algorithms.parts import ops
from bond_jax.types import Decoder, Policy, Scores

# -- laws ---------------------------------------------------------------------


def sequences(vocab: int, length: int, eos: int | None):
  """All completions: tokens [Y, T], mask [Y, T] (EOS included, 0 after it)."""
  rows = {}
  for draw in itertools.product(range(vocab), repeat=length):
    end = draw.index(eos) + 1 if eos in draw else length
    mask = tuple(t < end for t in range(length))
    rows[tuple(y * m for y, m in zip(draw, mask, strict=True)), mask] = None
  tokens, mask = zip(*rows, strict=True)
  return np.array(tokens), np.array(mask)


def table_log_probs(theta, tokens, mask):
  """[Y, T]: per-token log-probs of sequences under one table."""
  previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
  log_p = jax.nn.log_softmax(theta, -1)
  out = log_p[np.arange(tokens.shape[1])[None], previous, tokens]
  return jnp.where(mask, out, 0.0)


def table_policy(vocab: int) -> Policy:
  """A Policy whose parameters are a table [positions, V, V] as above.

  Positions count the prompt: the law of the next token depends on the last
  token and on how many came before it.
  """

  def hidden(params, tokens, mask):
    return params[jnp.maximum(jnp.cumsum(mask, -1) - 1, 0), tokens]

  def decoder(params):
    return Decoder(
      prefill=lambda tokens, mask: (
        hidden(params, tokens, mask)[:, -1],
        mask.sum(-1),
      ),
      start=lambda prefix, width, length: jnp.repeat(prefix, width),
      step=lambda token, alive, at: (params[at, token], at + alive),
      refill=lambda at, row, prefix, i: at.at[row].set(prefix[i]),
      logits=lambda hidden: hidden,
    )

  return Policy(
    init=lambda key: jax.random.normal(key, (8, vocab, vocab)),
    hidden=hidden,
    logits=lambda params, hidden: hidden,
    prepare=lambda params: params,
    decoder=decoder,
    vocab_size=vocab,
  )


def forced(policy: Policy, params, tokens, mask, prompt: int):
  """Logits [R, S - prompt + 1, V] of known tokens [R, S], read one at a time.

  The first are after the prompts, the columns before `prompt`.
  """
  decoder = policy.decoder(policy.prepare(params))
  first, prefix = decoder.prefill(tokens[:, :prompt], mask[:, :prompt])
  cache = decoder.start(prefix, 1, max(1, tokens.shape[1] - prompt))

  def step(cache, column):
    hidden, cache = decoder.step(*column, cache)
    return cache, hidden

  columns = jnp.array(tokens.T[prompt:]), jnp.array(mask.T[prompt:])
  _, rest = jax.lax.scan(step, cache, columns)
  hidden = jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], 1)
  return decoder.logits(hidden)


# -- Best-of-N ----------------------------------------------------------------


def quantiles(p, reward):
  """P(r(y') < r(y)) and P(r(y') <= r(y)) of every y, for y' from p [Y]."""
  less = (reward[None, :] < reward[:, None]) * p[None]
  at_most = (reward[None, :] <= reward[:, None]) * p[None]
  return less.sum(-1), at_most.sum(-1)


def best_of_n(p, reward, n: int):
  """The law of the best of n draws, the first drawn among tied: [Y].

  BOND, theorem 1, from the raw rewards: draw i is the first best when those
  before it are worse and those after it no better.
  """
  less, at_most = quantiles(p, reward)
  return p * sum(at_most ** (n - i) * less ** (i - 1) for i in range(1, n + 1))


def enumerate_best_of_n(p, reward, n: int):
  """The same, draw by draw."""
  law = np.zeros(len(p))
  for draws in itertools.product(range(len(p)), repeat=n):
    best = max(draws, key=lambda y: reward[y])  # max returns the first
    law[best] += math.prod(p[y] for y in draws)
  return law


# -- BOND ---------------------------------------------------------------------


def mean_monte_carlo(at_most, k: int, zero: str):
  """E log of the share of k comparisons won, each with chance at_most [Y]."""
  won = np.arange(k + 1)
  p = {
    'half': np.where(won == 0, 1 / 2, won) / k,
    'one': np.where(won == 0, 1, won) / k,
    'smooth': (won + 1) / (k + 1),
  }[zero]
  chance = [
    math.comb(k, s) * at_most**s * (1 - at_most) ** (k - s) for s in won
  ]
  return np.log(p) @ np.array(chance)


def mean_second_term(less, at_most, k: int, n: int):
  """E log sum_{i < n} (beaten / won)^i, where won = beaten + tied: [Y].

  The k comparisons have a multinomial law; where none is won, it is log n.
  """
  mean = 0.0
  for beaten, tied in itertools.product(range(k + 1), repeat=2):
    if (lost := k - beaten - tied) >= 0:
      ways = math.comb(k, beaten) * math.comb(k - beaten, tied)
      chance = less**beaten * (at_most - less) ** tied * (1 - at_most) ** lost
      ratio = beaten / (beaten + tied) if beaten + tied else 1.0
      mean = mean + ways * chance * math.log(sum(ratio**i for i in range(n)))
  return mean


def mean_floor(at_most, k: int):
  """The floor's expectation: all k of the anchor's beat y, [Y]."""
  return -(2**k) * math.log(2) * (1 - at_most) ** k


def kl(theta, anchor, tokens, mask):
  """KL(policy || anchor) of two tables, nats per sequence."""
  log_p = table_log_probs(theta, tokens, mask).sum(-1)
  log_q = table_log_probs(anchor, tokens, mask).sum(-1)
  return (jnp.exp(log_p) * (log_p - log_q)).sum()


def bond_objective(theta, anchor, best, signal, law, *, backward, drift):
  """What BOND descends at a given anchor, in closed form, for one prompt.

  (1 - b) KL(best || pi) + b (KL(pi || anchor) - E_pi[signal])
  + g KL(pi || anchor), up to a constant, where best [Y] is the Best-of-n law
  of the anchor and signal [Y] the expected (n - 1) r_BOND of every sequence.
  """
  log_p = table_log_probs(theta, *law).sum(-1)
  apart = kl(theta, anchor, *law)
  return (
    -(1 - backward) * (best * log_p).sum()
    + backward * (apart - (jnp.exp(log_p) * signal).sum())
    + drift * apart
  )


def expected_gradient(
  algorithm, theta, anchor, reward, weight, law, *,
  reference=None, win=None, quantile=None,
):  # fmt: skip
  """E[gradient] of an algorithm's batch loss, by enumeration of every batch.

  Args:
    algorithm: its select, weigh and loss are run as the training step does.
    theta, anchor: [X, T, V, V], tables of policy and anchor for each prompt.
    reward: [X, Y].
    weight: [X].
    law: what `sequences` returns.
    reference: as `anchor`, which it is by default.
    win: [X, Y, Y], P(a beats b); by default what the rewards say.
    quantile: [X, Y], what a learned quantile says of each sequence.

  Returns:
    [X, T, V, V], the expectation over all (Y ** K) ** X possible batches.
  """
  x, y = reward.shape
  k, split = algorithm.num_policy + algorithm.num_anchor, algorithm.num_policy
  draws = np.stack(
    np.unravel_index(np.arange(y ** (x * k)), (y,) * (x * k)), -1
  ).reshape(-1, x, k)
  prompt = np.arange(x)[:, None]
  tables = jax.vmap(lambda t: table_log_probs(t, *law))
  win = ops.win_matrix(reward) if win is None else win
  quantile = jnp.full((x, y), jnp.nan) if quantile is None else quantile

  def loss(theta, draws, log_p, log_q, log_r):
    """One batch: draws [X, K]."""
    scored = jnp.concatenate(
      [log_p[prompt, draws[:, :split]], log_q[prompt, draws[:, split:]]], 1
    )
    drawn = reward[prompt, draws]
    beats = win[prompt[..., None], draws[:, :, None], draws[:, None, :]]
    index = algorithm.select(drawn, beats)
    chosen = ops.take_rows(draws, index)
    at = lambda table, rows: table[prompt, chosen[:, list(rows)]]
    rows, _ = algorithm.weigh(
      Scores(
        reward=drawn,
        win=beats,
        index=index,
        log_sampled=ops.take_rows(scored, index),
        log_anchor=at(log_q, algorithm.anchor_rows),
        log_reference=at(log_r, algorithm.reference_rows),
        log_quantile=jnp.log(at(quantile, algorithm.quantile_rows)),
        weight=weight,
      )
    )
    rows = ops.keep_rows(jax.lax.stop_gradient(rows), weight > 0)
    log_policy = tables(theta)[prompt, chosen]
    return (weight * algorithm.loss(log_policy, rows)).sum() / weight.sum()

  def expected_loss(theta, fixed):
    log_p, log_q = tables(fixed), tables(anchor)
    log_r = log_q if reference is None else tables(reference)
    law_p, law_q = (jnp.exp(t.sum(-1)) for t in (log_p, log_q))
    mass = law_p[prompt, draws[..., :split]].prod((-2, -1))
    mass *= law_q[prompt, draws[..., split:]].prod((-2, -1))
    losses = jax.vmap(loss, (None, 0, None, None, None))(
      theta, draws, log_p, log_q, log_r
    )
    return (mass * losses).sum()

  return jax.grad(expected_loss)(theta, theta)


# -- a plain Gemma ------------------------------------------------------------


def _norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


def _rotate(x, position, base, scale):
  """One head of one token: x [H]."""
  half = len(x) // 2
  out = np.empty_like(x)
  for i in range(half):
    angle = position / scale / base ** (2 * i / len(x))
    pair = x[i] + 1j * x[i + half]
    pair *= np.exp(1j * angle)
    out[i], out[i + half] = pair.real, pair.imag
  return out


def _attention(c, p, x, local):
  """x [S, D] of consecutive tokens -> [S, D], head by head."""
  if 'qkv_einsum' in p:
    wq, wk, wv = p['qkv_einsum']['w']
  else:
    wq, (wk, wv) = p['q_einsum']['w'], p['kv_einsum']['w']
  base = c.local_rope_base if local else c.global_rope_base
  stretch = 1.0 if local else c.global_rope_scale
  out = np.zeros_like(x)
  for n in range(c.heads):
    group = n // (c.heads // c.kv_heads)
    q, k, v = x @ wq[n], x @ wk[group], x @ wv[group]
    if c.qk_norm:
      q = _norm(q, p['_query_norm']['scale'])
      k = _norm(k, p['_key_norm']['scale'])
    q = np.stack([_rotate(a, i, base, stretch) for i, a in enumerate(q)])
    k = np.stack([_rotate(a, i, base, stretch) for i, a in enumerate(k)])
    scale = c.head_size**-0.5 if c.query_scale is None else c.query_scale
    for i in range(len(x)):
      first = max(0, i - c.window + 1) if local else 0
      score = k[first : i + 1] @ q[i] * scale
      if c.attention_softcap:
        score = c.attention_softcap * np.tanh(score / c.attention_softcap)
      e = np.exp(score - score.max())
      mixed = e @ v[first : i + 1] / e.sum()
      out[i] += mixed @ p['attn_vec_einsum']['w'][n]
  return out


def _feed_forward(c, p, x):
  gate, up = p['gating_einsum']
  if c.gating_transposed:
    gate, up = gate.T, up.T
  g = x @ gate
  g = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
  return (g * (x @ up)) @ p['linear']


def gemma_logits(c, params, tokens):
  """Logits [S, V] of one unpadded row of tokens, in float64, layer by layer."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  table = params['embedder']['input_embedding']
  x = table[tokens] * np.sqrt(c.features)
  for j in range(c.layers):
    group, i = divmod(j, len(c.pattern))
    if f'layer_{j}' in params:
      p = params[f'layer_{j}']
    else:
      p = params['stacked_layers'][f'attention_type_{i}']
      p = jax.tree.map(lambda w, group=group: w[group], p)
    for before, after, part in (
      ('pre_attention_norm', 'post_attention_norm', 'attn'),
      ('pre_ffw_norm', 'post_ffw_norm', 'mlp'),
    ):
      y = _norm(x, p[before]['scale'])
      if part == 'attn':
        y = _attention(c, p['attn'], y, c.pattern[i] == 'local')
      else:
        y = _feed_forward(c, p['mlp'], y)
      x = x + (_norm(y, p[after]['scale']) if c.post_norms else y)
  out = _norm(x, params['final_norm']['scale']) @ table.T
  if c.final_softcap:
    out = c.final_softcap * np.tanh(out / c.final_softcap)
  return out[:, : c.used_vocab]
