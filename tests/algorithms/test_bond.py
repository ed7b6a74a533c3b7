"""BOND against enumeration of every batch it can meet, in double precision.

Laws: one-token completions over four actions; sequences of at most two tokens
over three, the second of which is EOS; over two where prompts are several.
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

from bond_jax.algorithms import bond
from bond_jax.algorithms.parts import anchors, ops, quantiles
from bond_jax.types import Scores

FOUR = [(0.1, 2.0, -1.0, 0.5), (1.0, 0.0, 1.0, 0.0), (2.0, 2.0, 2.0, 2.0)]
SEVEN = [
  (0.1, 2.0, -1.0, 0.5, 3.0, 0.7, 1.1),
  (0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 0.0),
]
SMALL = np.array([[0.0, 1, 2], [1, 0, 1]])

make = functools.partial(
  bond.make,
  n=3,
  backward_weight=0.5,
  drift_weight=0.7,
  num_policy=1,
  quantile='monte_carlo',
  num_quantile=2,
  zero='half',
  second_term=False,
  anchor='fixed',
)
SOME = {  # one of each signal
  'half': make(),
  'one': make(zero='one'),
  'smooth': make(zero='smooth'),
  'second_term': make(second_term=True),
  'floor': make(quantile='floor'),
  'learned': make(quantile='learned'),
}


def tables(seed, prompts=1, length=1, vocab=4):
  """Logits of policy and anchor: [X, T, V, V] each."""
  rng = np.random.default_rng(seed)
  return 0.7 * rng.standard_normal((2, prompts, length, vocab, vocab))


def law_of(theta):
  _, length, vocab, _ = theta.shape
  return oracle.sequences(vocab, length, 1 if length > 1 else None)


def laws(theta):
  """[X, Y], as numpy."""
  law = law_of(theta)
  log_p = [oracle.table_log_probs(t, *law).sum(-1) for t in theta]
  return np.exp(np.array(log_p))


@jax.jit
def objective_gradient(theta, anchor, best, signal, backward, drift):
  """Of the objective in closed form, summed over prompts."""
  f = functools.partial(
    oracle.bond_objective, law=law_of(theta), backward=backward, drift=drift
  )
  return jax.grad(lambda t: jax.vmap(f)(t, anchor, best, signal).sum())(theta)


def exact(theta, anchor, reward, signal, *, n, backward=0.5, drift=0.7):
  """The same at Best-of-n of the anchor; signal(less, at_most) -> [Y]."""
  q = laws(anchor)
  pairs = list(zip(q, np.asarray(reward), strict=True))
  best = np.array([oracle.best_of_n(p, r, n) for p, r in pairs])
  signals = np.array([signal(*oracle.quantiles(p, r)) for p, r in pairs])
  return objective_gradient(theta, anchor, best, signals, backward, drift)


def expected_gradients(algorithms, theta, anchor, reward, quantile, weight):
  f = functools.partial(oracle.expected_gradient, law=law_of(theta))
  return [
    f(a, theta, anchor, reward, weight, quantile=quantile) for a in algorithms
  ]


def same(mine, other, atol=1e-12):
  np.testing.assert_allclose(mine, other, rtol=0, atol=atol)


def prove(cases, theta, anchor, rewards):
  """The expected gradient is the objective's, of one prompt.

  cases: (arguments of `make`, the signal in closed form) of each algorithm,
  which are compiled together. A learned quantile is given the exact one.
  """
  algorithms = [make(**arguments) for arguments, _ in cases]
  mine = jax.jit(functools.partial(expected_gradients, algorithms))
  for reward in np.array(rewards):
    less, at_most = oracle.quantiles(laws(anchor)[0], reward)
    assert (at_most[None] <= 1 + 1e-12).all() and less.min() == 0
    gradients = mine(theta, anchor, reward[None], at_most[None], jnp.ones(1))
    for gradient, (arguments, signal) in zip(gradients, cases, strict=True):
      expected = exact(
        theta,
        anchor,
        reward[None],
        signal,
        n=arguments.get('n', 3),
        backward=arguments.get('backward_weight', 0.5),
        drift=arguments.get('drift_weight', 0.7),
      )
      assert jnp.abs(expected).max() > 0.01
      same(gradient, expected)


def monte_carlo(n=3, k=2, zero='half'):
  """The signal (n - 1) E log p, from the exact quantiles."""
  return lambda _, p: (n - 1) * oracle.mean_monte_carlo(p, k, zero)


# -- the gradient -------------------------------------------------------------


@pytest.mark.parametrize(
  'n, k',
  core(
    3,
    [(2, 3), (3, 2), (4, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (4, 3)],
  ),
)
def test_the_gradient_with_monte_carlo_quantiles(x64, n, k):
  """Fewer, as many and more comparisons than draws that compete for best."""
  cases = [
    (dict(n=n, num_quantile=k, zero=zero), monte_carlo(n, k, zero))
    for zero in quantiles.ZEROS
  ]
  prove(cases, *tables(10 * n + k), FOUR)


def test_the_gradient_of_any_mixture_on_sequences(x64):
  """Sums, masks, and the log-ratio from each position on."""
  cases = [
    (dict(n=2, backward_weight=b, drift_weight=g), monte_carlo(n=2))
    for b in (0.0, 0.5, 1.0)
    for g in (0.0, 0.7)
  ]
  prove(cases, *tables(1, length=2, vocab=3), SEVEN)


def test_the_gradient_with_the_second_term(x64):
  """Over strict wins, ties and losses; both terms are those of k draws."""
  cases = [
    (
      dict(n=n, num_quantile=k, second_term=True),
      lambda less, p, n=n, k=k: (
        (n - 1) * oracle.mean_monte_carlo(p, k, 'half')
        + oracle.mean_second_term(less, p, k, n)
      ),
    )
    for n, k in ((2, 1), (3, 2), (2, 3), (4, 3))
  ]
  prove(cases, *tables(2), FOUR)


def test_the_gradient_with_the_floor(x64):
  cases = [
    (
      dict(n=n, quantile='floor', num_quantile=k),
      lambda _, p, n=n, k=k: (n - 1) * oracle.mean_floor(p, k),
    )
    for n, k in ((2, 1), (2, 2), (3, 3), (2, 4))
  ]
  prove(cases, *tables(3), FOUR)


def test_the_gradient_with_a_learned_quantile(x64):
  """Which is exact here; then BOND's objective is, the second term apart."""
  cases = [
    (
      dict(n=n, quantile='learned', num_quantile=1, backward_weight=b),
      lambda _, p, n=n: (n - 1) * np.log(p),
    )
    for n in (2, 4)
    for b in (0.5, 1.0)
  ]
  prove(cases, *tables(4), FOUR)


