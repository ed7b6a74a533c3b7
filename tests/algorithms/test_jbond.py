"""J-BOND against enumeration of every batch it can meet, in double precision.

Two laws: one-token completions over four actions, and sequences of at most
two tokens over three, the second of which is EOS. Where batches of two or three
prompts are enumerated, the sequences are over two tokens.
"""

import functools
import itertools
import math

from conftest import core
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from benchmarks import objectives
from bond_jax.algorithms import bond, jbond
from bond_jax.algorithms.parts import ops, quantiles
from bond_jax.types import Scores

ONE_TOKEN = oracle.sequences(4, 1, None)
TWO_TOKENS = oracle.sequences(3, 2, 1)
SMALL = oracle.sequences(2, 2, 1)
REWARDS = {
  'distinct': (0.1, 2.0, -1.0, 0.5, 3.0, 0.7, 1.1),
  'tied': (0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0),
}

make = functools.cache(  # so that each algorithm is compiled once
  functools.partial(
    jbond.make,
    num_anchor=2,
    backward_weight=0.5,
    anchor_rate=0.02,
    drift_weight=0.7,
  )
)


def tables(seed, prompts, law):
  """Logits of two different laws, policy and anchor: [X, T, V, V] each."""
  tokens, _ = law
  size = tokens.shape[1], tokens.max() + 1, tokens.max() + 1
  rng = np.random.default_rng(seed)
  return 0.7 * rng.standard_normal((2, prompts, *size))


def law_of(theta):
  """The law of the three that has tables of this shape."""
  _, length, vocab, _ = theta.shape
  return oracle.sequences(vocab, length, 1 if length > 1 else None)


@functools.partial(jax.jit, static_argnums=0)
def expected_gradient(algorithm, theta, anchor, reward, weight):
  return oracle.expected_gradient(
    algorithm, theta, anchor, reward, weight, law_of(theta)
  )


def objective(theta, anchor, reward, law, *, k=2, backward=0.5, drift=0.7):
  """Summed over prompts; at Best-of-k of the anchor, by the mean floor."""

  def one(theta, anchor, reward):
    q = jnp.exp(oracle.table_log_probs(anchor, *law).sum(-1))
    _, at_most = oracle.quantiles(q, reward)
    best = oracle.best_of_n(q, reward, k)
    signal = (k - 1) * oracle.mean_floor(at_most, k)
    return oracle.bond_objective(
      theta, anchor, best, signal, law, backward=backward, drift=drift
    )

  return jax.vmap(one)(theta, anchor, jnp.asarray(reward)).sum()


@functools.partial(jax.jit, static_argnames='k')
def objective_gradient(theta, anchor, reward, **arguments):
  f = functools.partial(objective, law=law_of(theta), **arguments)
  return jax.grad(f)(theta, anchor, reward)


def test_the_laws_are_laws():
  tokens, mask = TWO_TOKENS
  assert [tuple(y[m]) for y, m in zip(tokens, mask, strict=True)] == [
      (0, 0), (0, 1), (0, 2), (1,), (2, 0), (2, 1), (2, 2),
  ]  # fmt: skip
  theta, _ = tables(0, 1, TWO_TOKENS)
  mass = jnp.exp(oracle.table_log_probs(theta[0], *TWO_TOKENS).sum(-1)).sum()
  np.testing.assert_allclose(mass, 1, rtol=1e-6)


# -- the gradient -------------------------------------------------------------


