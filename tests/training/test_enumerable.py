"""The language that can be enumerated, and what is said of its laws."""

import functools

import jax
import language
import numpy as np
import oracle
import pytest
import toy

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import completions
from bond_jax.measures import aggregate, exact, tables
from bond_jax.models import sampling, scalar_head
from bond_jax.models.log_probs import log_probs
from bond_jax.models.stops import Stop
from bond_jax.runs import stages
from bond_jax.training.tasks import enumerable
from bond_jax.types import Rollout

X, V, T = language.PROMPTS, language.VOCAB, language.LENGTH
STEPS = 40
EXACT = {
  'backward_kl', 'forward_kl', 'log_quantile', 'reward/validation',
  'win_rate/reference', 'kl/reference', 'entropy',
}  # fmt: skip


# -- the language -------------------------------------------------------------


@pytest.mark.parametrize('vocab, length', [(2, 1), (3, 2), (4, 3)])
def test_every_completion_is_there_once(vocab, length):
  tokens, mask = enumerable.completions(vocab, length)
  pairs = lambda *x: sorted(zip(*(map(tuple, a) for a in x), strict=True))
  expected = oracle.sequences(vocab, length, enumerable.EOS)
  assert pairs(tokens.tolist(), mask.tolist()) == pairs(
    *(x.tolist() for x in expected)
  )
  codes = enumerable.codes(tokens, mask, vocab)
  assert len(np.unique(codes)) == len(tokens)


def test_a_completion_finds_its_reward():
  tokens, mask = enumerable.completions(4, 3)
  table = np.arange(3.0 * len(tokens)).reshape(3, -1)
  prompts = next(enumerable.Cycle(3, 4, 6))
  drawn = np.random.default_rng(0).integers(len(tokens), size=(6, 9))
  junk = np.where(mask, tokens, 2)[drawn]  # after the end
  found = enumerable.lookup(table, tokens, mask, 4)(
    prompts, Rollout(junk, mask[drawn], None, None)
  ).value
  assert found.dtype == np.float32
  x = np.arange(6)[:, None] % 3
  np.testing.assert_array_equal(found, table[x, drawn])


def test_rewards_are_sums_over_places_and_neighbours():
  """So that two completions differ by what they do not share."""
  tokens, mask = enumerable.completions(4, 3)
  table = enumerable.reward_table(0, 2, tokens, mask, 4)
  at = {tuple(y[m]): r for y, m, r in zip(tokens, mask, table.T, strict=True)}
  # The first token changed, and nothing next to the third.
  a = at[0, 2, 3] - at[0, 2, 0]
  b = at[3, 2, 3] - at[3, 2, 0]
  np.testing.assert_allclose(a, b)
  # Next to the changed one there is a pair, too.
  assert np.abs(a - (at[0, 0, 3] - at[0, 0, 0])).min() > 0.01
  assert np.ptp(table, axis=1).min() > 1
  other = enumerable.reward_table(1, 2, tokens, mask, 4)
  assert (other != table).all()


def test_prompts_come_in_turn_and_draw_apart():
  prompts = next(enumerable.Cycle(3, 4, 6))
  assert prompts.tokens.tolist() == [[4], [5], [6]] * 2
  assert len(set(prompts.id)) == 6


@pytest.fixture(scope='module')
def task():
  """The task of the tiny config; its policy is far from uniform."""
  config = language.get_config('jbond')
  task = enumerable.make(stages.Run(config, '', sharding.make_mesh(1, 1)))
  rng = np.random.default_rng(0)
  noise = lambda x: x + 0.5 * rng.standard_normal(x.shape).astype(np.float32)
  return task, jax.tree.map(noise, task.frozen.reference)


def law_of(task, params):
  """The probability of every completion, f64[X, Y]."""
  config = language.get_config('jbond')
  law = jax.jit(enumerable.exact_law(config, task.policy))
  return np.exp(np.asarray(law(params), np.float64).sum(-1))


@pytest.fixture(scope='module')
def law(task):
  return law_of(*task)


def test_the_law_is_one(law):
  assert law.shape == (X, 7)
  np.testing.assert_allclose(law.sum(-1), 1, rtol=0, atol=1e-6)
  assert np.ptp(law) > 0.2
  assert np.abs(law[0] - law[1]).max() > 0.02


