"""Best-of-N by one score, judged by another: counted, not drawn."""

import itertools

import ml_collections
import numpy as np
import pytest

from benchmarks import overoptimisation
from bond_jax.training import setups
from configs import overoptimisation as configs


def beats(a, b):
  return (float(a > b) + float(a >= b)) / 2


@pytest.mark.parametrize('n', [1, 2, 3, 6])
def test_chances_are_those_of_all_subsets(n):
  rewards = np.array([[3, 1, 2, 3, 0, 3], [5, 4, 3, 2, 1, 0.0]])
  expected = np.zeros(rewards.shape)
  subsets = list(itertools.combinations(range(6), n))
  for x, some in itertools.product(range(2), subsets):
    best = [i for i in some if rewards[x, i] == rewards[x, list(some)].max()]
    expected[x, best] += 1 / len(best) / len(subsets)
  got = overoptimisation.chances(rewards, n)
  np.testing.assert_allclose(got, expected, atol=1e-12)


def test_best_of_n_is_judged_by_gold(monkeypatch):
  """By opponents that are not among those chosen from."""
  monkeypatch.setattr(overoptimisation, 'NS', (1, 2, 4))
  rng = np.random.default_rng(0)
  rewards, golds = rng.integers(0, 4, size=(2, 3, 9)).astype(float)
  points = overoptimisation.best_of_n(rewards, golds)
  for point in points:
    proxy, gold, mean = [], [], []
    for x in range(3):
      for some in itertools.combinations(range(3, 9), point['n']):
        top = rewards[x, list(some)].max()
        best = [i for i in some if rewards[x, i] == top]
        for key, score in ((proxy, rewards), (gold, golds)):
          pairs = itertools.product(score[x, best], score[x, :3])
          key.append(np.mean([beats(a, b) for a, b in pairs]))
        mean.append(golds[x, best].mean())
    assert point['proxy'] == pytest.approx(np.mean(proxy), abs=1e-12)
    assert point['gold'] == pytest.approx(np.mean(gold), abs=1e-12)
    assert point['gold_mean'] == pytest.approx(np.mean(mean), abs=1e-12)
    low, high = point['gold_interval']
    assert low <= point['gold'] <= high
  assert points[0]['kl'] == pytest.approx(0, abs=1e-9)
  assert points[1]['kl'] > 0


def test_a_curve_is_read_between_its_points():
  points = [dict(kl=2.0, gold=0.6), dict(kl=1.0, gold=0.7)]
  assert overoptimisation.at(points, 1.25, 'gold') == pytest.approx(0.675)
  assert overoptimisation.at(points, 2.5, 'gold') is None


def test_every_run_spends_as_much_and_draws_apart():
  spent, seeds = set(), set()
  for name in configs.RUNS:
    config = configs.get_config(f'run={name}')
    assert isinstance(config, ml_collections.ConfigDict)
    algorithm = setups.make_algorithm(config)
    each = algorithm.num_policy + algorithm.num_anchor
    spent.add(config.train.steps * config.train.batch * each)
    seeds.add(config.seed)
  assert len(spent) == 1 and len(seeds) == len(configs.RUNS)
  assert list(overoptimisation.LABELS) == list(configs.RUNS)