@pytest.mark.parametrize(
  'backward, drift',
  core(
    3,
    [(0.0, 0.7), (0.5, 0.7), (1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (1.0, 0.7)],
  ),
)
def test_expected_gradient_is_the_objective_s(x64, backward, drift):
  """On sequences: sums, masks, and the reward-to-go form of the log-ratio."""
  algorithm = make(backward_weight=backward, drift_weight=drift)
  weights = dict(backward=backward, drift=drift)
  theta, anchor = tables(1, 1, TWO_TOKENS)
  for reward in map(np.array, REWARDS.values()):
    batch = theta, anchor, reward[None]
    mine = expected_gradient(algorithm, *batch, np.ones(1))
    exact = objective_gradient(*batch, **weights)
    assert jnp.abs(exact).max() > 0.01
    np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize('k', core(1, [4, 2, 3]))
def test_expected_gradient_of_one_token_completions(x64, k):
  """k of the anchor's: Best-of-k, and a floor of -2^k log 2."""
  algorithm = make(num_anchor=k)
  theta, anchor = tables(2, 1, ONE_TOKEN)
  for reward in ([[0.0, 1.0, 2.0, 3.0]], [[1.0, 0.0, 1.0, 0.0]]):
    batch = theta, anchor, np.array(reward)
    mine = expected_gradient(algorithm, *batch, np.ones(1))
    exact = objective_gradient(*batch, k=k)
    assert jnp.abs(exact).max() > 0.01
    np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-12)


def test_expected_gradient_is_the_finite_difference(x64):
  """The closed form, differentiated without any autodiff."""
  reward = np.array([REWARDS['distinct']])
  theta, anchor = tables(3, 1, TWO_TOKENS)
  mine = expected_gradient(make(), theta, anchor, reward, np.ones(1))
  h = 1e-5
  moves = h * np.eye(theta.size).reshape(-1, *theta.shape)
  values = jax.jit(
    jax.vmap(lambda move: objective(theta + move, anchor, reward, TWO_TOKENS))
  )(np.concatenate([moves, -moves]))
  up, down = np.split(values, 2)
  np.testing.assert_allclose(mine.ravel(), (up - down) / (2 * h), atol=1e-9)


def test_descending_the_drift_term_shrinks_the_drift(x64):
  """gamma's sign: a public re-implementation has it wrong."""
  reward = np.array([REWARDS['distinct']])
  theta, anchor = tables(4, 1, TWO_TOKENS)
  with_drift, without = (
    expected_gradient(make(drift_weight=g), theta, anchor, reward, np.ones(1))
    for g in (0.7, 0.0)
  )
  g_drift = (with_drift - without) / 0.7
  kl = jax.jit(
    jax.value_and_grad(lambda t: oracle.kl(t[0], anchor[0], *TWO_TOKENS))
  )
  now, exact = kl(theta)
  np.testing.assert_allclose(g_drift, exact, atol=1e-12)
  assert kl(theta - 0.1 * g_drift)[0] < now - 1e-3


@pytest.mark.parametrize('k', [2, 3])
def test_the_package_s_closed_form_is_the_proven_one(x64, k):
  """`objectives.bond` of `jbond_terms`: the mean over two prompts."""
  theta, anchor = tables(9, 2, TWO_TOKENS)
  reward = np.array(list(REWARDS.values()))
  laws = lambda x: jax.vmap(
    lambda t: oracle.table_log_probs(t, *TWO_TOKENS).sum(-1)
  )(x)

  terms = objectives.jbond_terms(np.asarray(laws(anchor)), reward, k)

  @jax.jit
  def both(theta, b, g):
    def mine(theta):
      return objectives.bond(
        laws(theta), laws(anchor), *terms, backward_weight=b, drift_weight=g
      )

    def exact(theta):
      weights = dict(backward=b, drift=g)
      return objective(theta, anchor, reward, TWO_TOKENS, k=k, **weights) / 2

    return [jax.value_and_grad(f)(theta) for f in (mine, exact)]

  for weights in ((0.0, 0.0), (0.3, 0.7), (1.0, 0.7)):
    (value, gradient), (exact, exact_gradient) = both(theta, *weights)
    np.testing.assert_allclose(value, exact, rtol=1e-12)
    assert jnp.abs(gradient).max() > 0.01
    np.testing.assert_allclose(gradient, exact_gradient, rtol=0, atol=1e-12)