def test_the_law_is_that_of_scored_completions(task):
  prompts = next(enumerable.Cycle(X, V, X))
  shape = (X, 7, T)
  tokens, mask = enumerable.completions(V, T)
  score = functools.partial(log_probs, task[0].policy, chunk=T)
  scored = jax.jit(score)(
    task[1], prompts, *(np.broadcast_to(x, shape) for x in (tokens, mask))
  )
  config = language.get_config('jbond')
  law = jax.jit(enumerable.exact_law(config, task[0].policy))
  np.testing.assert_allclose(law(task[1]), scored, rtol=0, atol=1e-5)


def test_a_language_of_single_tokens_has_a_law():
  config = language.get_config('jbond')
  config.length = 1
  policy = enumerable.make_policy(config)
  init = jax.jit(policy.init)
  law = jax.jit(enumerable.exact_law(config, policy))(init(jax.random.key(0)))
  assert law.shape == (X, V, 1)
  np.testing.assert_allclose(np.exp(law).sum((1, 2)), 1, rtol=0, atol=1e-6)


def test_adapters_have_nothing_under_them():
  config = language.get_config('jbond')
  config.model.lora.rank = 2
  with pytest.raises(UserError, match='no weights under the adapters'):
    enumerable.check(config, None, None)


def test_the_sampler_draws_from_the_law(task, law):
  prompts = next(enumerable.Cycle(X, V, 4 * X))

  @jax.jit
  def draw(params):
    return sampling.sample(
        task[0].policy, params, prompts, jax.random.key(0),
        sampling.Limits(T, Stop((enumerable.EOS,))), num=500,
    )  # fmt: skip

  drawn = jax.device_get(draw(task[1]))
  known = enumerable.codes(*enumerable.completions(V, T), V)
  code = enumerable.codes(drawn.completion, drawn.mask, V)
  for x in range(X):
    count = (code[x::X, :, None] == known).sum((0, 1))
    expected = 2000 * law[x]
    assert count.sum() == 2000
    # Chi-square of 6 degrees of freedom: above 30 once in 25,000.
    assert ((count - expected) ** 2 / expected).sum() < 30


@pytest.mark.long
def test_the_kl_is_estimated_without_bias(task, law):
  """As evaluation does, of a policy and its reference whose laws are known."""
  config, mesh = language.get_config('jbond'), sharding.make_mesh(1, 1)
  policy, params = task[0].policy, task[1]
  prompts = next(enumerable.Cycle(X, V, 8 * X))
  mine = completions.Model(policy, params, {})
  theirs = completions.Model(policy, task[0].frozen.reference, {})
  draw = completions.make_draw(config, Stop((enumerable.EOS,)), mesh)
  _, here, there = draw(mine, theirs, prompts, jax.random.key(0), 0, 256)
  log_ratio = np.log(law) - np.log(law_of(task[0], theirs.params))
  exact_kl = (law * log_ratio).sum(-1)
  variance = (law * (log_ratio - exact_kl[:, None]) ** 2).sum(-1)
  got = (here - there).reshape(8, X, 256).swapaxes(0, 1).reshape(X, -1)
  error = np.sqrt(variance / got.shape[1])
  assert np.all(np.abs(got.mean(1) - exact_kl) < 4 * error)
  assert np.all(exact_kl > 20 * error)
  np.testing.assert_allclose(got.var(1), variance, rtol=0.15)
  # Of many draws the reported error is the deviation, prompts being clusters.
  kl, stderr = aggregate.mean_and_stderr(got)
  assert kl == pytest.approx(exact_kl.mean(), abs=5 * error.max())
  assert stderr == pytest.approx(got.mean(1).std(ddof=1) / np.sqrt(X), rel=1e-6)
  # A policy that is its reference: 0, whatever is drawn.
  _, here, there = draw(mine, mine, prompts, jax.random.key(1), 0, 8)
  np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)


# -- its measures -------------------------------------------------------------


