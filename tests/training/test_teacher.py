"""A reference that is another model, larger than the policy."""

import contextlib
import dataclasses
import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import toy

from bond_jax.algorithms import bond, qrpo, wind
from bond_jax.data import examples, sources
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.evaluation import evaluate, sample
from bond_jax.models import lora, policies
from bond_jax.models.log_probs import log_probs
from bond_jax.models.sampling import Limits
from bond_jax.models.sampling import sample as draw
from bond_jax.models.stops import Stop
from bond_jax.runs import provenance
from bond_jax.runs.settings import configs
from bond_jax.training import checks, distil
from bond_jax.training import step as step_lib
from bond_jax.training.tasks import text_task
from bond_jax.types import Frozen, Prompts
from bond_jax.weights import export, load, teachers

BATCH, P, T, V = 4, 3, 4, 9
SIZES = dict(features=32, heads=4, kv_heads=2, feed_forward=96)
KEYS = {  # of the toy's args
  'on_policy_distillation': dict(num_policy=2),
  'bond': dict(
    n=2, backward_weight=0.5, drift_weight=0.0, num_policy=1,
    quantile='monte_carlo', num_quantile=2, zero='half', second_term=False,
    anchor='fixed',
  ),
}  # fmt: skip
OPD = 'on_policy_distillation'

# -- one step -----------------------------------------------------------------


def setup_of(algorithm):
  """Student and teacher are tables, the teacher's in a tree of another shape.

  So that neither can be called with the other's parameters.
  """
  policy = oracle.table_policy(V)
  setup = step_lib.Setup(
    policy=policy, algorithm=algorithm, optimizer=optax.sgd(0.1), length=T,
    stop=Stop((1,)), rollouts=1, epochs=1, micro_batches=2, chunk=8,
  )  # fmt: skip
  return setup._replace(
    teacher=policy._replace(
      hidden=lambda params, *x: policy.hidden(params['table'], *x),
      prepare=lambda params: params['table'],
    )
  )


def trees():
  """The frozen trees, and what the policy starts from."""
  start, table = jax.random.normal(jax.random.key(0), (2, 8, V, V))
  return Frozen({'table': table}, {}), start


def make_prompts():
  rng = np.random.default_rng(0)
  mask = np.arange(P)[None] >= rng.integers(0, P, BATCH)[:, None]
  return Prompts(
    rng.integers(2, V, mask.shape), mask, np.arange(BATCH, dtype=np.int32),
    np.ones(BATCH, np.float32),
  )  # fmt: skip


def by_hand(table, prompts, completion, mask):
  """log of a table's law of each token: [B, M, T]."""
  found = np.zeros(completion.shape)
  log_p = np.asarray(jax.nn.log_softmax(table, -1))
  for b, m, t in np.argwhere(np.asarray(mask)):
    before = np.asarray(prompts.tokens[b])[prompts.mask[b]]
    tokens = [*before, *np.asarray(completion[b, m])]
    at = len(before) - 1 + t
    found[b, m, t] = log_p[at, tokens[at], tokens[at + 1]]
  return found