def test_the_sum_to_go_form_has_the_sequence_form_s_expectation(x64):
  """E[sum_t grad log pi(y_t) L] = E[sum_t grad log pi(y_t) L_{>= t}], where
  draw by draw the two differ."""
  (theta,), (anchor,) = tables(5, 1, TWO_TOKENS)

  @jax.jit
  def both(theta):
    log_p = oracle.table_log_probs(theta, *TWO_TOKENS)
    mass = jnp.exp(log_p.sum(-1))
    ratio = log_p - oracle.table_log_probs(anchor, *TWO_TOKENS)
    score = jax.jacobian(lambda t: oracle.table_log_probs(t, *TWO_TOKENS))(
      theta
    )  # [Y, T, *theta.shape]
    signals = jnp.broadcast_to(ratio.sum(-1, keepdims=True), ratio.shape)
    forms = [
      jnp.einsum('yt...,yt->y...', score, s)
      for s in (signals, ops.sum_to_go(ratio))
    ]
    return forms, [jnp.einsum('y...,y->...', f, mass) for f in forms]

  (whole, to_go), (mean_whole, mean_to_go) = both(theta)
  assert jnp.abs(whole - to_go).max() > 0.1
  np.testing.assert_allclose(mean_to_go, mean_whole, rtol=0, atol=1e-12)