def test_the_gradient_with_two_completions_of_the_policy(x64):
  cases = [
    (dict(n=2, num_policy=2, num_quantile=1), monte_carlo(2, 1)),
    (dict(n=2, num_policy=2, backward_weight=1.0), monte_carlo(2, 2)),
  ]
  prove(cases, *tables(5), FOUR)


@pytest.mark.parametrize('m', core(1, [1, 2]))
def test_the_baseline_leaves_the_expectation_alone(x64, m):
  """Two prompts, all pairs of their tuples; and any other sampler's baseline,
  which is the only place where the sampler's log-probs go."""
  algorithm = make(n=2, num_policy=m)

  def another_sampler(scores):
    off = 1.5 * scores.log_sampled - 1
    return algorithm.weigh(scores._replace(log_sampled=off))

  theta, anchor = tables(6, prompts=2, length=2, vocab=2)
  other = algorithm._replace(weigh=another_sampler)
  f = functools.partial(expected_gradients, [algorithm, other], quantile=None)
  mine, others = jax.jit(f)(theta, anchor, SMALL, weight=jnp.ones(2))
  both = exact(theta, anchor, SMALL, monte_carlo(n=2), n=2)
  same(mine, both / 2)
  same(others, both / 2)


@pytest.mark.parametrize('quantile', ['monte_carlo', 'learned'])
def test_a_filler_row_changes_nothing(x64, quantile):
  """Two prompts and a filler: every batch of the three is enumerated."""
  theta, anchor = tables(7, prompts=3, length=2, vocab=2)
  anchor[2] *= 1e3
  reward = np.concatenate([SMALL, [[np.nan, 5, np.nan]]])
  at_most = np.stack(
    [oracle.quantiles(*x)[1] for x in zip(laws(anchor), reward)]
  )
  at_most[2] = np.nan
  algorithm = make(n=2, num_quantile=1, quantile=quantile)
  mine = jax.jit(functools.partial(expected_gradients, [algorithm]))(
    theta, anchor, reward, at_most, jnp.array([1.0, 1, 0])
  )[0]
  signal = {
    'monte_carlo': monte_carlo(2, 1),
    'learned': lambda _, p: np.log(p),
  }[quantile]
  both = exact(theta[:2], anchor[:2], SMALL, signal, n=2)
  same(mine[:2], both / 2)
  np.testing.assert_array_equal(mine[2], 0)


