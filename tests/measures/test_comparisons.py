"""Comparisons of completions, against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest

from bond_jax.measures import comparisons


def test_win_rate_counts_ties_half():
  policy = np.array([[1.0, 2.0], [0.0, 0.0]])
  reference = np.array([[1.0, 0.0, 3.0], [0.0, -1.0, -1.0]])
  # Prompt 1: (1/2 + 1 + 0 + 1 + 1 + 0) / 6; prompt 2: (1/2 + 1 + 1) / 3.
  np.testing.assert_allclose(
    comparisons.win_rates(policy, reference), [3.5 / 6, 2.5 / 3]
  )
  assert comparisons.win_rate(policy, reference) == pytest.approx(
    (3.5 / 6 + 2.5 / 3) / 2
  )


def test_tie_rate_is_over_distinct_draws():
  rate = lambda rows: comparisons.tie_rate(np.array(rows))
  assert rate([[1, 1, 2, 3]]) == pytest.approx(1 / 6)
  assert rate([[1, 1], [1, 2]]) == pytest.approx(1 / 2)
  assert rate([[1, 2, 3]]) == 0


def test_mean_log_quantile_of_the_reference_is_minus_one():
  x = np.random.default_rng(0).random((4, 1200))
  value = comparisons.mean_log_quantile(x[:, :600], x[:, 600:])
  assert value == pytest.approx(-1, abs=0.06)
  assert comparisons.mean_log_quantile(x[:, :5] + 2, x) == 0
  worst = comparisons.mean_log_quantile(x[:, :5] - 2, x)
  assert worst == pytest.approx(-math.log(1201))


@pytest.mark.parametrize('n', [1, 2, 3, 6])
def test_the_best_of_n_are_all_choices_of_n(n):
  rng = np.random.default_rng(n)
  policy, reference = rng.integers(4, size=(3, 5)), rng.integers(4, size=(3, 6))
  exact = [
    np.mean([
      (a > max(some)) + 0.5 * (a == max(some))
      for some in itertools.combinations(theirs, n)
      for a in mine
    ])
    for mine, theirs in zip(policy, reference, strict=True)
  ]  # fmt: skip
  got = comparisons.win_rates_over_best_of(n, policy, reference)
  np.testing.assert_allclose(got, exact, atol=1e-12)
  if n == 1:
    rates = comparisons.win_rates(policy, reference)
    np.testing.assert_allclose(got, rates, atol=1e-12)


def test_best_of_n_itself_wins_half_over_best_of_n():
  rng = np.random.default_rng(0)
  policy = rng.random((3000, 8, 4)).max(-1)
  found = comparisons.over_best_of(policy, rng.random((3000, 12)))
  assert list(found) == ['2', '4', '8']  # of 12 there is no best of 16
  for n, row in found.items():
    low, high = row['interval']
    exact = 4 / (4 + int(n))
    assert low < row['win_rate'] < high < low + 0.05
    assert row['win_rate'] == pytest.approx(exact, abs=0.01)
  with pytest.raises(ValueError, match='best of 13 .* 12'):
    comparisons.win_rates_over_best_of(13, policy, rng.random((3000, 12)))


@pytest.mark.parametrize('levels', [2, 4, 1000])
def test_the_reference_has_an_even_histogram(levels):
  """Each of its draws among all others: exactly 1, ties and all."""
  draws = np.random.default_rng(levels).integers(levels, size=(1, 21))
  density = np.mean(
    [
      comparisons.quantile_histogram(
        draws[:, [i]], np.delete(draws, i, 1), None
      )['policy']
      for i in range(21)
    ],
    0,
  )
  np.testing.assert_allclose(density, 1, atol=1e-12)


def test_the_histogram_of_best_of_n():
  rng = np.random.default_rng(0)
  reference = rng.random((4, 4000))
  row = comparisons.quantile_histogram(
    rng.random((4, 4000, 3)).max(-1), reference, 3.0
  )
  edges = np.array(row['edges'])
  exact = np.diff(edges**3) * 10
  np.testing.assert_allclose(row['best_of_n'], exact, atol=1e-3)
  np.testing.assert_allclose(row['policy'], exact, atol=0.1)
  assert row['n'] == 3
  # Two levels of one half: a quarter of the mass of Best-of-2 is on the lower.
  row = comparisons.quantile_histogram(
    np.array([[1, 0]]), np.array([[0, 1, 0, 1]]), 2, bins=2
  )
  np.testing.assert_allclose(row['best_of_n'], [0.5, 1.5])
  # One is above two of five places, the other below them: 2/5 each, and both
  # are spread over three places of five.
  np.testing.assert_allclose(row['policy'], [1, 1])
  none = comparisons.quantile_histogram(reference, reference, None)
  assert none['best_of_n'] is none['n'] is None


def lengths_of(row):
  return row['length_controlled_win_rate']


def test_without_an_effect_of_length_it_is_the_win_rate():
  """Every reward occurs with every length, on both sides."""
  policy, reference = np.array([[3.0, 1.0]]), np.array([[0.0, 2.0, 3.0]])
  twice = lambda x: np.concatenate([x, x], 1)
  rewards = twice(policy), twice(reference)
  one_and_nine = lambda x: np.concatenate([0 * x + 1, 0 * x + 9], 1)
  sizes = one_and_nine(policy), one_and_nine(reference)
  row = comparisons.length_controlled(rewards, sizes)
  rate = comparisons.win_rate(*rewards)
  assert lengths_of(row) == pytest.approx(rate, abs=1e-9)
  same = tuple(np.full(x.shape, 5) for x in rewards)
  row = comparisons.length_controlled(rewards, same)
  assert lengths_of(row) == pytest.approx(rate, abs=1e-9)


def test_the_effect_of_length_is_taken_out():
  """Outcomes drawn from the model itself, of pairs of one prompt each."""
  rng, prompts = np.random.default_rng(0), 4000
  hits, found = 0, []
  for _ in range(40):
    lengths = [rng.integers(low, low + 20, (prompts, 1)) for low in (10, 5)]
    longer = lengths[0] - lengths[1]
    chance = 1 / (1 + np.exp(-0.3 - 2 * np.tanh(longer / longer.std())))
    rewards = (rng.random((prompts, 1)) < chance) * 2.0, np.ones((prompts, 1))
    row = comparisons.length_controlled(rewards, lengths)
    low, high = row['length_controlled_win_rate_interval']
    exact = 1 / (1 + math.exp(-0.3))
    hits += low < exact < high
    found.append(lengths_of(row))
    assert comparisons.win_rate(*rewards) > 0.67 > lengths_of(row)
  assert np.mean(found) == pytest.approx(exact, abs=0.005)
  assert hits >= 34  # 95 % of 40, less three standard errors


def test_its_error_counts_prompts_not_pairs():
  rng = np.random.default_rng(0)
  rewards = rng.random((50, 1)) + 0.2, rng.random((50, 1))
  lengths = rng.integers(1, 9, (50, 1)), rng.integers(1, 9, (50, 1))
  once = comparisons.length_controlled(rewards, lengths)
  again = comparisons.length_controlled(
    [np.repeat(x, 7, 1) for x in rewards], [np.repeat(x, 7, 1) for x in lengths]
  )
  key = 'length_controlled_win_rate_interval'
  np.testing.assert_allclose(once[key], again[key], rtol=1e-9)


@pytest.mark.parametrize(
  'policy, lengths, why',
  [
    ([[5.0, 6.0]], ([[1, 2]], [[2, 1]]), 'one side won every'),
    ([[5.0, 0.0]], ([[9, 1]], [[5, 5]]), 'the lengths alone tell'),
  ],
)
def test_where_no_regression_can_tell(policy, lengths, why):
  row = comparisons.length_controlled(
    (np.array(policy), np.array([[1.0, 2.0]])), tuple(map(np.array, lengths))
  )
  assert why in row['length_controlled_reason']
  assert lengths_of(row) is row['length_controlled_win_rate_interval'] is None