def test_the_baseline_leaves_the_expectation_alone(x64):
  """Two prompts, all pairs of their tuples: the mean of their gradients."""
  theta, anchor = tables(6, 2, SMALL)
  reward = np.array([[0.0, 1, 2], [1, 0, 1]])
  mine = expected_gradient(make(), theta, anchor, reward, np.ones(2))
  exact = objective_gradient(theta, anchor, reward)
  np.testing.assert_allclose(mine, exact / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize('garbage', [np.nan, -np.inf, 1e30])
def test_a_filler_row_changes_nothing(x64, garbage):
  """Two prompts and a filler: every batch of the three is enumerated."""
  theta, anchor = tables(7, 3, SMALL)
  anchor[2] *= 1e3
  reward = np.array([[0.0, 1, 2], [1, 0, 1], [garbage, 5, garbage]])
  weight = np.array([1.0, 1, 0])
  mine = expected_gradient(make(), theta, anchor, reward, weight)
  exact = objective_gradient(theta[:2], anchor[:2], reward[:2])
  np.testing.assert_allclose(mine[:2], exact / 2, rtol=0, atol=1e-12)
  np.testing.assert_array_equal(mine[2], 0)


# -- the pieces ---------------------------------------------------------------


def scores(reward, *, log_sampled=None, log_anchor=None, weight=None):
  """Scores of a batch of B prompts, T = 2."""
  b = len(reward)
  return Scores(
    reward=jnp.asarray(reward, jnp.float32),
    win=ops.win_matrix(jnp.asarray(reward, jnp.float32)),
    index=jnp.tile(jnp.array([[0, 1]]), (b, 1)),
    log_sampled=jnp.zeros((b, 2, 2)) if log_sampled is None else log_sampled,
    log_anchor=jnp.zeros((b, 1, 2)) if log_anchor is None else log_anchor,
    log_reference=jnp.zeros((b, 0, 2)),
    log_quantile=jnp.zeros((b, 0)),
    weight=jnp.ones(b) if weight is None else jnp.asarray(weight),
  )


def floor(reward):
  """r_J of (y, y1, y2): [B, 3] -> [B]."""
  return quantiles.floor(reward[:, :1], reward[:, 1:])[:, 0]


def test_a_batch_of_one_has_no_baseline():
  weigh = jax.jit(lambda r: make().weigh(scores(r))[0])
  rows = weigh(np.array([[0.0, 1, 1]]))
  np.testing.assert_array_equal(rows.baseline, 0)
  assert rows.quantile_reward[0] < 0  # so that a mean with itself would show


def test_the_baseline_is_the_others_whole_signal():
  """gamma's part included; from each position on."""
  rng = np.random.default_rng(0)
  log_sampled, log_anchor = rng.standard_normal((2, 3, 2, 2))
  reward = np.array([[0.0, 1, 1], [2, 1, 1], [0, 3, 1]])
  rows = jax.jit(
    lambda *x: make().weigh(
      scores(x[0], log_sampled=x[1], log_anchor=x[2][:, :1])
    )[0]
  )(reward, log_sampled, log_anchor)
  ratio = (log_sampled - log_anchor)[:, 0]
  to_go = np.stack([ratio.sum(-1), ratio[:, 1]], -1)
  floor = -math.log(16) * np.array([[1], [0], [1]])
  signal = 0.5 * floor - (0.5 + 0.7) * to_go
  others = (signal.sum(0) - signal) / 2
  np.testing.assert_allclose(rows.baseline[:, 0], others, atol=1e-5)


def test_the_floor_fires_on_a_third_of_distinct_rewards():
  """Policy = anchor, no ties: every order of three is as likely."""
  orders = np.array(list(itertools.permutations([1.0, 2, 3])))
  values, metrics = jax.jit(lambda r: (floor(r), make().weigh(scores(r))[1]))(
    orders
  )
  np.testing.assert_allclose(np.mean(values < 0), 1 / 3)
  np.testing.assert_allclose(np.mean(values), -math.log(16) / 3, rtol=1e-6)
  np.testing.assert_allclose(np.mean(values), -0.9242, atol=5e-5)
  np.testing.assert_allclose(np.var(values), 1.708, atol=1e-3)
  np.testing.assert_allclose(metrics['signal/fires'], 1 / 3, rtol=1e-6)


def test_select_takes_the_policy_s_and_the_first_of_the_best():
  reward = np.array([[9.0, 1, 2], [0, 2, 1], [0, 1, 1], [5, 5, 5]])
  index = jax.jit(lambda r: make().select(r, ops.win_matrix(r)))(reward)
  np.testing.assert_array_equal(index, [[0, 2], [0, 1], [0, 1], [0, 1]])


def test_fires_and_kl_metrics_leave_out_filler_rows():
  log_sampled = np.zeros((3, 2, 2), np.float32)
  log_sampled[:, 0] = [[1.0, 2], [0, 1], [np.nan, 0]]
  metrics = jax.jit(
      lambda r, s, w: make().weigh(scores(r, log_sampled=s, weight=w))[1]
  )(np.array([[0.0, 1, 1], [1, 1, 1], [0, 1, 1]]), log_sampled,
    np.array([1.0, 1, 0]))  # fmt: skip
  np.testing.assert_allclose(metrics['signal/fires'], 0.5)
  np.testing.assert_allclose(metrics['kl/policy_anchor'], 2.0)


@pytest.mark.parametrize('k', [2, 3, 4])
def test_it_is_bond_with_the_floor_and_a_moving_average(k):
  """To the last bit, in every part."""
  mine = make(num_anchor=k, anchor_rate=0.02)
  other = bond.make(
    n=k, backward_weight=0.5, drift_weight=0.7, num_policy=1,
    quantile='floor', num_quantile=k, zero='smooth', second_term=False,
    anchor='ema:0.02',
  )  # fmt: skip
  rng = np.random.default_rng(k)
  log_sampled, log_anchor, log_policy = rng.standard_normal((3, 64, 2, 2))
  reward = rng.integers(0, 4, (64, 1 + k))

  @functools.partial(jax.jit, static_argnums=0)
  def parts(algorithm, params):
    index = algorithm.select(jnp.asarray(reward), None)
    rows, metrics = algorithm.weigh(
      scores(reward, log_sampled=log_sampled, log_anchor=log_anchor[:, :1])
    )
    loss = algorithm.loss(log_policy, rows)
    moved = algorithm.anchor.update(jnp.float32(1), params, 1)
    return index, rows, metrics, loss, moved

  jax.tree.map(
    np.testing.assert_array_equal, parts(mine, 3.0), parts(other, 3.0)
  )
  floors = quantiles.floor(reward[:, :1], reward[:, 1:])
  np.testing.assert_allclose(
    parts(mine, 3.0)[1].quantile_reward, (k - 1) * floors
  )
  for field in ('num_policy', 'num_anchor', 'anchor_rows', 'quantile_rows'):
    assert getattr(mine, field) == getattr(other, field)
  assert mine.num_anchor == k and mine.anchor.moves


@pytest.mark.parametrize(
  'wrong',
  [
    dict(num_anchor=1),
    dict(backward_weight=-0.1),
    dict(backward_weight=1.1),
    dict(drift_weight=-1.0),
    dict(anchor_rate=2.0),
  ],
)
def test_bad_arguments_are_named(wrong):
  ((name, value),) = wrong.items()
  with pytest.raises(ValueError, match=f'{name.replace("_", ".")}.*{value}'):
    make(**wrong)


# -- where it leads -----------------------------------------------------------


def test_the_backward_part_stops_at_its_optimum(x64):
  """pi ∝ anchor 16^(-(1 - p)^2)."""
  _, anchor = tables(8, 1, ONE_TOKEN)
  algorithm = make(backward_weight=1.0, drift_weight=0.0)
  q = jax.nn.softmax(anchor[0, 0, 0])
  for reward in (np.array([0.1, 2, -1, 0.5]), np.array([1.0, 0, 1, 0])):
    _, at_most = oracle.quantiles(np.array(q), reward)
    theta = np.zeros_like(anchor)
    theta[0, 0, 0] = np.log(q) - math.log(16) * (1 - at_most) ** 2
    mine = expected_gradient(algorithm, theta, anchor, reward[None], np.ones(1))
    np.testing.assert_allclose(mine, 0, rtol=0, atol=1e-12)


def test_that_optimum_is_close_to_best_of_two():
  """Over a continuum of arms: u is the quantile, which the anchor has even."""
  u = (np.arange(200_000) + 0.5) / 200_000
  density = 16 ** -((1 - u) ** 2)
  density /= density.mean()
  to_best = (density * np.log(density / (2 * u))).mean()
  np.testing.assert_allclose((density * u).mean(), 0.676, atol=5e-4)
  np.testing.assert_allclose(to_best, 0.0078, atol=5e-5)
  to_anchor = (density * np.log(density)).mean()
  np.testing.assert_allclose(to_anchor, 0.209, atol=5e-4)
  np.testing.assert_allclose(np.log(2) - 1 / 2, 0.193, atol=5e-4)  # Best-of-2


# -- Best-of-N ----------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_best_of_n_formula_is_enumeration_with_ties(x64, n):
  p = np.array([0.1, 0.3, 0.2, 0.05, 0.35])
  for reward in ([3.0, 1, 2, 5, 4], [1.0, 0, 1, 1, 0], [2.0] * 5):
    law = oracle.best_of_n(p, np.array(reward), n)
    np.testing.assert_allclose(
      law, oracle.enumerate_best_of_n(p, reward, n), atol=1e-14
    )


def test_best_of_two_is_twice_the_win_rate(x64):
  """Bo2(y) = 2 p(y) P(y > p), from select and the win matrix themselves."""
  p = np.array([0.1, 0.3, 0.2, 0.4])
  reward = np.array([1.0, 0, 1, 2])
  pairs = np.array(list(itertools.product(range(4), repeat=2)))
  drawn = np.concatenate([np.zeros((16, 1)), reward[pairs]], 1)
  best, win = jax.jit(
    lambda r, d: (make().select(d, None)[:, 1], ops.win_matrix(r))
  )(reward, drawn)
  law = np.zeros(4)
  winner = pairs[np.arange(16), np.asarray(best) - 1]
  np.add.at(law, winner, p[pairs].prod(-1))
  np.testing.assert_allclose(law, 2 * p * (np.asarray(win) @ p), atol=1e-15)
  np.testing.assert_allclose(law, oracle.best_of_n(p, reward, 2), atol=1e-15)