# -- where it leads -----------------------------------------------------------


@pytest.mark.parametrize('drift', [0.0, 0.7])
def test_the_backward_part_stops_at_its_optimum(x64, drift):
  """pi ∝ anchor p^((n - 1) / (1 + g)), if the quantile is exact."""
  n = 3
  _, anchor = tables(8)
  algorithm = make(
    n=n, quantile='learned', backward_weight=1.0, drift_weight=drift
  )
  f = jax.jit(functools.partial(expected_gradients, [algorithm]))
  (q,) = laws(anchor)
  for reward in np.array(FOUR):
    _, at_most = oracle.quantiles(q, reward)
    theta = np.zeros_like(anchor)
    theta[0, 0, 0] = np.log(q) + (n - 1) / (1 + drift) * np.log(at_most)
    batch = anchor, reward[None], at_most[None], jnp.ones(1)
    same(f(theta, *batch)[0], 0)
    theta[0, 0, 0, 1] += 0.5
    assert jnp.abs(f(theta, *batch)[0]).max() > 0.01


def test_with_the_second_term_the_optimum_is_best_of_n(x64):
  """Equation (8) whole: both terms exact, ties included."""
  _, anchor = tables(9)
  (q,) = laws(anchor)
  for reward, n in itertools.product(np.array(FOUR), (2, 3, 4)):
    less, at_most = oracle.quantiles(q, reward)
    ratio = less / at_most
    signal = (n - 1) * np.log(at_most) + np.log(sum(ratio**i for i in range(n)))
    best = oracle.best_of_n(q, reward, n)
    theta = np.zeros_like(anchor)
    theta[0, 0, 0] = np.log(best)
    for b in (0.0, 0.5, 1.0):
      f = objective_gradient(theta, anchor, best[None], signal[None], b, 0.0)
      same(f, 0)


# -- the pieces ---------------------------------------------------------------


def scores(algorithm, reward):
  """Scores of B prompts with T = 2; its other numbers are the same always."""
  rng = np.random.default_rng(0)
  reward = jnp.asarray(reward, jnp.float32)
  index = algorithm.select(reward, ops.win_matrix(reward))
  b, m = index.shape
  log = lambda rows: jnp.float32(-rng.exponential(size=(b, rows, 2)))
  return Scores(
    reward=reward,
    win=ops.win_matrix(reward),
    index=index,
    log_sampled=log(m),
    log_anchor=log(len(algorithm.anchor_rows)),
    log_reference=log(len(algorithm.reference_rows)),
    log_quantile=log(len(algorithm.quantile_rows)).sum(-1),
    weight=jnp.ones(b),
  )