def random_laws(prompts, arms, seed=0):
  """Log-probs and rewards [X, Y], from nothing but a seed; no ties."""
  rng = np.random.default_rng(seed)
  return (
    np.log(rng.dirichlet(np.ones(arms), prompts)),
    rng.standard_normal((prompts, arms)),
  )


def measured(log_policy, log_reference, reward, n):
  return exact.measure(log_policy, exact.know(log_reference, reward, n, 0.0))


@pytest.mark.parametrize('ties', [False, True])
def test_measures_are_their_definitions(ties):
  log_reference, reward = random_laws(3, 6)
  log_policy, _ = random_laws(3, 6, seed=1)
  if ties:
    reward = np.round(reward)
  expected = dict.fromkeys(EXACT, 0.0)
  for log_p, log_q, r in zip(log_policy, log_reference, reward, strict=True):
    p, q = np.exp(log_p), np.exp(log_q)
    target = oracle.enumerate_best_of_n(q, r, 3)
    pairs = [(a, b) for a in range(6) for b in range(6)]
    score = lambda a, b, r=r: (np.sign(r[a] - r[b]) + 1) / 2
    for name, value in {
      'backward_kl': (p * np.log(p / target)).sum(),
      'forward_kl': (target * np.log(target / p)).sum(),
      'log_quantile': (p * np.log(oracle.quantiles(q, r)[1])).sum(),
      'reward/validation': p @ r,
      'win_rate/reference': sum(p[a] * q[b] * score(a, b) for a, b in pairs),
      'kl/reference': (p * np.log(p / q)).sum(),
      'entropy': -(p * np.log(p)).sum(),
    }.items():
      expected[name] += value / 3
  found = measured(log_policy, log_reference, reward, 3)
  assert set(found) >= EXACT
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_the_equilibrium_is_wind_s_and_the_tilt_the_front_s():
  """ref exp(P(. > pi) / b) / Z, and with ref for pi; KLs are from them."""
  log_reference, reward = random_laws(3, 6)
  log_policy, _ = random_laws(3, 6, seed=1)
  known = exact.know(log_reference, reward, 3, 0.5)
  p = np.exp(known.equilibrium)
  free = log_reference + 2 * (tables.win_matrix(reward) @ p[..., None])[..., 0]
  law = free - np.logaddexp.reduce(free, -1, keepdims=True)
  np.testing.assert_allclose(known.equilibrium, law, rtol=0, atol=1e-9)
  kl = (p * (known.equilibrium - log_policy)).sum(-1).mean()
  found = exact.measure(log_policy, known)['equilibrium_kl']
  np.testing.assert_allclose(found, kl, rtol=1e-9)
  free = (
    log_reference
    + 2 * (tables.win_matrix(reward) @ np.exp(log_reference)[..., None])[..., 0]
  )
  law = free - np.logaddexp.reduce(free, -1, keepdims=True)
  kl = (np.exp(law) * (law - log_policy)).sum(-1).mean()
  found = exact.measure(log_policy, known)['tilt_kl']
  np.testing.assert_allclose(found, kl, rtol=1e-9)
  without = measured(log_policy, log_reference, reward, 3)
  assert not without.keys() & {'equilibrium_kl', 'tilt_kl'}


def test_best_of_n_is_on_its_own_curve():
  """400 arms: nearly no ties of an arm with itself, so the closed forms."""
  log_reference, reward = random_laws(4, 400)
  for n in (2, 4, 16):
    law = np.stack([
        oracle.best_of_n(np.exp(p), r, n)
        for p, r in zip(log_reference, reward, strict=True)
    ])  # fmt: skip
    found = measured(np.log(law), log_reference, reward, n)
    assert abs(found['backward_kl']) < 1e-9
    assert abs(found['forward_kl']) < 1e-9
    assert found['effective_n'] == pytest.approx(n, rel=1e-2)
    assert found['frontier_efficiency'] == pytest.approx(1, abs=1e-2)
    assert found['win_rate/reference'] == pytest.approx(n / (n + 1), abs=0.01)
    kl = np.log(n) - (n - 1) / n
    assert found['kl/reference'] == pytest.approx(kl, rel=0.05)