ALGORITHMS = {
  'bond': bond.make(**KEYS['bond']),
  'qrpo': qrpo.make(
    num_policy=1, num_anchor=2, rows=1, transform='identity', kl_weight=0.5
  ),
  'wind': wind.make(
    kl_weight=0.2, step_size=1.0, risk='squared', constant='fitted',
    num_anchor=3, rows=3,
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', ALGORITHMS)
def test_a_step_with_a_teacher_by_hand(name):
  """It draws what a fixed anchor draws, and scores what is asked of it."""
  setup = setup_of(ALGORITHMS[name])
  algorithm, (frozen, start) = setup.algorithm, trees()
  prompts, key = make_prompts(), jax.random.key(3)
  state = step_lib.init_state(setup, frozen, start)
  jax.tree.map(np.testing.assert_array_equal, state.params, start)
  rollout = jax.jit(functools.partial(step_lib.rollout, setup))
  drawn = rollout(state, frozen, prompts, key, 0)
  num, k = algorithm.num_policy, algorithm.num_anchor
  theirs = setup.policy, start
  if not algorithm.anchor.moves:
    theirs = setup.teacher, frozen.reference
  limits = Limits(T, setup.stop)
  expected = jax.jit(
    lambda params: draw(
      theirs[0], params, prompts, jax.random.fold_in(key, 0), limits, num=k,
      first=num,
    )
  )(theirs[1])  # fmt: skip
  for mine, other in zip(drawn[:2], expected[:2], strict=True):
    np.testing.assert_array_equal(mine[:, num:], other)

  reward = jnp.cos(drawn.completion.sum(-1) * 1.0)
  score = jax.jit(functools.partial(step_lib.score, setup))
  chosen, scores = score(state, frozen, prompts, drawn, reward)
  hand = by_hand(
    frozen.reference['table'], prompts, chosen.completion, chosen.mask
  )
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
  close(scores.log_reference, hand[:, list(algorithm.reference_rows)])
  if algorithm.anchor.moves:  # it is the policy of before
    close(scores.log_anchor, scores.log_sampled)
  else:
    close(scores.log_anchor, hand[:, list(algorithm.anchor_rows)])
  assert algorithm.reference_rows or algorithm.anchor_rows

  weigh = jax.jit(functools.partial(step_lib.weigh, setup))
  batch, _ = weigh(state, frozen, prompts, drawn, reward)
  update = jax.jit(functools.partial(step_lib.update, setup))
  state, row = update(state, frozen, batch)
  assert np.isfinite(row['loss']) and row['gradient_norm'] > 0
  assert abs(row['sampler_gap']) < 1e-4 or not num
  state, moved = step_lib.move_anchor(setup, state, frozen)
  if algorithm.anchor.moves:  # there is no distance to a teacher
    assert moved == {}
    jax.tree.map(np.testing.assert_array_equal, state.anchor, state.params)
  else:
    assert moved == {'anchor/drift': 0} and state.anchor == {}


def test_a_teacher_is_kept_where_the_step_looks_at_it():
  setup, (frozen, _) = setup_of(ALGORITHMS['qrpo']), trees()
  left, whole = distil.rest_reference(setup, frozen)
  assert left is frozen and whole() is frozen


# -- whole runs ---------------------------------------------------------------


def student(teacher: str, name=OPD, **args):
  config = toy.get_config(toy.folder())
  config.teacher = teacher
  with config.unlocked():
    config.algorithm = dict(name=name, args=args or KEYS[name])
  return config


def large_config():
  """The toy's with more than three times the parameters."""
  config = toy.get_config(toy.folder())
  with config.unlocked():
    config.model.sizes = SIZES
  return config


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A run whose sft stage has finished."""
  workdir = str(tmp_path_factory.mktemp('large') / 'run')
  toy.run('sft', large_config(), workdir)
  return workdir


@pytest.fixture(scope='module')
def taught(large, tmp_path_factory):
  """A student, trained and evaluated."""
  workdir = tmp_path_factory.mktemp('taught')
  config = student(f'{large}/sft')
  toy.before('train', str(workdir), config)
  for stage in ('train', 'evaluate'):
    toy.run(stage, config, str(workdir))
  return str(workdir)


def left_by(workdir, stage):
  """The parameters that a stage has left."""
  return jax.tree.map(jnp.asarray, toy.saved(workdir, stage, 6)['params'])


def model_of(large):
  """The large model's policy and parameters, by no way of `teachers`."""
  config = large_config()
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  return policy, left_by(large, 'sft')


def held_out(config, workdir, split, count):
  tokenizer = load.load_tokenizer(config, workdir)
  encode = load.make_encoder(config, tokenizer)
  prompts = examples.fixed_prompts(
    sources.rows(config, split), encode, length=config.prompt.length,
    count=count,
  )  # fmt: skip
  return tokenizer, prompts


def test_the_teacher_has_more_than_three_times_the_parameters(large):
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  own = left_by(toy.finished(), 'sft')
  assert size(model_of(large)[1]) > 3 * size(own)


@pytest.mark.long
def test_the_probe_compares_with_the_teacher(large, tmp_path):
  config = student(f'{large}/sft')
  workdir = toy.before('train', str(tmp_path), config)
  run = checks.open_run(config, workdir)
  task = text_task.make(run)
  own = left_by(toy.finished(), 'sft')
  jax.tree.map(np.testing.assert_array_equal, task.start, own)
  probe = task.make_probe(task.frozen)
  found = probe(task.start, lambda: task.frozen)
  policy, params = model_of(large)
  _, prompts = held_out(config, workdir, 'validation', 8)
  key = jax.random.fold_in(configs.key(config.seed, 'probe'), 2)
  limits = Limits(config.length, task.stop)
  drawn = draw(task.policy, own, prompts, key, limits, num=2)
  under = log_probs(
    policy, params, prompts, drawn.completion, drawn.mask, chunk=48
  )
  kl = (drawn.log_prob - under).sum(-1).mean()
  assert found['kl/reference'] == pytest.approx(float(kl), abs=1e-4)
  assert abs(found['kl/reference']) > 0.01


@pytest.mark.long
def test_a_student_learns_and_is_judged_against_the_teacher(large, taught):
  """Every completion of the reference is the teacher's own."""
  config = student(f'{large}/sft')
  rows = toy.rows(taught, 'train')
  assert all(row['signal/fires'] == 1 for row in rows)
  assert toy.summary(taught, 'train')['compilations_after_first_step'] == 0
  policy, params = model_of(large)
  tokenizer, prompts = held_out(config, taught, 'test', 16)
  key = jax.random.fold_in(configs.key(config.seed, 'evaluate'), 1)
  stop = Stop((tokenizer.eos_id,))
  one = jax.jit(
    lambda first: draw(
      policy, params, prompts, key, Limits(config.length, stop), num=4,
      first=first,
    )
  )  # fmt: skip
  texts, log_p = [], []
  for first in (0, 4):
    drawn = one(first)
    for ys, masks in zip(drawn.completion, drawn.mask, strict=True):
      texts += [tokenizer.decode(y[m]) for y, m in zip(ys, masks, strict=True)]
    log_p += drawn.log_prob.sum(-1).reshape(-1).tolist()
  found = evaluate.log.read_rows(os.path.join(taught, 'completions.jsonl'))
  theirs = [row for row in found if row['who'] == 'reference']
  assert [row['completion'] for row in theirs] == texts
  mine = [row['log_reference'] for row in theirs]
  np.testing.assert_allclose(mine, log_p, rtol=0, atol=1e-4)
  ratio = [
    row['log_policy'] - row['log_reference']
    for row in found
    if row['who'] == 'policy'
  ]
  summary = toy.summary(taught)
  assert summary['kl'] == pytest.approx(np.mean(ratio), abs=1e-5)


@pytest.mark.long
def test_a_run_with_a_teacher_goes_on_where_it_was(large, taught, tmp_path):
  config = student(f'{large}/sft')
  workdir = toy.before('train', str(tmp_path), config)
  toy.light(workdir, 7, 'raise')
  with pytest.raises(UserError, match='the fuse has burnt down'):
    toy.run('train', config, workdir)
  assert toy.steps(workdir, 'train') == [3]
  toy.run('train', config, workdir)
  toy.same_end(workdir, taught, 'train')


@pytest.mark.long
def test_the_reference_that_sample_draws_from_is_the_teacher(large, taught):
  config = student(f'{large}/sft')
  _, theirs = sample.open_run(config, taught, 'reference')
  # A run that has finished its sft stage is its own reference.
  _, own = sample.open_run(large_config(), large, 'reference')
  row, pieces = {'text': 'the film'}, [2, 40, 50]
  assert theirs(row, pieces, 3, 0)[1] == own(row, pieces, 3, 0)[1]
  _, policy = sample.open_run(config, taught, 'last')
  assert policy(row, pieces, 3, 0)[1] != own(row, pieces, 3, 0)[1]
  with pytest.raises(UserError, match='is its teacher .*leave out --checkp'):
    export.export(taught, f'{taught}/out', 'reference', 'hf', 'float32')


@pytest.mark.long
@pytest.mark.parametrize('name', ['bond', 'best_of_n', 'wind'])
def test_other_algorithms_run_with_a_teacher(large, tmp_path, name):
  args = {
    'best_of_n': dict(n=1, anchor='fixed'),
    'wind': dict(
      kl_weight=0.2, step_size=1.0, risk='squared', constant='fitted',
      num_anchor=2, rows=2,
    ),
  }  # fmt: skip
  config = student(f'{large}/sft', name, **args.get(name, {}))
  config.model.lora.rank = 2
  workdir = toy.before('train', str(tmp_path), config)
  toy.run('train', config, workdir)
  assert toy.summary(workdir, 'train')['anchor_drift'] is None


# -- what a teacher may be ----------------------------------------------------


def of_teacher(name, workdir, prompts, drawn):
  """log-probs of completions under a teacher, by its name."""
  config = student(name)
  tokenizer = load.load_tokenizer(config, workdir)
  teacher = teachers.find(config, tokenizer)
  params = teacher.load(sharding.make_mesh(1, 1))
  shapes = jax.eval_shape(teacher.policy.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  return log_probs(
    teacher.policy, params, prompts, drawn.completion, drawn.mask, chunk=48
  )


@pytest.fixture(scope='module')
def some(large):
  """Prompts, and completions of the large model."""
  policy, params = model_of(large)
  config = large_config()
  _, prompts = held_out(config, large, 'test', 8)
  limits = Limits(config.length, Stop((1,)))
  drawn = draw(policy, params, prompts, jax.random.key(0), limits, num=2)
  return prompts, drawn


def close(mine, drawn):
  np.testing.assert_allclose(mine, drawn.log_prob, rtol=0, atol=1e-4)


def test_a_stage_of_a_run_from_any_folder(large, some, tmp_path):
  """Adapters of a trained policy are joined to their base."""
  close(of_teacher(f'{large}/sft', large, *some), some[1])
  with contextlib.chdir(tmp_path):
    close(of_teacher(os.path.relpath(f'{large}/sft'), large, *some), some[1])


@pytest.mark.long
def test_a_policy_of_adapters(large, some, tmp_path):
  config = large_config()
  config.model.lora.rank = 2
  config.reference = large
  toy.before('train', str(tmp_path), config)
  shutil.rmtree(tmp_path / 'sft')
  config.reward.args.path = f'{toy.finished()}/reward/model.npz'
  os.remove(tmp_path / 'config.json')
  toy.run('train', config, str(tmp_path))
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  joined = lora.join(
    left_by(large, 'sft'),
    left_by(str(tmp_path), 'train'),
  )
  prompts, drawn = some
  hand = log_probs(
    policy, joined, prompts, drawn.completion, drawn.mask, chunk=48
  )
  mine = of_teacher(f'{tmp_path}/train', large, *some)
  np.testing.assert_allclose(mine, hand, rtol=0, atol=1e-5)
  assert np.abs(mine - drawn.log_prob).max() > 1e-3


def test_weights_from_files(large, some, tmp_path):
  """At the student's temperature, for files have none."""
  out = str(tmp_path / 'hf')
  export.export(large, out, 'reference', 'hf', 'float32')
  close(of_teacher(out, large, *some), some[1])


def test_weights_are_kept_in_the_dtype_of_the_computation(large):
  config = student(f'{large}/sft')
  assert teachers.find(config).dtype == 'float32'
  found = dataclasses.asdict(teachers.find(config).sizes)
  assert found['features'] == 32 and found['used_vocab'] == 96


@pytest.mark.long
def test_a_run_records_its_teacher(large, taught, tmp_path):
  """Another one is refused, but where the policy is used alone."""
  other = str(tmp_path / 'other')
  shutil.copytree(large, other)
  config = student(f'{other}/sft')
  key = f'teacher {other}/sft'
  before = provenance.inputs(config, taught, 'train')
  assert key in before and key in provenance.inputs(config, taught, 'evaluate')
  assert key not in provenance.inputs(config, taught, 'sft')
  with open(f'{other}/sft/summary.json', 'a') as f:
    f.write(' ')
  made = {'inputs': before}
  provenance.check_start(config, taught, made, alone=True)
  with pytest.raises(UserError, match='reads what has changed: teacher'):
    provenance.check_start(config, taught, made, alone=False)


# -- what is refused ----------------------------------------------------------

EMA = dict(num_anchor=2, backward_weight=0.5, anchor_rate=0.1, drift_weight=0.0)
STEP = dict(step_size=1.0, num_anchor=2)


@pytest.mark.parametrize(
  'name, args, says',
  [
    ('jbond', EMA, "algorithm jbond looks at its anchor alone.*'fixed'"),
    ('sppo', dict(STEP, rows='all'), 'algorithm sppo looks at its anchor alo'),
    ('best_of_n', dict(n=2, anchor='periodic:1'), 'best_of_n looks at its an'),
    (
      'wind',
      dict(STEP, kl_weight=0.0, risk='squared', constant='half', rows=1),
      'wind looks at its anchor alone, .*wind or ipo with a kl_weight',
    ),
  ],
)
def test_an_anchor_that_follows_the_policy_has_no_teacher(
  large, name, args, says
):
  config = student(f'{large}/sft', name, **args)
  with pytest.raises(UserError, match=says) as e:
    checks.check(config)
  assert '\n' not in str(e.value)
  config.teacher = ''
  checks.check(config)


@pytest.mark.parametrize(
  'teacher, says',
  [
    ('', 'without a teacher nothing is to learn; set config.teacher'),
    ('nowhere/sft', 'and .*nowhere is no run: name the sft stage of a run'),
    ('nowhere', 'nowhere is no folder or GGUF file here'),
    ('{large}', 'a run; name the stage .*run/sft or .*run/train'),
    ('{large}/train', 'the train stage has not finished in'),
    ('gemma3_1b_it', 'of 262144 pieces, and tokenizer.vocab_size is 96'),
  ],
)
def test_a_teacher_that_is_none_is_one_line(large, teacher, says):
  config = student(teacher.replace('{large}', large))
  with pytest.raises(UserError, match=says) as e:
    checks.check(config)
  assert '\n' not in str(e.value)


def test_another_vocabulary_is_refused_before_weights_are_read(
  large, tmp_path, monkeypatch
):
  other = str(tmp_path / 'other')
  shutil.copytree(large, other)
  os.remove(f'{other}/tokenizer.model')
  lines = ['yes we say other words here', 'a zebra jumps over 17 quiet dogs']
  path = f'{other}/tokenizer.model'
  tokenizer_lib.train(lines * 50, path, 96)
  config = student(f'{other}/sft')
  workdir = toy.before('train', str(tmp_path / 'run'), config)
  monkeypatch.setattr(load, 'load_frozen', None)
  with pytest.raises(UserError, match='another vocabulary .piece [0-9]+ is'):
    text_task.make(checks.open_run(config, workdir))
  config.tokenizer.vocab_size = 95
  with pytest.raises(UserError, match='96 pieces, and tokenizer.vocab_size is'):
    checks.check(config)