@functools.partial(jax.jit, static_argnums=0)
def outcome(algorithm, reward):
  """What is made of a batch: index, rows, metrics and losses."""
  batch = scores(algorithm, reward)
  rows, metrics = algorithm.weigh(batch)
  loss = algorithm.loss(batch.log_sampled - 0.5, rows)
  return batch.index, rows, metrics, loss


@pytest.mark.parametrize('name', SOME)
def test_only_the_order_of_rewards_matters(name):
  reward = np.random.default_rng(1).integers(0, 4, (32, 4)).astype(np.float32)
  mine, *others, reverse = (
    outcome(SOME[name], r)
    for r in (
      reward,
      np.exp(reward),
      reward**3 - 100,
      -1e3 / (1 + reward),
      -reward,
    )
  )
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, mine, other)
  assert (mine[0] != reverse[0]).any()
  assert name == 'learned' or (np.abs(mine[-1] - reverse[-1]) > 0.01).any()


@pytest.mark.parametrize('name', SOME)
def test_a_group_that_is_all_tied(name):
  """No signal, whatever the tie is at; the pull to the anchor is left."""
  for level in (2.0, 0.0, -np.inf, np.inf):
    index, rows, metrics, loss = outcome(SOME[name], np.full((3, 4), level))
    np.testing.assert_array_equal(index, [[0, 1]] * 3)
    if name != 'learned':  # a network answers what it has learnt
      np.testing.assert_array_equal(rows.quantile_reward, 0)
      assert metrics['signal/fires'] == 0
    assert np.isfinite(loss).all()


@pytest.mark.parametrize('name', SOME)
def test_infinitely_bad_completions_are_the_worst(name):
  reward = np.random.default_rng(2).integers(0, 3, (32, 4)).astype(np.float32)
  low = np.where(reward == 0, -np.inf, reward)
  mine, other = (outcome(SOME[name], r) for r in (reward, low))
  jax.tree.map(np.testing.assert_array_equal, mine, other)
  assert np.isfinite(other[-1]).all()


@pytest.mark.parametrize(
  ('name', 'share'),
  [('half', 2 / 3), ('second_term', 1), ('floor', 1 / 3), ('learned', 1)],
)
def test_how_often_the_signal_fires(name, share):
  """Policy = anchor and no ties: y is best, second or third of three."""
  orders = np.array(list(itertools.permutations([1.0, 2, 3])))
  _, rows, metrics, _ = outcome(
    SOME[name], np.concatenate([orders, np.zeros((6, 1))], 1)
  )
  np.testing.assert_allclose(metrics['signal/fires'], share, rtol=1e-6)
  np.testing.assert_allclose(
    metrics['signal/mean'], rows.quantile_reward.mean(), rtol=1e-6
  )


def test_two_completions_of_the_policy_are_averaged():
  """In the baseline; a prompt fires if either does."""
  algorithm = make(num_policy=2, n=2, quantile='floor')
  reward = np.array([[0.0, 9, 1, 1], [9, 9, 1, 1], [0, 0, 1, 1]])

  @jax.jit
  def f(reward):
    batch = scores(algorithm, reward)
    ratio = batch.log_sampled[:, :2] - batch.log_anchor
    return ratio, *algorithm.weigh(batch)

  ratio, rows, metrics = jax.device_get(f(reward))
  np.testing.assert_allclose(metrics['signal/fires'], 2 / 3, rtol=1e-6)
  floor = -math.log(16) * np.array([[1, 0], [0, 0], [1, 1]])
  to_go = np.stack([ratio.sum(-1), ratio[..., 1]], -1)
  mean = (0.5 * floor[..., None] - (0.5 + 0.7) * to_go).mean(1)
  others = (mean.sum(0) - mean) / 2
  same(rows.baseline, np.stack([others, others], 1), 1e-5)