def test_off_the_curve_there_is_no_n():
  log_reference, reward = random_laws(2, 50)
  same = measured(log_reference, log_reference, reward, 4)
  assert same['win_rate/reference'] == pytest.approx(0.5, abs=1e-12)
  assert same['kl/reference'] == 0
  assert 'frontier_efficiency' not in same
  tilted = log_reference - reward
  tilted -= np.log(np.exp(tilted).sum(-1, keepdims=True))
  worse = measured(tilted, log_reference, reward, 4)
  assert worse['win_rate/reference'] < 0.4
  assert not {'effective_n', 'frontier_efficiency'} & set(worse)


# -- the train stage on it ----------------------------------------------------


def saved(workdir, step):
  return toy.saved(workdir, 'train', step)


def learned_config():
  config = language.get_config('bond', **language.LEARNED)
  config.train.update(dict(steps=STEPS, batch=16, save_every=20))
  return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of BOND with a learned quantile."""
  workdir = str(tmp_path_factory.mktemp('enumerable') / 'run')
  toy.run('train', learned_config(), workdir)
  return workdir


def test_a_run_reports_exact_measures(finished, task):
  rows = toy.rows(finished, 'train')
  assert [r['step'] for r in rows if 'backward_kl' in r] == [20, 40]
  last = rows[-1]
  assert EXACT | {'effective_n', 'frontier_efficiency'} <= set(last)
  summary = toy.summary(finished, 'train')
  assert summary['compilations_after_first_step'] == 0
  assert summary['win_rate_validation'] == last['win_rate/reference'] > 0.6
  # Said once more, of what has been saved.
  p = law_of(task[0], saved(finished, STEPS)['params'])
  q = law_of(task[0], task[0].frozen.reference)
  reward = enumerable.reward_table(0, X, *enumerable.completions(V, T), V)
  target = np.stack([oracle.best_of_n(q[x], reward[x], 4) for x in range(X)])
  kl = (p * np.log(p / target)).sum(-1).mean()
  np.testing.assert_allclose(last['backward_kl'], kl, rtol=1e-5)
  assert kl > 0.1


def test_the_learned_quantile_learns_the_quantile(finished, task):
  """Exact: P(r(y') <= r(y)) under the reference, which the anchor stays."""
  policy, prompts = task[0].policy, next(enumerable.Cycle(X, V, X))
  tokens, mask = enumerable.completions(V, T)
  each = [np.broadcast_to(x, (X, *x.shape)) for x in (tokens, mask)]
  logits = jax.jit(lambda p: scalar_head.logits(policy, p, prompts, *each))
  law = law_of(task[0], task[0].frozen.reference)
  reward = enumerable.reward_table(0, X, tokens, mask, V)
  rows = zip(law, reward, strict=True)
  exact = np.stack([oracle.quantiles(*row)[1] for row in rows])
  error = []  # of completions as frequent as under the reference
  for params in (
    scalar_head.init(policy, task[0].frozen.reference),
    *(saved(finished, s)['rest']['aux']['params'] for s in (20, 40)),
  ):
    gap = np.abs(jax.nn.sigmoid(logits(params)) - exact)
    error.append((law * gap).sum(-1).mean())
  assert error[0] > 0.25 and error[1] < 0.15 and error[2] < 0.08
  assert error[2] < error[1]


def fail_at(monkeypatch, call):
  """Lets the reward's call of this number raise."""
  lookup, calls = enumerable.lookup, []

  def failing(*args):
    reward = lookup(*args)

    def counted(*args):
      calls.append(1)
      if len(calls) == call:
        raise UserError('out of order')
      return reward(*args)

    return counted

  monkeypatch.setattr(enumerable, 'lookup', failing)


@pytest.mark.long
def test_a_run_goes_on_where_it_was_killed(finished, tmp_path, monkeypatch):
  """The learned quantile and its optimizer with it."""
  workdir = str(tmp_path / 'run')
  fail_at(monkeypatch, 30)
  with pytest.raises(UserError, match='out of order'):
    toy.run('train', learned_config(), workdir)
  assert toy.steps(workdir, 'train') == [20]
  toy.run('train', learned_config(), workdir)
  toy.same_end(workdir, finished, 'train', STEPS)
  assert set(saved(workdir, STEPS)['rest']['aux']) == {'params', 'opt_state'}