def test_the_gradient_of_a_batch_is_its_advantage():
  """At each position, less the baseline; the best has 1 - b at each."""
  algorithm = make(num_policy=2, n=2, quantile='floor', backward_weight=0.4)

  @jax.jit
  def f(log_policy, reward):
    batch = scores(algorithm, reward)
    rows, _ = algorithm.weigh(batch)
    loss = lambda x: algorithm.loss(x, rows).sum()
    return batch.log_anchor, rows.baseline, jax.grad(loss)(log_policy)

  log_policy = np.sin(np.arange(18.0)).reshape(3, 3, 2)
  reward = np.array([[0.0, 9, 1, 1], [9, 9, 1, 1], [0, 0, 1, 1]])
  log_anchor, baseline, gradient = map(np.asarray, f(log_policy, reward))
  ratio = log_policy[:, :2] - log_anchor
  to_go = np.stack([ratio.sum(-1), ratio[..., 1]], -1)
  floor = -math.log(16) * np.array([[1, 0], [0, 0], [1, 1]])
  signal = 0.4 * floor[..., None] - (0.4 + 0.7) * to_go
  assert np.abs(baseline).min() > 0.1
  same(gradient[:, :2], -(signal - baseline) / 2, 1e-5)
  same(gradient[:, 2], -0.6, 1e-6)


def test_the_rows_that_are_trained():
  """The policy's, then the first of the best among the anchor's first n."""
  reward = np.array([[9.0, 9, 1, 2, 3], [0, 0, 2, 2, 1], [0, 0, 0, 1, 2]])
  for arguments, index, drawn in (
    (dict(n=2), [[0, 1, 3], [0, 1, 2], [0, 1, 3]], 3),
    (dict(n=3), [[0, 1, 4], [0, 1, 2], [0, 1, 4]], 3),
    (dict(n=3, num_quantile=1), [[0, 1, 4], [0, 1, 2], [0, 1, 4]], 3),
    (dict(n=4, backward_weight=1.0), [[0, 1]] * 3, 3),
  ):
    algorithm = make(num_policy=2, **{'num_quantile': 3, **arguments})
    assert (algorithm.num_policy, algorithm.num_anchor) == (2, drawn)
    mine = algorithm.select(jnp.asarray(reward), None)
    np.testing.assert_array_equal(mine, index)
    assert algorithm.anchor_rows == (0, 1)
    assert algorithm.reference_rows == algorithm.quantile_rows == ()
  learned = make(num_policy=2, quantile='learned')
  assert learned.quantile_rows == (0, 1)


def test_the_second_term_of_distinct_rewards_is_a_constant():
  """log n for every y, which a baseline or a normaliser takes away."""
  orders = np.array(list(itertools.permutations(range(4))))
  mine, plain = (
    outcome(make(n=3, num_quantile=3, second_term=s), orders)[1]
    for s in (True, False)
  )
  same(mine.quantile_reward - plain.quantile_reward, math.log(3), 1e-6)


def test_the_anchor_is_the_named_one():
  for name in ('fixed', 'periodic:2', 'ema:0.25'):
    mine, named = make(anchor=name).anchor, anchors.named(name)
    assert mine.moves == named.moves
    for iteration in (1, 2):
      moved = [
        r.update(jnp.ones(1), jnp.zeros(1), iteration) for r in (mine, named)
      ]
      np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize(
  'wrong',
  [
    dict(n=1),
    dict(backward_weight=-0.1),
    dict(backward_weight=1.1),
    dict(backward_weight=math.nan),
    dict(drift_weight=-1.0),
    dict(drift_weight=math.nan),
    dict(num_policy=0),
    dict(num_quantile=0),
    dict(quantile='exact'),
    dict(zero='two'),
    dict(anchor='hourly'),
    dict(anchor='ema:2'),
  ],
)
def test_bad_arguments_are_named(wrong):
  ((name, value),) = wrong.items()
  with pytest.raises(ValueError, match=f'^{name} .*{value}'):
    make(**wrong)


@pytest.mark.parametrize('quantile', ['floor', 'learned'])
def test_the_second_term_needs_comparisons(quantile):
  with pytest.raises(ValueError, match=f'^second_term .*{quantile}'):
    make(second_term=True, quantile=quantile)
